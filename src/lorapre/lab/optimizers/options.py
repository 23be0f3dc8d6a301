"""An optimizer's own keywords, as ``--set NAME=VALUE`` sets them: which there are, their types, their written form."""

from __future__ import annotations

import contextlib
import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from lorapre.routing import state_dtype_of

#: Keywords that recipes give themselves, and what sets them instead.
OWNED: Mapping[str, str] = {
    "params": "the model gives them",
    "lr": "--lr sets it",
    "rank": "--rank sets it",
    "betas": "--beta1 and --beta2 set them",
    "weight_decay": "--weight-decay sets it",
    "seed": "--seed sets it",
    "maximize": "a loss is always minimised",
    "capturable": "no step is captured in a graph here",
    "nonfinite": "a gradient that is not finite always ends a run",
    "view_3d": "the kind of each module decides",
}

_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Option:
    """One keyword of an optimizer's class.

    Attributes:
        kind: its annotation, evaluated.
        default: what it is where it is not set.
    """

    kind: Any
    default: Any

    def read(self, value: Any) -> Any:
        """``value`` as the class takes it: a dtype by its name, a tuple as a list, 1e-8 and 1/4 as numbers.

        YAML has no words for these: 1e-8 without a point is text to it.

        Raises:
            ValueError: it is of another type, or not finite; the message says what it must be.
        """
        adapter: TypeAdapter[Any] = TypeAdapter(self.kind, config=_STRICT)
        try:
            return adapter.validate_python(value)
        except ValidationError as error:
            for other in _other_readings(value):
                try:
                    return adapter.validate_python(other)
                except ValidationError:
                    continue
            raise ValueError(self._expected(error)) from None

    def _expected(self, error: ValidationError) -> str:
        kinds = typing.get_args(self.kind)
        messages = dict.fromkeys(problem["msg"].removeprefix("Input should be ") for problem in error.errors())
        if torch.dtype in (self.kind, *kinds):
            messages = {"the name of a torch.dtype, such as bfloat16": None}
        return f"must be {' or '.join([*messages, *(['null'] if type(None) in kinds else [])])}"


def _other_readings(value: Any) -> list[Any]:
    if isinstance(value, list):
        return [tuple(value)]
    if not isinstance(value, str):
        return []
    found: list[Any] = [getattr(torch, value)] if isinstance(getattr(torch, value, None), torch.dtype) else []
    with contextlib.suppress(ValueError, ZeroDivisionError, OverflowError):
        found.append(float(Fraction(value)))
    return found


def options_of(
    kind: type[torch.optim.Optimizer],
    preset: Mapping[str, Any] | None = None,
    owned: Mapping[str, str] = OWNED,
) -> dict[str, Option]:
    """The keywords of ``kind`` that a recipe may set, read from its signature.

    Args:
        kind: the class.
        preset: what the recipe gives the class in place of some defaults.
        owned: keywords that the recipe gives, or that mean nothing in it.
    """
    given = {"self", *owned}
    return {
        name: Option(parameter.annotation, (preset or {}).get(name, parameter.default))
        for name, parameter in inspect.signature(kind.__init__, eval_str=True).parameters.items()
        if name not in given and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def defaults(options: Mapping[str, Option]) -> dict[str, Any]:
    """What each of ``options`` is where it is not set."""
    return {name: option.default for name, option in options.items()}


def recorded(value: Any) -> Any:
    """What `Option.read` gave, as YAML and JSON hold it."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return list(value) if isinstance(value, tuple) else value


def written(options: Mapping[str, Any]) -> list[str]:
    """``NAME=VALUE`` of each of ``options``, sorted by name, the values as YAML writes them."""
    return [f"{name}={_scalar(options[name])}" for name in sorted(options)]


def _scalar(value: Any) -> str:
    text: str = yaml.safe_dump(recorded(value), default_flow_style=True, width=float("inf"))
    return text.removesuffix("...\n").strip().replace(", ", ",")


def state_width(options: Mapping[str, Any]) -> int:
    """Bytes of one number of the state of float32 weights; ``state_dtype`` may be a dtype or its name."""
    dtype = options.get("state_dtype")
    return state_dtype_of(torch.float32, getattr(torch, dtype) if isinstance(dtype, str) else dtype).itemsize
