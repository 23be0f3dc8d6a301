"""Optimizers whose matrices are stepped by one of several backends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from lorapre.backends import dispatch
from lorapre.backends.dispatch import Job
from lorapre.backends.eager_muon import Hyperparameters
from lorapre.backends.opened import Opened
from lorapre.backends.triton import Layouts
from lorapre.optim.base import Group, Work
from lorapre.optim.checks import check_choice
from lorapre.optim.dense import DenseAdamW


class BackedOptimizer(DenseAdamW):
    """Base of the optimizers with the option ``backend``. Subclasses say what their options are to the backends."""

    _added: ClassVar[Mapping[str, Any]] = {**DenseAdamW._added, "backend": "auto"}

    def _hyperparameters(self, group: Group, device: torch.device) -> Hyperparameters:
        """The options of a group's matrices on ``device``."""
        raise NotImplementedError

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_choice("backend", group["backend"], ("auto", "eager", "triton"))

    def _open(self, work: Work) -> Opened:
        layouts: Layouts = self.__dict__.setdefault("_layouts", Layouts())  # no copy and no pickle has it
        jobs = [
            Job(buckets, self._hyperparameters(group, buckets[0].params[0].device), group["backend"])
            for buckets, group in work
        ]
        return dispatch.open_step(jobs, layouts)
