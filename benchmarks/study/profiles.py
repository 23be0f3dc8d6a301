"""What the study trains: change this to ask something else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Options of contestants whose names do not say them: what the library's defaults were when the rows were begun.
BEGUN: Mapping[str, Mapping[str, Any]] = {"lorapre-adamw": {"sweep_interval": 1}}

ADAM_RATES = (5e-4, 1e-3, 2e-3)
MUON_RATES = (2.5e-3, 5e-3)
#: After a contestant's name: from the end of the warm-up on, its residual gain falls with the learning rate.
DECAYING = " decaying"
#: Likewise, before the name of a variant out of `study.prototypes`.
AS = " as "


def _adam(
    gain: float | None, rank: str, more: str = "", *, clipping: bool = True, spectral: float | None = None
) -> str:
    options = f"residual_gain={_yaml(gain)}+update_clipping={str(clipping).lower()}"
    return f"lorapre-adamw+{options}{more}+spectral_clipping={_yaml(spectral)}@{rank}"


def _yaml(value: float | None) -> str:
    return "null" if value is None else str(value)


def _loose(gain: float | None, rank: str, more: str = "") -> str:
    return _adam(gain, rank, more, clipping=False)


def _muon(gain: float | None, rank: str, *, momentum: float = 0.9, normalization: str = "longer_side") -> str:
    return f"lorapre-muon+residual_gain={_yaml(gain)}+momentum={momentum}+normalization={normalization}@{rank}"


@dataclass(frozen=True)
class Profile:
    """A model, a length, and who competes.

    Attributes:
        model: preset of the search.
        tokens: of a run of the search.
        rates: contestants as ``lorapre compare`` writes them, with the first rates of each; the grid grows by factors
            of 2 while the best rate is at its edge. The first contestants are the most urgent.
        finalists: get more seeds at their best rate.
        seeds: for finalists; the first one is that of all other runs.
        long: contestants that are trained on ``long_tokens`` too, at their best rate and at half of it.
        long_tokens: of such a run.
        larger: models on which ``confirmed`` run, in a grid of their own that begins with the search's best rate.
        confirmed: contestants for larger models.
        starts: rates to begin with instead, by model and contestant: the best ones of a relative.
        repeated: of them, those that get more seeds there.
        batch_size: sequences a step.
        sequence_length: tokens of a sequence.
        valid_tokens: of the validation text, in whole sequences.
        dense_lr: rate of embeddings, head and norms, the same under all.
        validations: of a run, the last one at its end.
        tokenizer: to be trained on the text, such as ``bpe:512``; None is the corpus's own.

    Raises:
        ValueError: a contestant of a later stage is not searched for.
    """

    model: str
    tokens: int
    rates: Mapping[str, tuple[float, ...]]
    finalists: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    long: tuple[str, ...] = ()
    long_tokens: int = 300_000_000
    larger: tuple[str, ...] = ()
    confirmed: tuple[str, ...] = ()
    starts: Mapping[tuple[str, str], tuple[float, ...]] = field(default_factory=dict)
    repeated: tuple[str, ...] = ()
    batch_size: int = 128
    sequence_length: int = 256
    valid_tokens: int = 250_000
    dense_lr: float = 2.5e-3
    validations: int = 8
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        for contestant in (*self.finalists, *self.long, *self.confirmed, *(name for _, name in self.starts)):
            if contestant not in self.rates:
                raise ValueError(f"{contestant} has no rates to be searched among. Name it in rates, too.")

    @property
    def protocol(self) -> dict[str, float]:
        """What all rows of one study share besides the model and the length."""
        return {
            "batch_size": self.batch_size,
            "sequence_length": self.sequence_length,
            "valid_tokens": self.valid_tokens,
            "dense_lr": self.dense_lr,
        }


DEFAULT, DEFAULT_LOW = _adam(4.0, "1/4", spectral=3.0), _adam(4.0, "1/32", spectral=3.0)
#: The same with bases that rest for three steps of four.
RESTING = (
    _adam(4.0, "1/4", "+sweep_interval=4", spectral=3.0),
    _adam(4.0, "1/32", "+sweep_interval=4", spectral=3.0),
)
FINALISTS = ("adamw", "muon", DEFAULT, DEFAULT_LOW, _muon(4.0, "1/4"), _muon(4.0, "1/32"))

MAIN = Profile(
    model="llama-20m",
    tokens=50_000_000,
    rates={
        "adamw": (1e-3, 2e-3),
        "muon": MUON_RATES,
        _muon(4.0, "1/4"): (5e-3, 1e-2),
        DEFAULT: (4e-3, 8e-3),
        DEFAULT_LOW: (2e-3, 4e-3),
        _adam(4.0, "1/4"): (4e-3, 8e-3),
        _adam(4.0, "1/32"): (2e-3, 4e-3),
        _adam(4.0, "1/4", spectral=1.0): (4e-3, 8e-3),
        _adam(4.0, "1/32", spectral=1.0): (2e-3, 4e-3),
        _muon(4.0, "1/32"): (1e-2,),
        "stable-adamw": (2e-3, 4e-3),
        _loose(4.0, "1/4"): (2e-3, 4e-3),
        _loose(4.0, "1/32"): (1e-3, 2e-3),
        _loose(4.0, "1/32") + DECAYING: (1e-3, 2e-3),
        "apollo@1/4": (2.5e-3, 5e-3, 1e-2),
        "galore@1/4": (1e-2, 2e-2),
        "fira@1/4": (5e-3, 1e-2),
        _loose(2.0, "1/32"): (5e-4, 1e-3),
        _loose(1.0, "1/32"): (1e-3, 2e-3),
        _loose(1.0, "1/4"): (1e-3, 2e-3),
        _muon(1.0, "1/4", momentum=0.95, normalization="none"): MUON_RATES,
        _muon(1.0, "1/32", momentum=0.95, normalization="none"): MUON_RATES,
        "adam-beta1-0": (1e-3, 2e-3),
        "lorapre-adamw-paper@1/4": (2.5e-4, 5e-4, 1e-3),
        "lorapre-muon-paper@1/4": (1e-2, 2e-2),
        _adam(2.0, "1/32"): (2e-3,),
        _adam(8.0, "1/4"): (4e-3,),
        _adam(4.0, "1/4", "+second_moment=full"): (4e-3,),
        _adam(4.0, "1/4", "+second_moment=hadamard"): (4e-3,),
        _adam(4.0, "1/4", "+state_dtype=bfloat16"): (4e-3,),
        RESTING[0]: (4e-3,),
        RESTING[1]: (2e-3,),
        _adam(4.0, "1/4", "+sweep_interval=16", spectral=3.0): (4e-3,),
    },
    finalists=(*FINALISTS, *RESTING),
    long=(*FINALISTS, *RESTING),
    larger=("llama-60m", "llama-130m"),
    confirmed=(*FINALISTS, *RESTING),
    starts={("llama-130m", RESTING[0]): (2e-3,), ("llama-130m", RESTING[1]): (1e-3,)},
    repeated=("adamw", "muon", DEFAULT, DEFAULT_LOW, *RESTING, _muon(4.0, "1/4")),
)

#: Many variants at a quarter of the length and half of the batch: which of them are worth full runs.
VARIANTS = Profile(
    model="llama-20m",
    tokens=12_500_000,
    rates={
        "adamw": ADAM_RATES[:2],
        "adam-beta1-0": ADAM_RATES[:2],
        "muon": MUON_RATES,
        # The gain, by rank.
        _loose(None, "1/32"): ADAM_RATES[:2],
        _loose(0.3, "1/32"): ADAM_RATES[:2],
        _loose(1.0, "1/32"): ADAM_RATES[:2],
        _loose(2.0, "1/32"): ADAM_RATES[:2],
        _loose(4.0, "1/32"): ADAM_RATES[:2],
        _loose(8.0, "1/32"): ADAM_RATES[:2],
        _loose(1.0, "1/4"): ADAM_RATES[:2],
        _loose(2.0, "1/4"): ADAM_RATES[1:],
        _loose(4.0, "1/4"): ADAM_RATES[1:],
        _loose(8.0, "1/4"): ADAM_RATES[1:],
        _loose(4.0, "1"): ADAM_RATES[:2],
        _loose(4.0, "4"): ADAM_RATES[:2],
        _loose(4.0, "16"): ADAM_RATES[:2],
        _loose(4.0, "128"): ADAM_RATES[1:],
        _loose(4.0, "1/32") + DECAYING: ADAM_RATES[:2],
        _loose(1.0, "1/32") + DECAYING: ADAM_RATES[:2],
        _loose(1.0, "1/4") + DECAYING: ADAM_RATES[:2],
        _adam(4.0, "1/32"): ADAM_RATES[:2],
        _adam(4.0, "1/4"): ADAM_RATES[1:],
        # The residual scaled by norms.
        _adam(1.0, "1/32") + AS + "fira-scaled": ADAM_RATES[:2],
        _adam(4.0, "1/32") + AS + "fira-scaled": ADAM_RATES[:2],
        _adam(1.0, "1/4") + AS + "fira-scaled": ADAM_RATES[1:],
        _adam(4.0, "1/4") + AS + "fira-scaled": ADAM_RATES[1:],
        # Bases that move now and then.
        _adam(4.0, "1/32", "+sweep_interval=4"): ADAM_RATES[:2],
        _adam(4.0, "1/32", "+sweep_interval=16"): ADAM_RATES[:2],
        _adam(4.0, "1/4", "+sweep_interval=4"): ADAM_RATES[1:],
        _adam(4.0, "1/4", "+sweep_interval=16"): ADAM_RATES[1:],
        # Other state.
        _adam(4.0, "1/32", "+second_moment=full"): ADAM_RATES[1:],
        _adam(4.0, "1/32", "+second_moment=hadamard"): ADAM_RATES[1:],
        _adam(4.0, "1/32", "+regression=tangent"): ADAM_RATES[1:],
        _adam(4.0, "1/4", "+regression=tangent"): ADAM_RATES[1:],
        _adam(4.0, "1/32", "+state_dtype=bfloat16"): ADAM_RATES[1:],
        # Muon: the paper's and torch's momentum, a shorter one, even rows.
        _muon(None, "1/4", momentum=0.95, normalization="none"): MUON_RATES,
        _muon(0.3, "1/4", momentum=0.95, normalization="none"): MUON_RATES,
        _muon(1.0, "1/4", momentum=0.95, normalization="none"): MUON_RATES,
        _muon(2.0, "1/4", momentum=0.95, normalization="none"): MUON_RATES,
        _muon(4.0, "1/4", momentum=0.95, normalization="none"): MUON_RATES,
        _muon(1.0, "1/4", normalization="none"): MUON_RATES,
        _muon(2.0, "1/4", normalization="none"): MUON_RATES,
        _muon(4.0, "1/4", normalization="none"): MUON_RATES,
        _muon(2.0, "1/4", normalization="none") + DECAYING: MUON_RATES,
        _muon(2.0, "1/4", momentum=0.85, normalization="none"): MUON_RATES,
        _muon(2.0, "1/32", normalization="none"): MUON_RATES,
        _muon(2.0, "1/4", normalization="rows"): MUON_RATES,
        _muon(2.0, "1/4"): MUON_RATES,
        _muon(4.0, "1/4"): (1e-2,),
        _muon(8.0, "1/4"): (1e-2,),
        _muon(2.0, "1/32"): MUON_RATES,
        _muon(4.0, "1/32"): (1e-2,),
        _muon(4.0, "1"): (1e-2,),
        # At 255 of 256 it is Muon.
        _muon(1.0, "255", normalization="none"): (5e-3,),
        _muon(1.0, "255"): (5e-3,),
        "lorapre-adamw-paper@1/32": (2.5e-4, 5e-4),
        "lorapre-muon-paper@1/4": (1e-2, 2e-2),
    },
    batch_size=64,
    validations=4,
)  # fmt: skip

#: For a machine without a GPU, to try the script itself.
TINY = Profile(
    model="llama-1m",
    tokens=20_480,
    rates={"adamw": (1e-3, 2e-3), _adam(1.0, "1/4", spectral=3.0) + DECAYING: (5e-4, 1e-3), _muon(4.0, "1/4"): (5e-3,)},
    finalists=("adamw",),
    seeds=(0, 1),
    long=("adamw",),
    long_tokens=40_960,
    batch_size=8,
    sequence_length=64,
    valid_tokens=4_000,
    tokenizer="bpe:512",
)

PROFILES: Mapping[str, Profile] = {"main": MAIN, "variants": VARIANTS, "tiny": TINY}
