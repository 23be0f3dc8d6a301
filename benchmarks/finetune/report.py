"""The tables: every contestant at its best rate, and what sets LoRA-Pre apart from the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from study.rows import Row

from finetune.accuracy import Accuracy, accuracy, difference
from finetune.profiles import Contestant, Profile
from finetune.rows import Rows, unpacked
from lorapre.lab.run_folder import write_json, write_text
from lorapre.optim.summary import format_bytes

EDGE, UNTESTED, OURS = "†", "‡", "lorapre"
HEADER = (
    "| method | rank | learning rate (held-out loss at others) | accuracy | held-out loss | state (of the matrices) "
    "| peak memory | examples/s |\n|---|---:|---|---:|---:|---:|---:|---:|\n"
)
NOTES = """
{base}, {train:,} training examples ({tokens:,} tokens, {learned:,} of them learned), one epoch in {steps} steps of
{batch_size} packed rows of {max_length}. The rate of each method is the one with the lowest held-out loss after a run
with seed {first}, on {valid} examples {held_out}; † marks a search that ended with its best rate at the
edge of those tried, or has not ended. Accuracy is the mean over the other seeds (of {seeds} those that were run) of the
share of {asked} test questions answered rightly (greedy, at most {max_new_tokens} new tokens), with the 95 % interval
over seeds and questions; held-out loss is of the same runs, in nats a learned token ({loss_before:.3f} before
training). ‡ marks the loss of the search's own run, where no other seed was: it chose the rate, and is not to be
compared with those of other seeds. Rates are those of the matrices, or of the adapter; methods that train all weights
train embeddings and norms by AdamW at {dense_lr:g}, whose state is the difference between both numbers of bytes.
GaLore and Fira project every 200 steps where nothing else is said; their packages keep the whole basis of which they
use the rank's part.
Peak memory is what tensors took on the GPU in training. Examples a second are of a run that had the GPU for itself, –
where there was none.

{hardware}; {versions}.
"""


@dataclass(frozen=True)
class Result:
    """A contestant at its best rate.

    Attributes:
        lr: with the lowest held-out loss of the search.
        by_rate: held-out loss of the search, ascending; infinite where it diverged.
        at_edge: the best rate has not a neighbour on either side.
        found: the search's row at ``lr``.
        tests: rows of the tested seeds at ``lr``.
        alone: the row of the run that had the machine for itself.
    """

    contestant: Contestant
    lr: float
    by_rate: Mapping[float, float]
    at_edge: bool
    found: Row
    tests: tuple[Row, ...]
    alone: Row | None

    @property
    def verdicts(self) -> list[list[bool]]:
        """Of the tests that did not diverge, (seeds, questions)."""
        return [unpacked(row["right"]) for row in self.tests if row["loss"] is not None]

    @property
    def accuracy(self) -> Accuracy | None:
        """Over the tests; None where there is none."""
        return accuracy(self.verdicts) if self.verdicts else None

    @property
    def tested_losses(self) -> list[float]:
        """Held-out losses of the tests that did not diverge."""
        return [row["loss"] for row in self.tests if row["loss"] is not None]

    @property
    def loss(self) -> float:
        """Mean held-out loss of the tests, or the search's where there is none; infinite where all diverged."""
        return fmean(self.tested_losses) if self.tested_losses else self.by_rate[self.lr]

    def record(self) -> dict[str, Any]:
        """The row of ``table.json``."""
        known, row = self.accuracy, self.found
        return {
            "method": self.contestant.method,
            "rank": self.contestant.rank,
            "options": dict(self.contestant.options),
            "lr": self.lr,
            "seeds": [test["seed"] for test in self.tests],
            "accuracy": None if known is None else known.mean,
            "interval": None if known is None else [known.low, known.high],
            "loss": self.loss if self.loss < math.inf else None,
            "state_bytes": row["state_bytes"],
            "matrix_state_bytes": row["matrix_state_bytes"],
            "peak_bytes": row["peak_bytes"],
            "examples_per_s": None if self.alone is None else self.alone["examples_per_s"],
            "diverged_seeds": [test["seed"] for test in self.tests if test["loss"] is None],
            "rates": [[rate, loss if loss < math.inf else None] for rate, loss in self.by_rate.items()],
            "rate_at_edge": self.at_edge,
        }


def results(rows: Rows, profile: Profile) -> dict[Contestant, Result]:
    """Of every contestant that has a row of its search, in the profile's order."""
    by_contestant: dict[str, list[Row]] = {}
    for row in rows.all:
        by_contestant.setdefault(row["contestant"], []).append(row)
    found = {}
    for name, contestant in profile.contestants.items():
        own = by_contestant.get(name, [])
        searched = {row["lr"]: row for row in own if row["kind"] == "search"}
        if not searched:
            continue
        by_rate = {lr: math.inf if row["loss"] is None else row["loss"] for lr, row in sorted(searched.items())}
        lr = min(by_rate, key=lambda rate: by_rate[rate])
        tests = sorted((row for row in own if (row["kind"], row["lr"]) == ("test", lr)), key=lambda row: row["seed"])
        alone = next((row for row in own if (row["kind"], row["lr"]) == ("speed", lr)), None)
        edge = lr in (min(by_rate), max(by_rate))
        found[contestant] = Result(contestant, lr, by_rate, edge, searched[lr], tuple(tests), alone)
    return found


