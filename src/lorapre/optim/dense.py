"""AdamW for what is not compressed: torch's own, on states of any dtype."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lorapre.backends.rounding import round_
from lorapre.optim.base import FactoredOptimizer, Group


class DenseAdamW(FactoredOptimizer):
    """A `FactoredOptimizer` whose dense parameters take AdamW; groups hold ``betas``, ``eps``, ``weight_decay``."""

    def _init_dense_state(self, param: Tensor, group: Group) -> dict[str, Tensor]:
        dtype = self._state_dtype(param, group)
        return {
            "step": self._new_step(param, group),
            "exp_avg": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format),
        }

    def _step_dense(self, params: list[Tensor], group: Group, mask: Tensor | None) -> None:
        """torch's own AdamW; weights narrower than their state are updated through a wide copy."""
        states = [self.state[param] for param in params]
        grads = [cast(Tensor, param.grad) for param in params]
        averages = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]
        dtypes = [
            torch.promote_types(torch.promote_types(param.dtype, average.dtype), torch.float32)
            for param, average in zip(params, averages, strict=True)
        ]

        capturable = group["capturable"]
        fused = True if capturable or mask is not None else group.get("fused")

        def widened(tensors: list[Tensor]) -> list[Tensor]:
            wide = [tensor.to(dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
            # torch's fused CPU kernel walks through memory without a look at the strides, as rounding does.
            return [tensor.contiguous() for tensor in wide] if fused or group["stochastic_rounding"] else wide

        wide_params, wide_averages, wide_squares = widened(params), widened(averages), widened(squares)
        steps = [state["step"] for state in states]
        counters = steps
        if fused and not capturable:  # which wants them beside the weights, and leaves ours on the CPU to us
            counters = _sent(steps, [param.device for param in params])
        lr = group["lr"]
        if fused and isinstance(lr, Tensor):
            lr = lr.float()  # torch's fused CUDA kernel reads its memory as float32, whatever it is
        beta1, beta2 = group["betas"]
        adamw(
            wide_params,
            widened(grads),
            wide_averages,
            wide_squares,
            [],
            counters,
            # torchtitan and others put these two keys into every group; they choose torch's implementation.
            # Only the fused one can leave a step out on the device, and the foreach one takes no tensor lr.
            foreach=None if capturable or mask is not None or isinstance(group["lr"], Tensor) else group.get("foreach"),
            fused=fused,
            capturable=capturable,
            found_inf=None if mask is None else 1.0 - mask.to(torch.float32),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
        for step, counter in zip(steps, counters, strict=True):
            if step is not counter:
                step.add_(1.0)
        self._round_dense(params, wide_params, steps, group)
        for original, result in zip(
            params + averages + squares, wide_params + wide_averages + wide_squares, strict=True
        ):
            if original is not result:
                original.copy_(result)

    def _round_dense(self, params: list[Tensor], values: list[Tensor], steps: list[Tensor], group: Group) -> None:
        """Round what is to be written to bfloat16 parameters by chance, where the group says so.

        What a step that is not enabled leaves as it was is in bfloat16 already, and stays.
        """
        narrow = [index for index, param in enumerate(params) if param.dtype == torch.bfloat16]
        rounding = self._rounding([params[index] for index in narrow], group) if narrow else None
        if rounding is None:
            return
        for index, stream in zip(narrow, rounding.streams, strict=True):
            step = steps[index] if group["capturable"] else steps[index].item()
            round_(values[index], seed=rounding.seed, stream=stream, step=step, numel=params[index].numel())


def _sent(counters: list[Tensor], devices: list[torch.device]) -> list[Tensor]:
    """Copies of numbers on the CPU, each on its device; nobody waits for them."""
    sent = list(counters)
    for device in set(devices):
        places = [place for place, other in enumerate(devices) if other == device]
        host = torch.stack([counters[place] for place in places])
        there = host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
        for place, counter in zip(places, there.unbind(), strict=True):
            sent[place] = counter
    return sent
