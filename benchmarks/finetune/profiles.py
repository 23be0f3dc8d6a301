"""What is trained, and on what: change this to ask something else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

#: Their rank is their adapter's; all other methods train all weights.
ADAPTERS = ("lora", "rslora", "lora+", "dora", "lora-pro", "loft")


@dataclass(frozen=True)
class Contestant:
    """A method of ``lorapre finetune`` with its rank (None where it has none) and options."""

    method: str
    rank: int | None = 8
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        rank = "" if self.rank is None else f"@{self.rank}"
        return f"{self.method}{rank}" + "".join(f"+{name}={value}" for name, value in self.options)

    @property
    def adapts(self) -> bool:
        """It trains an adapter, not all weights."""
        return self.method in ADAPTERS


@dataclass(frozen=True)
class Task:
    """Data, and how an answer is asked for.

    Attributes:
        name: as in ``--task``.
        train: file of the material.
        data: what ``lorapre finetune --data`` calls its format; None of records with prompt and response.
        valid: file to validate on; None cuts the examples from ``train``.
        test: file of questions.
        fields: of a test record: the question, and what has the answer.
        max_new_tokens: of an answer.
        test_batch: questions that are asked at a time, the longest first.
        train_size: examples to train on.
        example_tokens: mean length of one.
        questions: of the test.
        test_size: questions to ask at most; None asks all.
    """

    name: str
    train: str
    data: str | None
    valid: str | None
    test: str
    fields: tuple[str, str]
    max_new_tokens: int
    test_batch: int
    train_size: int
    example_tokens: float
    questions: int
    test_size: int | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """Of the material."""
        return tuple(name for name in (self.train, self.valid, self.test) if name is not None)


@dataclass(frozen=True)
class Profile:
    """Who competes, and the protocol.

    Attributes:
        task: what is learned.
        rates: first rate of each contestant's search. The grid grows by factors of 2 until the best rate, by held-out
            loss, has a neighbour on either side.
        ranks: further contestants, each with the one of ``rates`` whose best rate its search begins with.
        seeds: the first one is the search's; the others are tested, so that no seed that chose a rate is reported.
        batch_size: packed rows a step.
        max_length: tokens of a row.
        valid_examples: held out, the same for all.
        dense_lr: rate of embeddings and norms by AdamW, the same under all methods that train all weights.
        train_examples: at most; None takes all.
        bf16: autocast in training, and bfloat16 weights in tests.
        validations: of a run, the last one at its end.
    """

    task: Task
    rates: Mapping[Contestant, float]
    ranks: Mapping[Contestant, Contestant]
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    batch_size: int = 8
    max_length: int = 1024
    valid_examples: int = 500
    dense_lr: float = 1e-4
    train_examples: int | None = None
    bf16: bool = True
    validations: int = 4

    def __post_init__(self) -> None:
        for contestant, base in self.ranks.items():
            if base not in self.rates:
                raise ValueError(f"{base} has no rates to be searched among, and {contestant} begins with its best.")
        names = [str(contestant) for contestant in (*self.rates, *self.ranks)]
        if len(set(names)) < len(names):
            raise ValueError(f"A contestant occurs twice: {', '.join(names)}.")

    @property
    def contestants(self) -> dict[str, Contestant]:
        """All by their names."""
        return {str(contestant): contestant for contestant in (*self.rates, *self.ranks)}

    @property
    def protocol(self) -> dict[str, Any]:
        """What all rows of one table share."""
        return {
            "task": self.task.name,
            "batch_size": self.batch_size,
            "max_length": self.max_length,
            "valid_examples": self.valid_examples,
            "train_examples": self.train_examples,
            "dense_lr": self.dense_lr,
            "bf16": self.bf16,
            "max_new_tokens": self.task.max_new_tokens,
            "test_size": self.task.test_size,
        }


GSM8K = Task(
    "gsm8k", "gsm8k-train.jsonl", "gsm8k", None, "gsm8k-test.jsonl", ("question", "answer"),
    max_new_tokens=320, test_batch=660, train_size=6973, example_tokens=216.8, questions=1319,
)  # fmt: skip
CHAIN_SUM = Task(
    "chain-sum", "chain-sum-train.jsonl", None, "chain-sum-valid.jsonl", "chain-sum-test.jsonl", ("prompt", "response"),
    max_new_tokens=16, test_batch=1000, train_size=8000, example_tokens=56.4, questions=1000,
)  # fmt: skip

ADAMW, MUON = Contestant("lorapre-adamw"), Contestant("lorapre-muon")
#: First rates: near the best ones of the searches that have come far (docs/study-finetune.md), and for the others as
#: far above those that their papers give as these turned out to be.
RATES: Mapping[Contestant, float] = {
    ADAMW: 4e-4,
    MUON: 1.6e-3,
    Contestant("lora"): 3.2e-3,
    Contestant("galore"): 3.2e-3,
    Contestant("full-adamw", None): 2e-4,
    Contestant("rslora"): 1.6e-3,
    Contestant("lora+"): 8e-4,
    Contestant("dora"): 3.2e-3,
    Contestant("lora-pro"): 8e-4,
    Contestant("loft"): 8e-4,
    Contestant("apollo"): 1.6e-3,
    Contestant("fira"): 1.6e-3,
    # A run has fewer than 200 steps, so that the two project once, by the first batch, with their packages' gap. They
    # come last, since eight decompositions of every matrix take longer than the training.
    Contestant("galore", 8, (("update_proj_gap", 25),)): 3.2e-3,
    Contestant("fira", 8, (("update_proj_gap", 25),)): 1.6e-3,
}
#: First moment only: v is kept whole.
FIRST_MOMENT = Contestant("lorapre-adamw", 8, (("second_moment", "full"),))
#: The optimizer's own default, where ``lorapre finetune`` sweeps in every step.
RESTING = Contestant("lorapre-adamw", 8, (("sweep_interval", 4),))
RANKS: Mapping[Contestant, Contestant] = {
    FIRST_MOMENT: ADAMW,
    RESTING: ADAMW,
    **{Contestant(base.method, rank): base for rank in (1, 32, 4) for base in (ADAMW, MUON)},
}

PROFILES: Mapping[str, Profile] = {
    "gsm8k": Profile(GSM8K, RATES, RANKS),
    # Its examples are short: a row of 512 tokens holds nine of them, a step 45.
    "chain-sum": Profile(CHAIN_SUM, RATES, RANKS, batch_size=5, max_length=512),
}


def tiny(profile: Profile) -> Profile:
    """For a machine without a GPU, to try the script itself: one rate of each method is searched from, a few steps."""
    task = replace(profile.task, test_size=8, test_batch=8, max_new_tokens=8)
    return replace(profile, task=task, batch_size=2, valid_examples=8, train_examples=32, bf16=False, validations=2)
