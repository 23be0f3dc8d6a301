"""Is the low-rank momentum any good? Figures of an optimizer at work, against the dense momentum it stands for.

Everything is measured from outside, by the hooks of `torch.optim.Optimizer`: an optimizer that nobody watches
does not know of this module. ``docs/diagnostics.md`` says how to read the figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from lorapre.momentum_figures import conditions, drift, energy_outside, largest_singular_value, row_space, tracking
from lorapre.optim.base import FactoredOptimizer, Group
from lorapre.routing import MatrixView
from lorapre.spectral import random_norm

#: Which of its ``betas`` an optimizer decays its momentum by, where that is not the first: Lion's step reads a
#: mixture by beta1, and what it keeps decays by beta2 (arXiv 2302.06675, Algorithm 2).
_KEPT_BETA = {"LoRAPreLion": 1}


def momentum_rule(optimizer: Optimizer, group: Group) -> tuple[float, float]:
    """The dense recursion m <- decay m + gain G that the factors of ``group`` follow.

    A group with ``momentum`` keeps a sum, as SGD and Muon do (Muon's ``betas`` are of the AdamW beside it):
    (momentum, 1). One with ``betas`` alone keeps an average: (beta, 1 - beta). A class whose gain is another says so
    by an attribute ``momentum_gain``, called with the group.

    Raises:
        TypeError: the group has neither ``betas`` nor ``momentum``.
    """
    if "momentum" in group:
        decay, gain = float(group["momentum"]), 1.0
    elif "betas" in group:
        position = next(
            (_KEPT_BETA[kind.__name__] for kind in type(optimizer).__mro__ if kind.__name__ in _KEPT_BETA), 0
        )
        decay = float(group["betas"][position])
        gain = 1.0 - decay
    else:
        raise TypeError(
            f"{type(optimizer).__name__} has neither betas nor momentum in its groups, so its true momentum is not "
            "known. Use track_ema=False."
        )
    own = getattr(type(optimizer), "momentum_gain", None)
    return decay, gain if own is None else float(own(group))


@dataclass(frozen=True)
class MomentumRecord:
    """What was measured of one parameter at one step; nan where a figure is not defined.

    Of a stack of matrices each figure is the mean over those for which it is defined, but ``update_max``, which is
    the largest of all. M is the dense momentum, Q an orthonormal basis of the rows of m_A.

    Attributes:
        step: calls of ``optimizer.step()`` so far, this one included.
        name: of the parameter, or its index in the optimizer as text.
        shape: of the parameter.
        rank: of its factors.
        ema_error: ||m_B m_A - M|| / ||M||, after the step.
        best_error: the same for the best approximation of M at this rank (to about 1e-7).
        ema_cosine: cosine between m_B m_A and M.
        outside: share of the gradient's energy outside the rows of m_A before the step, 1 - ||G Q||^2 / ||G||^2.
        drift: how far the step turned that subspace, 1 - ||Q_old^T Q_new||^2 / r: 0 not at all, 1 to be orthogonal.
        condition_m_A: largest over smallest singular value of m_A; inf where singular.
        condition_product: the same of the r singular values of m_B m_A.
        update_rms: root mean square of (W_before (1 - lr weight_decay) - W_after) / lr.
        update_max: its largest entry in absolute value.
        update_norm: its largest singular value over sqrt(p) + sqrt(q), which a random matrix of mean square 1 has: what
            `spectral_clipping` of `LoRAPreAdamW` bounds, where ``scale`` is 1.
    """

    step: int
    name: str
    shape: tuple[int, ...]
    rank: int
    ema_error: float
    best_error: float
    ema_cosine: float
    outside: float
    drift: float
    condition_m_A: float
    condition_product: float
    update_rms: float
    update_max: float
    update_norm: float

    def to_dict(self) -> dict[str, Any]:
        """Fields by name, for JSON, which has no nan and no infinity: None stands for both."""
        fields = asdict(self) | {"shape": list(self.shape)}
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in fields.items()
        }


@dataclass(frozen=True)
class _Watched:
    name: str
    param: Tensor
    view: MatrixView


@dataclass(frozen=True)
class _Before:
    """A watched parameter before the step; ``weight`` and ``basis`` on measuring steps alone."""

    count: float
    weight: Tensor | None = None
    basis: tuple[Tensor, Tensor] | None = None


class MomentumDiagnostics:
    """Measures the low-rank momentum of some parameters of an optimizer while it trains.

    Hangs on the optimizer's step hooks until it is closed; also a context manager. With ``track_ema`` each watched
    parameter gets its true dense momentum, started from zero here: p q numbers in float32 or wider, and a pass over
    the gradient every step, whatever ``every`` is. Attached in mid-training it takes 1 / (1 - decay) steps to mean
    something. A measuring step copies the watched weights, and works on one of them at a time in float64.

    A step that the optimizer leaves out (no gradient, ``nonfinite="skip"``) advances no momentum and leaves no
    record. Steps replayed from a CUDA graph run no hooks: capturing one while this is attached raises.

    Args:
        optimizer: one of this library's.
        params: what to watch: parameters, names (or indices as text, where there are no names), patterns of names as
            in ``fnmatch``, which stand for their compressed matches. None is the first compressed parameter of each
            shape.
        every: measure at the steps that this divides.
        track_ema: keep the true momentum; without it ``ema_error``, ``best_error`` and ``ema_cosine`` are nan.

    Attributes:
        step: calls of ``optimizer.step()`` so far; begins at the optimizer's own count.
        records: all measurements, in order; may be emptied at any time.

    Raises:
        TypeError: ``optimizer`` is not one of this library's.
        ValueError: ``every`` is not positive, or a parameter is not in the optimizer or not compressed.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        params: str | Tensor | Iterable[str | Tensor] | None = None,
        every: int = 1,
        track_ema: bool = True,
    ) -> None:
        if not isinstance(optimizer, FactoredOptimizer):
            raise TypeError(
                f"{type(optimizer).__name__} keeps no factors m_B and m_A. Give one of this library's optimizers, "
                "taken out of any wrapper."
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"Invalid every: {every!r}. It must be an integer of at least 1.")
        optimizer.settle()
        self._optimizer = optimizer
        self._every = every
        self._watched = _select(optimizer, [params] if isinstance(params, (str, Tensor)) else params)
        self._emas: dict[str, Tensor] = {}
        if track_ema:
            for group, watched in self._with_groups():
                momentum_rule(optimizer, group)  # now rather than in the first step
                state = optimizer.state[watched.param]["m_A"]
                dtype = torch.promote_types(torch.promote_types(watched.param.dtype, state.dtype), torch.float32)
                shape = (watched.view.batch, watched.view.p, watched.view.q)
                self._emas[watched.name] = torch.zeros(shape, dtype=dtype, device=watched.param.device)
        self.step = max(int(self._count(watched)) for watched in self._watched)
        self.records: list[MomentumRecord] = []
        self._before: dict[str, _Before] = {}
        self._handles = [
            optimizer.register_step_pre_hook(self._on_begin),
            optimizer.register_step_post_hook(self._on_end),
        ]

    def __enter__(self) -> MomentumDiagnostics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the hooks off; records and state stay. May be called again."""
        for handle in self._handles:
            handle.remove()

    @property
    def names(self) -> list[str]:
        """What is watched, in the optimizer's order."""
        return [watched.name for watched in self._watched]

    def latest(self) -> dict[str, MomentumRecord]:
        """The last record of each parameter, by name."""
        return {record.name: record for record in self.records}

    def to_dicts(self) -> list[dict[str, Any]]:
        """All records, ready for JSON; see `MomentumRecord.to_dict`."""
        return [record.to_dict() for record in self.records]

    def true_momentum(self, name: str) -> Tensor:
        """A copy of the dense momentum of a watched parameter, (batch, p, q); the batch is 1 but for stacks.

        Raises:
            KeyError: it is not watched, or its momentum is not kept.
        """
        return self._emas[name].clone()

    def state_dict(self) -> dict[str, Any]:
        """Step and dense momenta, to go on exactly from here: numbers and tensors (not copied), without records."""
        return {"step": self.step, "ema": dict(self._emas)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; load the optimizer's own state as well.

        Raises:
            ValueError: it is of other parameters or shapes; nothing has been changed then.
        """
        loaded = state_dict["ema"]
        found, wanted = ({name: tuple(ema.shape) for name, ema in emas.items()} for emas in (loaded, self._emas))
        if found != wanted:
            raise ValueError(
                f"The loaded momenta are {found or 'none'}, those kept here {wanted or 'none'}. Build "
                "MomentumDiagnostics with the params and track_ema that it was saved with."
            )
        for name, ema in self._emas.items():
            ema.copy_(loaded[name])
        self.step = int(state_dict["step"])

    # The two hooks.

    @torch.no_grad()
    def _on_begin(self, *_: Any) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "MomentumDiagnostics cannot follow a CUDA graph: its replays run no hooks. Close it before capturing."
            )
        measuring = (self.step + 1) % self._every == 0
        for watched in self._watched:
            if not measuring:
                self._before[watched.name] = _Before(self._count(watched))
                continue
            m_A = self._factor(watched, "m_A")
            self._before[watched.name] = _Before(
                count=self._count(watched),
                weight=watched.param.detach().clone(),
                basis=row_space(m_A, self._eps(watched)) if bool(m_A.isfinite().all()) else None,
            )

    @torch.no_grad()
    def _on_end(self, *_: Any) -> None:
        self._optimizer.settle()  # or a step that was left out would count
        self.step += 1
        for group, watched in self._with_groups():
            before = self._before.pop(watched.name)
            if self._count(watched) == before.count:
                continue
            # Read after the step, for a closure makes it within.
            if watched.param.grad is None:
                raise RuntimeError(
                    f"The gradient of parameter {watched.name!r} was gone when its step ended. Attach "
                    "MomentumDiagnostics before the hook that clears gradients."
                )
            G = self._matrices(watched, watched.param.grad)
            ema = self._emas.get(watched.name)
            sign = -1.0 if group.get("maximize") else 1.0
            if ema is not None:
                decay, gain = momentum_rule(self._optimizer, group)
                ema.mul_(decay).add_(G.to(ema.dtype), alpha=sign * gain)
            if before.weight is not None:
                self.records.append(self._measure(watched, group, before, before.weight, G.double(), ema))

    def _measure(
        self, watched: _Watched, group: Group, before: _Before, weight: Tensor, G: Tensor, ema: Tensor | None
    ) -> MomentumRecord:
        figures = dict.fromkeys(_FIGURES, math.nan)
        eps = self._eps(watched)
        m_B, m_A = self._factor(watched, "m_B"), self._factor(watched, "m_A")
        read = (m_B, m_A) if ema is None else (m_B, m_A, ema)
        # No decomposition takes nan. A run that has diverged is to end by its own error, not here.
        if before.basis is not None and all(bool(tensor.isfinite().all()) for tensor in read):
            means = {"outside": energy_outside(G, before.basis[0]), "drift": drift(before.basis, row_space(m_A, eps))}
            means |= zip(("condition_m_A", "condition_product"), conditions(m_B, m_A, eps), strict=True)
            if ema is not None:
                means |= zip(("ema_error", "best_error", "ema_cosine"), tracking(m_B, m_A, ema.double()), strict=True)
            figures |= {key: float(values.nanmean()) for key, values in means.items()}
        lr = float(group["lr"])
        if lr != 0:
            kept = 1.0 - lr * float(group.get("weight_decay", 0.0))
            moved = self._matrices(watched, weight).double() * kept - self._matrices(watched, watched.param).double()
            moved /= lr
            figures["update_rms"] = float(moved.square().mean(dim=(-2, -1)).sqrt().mean())
            figures["update_max"] = float(moved.abs().max())
            figures["update_norm"] = float(largest_singular_value(moved).mean()) / random_norm(*moved.shape[1:])
        return MomentumRecord(self.step, watched.name, tuple(watched.param.shape), watched.view.rank, **figures)

    # Access.

    def _with_groups(self) -> Iterator[tuple[Group, _Watched]]:
        """Watched parameters with their groups, asked for anew: loading a state replaces the groups."""
        groups = {id(param): group for group in self._optimizer.param_groups for param in group["params"]}
        for watched in self._watched:
            yield groups[id(watched.param)], watched

    def _count(self, watched: _Watched) -> float:
        return float(self._optimizer.state[watched.param]["step"])

    def _factor(self, watched: _Watched, key: str) -> Tensor:
        """A factor as (batch, p, r) or (batch, r, q), in float64."""
        factor: Tensor = self._optimizer.state[watched.param][key].double()
        return factor if watched.view.stacked else factor[None]

    def _eps(self, watched: _Watched) -> float:
        """Of the dtype in which the factors are kept."""
        return float(torch.finfo(self._optimizer.state[watched.param]["m_A"].dtype).eps)

    @staticmethod
    def _matrices(watched: _Watched, tensor: Tensor) -> Tensor:
        view = watched.view
        return tensor.detach().reshape(view.batch, view.p, view.q)


_FIGURES = tuple(name for name in MomentumRecord.__dataclass_fields__ if name not in ("step", "name", "shape", "rank"))


# What to watch.


def _select(optimizer: FactoredOptimizer, wanted: Iterable[str | Tensor] | None) -> list[_Watched]:
    """The parameters to watch, in the optimizer's order."""
    known: list[tuple[str, Tensor, MatrixView | None]] = [
        (label, param, optimizer._view(param, group))
        for group in optimizer.param_groups
        for label, param in optimizer._labelled_params(group)
    ]
    chosen: set[int] = set()
    if wanted is None:
        shapes: set[tuple[int, ...]] = set()
        for _, param, view in known:
            if view is not None and tuple(param.shape) not in shapes:
                shapes.add(tuple(param.shape))
                chosen.add(id(param))
        if not chosen:
            raise ValueError(f"{type(optimizer).__name__} compresses nothing, so there is no momentum to watch.")
    else:
        for item in wanted:
            chosen.update(_matches(item, known))
        if not chosen:
            raise ValueError("params is empty: name what to watch, or leave it out for one parameter of each shape.")
    found = [_Watched(label, param, view) for label, param, view in known if view is not None and id(param) in chosen]
    names = [watched.name for watched in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Two watched parameters are called {name!r}. Give the optimizer different names.")
    return found


def _matches(item: str | Tensor, known: list[tuple[str, Tensor, MatrixView | None]]) -> set[int]:
    """The ids of the compressed parameters that ``item`` stands for."""
    if isinstance(item, Tensor):
        what, matches = f"a tensor of shape {tuple(item.shape)}", [entry for entry in known if entry[1] is item]
    else:
        what, matches = repr(item), [entry for entry in known if fnmatchcase(entry[0], item)]
    if not matches:
        raise ValueError(f"{what} matches no parameter of the optimizer; the first is called {known[0][0]!r}.")
    compressed = {id(param) for _, param, view in matches if view is not None}
    if not compressed:
        label, param, _ = matches[0]
        raise ValueError(
            f"Parameter {label!r} of shape {tuple(param.shape)} is not compressed, so it has no low-rank momentum to "
            "watch. Watch a matrix whose smaller side exceeds the rank, in a group without compress=False."
        )
    return compressed
