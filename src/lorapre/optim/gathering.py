"""Parameters by what must be equal within a batch, in every step: each look at each tensor counts.

Nothing is remembered from step to step. Tensors may be swapped under a parameter or a state at any time, and to see
that they were not takes as long as to look at them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import repeat
from operator import attrgetter, itemgetter
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from lorapre.backends.batches import Bucket, Scratch
from lorapre.backends.rounding import Rounding
from lorapre.optim.checks import sweep_interval
from lorapre.routing import MatrixView

_device, _dtype = attrgetter("device"), attrgetter("dtype")

#: Parameters of one shape, with how each of them is a batch of matrices.
Alike: TypeAlias = tuple[MatrixView, list[Tensor]]


def by_shape(params: Iterable[Tensor]) -> dict[torch.Size, list[Tensor]]:
    """The parameters of each shape, which all that is decided from shapes asks for once."""
    found: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for param in params:
        found[param.shape].append(param)
    return found


def gathered(
    matrices: Iterable[Alike],
    group: dict[str, Any],
    states: Mapping[Tensor, dict[str, Tensor]],
    rounding: Callable[[list[Tensor]], Rounding | None],
    scratch: Scratch,
) -> list[list[Bucket]]:
    """Buckets of what is equal in shape, device, both dtypes and count; those of each device together.

    Args:
        matrices: parameters of a group, which have gradients; no shape twice.
        group: theirs.
        states: of each.
        rounding: of parameters of one dtype.
        scratch: for all of them.
    """
    by_device: dict[torch.device, list[Bucket]] = defaultdict(list)
    for view, params in matrices:
        for (device, _, _, count), (some, kept) in _alike(params, group, states).items():
            # Steps are counted from 1, and the first one sweeps: a random basis tracks nothing.
            sweeps = count is None or count % sweep_interval(group) == 0
            steps = [state["step"] for state in kept]
            bucket = Bucket(
                view=view,
                params=some,
                grads=cast("list[Tensor]", [param.grad for param in some]),
                state={key: [state[key] for state in kept] for key in kept[0] if key != "step"},
                step=torch.stack(steps) + 1 if count is None else count + 1.0,
                maximize=group["maximize"],
                sweeps=sweeps,
                rounding=rounding(some),
                counters=steps,
                scratch=scratch,
            )
            by_device[device].append(bucket)
    return list(by_device.values())


_Key: TypeAlias = tuple[torch.device, torch.dtype, torch.dtype, float | None]
_Batch: TypeAlias = tuple[list[Tensor], list[dict[str, Tensor]]]


def _alike(
    params: list[Tensor], group: dict[str, Any], states: Mapping[Tensor, dict[str, Tensor]]
) -> dict[_Key, _Batch]:
    """Parameters and their states by device, dtype, dtype of the state, and steps taken."""
    kept = [states[param] for param in params]
    first = itemgetter(next(key for key in kept[0] if key != "step"))
    # Counters on the device stay unread; a batch then carries one coefficient a matrix.
    counts = repeat(None) if group["capturable"] else map(Tensor.item, map(itemgetter("step"), kept))
    keys = list(zip(map(_device, params), map(_dtype, params), map(_dtype, map(first, kept)), counts, strict=False))
    if len(set(keys)) == 1:  # without a line of Python for each
        return {keys[0]: (params, kept)}
    found: dict[_Key, _Batch] = defaultdict(lambda: ([], []))
    for key, param, state in zip(keys, params, kept, strict=True):
        some, theirs = found[key]
        some.append(param)
        theirs.append(state)
    return found
