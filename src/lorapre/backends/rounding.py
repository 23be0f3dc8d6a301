"""Stochastic rounding to bfloat16: up or down by chance, so that the mean is the exact value.

Nearest rounding loses every update below 1/512 of a weight; rounded like this it arrives on average. The chance comes
from Philox-4x32 (Salmon and others, SC 2011), which makes a number out of a key and a counter and keeps no state: the
key is the seed, the counter says which number of which matrix of which parameter at which step. Nothing depends on how
the work is cut, and the Triton kernels, which draw the same bits, round the same number alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lorapre.factors import Coefficient

#: Rounds of Philox; 7 are the fewest that pass BigCrush.
ROUNDS = 7

#: Numbers that are rounded at once, and the same on a CPU, whose caches hold so many.
NUMEL = 2**20
CACHED_NUMEL = 2**15

#: Bytes of what rounding one number holds at once.
SCRATCH_BYTES = 96

#: Numbers of 32 bits, as an int or in an int64 tensor.
_Word: TypeAlias = int | Tensor
_MASK = 2**32 - 1
_FACTORS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85


@dataclass(frozen=True)
class Rounding:
    """How the weights of a bucket are rounded.

    Attributes:
        seed: 0 to 2^63 - 1.
        streams: a number below 2^32 for each parameter, nobody else's.
    """

    seed: int
    streams: tuple[int, ...]

    def part(self, which: slice) -> Rounding:
        """That of some of the parameters."""
        return Rounding(self.seed, self.streams[which])


def rounding_of(params: Sequence[Tensor], everyone: Iterable[Tensor], *, on: bool, seed: int) -> Rounding | None:
    """The `Rounding` of ``params``, of one dtype; None, to nearest, unless it is ``on`` and they are bfloat16.

    A parameter's stream is its place among ``everyone``, all parameters of the optimizer, by which a checkpoint knows
    it too.
    """
    if not on or params[0].dtype != torch.bfloat16:
        return None
    places = {param: place for place, param in enumerate(everyone)}
    return Rounding(seed % 2**63, tuple(places[param] for param in params))


def scratch_bytes(numel: int, device: torch.device) -> int:
    """What `round_` allocates at most for ``numel`` numbers on ``device``."""
    return SCRATCH_BYTES * min(numel, _at_once(device))


def round_(values: Tensor, *, seed: int, stream: int, step: Coefficient, numel: int) -> None:
    """Replace each number by one of its two neighbours in bfloat16, in place, so that the mean is the number.

    float64 is rounded to float32 first, whose error is 2^-16 of a bfloat16's. What is not finite stays. Numbers of one
    matrix that are 2^32 apart are rounded by the same draw.

    Args:
        values: float32 or float64, contiguous, in the order of the parameter's elements.
        seed: the key, 0 to 2^63 - 1.
        stream: of the parameter.
        step: number of the step, a float or a 0-d tensor on the device, which stays unread.
        numel: numbers of a matrix; ``values`` are one of them or several behind each other.
    """
    flat = values.view(-1)
    when = step.to(torch.int64) if isinstance(step, Tensor) else int(step)
    size = _at_once(values.device)
    for start in range(0, flat.numel(), size):
        piece = flat[start : start + size]
        element: Tensor = torch.arange(start, start + piece.numel(), device=values.device)
        number: _Word = 0
        if flat.numel() > numel:
            number = element // numel
            element = element % numel
        noise = (draw(element.bitwise_and_(_MASK), number, when, stream, seed) >> 16).to(torch.int32)
        single = piece.float()
        bits = single.view(torch.int32)
        # The noise may carry into the exponent, as it must, but not out of infinity or nan.
        rounded = torch.where(single.isfinite(), noise.add_(bits).bitwise_and_(-0x10000), bits)
        piece.copy_(rounded.view(torch.float32))


def draw(element: Tensor, number: _Word, step: _Word, stream: _Word, seed: int) -> Tensor:
    """The first word of Philox-4x32 with `ROUNDS` rounds, in an int64 tensor like ``element``.

    The counter is (element, number, step, stream), 32 bits each; the key is ``seed``, low word first.
    """
    c0: _Word = element
    c1, c2, c3 = number, step, stream
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(ROUNDS):
        high_0, low_0 = _product(c0, _FACTORS[0])
        high_2, low_2 = _product(c2, _FACTORS[1])
        high_2, high_0 = high_2 ^ c1, high_0 ^ c3
        high_2 ^= k0
        high_0 ^= k1
        c0, c1, c2, c3 = high_2, low_2, high_0, low_0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    assert isinstance(c0, Tensor)  # ``element`` has reached every word
    return c0


def _product(word: _Word, factor: int) -> tuple[_Word, _Word]:
    """The high and the low 32 bits of ``word * factor``, a product of 64 bits without a sign.

    int64 has no room for it. With 2^32 taken off the factor, which is above 2^31, the product stays within 2^63, its
    low half is the same, and its high half lacks one ``word``.
    """
    low = word * (factor - 2**32)
    high = low >> 32
    high += word
    low &= _MASK
    return high, low


def _at_once(device: torch.device) -> int:
    return CACHED_NUMEL if device.type == "cpu" else NUMEL
