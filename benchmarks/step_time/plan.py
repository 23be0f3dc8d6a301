"""Which rows are wanted, and in which order: a session may end at any time, so the most urgent come first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from step_time.contestants import REFERENCE, Contestant
from step_time.weights import smallest_side


@dataclass(frozen=True)
class Wanted:
    """A row to come: ``contestant`` None is fused AdamW."""

    contestant: Contestant | None
    rank: int | None

    @property
    def title(self) -> str:
        return REFERENCE if self.contestant is None else self.contestant.title


@dataclass(frozen=True)
class Job:
    """Rows that share weights: of one model and dtype; of whole training where ``dtype`` is None."""

    model: str
    dtype: str | None
    rows: list[Wanted]


@dataclass(frozen=True)
class Plan:
    """What the command line asked for.

    ``ranks`` are of `LoRAPreAdamW`, ``other_ranks`` of all others that have one, ``training_ranks`` of `LoRAPreAdamW`
    in whole training steps.
    """

    models: tuple[str, ...]
    dtypes: tuple[str, ...]
    contestants: list[Contestant]
    ranks: tuple[int, ...]
    other_ranks: tuple[int, ...]
    training: tuple[str, ...] = ()
    training_ranks: tuple[int, ...] = ()
    batches: dict[str, int] = field(default_factory=dict)

    def jobs(self) -> Iterator[Job]:
        """Model by model: ours in all dtypes, then everyone else in all dtypes; whole training at the end."""
        for model in self.models:
            for first in (True, False):
                for dtype in self.dtypes:
                    rows = [row for one in self.contestants if one.first == first for row in self._rows(one, model)]
                    yield Job(model, dtype, [Wanted(None, None), *rows] if first else rows)
        for model in self.training:
            rows = [
                Wanted(one, rank)
                for one in self.contestants
                if not one.captured  # gradients are elsewhere in every step of training
                for rank in below(model, self._ranks(one, training=True))
            ]
            yield Job(model, None, [Wanted(None, None), *rows])

    def _rows(self, contestant: Contestant, model: str) -> list[Wanted]:
        return [Wanted(contestant, rank) for rank in below(model, self._ranks(contestant, training=False))]

    def _ranks(self, contestant: Contestant, *, training: bool) -> tuple[int | None, ...]:
        if not contestant.ranked:
            return (None,)
        if not contestant.first:
            return self.other_ranks
        return self.training_ranks if training else self.ranks


def below(model: str, ranks: tuple[int | None, ...]) -> list[int | None]:
    """Those that every matrix of ``model`` can be compressed to."""
    return [rank for rank in ranks if rank is None or rank < smallest_side(model)]