def write_tables(rows: Rows, profile: Profile, folder: Path) -> None:
    """``table.json`` (a row a contestant) and ``table.md`` (the same in words, and differences of accuracy)."""
    found = results(rows, profile)
    write_json(folder / "table.json", [result.record() for result in found.values()])
    parts = []
    sections = {"Methods": list(profile.rates)}
    if any(one in found for one in profile.ranks):
        sections["Ranks and moments of LoRA-Pre"] = [*dict.fromkeys(profile.ranks.values()), *profile.ranks]
    for title, group in sections.items():
        shown = sorted((found[one] for one in group if one in found), key=_place)
        parts.append(f"## {title}\n\n{HEADER}" + "".join(map(_line, shown)))
    compared = _differences([found[one] for one in profile.rates if one in found])
    if compared:
        parts.append(
            "## LoRA-Pre's accuracy minus others'\n\nIn percentage points, with the 95 % interval; both answered the "
            f"same questions with the same seeds.\n\n{compared}"
        )
    write_text(folder / "table.md", "\n".join(parts) + _notes(rows, profile))


def _place(result: Result) -> tuple[float, float]:
    """The highest accuracy first, then the lowest loss."""
    known = result.accuracy
    return (math.inf if known is None else -known.mean, result.loss)


def _line(result: Result) -> str:
    record, known = result.record(), result.accuracy
    others = ", ".join(f"{rate:g}: {_loss(loss)}" for rate, loss in result.by_rate.items() if rate != result.lr)
    rates = f"{result.lr:g}{EDGE if result.at_edge else ''}" + (f" ({others})" if others else "")
    share = "–" if known is None else f"{100 * known.mean:.1f} % [{100 * known.low:.1f}, {100 * known.high:.1f}]"
    if record["diverged_seeds"]:
        share += f", {len(record['diverged_seeds'])} diverged"
    cells = (
        _name(result.contestant),
        "–" if result.contestant.rank is None else result.contestant.rank,
        rates,
        share,
        _loss(result.loss) + ("" if result.tested_losses else UNTESTED),
        f"{_bytes(record['state_bytes'])} ({_bytes(record['matrix_state_bytes'])})",
        _bytes(record["peak_bytes"]),
        "–" if record["examples_per_s"] is None else f"{record['examples_per_s']:.0f}",
    )
    return "| " + " | ".join(map(str, cells)) + " |\n"


def _name(contestant: Contestant) -> str:
    return f"`{contestant.method}`" + "".join(f", {name}={value}" for name, value in contestant.options)


def _differences(shown: list[Result]) -> str:
    ours = [one for one in shown if one.contestant.method.startswith(OURS) and one.verdicts]
    others = [one for one in shown if not one.contestant.method.startswith(OURS) and one.verdicts]
    if not ours or not others:
        return ""
    lines = ["| minus | " + " | ".join(_name(one.contestant) for one in ours) + " |\n"]
    lines.append("|---|" + "---:|" * len(ours) + "\n")
    for other in others:
        cells = []
        for one in ours:
            apart = difference(one.verdicts, other.verdicts)
            cells.append(f"{100 * apart.mean:+.1f} [{100 * apart.low:+.1f}, {100 * apart.high:+.1f}]")
        lines.append(f"| {_name(other.contestant)} | " + " | ".join(cells) + " |\n")
    return "".join(lines)


def _notes(rows: Rows, profile: Profile) -> str:
    last, tested = rows.all[-1], [row["asked"] for row in rows.all if "asked" in row]
    return NOTES.format(
        base="SmolLM2-135M-Instruct (4-bit weights, made whole again)",
        train=last["train_size"],
        tokens=last["train_tokens"],
        learned=last["learned_tokens"],
        steps=last["steps"],
        batch_size=profile.batch_size,
        max_length=profile.max_length,
        first=profile.seeds[0],
        seeds=", ".join(map(str, profile.seeds[1:])),
        valid=profile.valid_examples,
        held_out="cut from the training data" if profile.task.valid is None else "drawn apart from the training data",
        asked=tested[-1] if tested else "the",
        max_new_tokens=profile.task.max_new_tokens,
        loss_before=last["loss_before"],
        dense_lr=profile.dense_lr,
        hardware=" and ".join(dict.fromkeys(f"{row['hardware']}, {row['date'][:10]}" for row in rows.all)),
        versions=", ".join(f"{name} {version}" for name, version in last["versions"].items()),
    )


def _loss(loss: float) -> str:
    return f"{loss:.3f}" if loss < math.inf else "diverged"


def _bytes(number: int | None) -> str:
    return "–" if number is None else format_bytes(number)
