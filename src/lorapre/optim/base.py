"""What all our optimizers share: groups and their checks, the state's layout, saving and loading.

The state is plain tensors, created when a group is added and never later: the same keys on every rank, loadable
with ``torch.load(weights_only=True)``, and no fake first step for distributed checkpointing.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from lorapre.optim.summary import OptimizerSummary, summarize
from lorapre.routing import MatrixView, check_rank, matrix_view, refuse_unsupported, state_dtype_of

logger = logging.getLogger("lorapre")

Group: TypeAlias = dict[str, Any]


class NonFiniteGradientError(RuntimeError):
    """A gradient holds inf or nan and ``nonfinite`` is "raise". The step has changed nothing."""


@dataclass(frozen=True)
class _AsSaved:
    """Carries a state tensor through ``Optimizer.load_state_dict``, which would cast it to the weight's dtype."""

    value: Any


def _protect_state(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    protected = {
        index: {key: _AsSaved(value) for key, value in state.items()} for index, state in state_dict["state"].items()
    }
    return {**state_dict, "state": protected}


class FactoredOptimizer(Optimizer):
    """Base of the optimizers whose momenta are factored. Subclasses say what the state of a parameter is.

    Each group may set any option of the constructor, and ``compress`` (default True): False keeps all of the
    group's parameters dense, as `lorapre.param_groups` does for embeddings and heads.
    """

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        super().__init__(params, {**defaults, "compress": True})
        self._warn_if_nothing_is_compressed()

    # What a subclass provides.

    def _init_param_state(self, param: Tensor, view: MatrixView | None, group: Group, key: str) -> dict[str, Tensor]:
        """The fresh state of one parameter; ``view`` is None for a dense one, ``key`` seeds random factors."""
        raise NotImplementedError

    def _check_group(self, group: Group) -> None:
        """Raise ``ValueError`` for an option that is out of range."""
        _check_lr(group["lr"], group["capturable"])
        for name in ("eps", "weight_decay", "scale"):
            if not group[name] >= 0:
                raise ValueError(f"Invalid {name} value: {group[name]}. It must be at least 0.")
        check_rank(group["rank"])
        if not group["damping"] > 0:
            raise ValueError(
                f"Invalid damping value: {group['damping']}. It must be above 0, or the first step, whose left "
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

    # Routing.

    @staticmethod
    def _view(param: Tensor, group: Group) -> MatrixView | None:
        return matrix_view(param.shape, group["rank"], group["view_3d"]) if group["compress"] else None

    def _labelled_params(self, group: Group) -> Iterator[tuple[str, Tensor]]:
        """Pairs of (name, or index in the optimizer, as text) and parameter."""
        if "param_names" in group:
            yield from zip(group["param_names"], group["params"], strict=True)
            return
        first = 0
        for other in self.param_groups:
            if other is group:
                break
            first += len(other["params"])
        for offset, param in enumerate(group["params"]):
            yield str(first + offset), param

    def summary(self) -> OptimizerSummary:
        """What is compressed and what is not, in tensors, numbers and bytes of state; prints as a table."""
        return summarize(self, self._view)

    def _warn_if_nothing_is_compressed(self) -> None:
        if any(self._view(param, group) is not None for group in self.param_groups for param in group["params"]):
            return
        count = sum(len(group["params"]) for group in self.param_groups)
        ranks = sorted({group["rank"] for group in self.param_groups if group["compress"]})
        frame, level = inspect.currentframe(), 1  # blame the first caller outside this package
        while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "lorapre":
            frame, level = frame.f_back, level + 1
        warnings.warn(
            f"{type(self).__name__} compresses nothing: none of its {count} parameters is a matrix whose smaller "
            f"side exceeds the rank ({', '.join(map(str, ranks)) or 'no group is to be compressed'}). All of "
            "them are updated by plain AdamW. Give a smaller rank, or pass the model's matrices.",
            UserWarning,
            stacklevel=level,
        )

    # State.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and create its state at once.

        Raises:
            ValueError: an option is out of range, or a parameter is in two groups.
            TypeError: a parameter is complex, sharded or flattened.
        """
        if isinstance(param_group, dict):
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for label, param in self._labelled_params(group):
                refuse_unsupported(param, f"Parameter {label!r} of {type(self).__name__}")
                self.state[param] = self._init_param_state(param, self._view(param, group), group, label)
        except Exception:
            self.param_groups.pop()
            for param in group["params"]:
                self.state.pop(param, None)
            raise

    @staticmethod
    def _new_step(param: Tensor, group: Group) -> Tensor:
        """A float32 counter, on the CPU unless a CUDA graph is to advance it: reading it must not wait."""
        return torch.zeros((), dtype=torch.float32, device=param.device if group["capturable"] else "cpu")

    @staticmethod
    def _state_dtype(param: Tensor, group: Group) -> torch.dtype:
        return state_dtype_of(param.dtype, group["state_dtype"])

    def _init_dense_state(self, param: Tensor, group: Group) -> dict[str, Tensor]:
        dtype = self._state_dtype(param, group)
        return {
            "step": self._new_step(param, group),
            "exp_avg": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as it was saved: factors keep their dtype whatever the weights' is.

        Raises:
            ValueError: the state belongs to another optimizer or to parameters of other shapes; nothing has
                been changed then.
        """
        # Registered last, so that it sees what the user's own pre-hooks return.
        handle = self.register_load_state_dict_pre_hook(_protect_state)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Reached from load_state_dict (no "defaults" yet) and from unpickling (nothing set yet).
        defaults = state.get("defaults", getattr(self, "defaults", {}))
        for group in state["param_groups"]:
            for key, value in defaults.items():
                group.setdefault(key, value)
            for position, param in enumerate(group["params"]):
                label = group["param_names"][position] if "param_names" in group else f"number {position}"
                loaded = state["state"].get(param, {})
                state["state"][param] = self._restore_param_state(param, group, loaded, label)
        super().__setstate__(state)

    def _restore_param_state(self, param: Tensor, group: Group, loaded: dict[str, Any], label: str) -> dict[str, Any]:
        expected = self._init_param_state(param.to("meta"), self._view(param, group), group, label)
        missing = sorted(expected.keys() - loaded.keys())
        if missing:
            raise ValueError(
                f"The loaded state of parameter {label} lacks {', '.join(missing)} (it holds "
                f"{', '.join(sorted(map(str, loaded))) or 'nothing'}). It was saved by another optimizer or with "
                "another second_moment; build the optimizer with the options that wrote the checkpoint."
            )
        restored: dict[str, Any] = {}
        for key, value in loaded.items():
            value = value.value if isinstance(value, _AsSaved) else value
            if key == "step":
                device = param.device if group["capturable"] else torch.device("cpu")
                value = torch.as_tensor(value, dtype=torch.float32).to(device)
            elif isinstance(value, Tensor):
                if key in expected and value.shape != expected[key].shape:
                    raise ValueError(
                        f"The loaded state {key} of parameter {label} has shape {tuple(value.shape)}; a weight of "
                        f"shape {tuple(param.shape)} at rank {group['rank']} needs {tuple(expected[key].shape)}. "
                        "The checkpoint belongs to another model."
                    )
                value = value.to(param.device)
            restored[key] = value
        return restored

    # Gradients.

    def _check_graph_capture(self) -> None:
        """Raise ``RuntimeError`` inside a CUDA graph capture unless every group is ``capturable``."""
        if all(group["capturable"] for group in self.param_groups):
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{type(self).__name__}.step() is being captured in a CUDA graph, but was built with "
                "capturable=False: its step counters are on the CPU and would stand still in the graph. Build it "
                "with capturable=True."
            )

    def _labels_with_grad(self) -> Iterator[tuple[str, Tensor, Group]]:
        for group in self.param_groups:
            for label, param in self._labelled_params(group):
                if param.grad is not None:
                    yield label, param, group

    def _check_gradients(self) -> Tensor | bool:
        """Whether this step may be taken: every gradient is dense and finite.

        Returns a 0-d bool tensor on the device, unread, where every group is ``capturable`` (a graph cannot
        wait for the host); else True, or False for a step to be skipped.

        Raises:
            RuntimeError: a gradient is sparse.
            NonFiniteGradientError: one is not finite in a group whose ``nonfinite`` is "raise".
        """
        items = list(self._labels_with_grad())
        for label, param, _ in items:
            if param.grad is not None and param.grad.layout != torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients (parameter {label!r}). Build its "
                    "nn.Embedding with sparse=False, or give the parameter to torch.optim.SparseAdam."
                )
        grads = [param.grad for _, param, _ in items if param.grad is not None and param.grad.numel() > 0]
        if not grads:
            return True
        finite = all_finite(grads)
        if all(group["capturable"] for group in self.param_groups):
            return finite
        if finite:
            return True
        for label, param, group in items:
            if param.grad is None or bool(param.grad.isfinite().all()):
                continue
            message = f"the gradient of parameter {label!r} holds inf or nan"
            if (group["nonfinite"] or ("skip" if group["capturable"] else "raise")) == "raise":
                raise NonFiniteGradientError(
                    f"{type(self).__name__}: {message}. Nothing was changed. Look for the overflow, clip, or use "
                    "nonfinite='skip' to leave such steps out."
                )
            logger.warning("%s skips a step: %s", type(self).__name__, message)
            break
        return False


