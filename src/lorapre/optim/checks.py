"""Options that are out of range, named with their value and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorapre.routing import check_rank

#: Options that are True or False, of all classes.
_FLAGS = ("compress", "bounded", "update_clipping", "nesterov", "stochastic_rounding", "maximize", "capturable")


def check_options(group: dict[str, Any]) -> None:
    """Raise ``ValueError`` for an option of any factored optimizer that is out of range."""
    check_lr(group["lr"], group["capturable"])
    for name in ("eps", "weight_decay", "scale"):
        if name in group and not 0 <= group[name] < float("inf"):
            raise ValueError(f"Invalid {name} value: {group[name]}. It must be at least 0, and finite.")
    for name in _FLAGS:
        if name in group and not isinstance(group[name], bool):
            raise ValueError(f"Invalid {name}: {group[name]!r}. Give True or False.")
    check_rank(group["rank"])
    check_choice("regression", group["regression"], ("newton", "subspace", "tangent"))
    if group["residual_gain"] is not None and not 0 <= group["residual_gain"] < float("inf"):
        raise ValueError(
            f"Invalid residual_gain: {group['residual_gain']}. Give a number of at least 0, or None for the "
            "paper's, 1 - beta1."
        )
    if not 0 < group["damping"] < float("inf"):
        raise ValueError(
            f"Invalid damping value: {group['damping']}. It must be above 0 and finite, or the first step, whose left "
            "factor is zero, has no solution."
        )
    check_choice("damping_mode", group["damping_mode"], ("absolute", "relative"))
    check_choice("view_3d", group["view_3d"], ("stack", "flatten"))
    check_choice("nonfinite", group["nonfinite"], ("raise", "skip", None))
    if group["capturable"] and group["nonfinite"] == "raise":
        raise ValueError(
            "nonfinite='raise' cannot work with capturable=True: a CUDA graph does not wait for the host. Use "
            "nonfinite='skip', or leave it out."
        )
    if not isinstance(group["seed"], int) or isinstance(group["seed"], bool):
        raise ValueError(f"Invalid seed value: {group['seed']!r}. It must be an integer.")
    dtype = group["state_dtype"]
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(
            f"Invalid state_dtype: {dtype!r}. Give a floating torch.dtype of 16 to 64 bits, or None for at "
            "least float32."
        )


def check_rounding(groups: list[dict[str, Any]]) -> None:
    """Raise ``ValueError`` where ``stochastic_rounding`` is on and no parameter that it is on for is bfloat16."""
    dtypes = {param.dtype for group in groups if group["stochastic_rounding"] for param in group["params"]}
    if dtypes and torch.bfloat16 not in dtypes:
        raise ValueError(
            "stochastic_rounding=True rounds bfloat16 weights, and there are none: the parameters are of "
            f"{', '.join(sorted(map(str, dtypes)))}. Convert the model before the optimizer is built "
            "(model.to(torch.bfloat16)), or leave the option out: other weights are not rounded by chance."
        )


def check_choice(name: str, value: Any, allowed: tuple[str | None, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"Invalid {name}: {value!r}. Choose one of {', '.join(map(repr, allowed))}.")


#: Steps from one sweep to the next, unless the user says otherwise (docs/study-defaults.md).
SWEEP_INTERVAL = 4


def sweep_interval(group: Mapping[str, Any]) -> int:
    """Steps from one sweep to the next: what None means, and 1 in a group that has no such option."""
    given: int | None = group.get("sweep_interval", 1)
    if given is not None:
        return given
    return SWEEP_INTERVAL if group["regression"] == "subspace" and not group["capturable"] else 1


def check_sweep_interval(group: dict[str, Any]) -> None:
    """Raise ``ValueError`` for a ``sweep_interval`` that is out of range, or that another option leaves no meaning."""
    interval = group["sweep_interval"]
    if interval is None:
        return
    if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
        raise ValueError(f"Invalid sweep_interval: {interval!r}. Give a whole number of at least 1, or None.")
    if interval > 1 and group["regression"] != "subspace":
        raise ValueError(
            f"sweep_interval={interval} means nothing with regression={group['regression']!r}, which moves both "
            "factors in every step. Leave it out, or use regression='subspace'."
        )
    if interval > 1 and group["capturable"]:
        raise ValueError(
            f"sweep_interval={interval} cannot work with capturable=True: a CUDA graph repeats one step, and steps "
            "that sweep are others than those that do not. Use sweep_interval=1 or capturable=False."
        )


def check_betas(betas: tuple[float, float]) -> None:
    """Raise ``ValueError`` unless both decay rates lie in [0, 1), worded as torch.optim words it."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas!r}. Give a pair, such as (0.9, 0.95).")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}. It must be in [0, 1).")


def check_momentum(momentum: float) -> None:
    """Raise ``ValueError`` unless the momentum's decay lies in [0, 1)."""
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"Invalid momentum value: {momentum}. It must be in [0, 1).")


def check_lr(lr: float | Tensor, capturable: bool) -> None:
    """Raise ``ValueError`` unless the learning rate is a number of at least 0; a graph's tensor is not read."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, but it has shape {tuple(lr.shape)}.")
    if not (isinstance(lr, Tensor) and capturable) and not 0 <= lr < float("inf"):
        raise ValueError(f"Invalid learning rate: {lr}. It must be at least 0, and finite.")
