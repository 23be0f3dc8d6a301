"""Who is measured: how each is made, what it is called, and what its step must move and multiply."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorapre import LoRAPreAdamW, LoRAPreMuon, param_groups
from lorapre.lab.config import PretrainConfig
from lorapre.lab.optimizers import OPTIMIZERS, find_optimizer
from lorapre.optim.checks import SWEEP_INTERVAL
from step_time import costs
from step_time.costs import CostOf

REFERENCE = "AdamW, fused"
FOREACH = "AdamW, foreach"
#: Small, as weights and gradients are random: nothing here depends on it.
LR = 1e-5
#: Steps between two projections of GaLore, Fira and APOLLO in the lab's registry.
GAP = 200

#: Steps from sweep to sweep, besides the default.
INTERVALS = (1, 16)

Make = Callable[[nn.Module, "int | None"], Optimizer]


@dataclass(frozen=True)
class Contestant:
    """One optimizer.

    Attributes:
        kind: what ``--contestants`` takes.
        title: what rows and tables say.
        make: builds it for all parameters of a module, at a rank.
        cost: of one matrix.
        ranked: whether a rank means something.
        first: measured in the first stage, at ``--ranks``; others come after, at ``--other-ranks``.
        ours: a failure is an error of this library.
        rare: "svd" or "projection", what it does every `GAP` steps; None if all steps are alike.
        captured: its step is captured in a CUDA graph and replayed.
        period: steps that are timed as one, of which the mean counts; above 1 where they are not alike.
        package: the distribution that it comes from; None for torch and this one.
    """

    kind: str
    title: str
    make: Make
    cost: CostOf
    ranked: bool = False
    first: bool = False
    ours: bool = False
    rare: str | None = None
    captured: bool = False
    period: int = 1
    package: str | None = None

    def check_installed(self) -> None:
        """Raise ``UserError`` where the registry knows that its package is missing."""
        if self.package is not None:
            find_optimizer(self.kind, "--contestants")


def _registered(name: str) -> Make:
    """A row of the lab's registry, with its own choice for what is no matrix."""

    def make(module: nn.Module, rank: int | None) -> Optimizer:
        config = PretrainConfig(optimizer=name, rank=0.25 if rank is None else rank)  # else it means nothing
        kind, keywords = find_optimizer(name, "--contestants").build(module, config, LR, LR)
        return kind(**keywords)

    return make


def _peer(name: str, cost: CostOf, rare: str | None = None) -> Contestant:
    entry = OPTIMIZERS[name]
    title = f"{entry.title} ({entry.package})" if name == "adamw-8bit" else entry.title
    make = _registered(name)
    return Contestant(name, title, make, cost, ranked=entry.ranked, rare=rare, package=entry.package)


def _lorapre(
    kind: str, title: str, make: Callable[[list[dict[str, Any]], Any], Optimizer], cost: CostOf, **more: Any
) -> Contestant:
    def build(module: nn.Module, rank: int | None) -> Optimizer:
        return make(param_groups(module), rank)

    return Contestant(kind, title, build, cost, ranked=True, ours=True, **more)


def _lr_on_device(groups: list[dict[str, Any]]) -> Tensor:
    """A schedule changes it between replays."""
    return torch.tensor(LR, device=groups[0]["params"][0][1].device)


def _titled(name: str, backend: str) -> str:
    return name if backend == "auto" else f"{name}, {backend}"


def _muon(backend: str) -> Contestant:
    return _lorapre(
        "lorapre-muon",
        _titled("LoRAPreMuon", backend),
        lambda groups, rank: LoRAPreMuon(groups, LR, rank, backend=backend),  # type: ignore[arg-type]
        costs.lorapre_muon,
    )


def _adamw(backend: str, interval: int | None = None) -> Contestant:
    """With the default's sweeps, or one in ``interval`` steps."""
    kind, title = "lorapre-adamw", "LoRAPreAdamW"
    if interval is not None:
        kind = f"sweeps-{interval}"
        title += f", a sweep in {'every step' if interval == 1 else f'{interval} steps'}"
    period = interval or SWEEP_INTERVAL
    return _lorapre(
        kind,
        _titled(title, backend),
        lambda groups, rank: LoRAPreAdamW(groups, LR, rank, sweep_interval=interval, backend=backend),  # type: ignore[arg-type]
        costs.sweeping(period),
        first=True,
        period=period,
    )


def _graph(backend: str) -> Contestant:
    return _lorapre(
        "graph",
        _titled("LoRAPreAdamW, CUDA graph", backend),
        lambda groups, rank: LoRAPreAdamW(groups, _lr_on_device(groups), rank, capturable=True, backend=backend),  # type: ignore[arg-type]
        costs.lorapre_adamw,
        captured=True,
    )


def _paper(backend: str) -> Contestant:
    return _lorapre(
        "lorapre-adamw-paper",
        _titled("LoRAPreAdamW.paper", backend),
        lambda groups, rank: LoRAPreAdamW.paper(groups, LR, rank, backend=backend),  # type: ignore[arg-type]
        costs.lorapre_adamw_paper,
    )


def contestants(backends: tuple[str, ...] = ("auto",)) -> list[Contestant]:
    """All, the most wanted first; `REFERENCE` is none of them."""
    sgd = lambda module, rank: torch.optim.SGD(module.parameters(), LR, fused=True)  # noqa: E731
    return [
        *(_adamw(backend) for backend in backends),
        *(_adamw(backend, interval) for interval in INTERVALS for backend in backends),
        *(_graph(backend) for backend in backends),
        Contestant("adamw-foreach", FOREACH, lambda module, rank: foreach(module), costs.adamw),
        Contestant("sgd", "SGD, fused", sgd, costs.sgd),
        Contestant("muon", "Muon", _registered("muon"), costs.muon),
        *(_muon(backend) for backend in backends),
        *(_paper(backend) for backend in backends),
        _peer("adamw-8bit", costs.adamw_8bit),
        _peer("adamw-8bit-bnb", costs.adamw_8bit),
        _peer("galore", costs.galore, "svd"),
        _peer("apollo", costs.apollo, "projection"),
        _peer("fira", costs.fira, "svd"),
    ]


#: What ``--contestants`` takes, in order.
KINDS: Mapping[str, Contestant] = {contestant.kind: contestant for contestant in contestants()}
#: On a CPU others take seconds a step.
CPU_KINDS = ("lorapre-adamw", "sweeps-1", "adamw-foreach", "sgd")


def foreach(module: nn.Module) -> Optimizer:
    """Plain AdamW by lists of tensors."""
    return torch.optim.AdamW(module.parameters(), LR, foreach=True)


def reference(module: nn.Module) -> Optimizer:
    """What all ratios are to."""
    return torch.optim.AdamW(module.parameters(), LR, fused=True)
