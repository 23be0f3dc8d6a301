"""How contestants are named and told apart in the figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from lorapre.lab.compare.style import BLACK, LINES, MARKERS, OTHERS, OURS
from lorapre.lab.optimizers import OPTIMIZERS
from lorapre.lab.optimizers.options import defaults
from lorapre.optim.checks import SWEEP_INTERVAL
from study.profiles import BEGUN
from study.rows import Row

GREY = "#666666"
NAMES = {
    "adamw": "AdamW",
    "adam-beta1-0": "AdamW, beta1 = 0",
    "stable-adamw": "StableAdamW",
    "muon": "Muon",
    "galore": "GaLore",
    "fira": "Fira",
    "apollo": "APOLLO",
    "lorapre-adamw": "LoRA-Pre AdamW",
    "lorapre-muon": "LoRA-Pre Muon",
    "lorapre-adamw-paper": "LoRA-Pre Adam (paper)",
    "lorapre-muon-paper": "LoRA-Pre Muon (paper)",
}
#: A form that did not survive the study: its rows are kept, its code is not.
FACTORS = "LoRA-Pre Muon, by factors"
#: Settings of our own that the figures take for granted, those of most rows; everything else is said.
USUAL: Mapping[str, Mapping[str, Any]] = {
    name: {**defaults(OPTIMIZERS[name].options), **BEGUN.get(name, {})} for name in ("lorapre-adamw", "lorapre-muon")
}
#: The library's own defaults; the curves are told apart from them.
NOW: Mapping[str, Mapping[str, Any]] = {
    **USUAL,
    "lorapre-adamw": {**USUAL["lorapre-adamw"], "sweep_interval": SWEEP_INTERVAL},
}
#: Of both.
DEFAULT_GAIN = float(USUAL["lorapre-adamw"]["residual_gain"])
#: Colours of those that are drawn in every figure; rivals cool, ours warm, as in `lorapre compare`.
COLOURS = {
    "AdamW": BLACK[0],
    "AdamW, beta1 = 0": "#888888",
    "Muon": OTHERS[0][0],
    "GaLore": OTHERS[1][0],
    "Fira": OTHERS[2][0],
    "APOLLO": OTHERS[3][0],
    "LoRA-Pre AdamW": OURS[0][0],
    "LoRA-Pre Muon": OURS[1][0],
    FACTORS: OURS[2][0],
    "LoRA-Pre Adam (paper)": "#B5A300",
    "LoRA-Pre Muon (paper)": "#7A7000",
}


@dataclass(frozen=True)
class Look:
    """How a contestant is drawn, in matplotlib's words."""

    colour: str
    line: Any
    marker: str
    width: float


def family(row: Row) -> str:
    """Which method, whatever its rank and gain."""
    if row["options"].get("orthogonalization") == "factors":
        return FACTORS
    return NAMES.get(row["optimizer"], str(row["optimizer"]))


def is_ours(row: Row) -> bool:
    """One of this library's, with its own options rather than the paper's."""
    return row["optimizer"] in ("lorapre-adamw", "lorapre-muon")


def rank_name(row: Row) -> str:
    """``r = d/4``, ``r = 16``; empty where it has none."""
    rank = row["rank"]
    if rank is None:
        return ""
    if isinstance(rank, int):
        return f"r = {rank}"
    share = Fraction(rank).limit_denominator(1000)
    return f"r = {'' if share.numerator == 1 else share.numerator}d/{share.denominator}"


def extras(row: Row, known: Mapping[str, Mapping[str, Any]] = USUAL) -> list[str]:
    """Settings that are not those ``known``, besides the gain, and a gain that follows the learning rate."""
    # A row from before an option was there has what the first rows had.
    usual, settings = known.get(row["optimizer"], {}), {**USUAL.get(row["optimizer"], {}), **row["settings"]}
    varied = [name for name in usual if name != "residual_gain" and settings[name] != usual[name]]
    return [_said(name, settings[name]) for name in varied] + (
        ["gain falls"] if "residual_gain_follows" in settings else []
    )


def _said(name: str, value: Any) -> str:
    words = {
        "normalization": {"none": "not evened out", "rows": "even rows"},
        "update_clipping": {True: "clipped", False: "not clipped"},
        "spectral_clipping": {None: "no spectral clip"},
        "sweep_interval": {1: "a sweep a step"},
    }
    return words.get(name, {}).get(value, f"{name.replace('_', ' ')} {value}")


def gain(row: Row) -> float:
    """The residual's gain; where it is the paper's, None, the weight of one gradient in the momentum's average."""
    given = row["settings"]["residual_gain"]
    if given is not None:
        return float(given)
    return 1.0 - float(row["settings"].get("momentum", 0.9))  # beta1 is 0.9 in all of the study


def gain_name(row: Row) -> str:
    """``gain 1``, or ``gain of the paper``; empty where there is none."""
    if not is_ours(row):
        return ""
    given = row["settings"]["residual_gain"]
    return "paper's gain" if given is None else f"gain {given:g}"


def label(row: Row, *, with_family: bool = True) -> str:
    """All that sets a contestant apart from the others of the study."""
    parts = [rank_name(row), gain_name(row), *extras(row)]
    told = ", ".join(part for part in ([family(row)] if with_family else []) + parts if part)
    return told or family(row)


def look(row: Row) -> Look:
    """By family alone, for figures in which a family is one line or a few points."""
    name = family(row)
    number = list(COLOURS).index(name) if name in COLOURS else len(COLOURS)
    line = (0, (4, 2)) if name == "AdamW" else "-"
    return Look(COLOURS.get(name, GREY), line, MARKERS[number % len(MARKERS)][0], 2.4 if is_ours(row) else 1.6)


def numbered(number: int) -> Look:
    """For the lines of one panel, which are of one family: colours first, then line styles."""
    palette = [colour for colour, _ in (*OTHERS, *OURS)]
    line = LINES[number // len(palette) % len(LINES)][0]
    return Look(palette[number % len(palette)], line, MARKERS[number % len(MARKERS)][0], 1.7)