def run_closure(closure: Callable[[], Any] | None) -> Any:
    """Evaluate a closure with gradients on, as every torch optimizer does inside its own no_grad."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def all_finite(tensors: list[Tensor]) -> Tensor:
    """A 0-d bool tensor on the first tensor's device: one reduction over all, no host synchronisation."""
    device = tensors[0].device
    norms = torch._foreach_norm(tensors, float("inf"))
    # float16 and bfloat16 widen without loss; a large float64 must not become inf by narrowing.
    widest = torch.float64 if any(norm.dtype == torch.float64 for norm in norms) else torch.float32
    return torch.stack([norm.to(device, widest) for norm in norms]).isfinite().all()


def check_choice(name: str, value: Any, allowed: tuple[str | None, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"Invalid {name}: {value!r}. Choose one of {', '.join(map(repr, allowed))}.")


def check_betas(betas: tuple[float, float]) -> None:
    """Raise ``ValueError`` unless both decay rates lie in [0, 1), worded as torch.optim words it."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas!r}. Give a pair, such as (0.9, 0.95).")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}. It must be in [0, 1).")


def _check_lr(lr: float | Tensor, capturable: bool) -> None:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, but it has shape {tuple(lr.shape)}.")
    if not (isinstance(lr, Tensor) and capturable) and not lr >= 0:
        raise ValueError(f"Invalid learning rate: {lr}. It must be at least 0.")
