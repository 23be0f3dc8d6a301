"""What the contract tests share: every optimizer of the library under one name, built alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from _support import Shape, make_params
from lorapre import LoRAPreAdamW, LoRAPreLion, LoRAPreMuon, LoRAPreSGD

SHAPES = ((12, 20), (20, 12), (2, 8, 10), (7,), ())  # two matrices, a stack, two dense parameters

#: Algorithms 1 and 2, written out: what the presets `paper` have to be.
NEWTON = {"regression": "newton", "residual_gain": None}
PAPER_NEWTON = {**NEWTON, "damping": 1e-6, "damping_mode": "absolute"}
PAPER_ADAMW = {
    **PAPER_NEWTON,
    "betas": (0.9, 0.95),
    "weight_decay": 0.0,
    "second_moment": "hadamard",
    "bias_correction": "paper",
    "eps_mode": "absolute",
    "bounded": False,
    "update_clipping": False,
    "spectral_clipping": None,
    "scale": 0.25,
}
PAPER_MUON = {
    **PAPER_NEWTON,
    "momentum": 0.95,
    "nesterov": False,
    "weight_decay": 0.0,
    "adjust_lr_fn": "original",
    "normalization": "none",
}


@dataclass(frozen=True, eq=False)
class Kind:
    """An optimizer class with the options that make it what its name says."""

    name: str
    cls: Any
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def __call__(self, params: Any, **options: Any) -> Any:
        return self.cls(params, **{**self.options, **options})

    @property
    def is_adamw(self) -> bool:
        return self.cls is LoRAPreAdamW

    @property
    def dense_keys(self) -> set[str]:
        """State of a parameter that is not compressed."""
        if self.cls in (LoRAPreAdamW, LoRAPreMuon):
            return {"step", "exp_avg", "exp_avg_sq"}
        return {"step", "momentum_buffer"}


ADAMW = Kind("adamw", LoRAPreAdamW)
MUON = Kind("muon", LoRAPreMuon)
SGD = Kind("sgd", LoRAPreSGD)
LION = Kind("lion", LoRAPreLion)
#: The four classes as they are built without options.
DEFAULTS = (ADAMW, MUON, SGD, LION)
PAPER = Kind("adamw-paper", LoRAPreAdamW, PAPER_ADAMW)
MUON_PAPER = Kind("muon-paper", LoRAPreMuon, PAPER_MUON)
MUON_ROWS = Kind("muon-rows", LoRAPreMuon, {"normalization": "rows"})
TANGENT = Kind("adamw-tangent", LoRAPreAdamW, {"regression": "tangent", "second_moment": "rank1"})
#: The defaults, both algorithms of the paper, and every second moment.
KINDS = (
    *DEFAULTS,
    PAPER,
    MUON_PAPER,
    MUON_ROWS,
    Kind("adamw-full", LoRAPreAdamW, {"second_moment": "full"}),
    TANGENT,
)

each_class = pytest.mark.parametrize("kind", DEFAULTS, ids=str)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def build(
    kind: Kind,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    shapes: tuple[Shape, ...] = SHAPES,
    **options: Any,
) -> Any:
    return kind(make_params(shapes, dtype, device), **{"rank": 3, **options})


def params_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def model_of(device: torch.device) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8)).to(device)
