"""Who competes: an optimizer of the registry at a rank, written ``galore@0.25``."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from lorapre.lab.errors import UserError
from lorapre.lab.optimizers import OptimizerEntry, find_optimizer, matrix_parameters, matrix_state_bytes
from lorapre.routing import check_rank

#: ``galore@=lorapre-adamw``: at the rank whose state is as large as the other's.
MATCH = "="


@dataclass(frozen=True)
class Contestant:
    """An optimizer at a rank; None where it has none."""

    optimizer: str
    rank: int | float | None

    @property
    def key(self) -> str:
        """How it is written: ``adamw``, ``galore@0.25``, ``fira@16``."""
        return self.optimizer if self.rank is None else f"{self.optimizer}@{self.rank}"


def parse_rank(text: str, option: str) -> int | float:
    """16, 0.25 or 1/4.

    Raises:
        UserError: it is none of them.
    """
    try:
        rank: int | float = int(text) if text.lstrip("+-").isdigit() else float(Fraction(text))
        check_rank(rank)
    except (ValueError, ZeroDivisionError):
        raise UserError(
            f"{option}: {text!r} is no rank. Give an integer of at least 1, or a fraction between 0 and 1 of each "
            "matrix's smaller side, such as 0.25 or 1/32."
        ) from None
    return rank


def parse_contestants(specs: list[str], default_rank: int | float, model: nn.Module) -> tuple[Contestant, ...]:
    """The contestants that ``--optimizers`` names.

    ``name`` takes ``default_rank`` if it has a rank at all, ``name@rank`` that rank, and ``name@=other`` the largest
    integer rank at which its matrices' state is no larger than that of ``other`` (matched bytes).

    Args:
        specs: the names, in order.
        default_rank: ``--rank``.
        model: where bytes are counted; may be on the meta device.

    Raises:
        UserError: a name is unknown, its package missing, a rank impossible, or a contestant occurs twice.
    """
    found: list[Contestant] = []
    for spec in specs:
        contestant = _parse(spec, default_rank, model)
        if contestant in found:
            raise UserError(f"--optimizers {','.join(specs)}: {contestant.key} occurs twice. Name each once.")
        found.append(contestant)
    return tuple(found)


def _parse(spec: str, default_rank: int | float, model: nn.Module) -> Contestant:
    name, at, text = spec.partition("@")
    entry = find_optimizer(name, "--optimizers")
    if not at:
        return Contestant(name, default_rank if entry.ranked else None)
    if not entry.ranked:
        raise UserError(f"--optimizers {spec}: {name} has no rank. Write {name}.")
    if text.startswith(MATCH):
        other = _parse(text[len(MATCH) :], default_rank, model)
        return Contestant(name, _rank_of_equal_bytes(spec, entry, other, model))
    return Contestant(name, parse_rank(text, f"--optimizers {spec}"))


def _rank_of_equal_bytes(spec: str, entry: OptimizerEntry, other: Contestant, model: nn.Module) -> int:
    allowed = matrix_state_bytes(find_optimizer(other.optimizer, "--optimizers"), model, other.rank or 1)
    sides = [min(param.shape) for param in matrix_parameters(model) if param.ndim == 2]
    ranks = range(1, max(sides, default=1))
    if allowed is None:
        raise UserError(
            f"--optimizers {spec}: the bytes of {other.key} have no formula on a model with weights of three "
            "dimensions. Give a rank."
        )

    def bytes_at(rank: int) -> int:
        return matrix_state_bytes(entry, model, rank) or 0

    fitting = [rank for rank in ranks if bytes_at(rank) <= allowed]
    if not fitting:
        raise UserError(
            f"--optimizers {spec}: even at rank 1 {entry.name} holds more ({bytes_at(1):,} bytes) than {other.key} "
            f"({allowed:,}). Give it a rank of its own."
        )
    return max(fitting)
