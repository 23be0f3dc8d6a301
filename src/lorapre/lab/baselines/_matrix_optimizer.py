"""What the rival optimizers of single matrices share: groups and their checks, the step around the method, Adam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

Group: TypeAlias = dict[str, Any]
State: TypeAlias = dict[str, Tensor]

_AT_LEAST_ZERO = ("lr", "eps", "weight_decay", "scale", "alpha", "oversampling", "power_iterations")
_BELOW_ONE = ("beta", "rho")
_AT_LEAST_ONE = ("rank", "update_gap", "newton_schulz_steps", "max_growth")


class CheckedOptimizer(Optimizer):
    """Checks each parameter group as it is added; one that is refused is not kept."""

    def _check_group(self, group: Group) -> None:
        """Raise ``ValueError`` for parameters or options that the method cannot take."""
        raise NotImplementedError

    def add_param_group(self, param_group: Group) -> None:
        """As in torch; the group may set any option of the constructor.

        Raises:
            ValueError: the method cannot take a parameter, or an option is out of range.
        """
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise


class MatrixOptimizer(CheckedOptimizer):
    """Base of optimizers that know matrices alone, each on its own: W <- (1 - lr weight_decay) W - lr direction.

    Subclasses say what the state of a matrix is and what direction it gives. The state is plain tensors in the
    parameter's dtype and a counter ``step``, created at the first step that has a gradient.

    Raises:
        ValueError: a parameter is no float32 or float64 matrix, or an option is out of range.
    """

    def _initial_state(self, param: Tensor, group: Group) -> State:
        """The fresh state of one parameter (p, q), without its counter."""
        raise NotImplementedError

    def _direction(self, G: Tensor, state: State, group: Group, step: int) -> tuple[Tensor, State]:
        """The descent direction (p, q), and the entries of ``state`` that change; ``step`` counts from 1."""
        raise NotImplementedError

    def _check_group(self, group: Group) -> None:
        known = (*_AT_LEAST_ZERO, *_BELOW_ONE, *_AT_LEAST_ONE)
        values = [(name, group[name]) for name in known if group.get(name) is not None]
        values += [(f"betas[{index}]", beta) for index, beta in enumerate(group.get("betas", ()))]
        for name, value in values:
            if not value >= (1 if name in _AT_LEAST_ONE else 0):
                raise ValueError(f"Invalid {name} value: {value}. It must be at least {int(name in _AT_LEAST_ONE)}.")
            if (name in _BELOW_ONE or name.startswith("betas")) and not value < 1:
                raise ValueError(f"Invalid {name} value: {value}. It must be below 1.")
        if not isinstance(group["rank"], int):
            raise ValueError(f"Invalid rank value: {group['rank']}. It must be a whole number.")
        for param in group["params"]:
            if param.ndim != 2:
                raise ValueError(
                    f"{type(self).__name__} moves matrices alone, and a parameter has the shape {tuple(param.shape)}. "
                    "Give the others to torch.optim.AdamW; lorapre.lab.optimizers.hybrid steps both as one."
                )
            if param.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"{type(self).__name__} keeps its state in the parameter's dtype and decomposes matrices in it, "
                    f"which {param.dtype} is too narrow for. Keep float32 weights and train under torch.autocast."
                )
            if group["rank"] > min(param.shape):
                raise ValueError(
                    f"Invalid rank value: {group['rank']}. A matrix of shape {tuple(param.shape)} has no more than "
                    f"{min(param.shape)}: give less, or leave the matrix to torch.optim.AdamW."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: reevaluates the model with gradients and returns the loss.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_matrix(param, param.grad, group)
        return loss

    def _step_matrix(self, param: Tensor, G: Tensor, group: Group) -> None:
        if G.is_sparse:
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients.")
        state: State = self.state[param]
        if not state:
            # Its own key and on the CPU, as in torch: load_state_dict leaves "step" alone, and reading it is free.
            state["step"] = torch.zeros((), dtype=torch.float32)
            state.update(self._initial_state(param, group))
        state["step"] += 1
        direction, changed = self._direction(G, state, group, int(state["step"].item()))
        for name, value in changed.items():
            state[name].copy_(value)  # into its own memory: a slice would keep the whole decomposition alive
        lr = float(group["lr"])
        param.mul_(1.0 - lr * group["weight_decay"])
        param.add_(direction, alpha=-lr)


def adam_direction(
    G: Tensor, m: Tensor, v: Tensor, *, step: int, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam on any shape: (mhat / (sqrt(vhat) + eps), m, v), all of G's shape."""
    beta1, beta2 = betas
    m = beta1 * m + (1 - beta1) * G
    v = beta2 * v + (1 - beta2) * G.square()
    mhat, vhat = m / (1 - beta1**step), v / (1 - beta2**step)
    return mhat / (vhat.sqrt() + eps), m, v
