"""May this step be taken? Every gradient must be dense and finite, and a compressed matrix's squares too."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lorapre.backends.opened import Opened

logger = logging.getLogger("lorapre")

#: Label, parameter and group of a parameter that has a gradient.
Item: TypeAlias = tuple[str, Tensor, dict[str, Any]]
#: No sum of squares of fewer than 3e14 numbers that are not above this is beyond float32.
_SMALL = 1e12


class NonFiniteGradientError(RuntimeError):
    """A gradient holds inf or nan, or its squares do, and ``nonfinite`` is "raise". The step has changed nothing."""


@dataclass(frozen=True)
class Verdict:
    """What the device knows of the gradients, and the host does not yet.

    Attributes:
        owner: the optimizer's name, for messages.
        items: those whose gradients were looked at, in their order.
        sizes: one number for each of them on one device: its largest magnitude or the sum of its squares, or inf or
            nan where it is not finite or its squares are not. Of a stack of matrices, one for each.
        places: the item of each number.
        enabled: 0-d bool: all of them are finite.
    """

    owner: str
    items: Sequence[Item]
    sizes: Tensor
    places: Sequence[int]
    enabled: Tensor

    def bad(self, sizes: Tensor) -> list[Item]:
        """The items that are not finite, by ``sizes`` as they have arrived at the host."""
        finite = sizes.isfinite()
        if finite.all():
            return []
        numbers = zip(self.places, finite.tolist(), strict=True)
        return [self.items[place] for place in sorted({place for place, finite in numbers if not finite})]


def check_gradients(
    owner: str,
    items: list[Item],
    grads: list[Tensor],
    opened: Opened,
    *,
    unread: bool,
    squared: Callable[[Tensor, dict[str, Any]], bool],
) -> Verdict | bool:
    """Whether this step may be taken: every gradient is dense and finite, and so are its squares where they are summed.

    Where kernels take part the answer stays on the device, and the gradients that they have read are not read again.
    Gradients on devices of several types are the exception: a step on the CPU cannot ask a GPU for its mask.

    Args:
        owner: the optimizer's name, for messages.
        items: every parameter that has a gradient.
        grads: these gradients. A verdict has none of them, which would live until it is read.
        opened: what has been begun with some of them.
        unread: leave the answer on the device in any case; a graph cannot wait for the host.
        squared: whether a parameter of a group is one of those whose gradient's squares are summed in float32.

    Returns:
        True, or False for a step to be skipped; a verdict that is still to be read where ``unread`` or by kernels.

    Raises:
        NonFiniteGradientError: one is not finite in a group whose ``nonfinite`` is "raise".
    """
    sizes = list(map(Tensor.numel, grads))
    if not all(sizes):
        items, grads = list(compress(items, sizes)), list(compress(grads, sizes))
    if not items:
        return True
    by_device = unread or opened.by_kernels
    if not by_device and (largest(grads) <= _SMALL).all():
        return True
    verdict = _verdict(owner, items, grads, opened, squared)
    if unread or (by_device and len(device_types(grads)) == 1):
        return verdict
    if verdict.enabled:
        return True
    report(owner, verdict.bad(verdict.sizes), "Nothing was changed")
    return False


def device_types(grads: Iterable[Tensor]) -> set[str]:
    """Where the gradients are."""
    return {device.type for device in {grad.device for grad in grads}}


def refuse_sparse(owner: str, items: list[Item], grads: list[Tensor]) -> None:
    """Raise ``RuntimeError`` for a gradient that is sparse."""
    if {grad.layout for grad in grads} <= {torch.strided}:
        return
    for (label, _, _), grad in zip(items, grads, strict=True):
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"{owner} does not support sparse gradients (parameter {label!r}). Build its nn.Embedding with "
                "sparse=False, or give the parameter to torch.optim.SparseAdam."
            )


def report(owner: str, bad: Sequence[Item], outcome: str) -> None:
    """Say that a step is left out: by the group of the first of the ``bad`` ones, a warning or an error.

    Raises:
        NonFiniteGradientError: that group's ``nonfinite`` is "raise".
    """
    label, _, group = bad[0]
    if (group["nonfinite"] or ("skip" if group["capturable"] else "raise")) != "raise":
        logger.warning(
            "%s skips a step: the gradient of parameter %r holds inf or nan, or its squares do", owner, label
        )
        return
    others = f" (and those of {len(bad) - 1} more)" if len(bad) > 1 else ""
    raise NonFiniteGradientError(
        f"{owner}: the gradient of parameter {label!r}{others} holds inf or nan, or its squares do. {outcome}. Look "
        "for the overflow, clip, or use nonfinite='skip' to leave such steps out."
    )


def largest(tensors: Sequence[Tensor]) -> Tensor:
    """The largest magnitude of each tensor (k,), nan where it holds one; on the first's device, nobody waits."""
    device = tensors[0].device
    # float16 and bfloat16 widen without loss; a large float64 must not become inf by narrowing.
    widest = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    # A maximum norm takes one launch on a GPU, and ten times as long as both extremes on a CPU; nan is an extreme.
    on_cpu, elsewhere = ([t for t in tensors if (t.device.type == "cpu") == cpu] for cpu in (True, False))
    extremes = [extreme.to(widest) for tensor in on_cpu for extreme in torch.aminmax(tensor)]
    of_cpu = iter(torch.stack(extremes).abs().view(-1, 2).amax(dim=1).unbind() if extremes else ())
    norms = iter(torch._foreach_norm(elsewhere, float("inf")) if elsewhere else ())
    found = [next(of_cpu if tensor.device.type == "cpu" else norms) for tensor in tensors]
    if len({(value.device, value.dtype) for value in found}) == 1:  # one conversion instead of one each
        return torch.stack(found).to(widest)
    return torch.stack([value.to(device, widest) for value in found])


def _sizes(
    items: Sequence[Item],
    grads: Sequence[Tensor],
    places: Iterable[int],
    squared: Callable[[Tensor, dict[str, Any]], bool],
) -> tuple[list[Tensor], list[int]]:
    """The largest magnitudes of the gradients at ``places``, inf where its square times the numbers overflows float32.

    In one or two parts, each on the device of one of its gradients; the items come in the order that is returned.
    """
    summed: list[int] = []
    others: list[int] = []
    for place in places:
        _, param, group = items[place]
        (summed if squared(param, group) else others).append(place)
    parts = [largest([grads[place] for place in some]) for some in (summed, others) if some]
    if summed:
        most = max(grads[place].numel() for place in summed)
        limit = math.sqrt(torch.finfo(torch.float32).max / most)
        parts[0] = parts[0].masked_fill(parts[0] > limit, float("inf"))
    return parts, summed + others


def _verdict(
    owner: str,
    items: list[Item],
    grads: list[Tensor],
    opened: Opened,
    squared: Callable[[Tensor, dict[str, Any]], bool],
) -> Verdict:
    """The sums that ``opened`` has, and the largest magnitude of every gradient that it has not read."""
    device = grads[0].device
    at = {id(param): place for place, (_, param, _) in enumerate(items)}
    sizes, places = [squares.to(device) for squares in opened.squares], [at[id(param)] for param in opened.read]
    unseen = sorted(set(range(len(items))).difference(places))
    if unseen:
        parts, order = _sizes(items, grads, unseen, squared)
        sizes += [part.to(device) for part in parts]
        places += order
    together = torch.cat(sizes) if len({size.dtype for size in sizes}) == 1 else torch.cat([s.double() for s in sizes])
    # None is negative, and nan is the largest of all.
    return Verdict(owner, items, together, places, together.amax() < float("inf"))
