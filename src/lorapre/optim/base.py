"""What all our optimizers share: groups and their checks, the state's layout, saving and loading.

The state is plain tensors, created when a group is added and never later: the same keys on every rank, loadable
with ``torch.load(weights_only=True)``, and no fake first step for distributed checkpointing.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any, ClassVar, TypeAlias, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from lorapre import factors
from lorapre.backends.batches import Bucket, Scratch
from lorapre.backends.opened import Opened
from lorapre.backends.rounding import Rounding, rounding_of
from lorapre.factors import Coefficient, Regressor
from lorapre.optim.checks import check_lr, check_options, check_rounding
from lorapre.optim.gathering import Alike, by_shape, gathered
from lorapre.optim.gradients import Item, Verdict, check_gradients, refuse_sparse
from lorapre.optim.late import LateVerdict, SettlingOptimizer
from lorapre.optim.options import refuse_changes, refuse_unknown, settings_of
from lorapre.optim.summary import OptimizerSummary, summarize
from lorapre.routing import MatrixView, matrix_view, refuse_unsupported, state_dtype_of

Group: TypeAlias = dict[str, Any]
#: Buckets of one device, and their group.
Work: TypeAlias = list[tuple[list[Bucket], Group]]


@dataclass(frozen=True)
class _AsSaved:
    """Carries a state tensor through ``Optimizer.load_state_dict``, which would cast it to the weight's dtype."""

    value: Any


