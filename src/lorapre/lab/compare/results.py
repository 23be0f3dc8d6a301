"""What a comparison has found, as data: runs, rows of the table, and the whole. Figures and pages read only this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["finished", "diverged", "failed", "missing"]


@dataclass(frozen=True)
class Point:
    """One validation of a run."""

    step: int
    tokens: int
    seconds: float  # of training, validation not counted
    loss: float


@dataclass(frozen=True)
class Run:
    """One training run, whole or broken off by an error.

    Attributes:
        contestant: optimizer and rank, such as ``galore@0.25``.
        lr: peak learning rate of the matrices.
        seed: of weights and data order.
        tokens: length that was planned.
        status: ``diverged`` where a gradient or loss was not finite, ``failed`` after any other error.
        reason: one line, empty for a finished run.
        loss: final validation loss; None unless finished.
        points: validations, in order; of a broken run those before the end.
        shared_device: other runs used the device at the same time, or the momentum was measured on the way, so that
            ``Point.seconds`` is inflated.
    """

    contestant: str
    lr: float
    seed: int
    tokens: int
    status: Status
    reason: str
    loss: float | None
    points: tuple[Point, ...]
    shared_device: bool = False

    @property
    def best_loss(self) -> float | None:
        """The lowest validation loss of a finished run."""
        return min((point.loss for point in self.points), default=self.loss) if self.loss is not None else None


@dataclass(frozen=True)
class Row:
    """One line of the table. None stands for what was not measured.

    Attributes:
        contestant: key, such as ``galore@0.25``.
        optimizer: name in the registry.
        title: for people.
        rank: as given (integer or fraction), None where the method has none.
        status: of the runs at the chosen learning rate: ``finished`` if any of them is; ``missing`` where none of full
            length has been made yet.
        lr: the chosen learning rate.
        lr_losses: final loss against each learning rate that was tried at full length with the first seed, or, for
            rates given up earlier, at the longest length that they reached; ascending; None for a broken run.
        lr_at_edge: the chosen rate is the lowest or highest of those tried, so a better one may lie beyond.
        seeds: seeds of the finished runs at the chosen rate and full length.
        loss: mean over the seeds of the final validation loss, nats a token.
        loss_spread: largest minus smallest over the seeds; None for a single seed.
        best_loss: mean over the seeds of the lowest validation loss on the way.
        perplexity: exp(loss).
        state_bytes: of the whole optimizer, measured.
        matrix_state_bytes: of the matrices of attention and MLP alone, measured.
        formula_bytes: what the registry's formula gives for ``matrix_state_bytes``.
        peak_bytes: peak memory of training: of the device's allocator, or of the process on the CPU.
        step_ms: the optimizer's step alone, mean, rare work such as a decomposition every 200 steps amortised.
        train_ms: a whole training step.
        tokens_per_s: training, validation not counted.
        tokens_to_adamw: tokens after which the loss was at or below AdamW's final loss; None if never.
        limitations: from the registry.
        reason: why it failed or diverged, or why those seeds did that are not in ``seeds``; empty otherwise.
    """

    contestant: str
    optimizer: str
    title: str
    rank: int | float | None
    status: Status
    lr: float | None
    lr_losses: tuple[tuple[float, float | None], ...]
    lr_at_edge: bool
    seeds: tuple[int, ...]
    loss: float | None
    loss_spread: float | None
    best_loss: float | None
    perplexity: float | None
    state_bytes: int | None
    matrix_state_bytes: int | None
    formula_bytes: int | None
    peak_bytes: int | None
    step_ms: float | None
    train_ms: float | None
    tokens_per_s: float | None
    tokens_to_adamw: int | None
    limitations: str
    reason: str


@dataclass(frozen=True)
class MomentumCurve:
    """How well the factors of one contestant followed the dense momentum, by step, at its chosen rate and first seed.

    All sequences are as long as ``steps``; None stands for what no matrix has. The figures are those of
    `lorapre.diagnostics.MomentumRecord`.

    Attributes:
        contestant: key, such as ``lorapre-adamw@0.25``.
        matrices: number of those that were watched, one of each shape.
        steps: at which was measured.
        ema_error: median over the matrices, as are the next four.
        best_error: of the best approximation at this rank.
        outside: share of the gradient's energy outside the subspace.
        drift: of the subspace in a step.
        update_rms: in units of the learning rate.
        update_max: largest over the matrices, in units of the learning rate.
    """

    contestant: str
    matrices: int
    steps: tuple[int, ...]
    ema_error: tuple[float | None, ...]
    best_error: tuple[float | None, ...]
    outside: tuple[float | None, ...]
    drift: tuple[float | None, ...]
    update_rms: tuple[float | None, ...]
    update_max: tuple[float | None, ...]


@dataclass(frozen=True)
class Comparison:
    """Everything that a report shows.

    Attributes:
        title: such as "llama-3m on stdlib".
        command: the command line that makes it, to be printed.
        settings: options and facts, name to printable value, in order of importance (model, parameters, data, tokens a
            run, batch, schedule, seeds, ...).
        environment: hardware, versions, date.
        bigram_loss: cross-entropy of a bigram model on the validation text.
        rows: the best first; those without a loss last.
        runs: all, search and final.
        notes: sentences to print under the table: plan, budget, what was cut.
        momentum: of the contestants that were measured, in the order of the rows.
    """

    title: str
    command: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    bigram_loss: float
    rows: tuple[Row, ...]
    runs: tuple[Run, ...]
    notes: tuple[str, ...]
    momentum: tuple[MomentumCurve, ...] = ()
