"""Two optimizers behind one `torch.optim.Optimizer`: one for the matrices, one for everything else."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from lorapre.lab.optimizers.entry import Group

#: Makes an optimizer of its groups. Called when the model is on its device, so that state is created there.
Part = tuple[Callable[[list[Group]], Optimizer], list[Group]]


class _JointState(ChainMap[Any, Any]):
    """The states of all parts, each parameter's where it is; a plain ChainMap would make an empty one in the first."""

    def __getitem__(self, key: Any) -> Any:
        for state in self.maps:
            if key in state:
                return state[key]
        return self.__missing__(key)


class HybridOptimizer(Optimizer):
    """Steps several optimizers in turn, and shows their groups as one list, which schedulers change in place.

    The state dict holds one state dict a part.
    """

    def __init__(self, params: Sequence[Part]) -> None:
        self.parts = [make(groups) for make, groups in params if groups]
        self._complete = False
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._complete = True
        self._show_parts()

    def _show_parts(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.state = _JointState(*(part.state for part in self.parts))  # type: ignore[assignment]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: no part would step the group, and which one should cannot be told.

        Raises:
            RuntimeError: always, once all parts are there.
        """
        if self._complete:
            kinds = ", ".join(type(part).__name__ for part in self.parts)
            raise RuntimeError(
                f"{type(self).__name__} cannot tell which of its parts ({kinds}) should step a new group. Give the "
                "group to that part when the optimizer is built."
            )
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every part; ``closure`` is evaluated once, with gradients, before them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """``{"parts": [state dict of each part]}``."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave.

        Raises:
            ValueError: it is of another number of parts.
        """
        states = state_dict["parts"]
        if len(states) != len(self.parts):
            raise ValueError(f"state_dict holds {len(states)} parts, this optimizer has {len(self.parts)}.")
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
        self._show_parts()


def parts_of(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that take the steps of ``optimizer``: its parts, or itself."""
    return optimizer.parts if isinstance(optimizer, HybridOptimizer) else [optimizer]
