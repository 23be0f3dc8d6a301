"""ReLoRA: LoRA that merges its product into the frozen weight again and again, and starts anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from lorapre.lab.baselines.factorised import restart_factor
from lorapre.lab.baselines.lora import LoRALinear

#: Share of each moment that a restart sets to zero, the smallest magnitudes first (arXiv 2307.05695, section 3).
PRUNED = 0.99


@torch.no_grad()
def prune_moments(mean: Tensor, square: Tensor, share: float) -> None:
    """Set ``share`` of the entries of both moments to zero, rounded down: those whose mean is smallest in magnitude.

    One mask for both. The authors' program prunes them apart; then an entry can keep its mean and lose its square,
    and while B is zero, A has no gradient, so that Adam would divide that mean by eps. Ties fall together.
    """
    count = int(share * mean.numel())
    if count:
        magnitude = mean.abs()
        # Not torch.quantile, which refuses more than 2^24 numbers.
        smallest = magnitude <= magnitude.flatten().kthvalue(count).values
        mean.masked_fill_(smallest, 0)
        square.masked_fill_(smallest, 0)


class ReLoRAAdamW(AdamW):
    """AdamW for the factors of `LoRALinear`, with restarts (arXiv 2307.05695, algorithm 1).

    After every ``every``-th step W <- W + (alpha / r) B A, A is drawn anew, B set to zero, and `PRUNED` of both
    moments of A and of B too. The learning rate then warms up again, on top of whatever the scheduler says
    (`restart_factor`). The frozen weights are in the model's state; which restart comes next, and hence its draw,
    follows from AdamW's own step counter: so a run resumes exactly from ordinary checkpoints.
    """

    def __init__(
        self, params: list[dict[str, Any]], layers: Sequence[LoRALinear], every: int, rewarmup: int, **options: Any
    ) -> None:
        """``params`` are groups of the factors of ``layers``; ``options`` are AdamW's."""
        super().__init__(params, **options)
        self.layers, self.every, self.rewarmup = list(layers), every, rewarmup

    def _steps(self) -> int:
        """Steps taken by the factor that has taken the most."""
        factors = [factor for layer in self.layers for factor in (layer.lora_A, layer.lora_B)]
        return max((int(self.state[factor]["step"]) for factor in factors if factor in self.state), default=0)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of AdamW, and the restart if it is due."""
        before = self._steps()
        factor = restart_factor(before, self.every, self.rewarmup)
        rates = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        try:
            loss = super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate
        after = self._steps()
        if after > before and after % self.every == 0:
            self._restart(after // self.every)
        return loss

    @torch.no_grad()
    def _restart(self, number: int) -> None:
        for layer in self.layers:
            layer.weight.copy_(layer.merged_weight())
            layer.lora_A.copy_(layer.initial_A(layer.lora_A.shape[0], str(number)))
            layer.lora_B.zero_()
            for param in (layer.lora_A, layer.lora_B):
                if param in self.state:  # it is not where a layer has had no gradient yet
                    prune_moments(self.state[param]["exp_avg"], self.state[param]["exp_avg_sq"], PRUNED)
