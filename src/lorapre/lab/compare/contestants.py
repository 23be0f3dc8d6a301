"""Who competes: an optimizer of the registry at a rank, written ``galore@0.25``, or ``lorapre-adamw+eps=1e-6@1/32``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lorapre.lab.config import PretrainConfig, parse_options, parse_rank
from lorapre.lab.errors import UserError
from lorapre.lab.optimizers import (
    OptimizerEntry,
    check_options,
    find_optimizer,
    matrix_parameters,
    matrix_state_bytes,
    read_options,
)
from lorapre.lab.optimizers.options import written

#: ``galore@=lorapre-adamw``: at the rank whose state is as large as the other's.
MATCH = "="

#: Begins an option: a plus that a number such as 1e+5 does not hold.
_OPTION = re.compile(r"\+(?=[^\W\d]\w*=)")

#: Bytes of a folder's name on common file systems.
_LONGEST = 255


@dataclass(frozen=True)
class Contestant:
    """An optimizer at a rank (None where it has none), with options of its own as they are recorded."""

    optimizer: str
    rank: int | float | None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> str:
        """How it is written: ``adamw``, ``fira@16``, ``lorapre-adamw+scale=0.5+second_moment=full@0.25``."""
        name = "+".join([self.optimizer, *written(self.options)])
        return name if self.rank is None else f"{name}@{self.rank}"

    def title(self, entry: OptimizerEntry) -> str:
        """For people: ``entry``'s title, and what sets it apart from the same optimizer without options."""
        return ", ".join([entry.title, *written(self.options)])


def split_names(text: str) -> list[str]:
    """The names that ``--optimizers`` separates by commas; those within brackets belong to a value."""
    return [name.strip() for name in re.split(r",(?![^\[\]]*\])", text) if name.strip()]


def parse_contestants(specs: list[str], default_rank: int | float, model: nn.Module) -> tuple[Contestant, ...]:
    """The contestants that ``--optimizers`` names.

    ``name`` takes ``default_rank`` if it has a rank at all, ``name@rank`` that rank, and ``name@=other`` the largest
    integer rank at which its matrices' state is no larger than that of ``other`` (matched bytes). Before the ``@`` may
    stand options: ``name+option=value+option=value``.

    Args:
        specs: the names, in order.
        default_rank: ``--rank``.
        model: where bytes are counted; may be on the meta device.

    Raises:
        UserError: a name is unknown, its package missing, a rank or an option impossible, or a contestant occurs
            twice.
    """
    found: dict[str, Contestant] = {}
    for spec in specs:
        contestant = _parse(spec, default_rank, model)
        if contestant.key in found:
            raise UserError(f"--optimizers {','.join(specs)}: {contestant.key} occurs twice. Name each once.")
        if len(contestant.key.encode()) > _LONGEST or "/" in contestant.key:
            raise UserError(
                f"--optimizers {spec}: {contestant.key} cannot be the name of a folder: it holds a slash, or more than "
                f"{_LONGEST} bytes. Set fewer options."
            )
        found[contestant.key] = contestant
    return tuple(found.values())


def _parse(spec: str, default_rank: int | float, model: nn.Module) -> Contestant:
    origin = f"--optimizers {spec}"
    head, at, text = spec.partition("@")
    name, *settings = _OPTION.split(head)
    entry = find_optimizer(name, "--optimizers")
    options = read_options(entry, parse_options(settings, origin), origin)
    if at and not entry.ranked:
        raise UserError(f"{origin}: {name} has no rank. Write {head}.")
    rank = default_rank
    if text == MATCH:
        raise UserError(f"{origin}: names nobody to match. Write {head}@=adamw, for instance.")
    if text.startswith(MATCH):
        other = _parse(text[len(MATCH) :], default_rank, model)
        rank = _rank_of_equal_bytes(spec, entry, options, other, model)
    elif at:
        rank = parse_rank(text, origin)
    check_options(entry, model, PretrainConfig(optimizer=name, rank=rank, options=options), origin)
    return Contestant(name, rank if entry.ranked else None, options)


def _rank_of_equal_bytes(
    spec: str, entry: OptimizerEntry, options: Mapping[str, Any], other: Contestant, model: nn.Module
) -> int:
    peer = find_optimizer(other.optimizer, "--optimizers")
    allowed = matrix_state_bytes(peer, model, other.rank or 1, other.options)
    sides = [min(param.shape) for param in matrix_parameters(model) if param.ndim == 2]
    ranks = range(1, max(sides, default=1))
    if allowed is None:
        raise UserError(
            f"--optimizers {spec}: the bytes of {other.key} have no formula on a model with weights of three "
            "dimensions. Give a rank."
        )

    def bytes_at(rank: int) -> int:
        return matrix_state_bytes(entry, model, rank, options) or 0

    fitting = [rank for rank in ranks if bytes_at(rank) <= allowed]
    if not fitting:
        raise UserError(
            f"--optimizers {spec}: even at rank 1 {entry.name} holds more ({bytes_at(1):,} bytes) than {other.key} "
            f"({allowed:,}). Give it a rank of its own."
        )
    return max(fitting)
