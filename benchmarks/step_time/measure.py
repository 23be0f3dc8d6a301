"""A row: one optimizer on the matrices of one model, in turn with fused AdamW, on a CPU with foreach AdamW too."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone

import torch

from lorapre.backends import dispatch
from step_time import costs
from step_time.clock import Limits, extra_peak, in_turn, launches, middle
from step_time.contestants import FOREACH, GAP, REFERENCE, Contestant, foreach, reference
from step_time.rare import Amortised, rare_ms, without_svd
from step_time.replay import capture, same_bits
from step_time.rows import StepRow
from step_time.weights import Matrices, layer_shapes

#: Steps before any is timed: state is made, kernels are compiled and chosen.
WARM_UP = 3


@dataclass(frozen=True)
class Effort:
    """How long a row may take: ``count`` steps in each of at most ``rounds`` rounds, none begun after ``seconds``."""

    rounds: int
    count: int
    seconds: float
    rare_layers: int


def today() -> str:
    """In UTC."""
    return datetime.now(timezone.utc).date().isoformat()


class Bench:
    """Weights of one model and dtype, and the fused AdamW that every row is measured in turn with."""

    def __init__(
        self, model: str, layers: int, dtype: torch.dtype, device: torch.device, limits: Limits, effort: Effort
    ) -> None:
        self.model, self.layers, self.dtype, self.device = model, layers, dtype, device
        self.limits, self.effort = limits, effort
        self.module = Matrices(model, layers, dtype, device)
        self.reference = reference(self.module)
        # A CPU's fused AdamW makes one pass where others make ten, so that lists are the rival there.
        self.beside = [foreach(self.module)] if device.type == "cpu" else []
        for _ in range(WARM_UP):
            for each in (self.reference, *self.beside):
                each.step()

    def row(self, contestant: Contestant | None, rank: int | None) -> StepRow:
        """The row of ``contestant``, or of the reference where it is None."""
        if contestant is None:
            return self._timed(REFERENCE, None, costs.adamw, self.reference.step, self.reference.step)
        with said() as notes:
            optimizer = contestant.make(self.module, rank)
            with without_svd() if contestant.rare == "svd" else contextlib.nullcontext():
                for _ in range(WARM_UP):
                    optimizer.step()
            if contestant.captured:
                graph, extra = capture(optimizer.step)
                same = same_bits(self.module, optimizer, graph.replay)
                row = self._timed(contestant.title, rank, contestant.cost, graph.replay, optimizer.step)
                row = replace(row, extra_bytes=extra, same_bits=same)
            else:
                step = cycle(optimizer.step, contestant.period)
                row = self._timed(contestant.title, rank, contestant.cost, step, step, contestant.period)
        if contestant.rare is not None:
            row = self._amortised(row, contestant)
        if self.device.type != "cpu" and row.extra_bytes is None:
            notes.append("Every step kept some memory, so that its peak was not measured.")
        return replace(row, note=" ".join(notes))

    def _timed(
        self,
        title: str,
        rank: int | None,
        cost_of: costs.CostOf,
        step: Callable[[], object],
        launched: Callable[[], object],
        period: int = 1,
    ) -> StepRow:
        """The row of a ``step`` that is ``period`` of the optimizer's."""
        effort = self.effort
        ours, theirs, *others = in_turn(
            step,
            self.reference.step,
            *(each.step for each in self.beside),
            rounds=effort.rounds,
            count=effort.count,
            seconds=effort.seconds,
            device=self.device,
        )
        own = middle(ours) / period
        ratio = 1.0 if title == REFERENCE else own / middle(theirs)
        to_foreach = next((1.0 if title == FOREACH else round(own / middle(each), 4) for each in others), None)
        on_gpu = self.device.type != "cpu"
        extra, seen = (extra_peak(launched), launches(step)) if on_gpu else (None, None)
        cost = costs.total(cost_of, layer_shapes(self.model) * self.layers, rank, self.dtype.itemsize)
        row = StepRow(
            device=self.device.type,
            model=self.model,
            dtype=str(self.dtype).removeprefix("torch."),
            optimizer=title,
            rank=rank,
            step_ms=own,
            ratio_to_fused_adamw=ratio,
            ratio_to_foreach_adamw=to_foreach,
            extra_bytes=extra,
            launches=None if seen is None else round(seen.launches / period),
            kernels=None if seen is None else seen.kernels,
            copies=None if seen is None else round(seen.copies / period),
            layers=self.layers,
            parameter_bytes=sum(param.numel() * param.element_size() for param in self.module.parameters()),
            bytes_moved=cost.bytes_moved,
            flops=cost.flops,
            date=today(),
        )
        return with_shares(row, self.limits)

    def _amortised(self, row: StepRow, contestant: Contestant) -> StepRow:
        """The row with the share of what its optimizer does every `GAP` steps."""
        measured = min(self.effort.rare_layers, self.layers)
        rare = rare_ms(
            contestant,
            row.rank,
            model=self.model,
            layers=self.layers,
            measured=measured,
            dtype=self.dtype,
            device=self.device,
        )
        return amortised(row, Amortised(row.step_ms, rare), measured, self.limits)


def cycle(step: Callable[[], object], period: int) -> Callable[[], object]:
    """``period`` steps as one."""
    if period == 1:
        return step

    def steps() -> None:
        for _ in range(period):
            step()

    return steps


def amortised(row: StepRow, mean: Amortised, measured: int, limits: Limits) -> StepRow:
    """``row``, of plain steps, as that of a mean step."""
    row = replace(
        row,
        step_ms=round(mean.step_ms, 4),
        ratio_to_fused_adamw=row.ratio_to_fused_adamw * mean.step_ms / mean.plain_ms,
        plain_ms=round(mean.plain_ms, 4),
        rare_ms=round(mean.rare_ms, 3),
        rare_every=GAP,
        rare_layers=measured,
    )
    return with_shares(row, limits)


def with_shares(row: StepRow, limits: Limits) -> StepRow:
    """``row``, rounded, with the shares of the machine's rates that it reaches."""
    seconds = row.step_ms / 1e3
    copy = (row.bytes_moved or 0.0) / seconds / limits.copy
    product = (row.flops or 0.0) / seconds / limits.product[row.dtype] if row.dtype in limits.product else None
    return replace(
        row,
        step_ms=round(row.step_ms, 4),
        ratio_to_fused_adamw=round(row.ratio_to_fused_adamw, 4),
        copy_share=round(copy, 4),
        product_share=None if product is None else round(product, 4),
    )


@contextlib.contextmanager
def said() -> Iterator[list[str]]:
    """Collects why "auto" stepped matrices without the kernels; each reason once for every row."""
    dispatch._said.clear()
    logger, messages = logging.getLogger(dispatch.__name__), list[str]()
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
