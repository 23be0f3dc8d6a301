"""Steps by the kernels of several cohorts, whose gradients are read before anything changes. Imports triton."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lorapre.backends.batches import Bucket
from lorapre.backends.eager_muon import Hyperparameters, MuonHyperparameters
from lorapre.backends.opened import Opened
from lorapre.backends.triton import newton, table
from lorapre.backends.triton.adamw import AdamStep
from lorapre.backends.triton.layout import Layouts
from lorapre.backends.triton.muon import MuonStep
from lorapre.backends.triton.subspace_step import SubspaceStep, turns_of


@dataclass(frozen=True)
class Cohort:
    """Buckets of one launch, and their options."""

    buckets: Sequence[Bucket]
    hyper: Hyperparameters


def step_of(buckets: Sequence[Bucket], hyper: Hyperparameters, layouts: Layouts) -> SubspaceStep:
    """The step of some buckets with the subspace regression."""
    if isinstance(hyper, MuonHyperparameters):
        return MuonStep(buckets, hyper, layouts)
    return AdamStep(buckets, hyper, layouts)


def open_cohorts(cohorts: Sequence[Cohort], layouts: Layouts) -> Opened:
    """Launch the first pass of as many matrices as `lorapre.backends.triton.table.scratch_limit` leaves room for.

    What has to wait for its turn, and what the paper's regression steps, is read for the first time by ``proceed``.
    The scratch of a first pass is held until then, and given back cohort by cohort.

    Args:
        cohorts: of the whole optimizer step.
        layouts: remembers addresses from step to step.
    """
    room = table.scratch_limit(sum(bucket.weight_bytes for cohort in cohorts for bucket in cohort.buckets))
    begun: deque[SubspaceStep] = deque()
    later: list[tuple[Callable[[Sequence[Bucket], Hyperparameters], None], Sequence[Bucket], Hyperparameters]] = []

    def by_turn(buckets: Sequence[Bucket], hyper: Hyperparameters) -> None:
        step = step_of(buckets, hyper, layouts)
        step.read()
        step.proceed(None)  # the mask is the buckets' own

    def by_newton(buckets: Sequence[Bucket], hyper: Hyperparameters) -> None:
        assert not isinstance(hyper, MuonHyperparameters)  # `lorapre.backends.triton.supports` has seen to it
        newton.step_buckets(buckets, hyper, layouts)

    for cohort in cohorts:
        if cohort.hyper.regressor.regression == "newton":
            later.append((by_newton, cohort.buckets, cohort.hyper))
            continue
        for place, (turn, scratch) in enumerate(turns_of(cohort.buckets, cohort.hyper)):
            if place == 0 and (scratch <= room or not begun):
                begun.append(step_of(turn, cohort.hyper, layouts))
                begun[-1].read()
                room -= scratch
            else:
                later.append((by_turn, turn, cohort.hyper))

    def proceed(enabled: Tensor | None) -> None:
        while begun:
            step = begun.popleft()
            step.proceed(None if enabled is None else enabled.to(step.device))
            del step  # and its scratch, before another takes some
        for advance, buckets, hyper in later:
            advance([bucket.where(enabled) for bucket in buckets], hyper)

    return Opened(
        proceed,
        read=tuple(param for step in begun for param in step.matrix_params),
        squares=tuple(step.squares for step in begun),
        by_kernels=bool(cohorts),
    )