def _protect_state(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    protected = {
        index: {key: _AsSaved(value) for key, value in state.items()} for index, state in state_dict["state"].items()
    }
    return {**state_dict, "state": protected}


def keywords(arguments: dict[str, Any]) -> dict[str, Any]:
    """The defaults of an optimizer: every option by its name, from its constructor's untouched ``locals()``."""
    return {name: value for name, value in arguments.items() if name not in ("self", "params", "__class__")}


class FactoredOptimizer(SettlingOptimizer):
    """Base of the optimizers whose momenta are factored. Subclasses say what the state of a parameter is.

    Each group may set any option of the constructor, and ``compress`` (default True): False keeps all of the
    group's parameters dense, as `lorapre.param_groups` does for embeddings and heads.
    """

    #: Options that older pickles do not have, with the values by which they went.
    _added: ClassVar[Mapping[str, Any]] = {"stochastic_rounding": False}

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        super().__init__(params, {**defaults, "compress": True})
        check_rounding(self.param_groups)
        self._warn_if_nothing_is_compressed()

    # What a subclass provides.

    def _init_param_state(self, param: Tensor, view: MatrixView | None, group: Group, key: str) -> dict[str, Tensor]:
        """The fresh state of one parameter; ``view`` is None for a dense one, ``key`` seeds random factors."""
        raise NotImplementedError

    def _step_bucket(self, bucket: Bucket, group: Group) -> None:
        """Update the matrices of one bucket and their factors."""
        raise NotImplementedError

    def _step_dense(self, params: list[Tensor], group: Group, mask: Tensor | None) -> None:
        """Update the dense parameters of a group; nothing changes where ``mask`` (0-d bool) is False."""
        raise NotImplementedError

    def _check_group(self, group: Group) -> None:
        """Raise ``ValueError`` for an option that is out of range."""
        check_options(group)

    # Routing.

    @staticmethod
    def _view(param: Tensor, group: Group) -> MatrixView | None:
        return matrix_view(param.shape, group["rank"], group["view_3d"]) if group["compress"] else None

    def _labelled_params(self, group: Group) -> Iterator[tuple[str, Tensor]]:
        """Pairs of (name, or index in the optimizer, as text) and parameter."""
        if "param_names" in group:
            return zip(group["param_names"], group["params"], strict=True)
        before = takewhile(lambda other: other is not group, self.param_groups)
        first = sum(len(other["params"]) for other in before)
        return zip(map(str, count(first)), group["params"], strict=False)

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
            "them keep a dense state. Give a smaller rank, or pass the model's matrices.",
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
            refuse_unknown(type(self).__name__, param_group, self.defaults, _owners_of)
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
        self._remember(group)

    def _remember(self, group: Group) -> None:
        """Keep the group's options, of which a step takes no others unchecked; no copy and no pickle has them."""
        self.__dict__.setdefault("_settings", {})[id(group)] = settings_of(group, self.defaults)

    def _check_changes(self) -> None:
        """Raise ``ValueError`` for an option that was changed since it was last looked at, and must not be so."""
        known: dict[int, dict[str, Any]] = self.__dict__.setdefault("_settings", {})
        for group in self.param_groups:
            before = known.get(id(group), {})
            if before and all(group[name] == value for name, value in before.items()):
                if not isinstance(group["lr"], Tensor):
                    check_lr(group["lr"], group["capturable"])
                continue
            self._check_group(group)
            if before:
                refuse_changes(type(self).__name__, before, group)
            self._remember(group)

    def _init_momentum(self, param: Tensor, view: MatrixView, group: Group, key: str, name: str) -> dict[str, Tensor]:
        """The factors ``{name}_B`` (zeros) and ``{name}_A`` (random; orthonormal rows unless newton inverts them)."""
        dtype, device = self._state_dtype(param, group), param.device
        right = factors.initial_right_factor(
            view.right_shape,
            seed=group["seed"],
            key=f"{key}.{name}_A",
            dtype=dtype,
            device=device,
            orthonormal=group["regression"] != "newton",
        )
        return {f"{name}_B": torch.zeros(view.left_shape, dtype=dtype, device=device), f"{name}_A": right}

    def _init_average(self, param: Tensor, view: MatrixView, group: Group, size: int) -> Tensor:
        """Zeros, ``size`` of them for each matrix: averages over its rows or columns."""
        shape = (*view.left_shape[:-2], size)
        return torch.zeros(shape, dtype=self._state_dtype(param, group), device=param.device)

    @staticmethod
    def _regressor(group: Group) -> Regressor:
        return Regressor(group["regression"], group["damping"], group["damping_mode"])

    @staticmethod
    def _new_step(param: Tensor, group: Group) -> Tensor:
        """A float32 counter, on the CPU unless a CUDA graph is to advance it: reading it must not wait."""
        return torch.zeros((), dtype=torch.float32, device=param.device if group["capturable"] else "cpu")

    @staticmethod
    def _state_dtype(param: Tensor, group: Group) -> torch.dtype:
        return state_dtype_of(param.dtype, group["state_dtype"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as it was saved: factors keep their dtype whatever the weights' is.

        Raises:
            ValueError: the state belongs to another optimizer or to parameters of other shapes; nothing has
                been changed then.
            NonFiniteGradientError: see `settle`; nothing has been changed then.
        """
        self.settle()
        # Registered last, so that it sees what the user's own pre-hooks return.
        handle = self.register_load_state_dict_pre_hook(_protect_state)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Reached from load_state_dict (no "defaults" yet) and from unpickling (nothing set yet).
        defaults = state.get("defaults", getattr(self, "defaults", {}))
        if "defaults" in state:
            for name, value in self._added.items():
                defaults.setdefault(name, value)
        for group in state["param_groups"]:
            for key, value in defaults.items():
                group.setdefault(key, value)
            for position, param in enumerate(group["params"]):
                label = group["param_names"][position] if "param_names" in group else f"number {position}"
                loaded = state["state"].get(param, {})
                state["state"][param] = self._restore_param_state(param, group, loaded, label)
        super().__setstate__(state)
        self.__dict__.pop("_settings", None)
        for group in self.param_groups:
            self._remember(group)

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

    # The step.

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; those without keep their state and step count.

        Args:
            closure: reevaluates the model with gradients and returns the loss.

        Raises:
            RuntimeError: a gradient is sparse; nothing has changed then.
            ValueError: an option was set that is out of range, or that the state was made by; nothing has changed then.
            NonFiniteGradientError: a gradient is not finite (see ``nonfinite``), or one was not in the step before
                (see `settle`); nothing has changed then.
        """
        self.settle()
        self._check_graph_capture()
        self._check_changes()
        loss = cast("float | None", run_closure(closure))
        items, grads = self._items_with_grad()
        refuse_sparse(type(self).__name__, items, grads)
        work: Work = []
        scratch = Scratch()
        dense_of: list[tuple[list[Tensor], Group]] = []
        for group in self.param_groups:
            dense: list[Tensor] = []
            matrices: list[Alike] = []
            for params in by_shape(param for param in group["params"] if param.grad is not None).values():
                view = self._view(params[0], group)
                if view is None:
                    dense += params
                else:
                    matrices.append((view, params))
            work += self._gathered(matrices, group, scratch)
            if dense:
                dense_of.append((dense, group))
        opened = self._open(work)
        capturable = all(group["capturable"] for group in self.param_groups)
        answer = check_gradients(
            type(self).__name__, items, grads, opened, unread=capturable, squared=self._squares_in_float32
        )
        if answer is False:
            return loss
        mask = answer.enabled if isinstance(answer, Verdict) else None
        late: LateVerdict | None = None
        if isinstance(answer, Verdict) and not capturable:
            # Before the launches: it travels while the device works.
            counters = [
                one for buckets, group in work if not group["capturable"] for b in buckets for one in b.counters
            ]
            counters += [
                self.state[param]["step"] for some, group in dense_of if not group["capturable"] for param in some
            ]
            late = LateVerdict(answer, counters)
        self._proceed(opened, work, mask)
        scratch.clear()
        for dense, group in dense_of:
            self._step_dense(dense, group, mask)
        self._late = late
        return loss

    def _step_matrices(self, matrices: list[Alike], group: Group, mask: Tensor | None) -> None:
        work = self._gathered(matrices, group, Scratch())
        self._proceed(self._open(work), work, mask)

    def _gathered(self, matrices: list[Alike], group: Group, scratch: Scratch) -> Work:
        def rounding(params: list[Tensor]) -> Rounding | None:
            return self._rounding(params, group)

        return [(together, group) for together in gathered(matrices, group, self.state, rounding, scratch)]

    def _open(self, work: Work) -> Opened:
        """Begin the step of all matrices; here they are stepped bucket by bucket, and nothing is done before."""

        def proceed(enabled: Tensor | None) -> None:
            for buckets, group in work:
                for bucket in buckets:
                    self._step_bucket(bucket.where(enabled), group)

        return Opened(proceed)

    def _proceed(self, opened: Opened, work: Work, mask: Tensor | None) -> None:
        opened.proceed(mask)
        for buckets, group in work:
            for bucket in buckets:
                steps = bucket.counters
                if mask is None or not group["capturable"]:  # on the CPU, where nobody waits for the mask
                    one = torch.ones_like(steps[0])
                else:
                    one = mask.to(steps[0].device, steps[0].dtype)
                # As a list: given one tensor, the CUDA kernel asks the host for its value, and the CPU, given a number,
                # makes a tensor of it for each counter.
                torch._foreach_add_(steps, [one] * len(steps))

    def _rounding(self, params: list[Tensor], group: Group) -> Rounding | None:
        """How ``params`` of one dtype are rounded; None is to nearest."""
        everyone = (param for other in self.param_groups for param in other["params"])
        return rounding_of(params, everyone, on=group["stochastic_rounding"], seed=group["seed"])

    @staticmethod
    def _lr(group: Group, device: torch.device) -> Coefficient:
        """The learning rate as a float, or as a 0-d tensor on ``device`` where the step may not read its value."""
        lr: Coefficient = group["lr"]
        if isinstance(lr, Tensor):
            # Only a captured step may not read the value: it must follow the tensor when the graph is replayed.
            lr = lr.to(device).reshape(()) if group["capturable"] else lr.item()
        return lr

    # Gradients.

    def _squares_in_float32(self, param: Tensor, group: Group) -> bool:
        """Whether the step sums squares of this parameter's gradient in float32: of its rows, or of its projections."""
        if self._view(param, group) is None:
            return False
        width = torch.promote_types(self._state_dtype(param, group), param.dtype)
        return torch.promote_types(width, torch.float32) == torch.float32

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

    def _items_with_grad(self) -> tuple[list[Item], list[Tensor]]:
        """Every parameter that has a gradient, and these gradients."""
        items: list[Item] = []
        grads: list[Tensor] = []
        for group in self.param_groups:
            for label, param in self._labelled_params(group):
                grad = param.grad
                if grad is not None:
                    items.append((label, param, group))
                    grads.append(grad)
        return items, grads


def _owners_of(option: str) -> list[str]:
    """The optimizers of this package that have an option."""
    classes: list[type] = [FactoredOptimizer]
    for cls in classes:
        classes += cls.__subclasses__()
    own = [cls for cls in classes if cls.__module__.startswith("lorapre.") and "__init__" in vars(cls)]
    return sorted(cls.__name__ for cls in own if option in inspect.signature(cls).parameters)


def run_closure(closure: Callable[[], Any] | None) -> Any:
    """Evaluate a closure with gradients on, as every torch optimizer does inside its own no_grad."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
