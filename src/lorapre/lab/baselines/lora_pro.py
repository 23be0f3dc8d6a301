"""LoRA-Pro: gradients of both factors chosen so that their product moves as the full gradient would."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lorapre.lab.baselines._matrix_optimizer import Group, State, adam_direction
from lorapre.lab.baselines.lora_pairs import LoRAPairOptimizer, Pair, Spectrum, gram_spectra, solve_sylvester


def closest_gradients(
    pair: Pair, grad_A: Tensor, grad_B: Tensor, gram_A: Spectrum, gram_B: Spectrum, delta: float
) -> tuple[Tensor, Tensor]:
    """g_A (r, in) and g_B (out, r) whose equivalent gradient s B g_A + s g_B A is closest to the full one, G.

    ``grad_A`` = s B^T G and ``grad_B`` = s G A^T are what backpropagation gives. The closed form of arXiv 2407.18242
    with X = 0: g_A = (B^T B)^-1 grad_A / s^2, g_B = (I - B (B^T B)^-1 B^T) grad_B (A A^T)^-1 / s^2.
    """
    inverse_A, inverse_B = (gram.inverse(delta).to(pair.A.dtype) for gram in (gram_A, gram_B))
    g_A = inverse_B @ grad_A / pair.scaling**2
    g_B = grad_B @ inverse_A / pair.scaling**2
    return g_A, g_B - pair.B @ (inverse_B @ (pair.B.mT @ g_B))


def balanced(pair: Pair, g_A: Tensor, g_B: Tensor, gram_A: Spectrum, gram_B: Spectrum) -> tuple[Tensor, Tensor]:
    """g_A + X A and g_B - B X, which have the same equivalent gradient, at the X (r, r) that is closest to LoRA's own.

    Of all X it minimises ||g_A + X A - grad_A||^2 + ||g_B - B X - grad_B||^2, and it solves
    B^T B X + X A A^T = -g_A A^T (arXiv 2407.18242; the equation is Sylvester's).
    """
    C = -(g_A @ pair.A.mT).double()
    X = solve_sylvester(gram_B, gram_A, C).to(g_A.dtype)
    return g_A + X @ pair.A, g_B - pair.B @ X


def state_bytes(groups: list[Group]) -> int:
    """Bytes of `LoRAPro`'s state with ``moments="factors"``, for float32 pairs as `lora_pair_groups` gives them."""
    params = [param for group in groups for _, param in group["params"]]
    return sum(4 * (2 * (A.numel() + B.numel()) + 1) for A, B in zip(params[::2], params[1::2], strict=True))


class LoRAPro(LoRAPairOptimizer):
    """LoRA-Pro with AdamW (arXiv 2407.18242), on pairs A (r, in), B (out, r) of W = W0 + scaling B A.

    ``moments="factors"`` takes AdamW of the adjusted gradients of A and B: state 2 r (in + out) numbers, as AdamW's.
    ``moments="full"`` takes the moments of the equivalent gradient, (out, in), and projects their Adam step: 2 in out
    numbers, as full fine-tuning's. Both are in the released code, "factors" as its default; the released one keeps
    the full moments in bfloat16, this one in float32. There "full" decays W0 too; here W0 is nobody's parameter and
    stays, and weight decay shrinks the product B A by 1 - lr weight_decay.

    Args:
        params: A and B in turn, named or not, or groups of them with their ``scaling`` (`lora_pair_groups`).
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to sqrt(vhat).
        weight_decay: decoupled; of A and of B under "factors", of their product under "full".
        moments: of what the moments are.
        delta: added to the diagonals of B^T B and A A^T before they are inverted; B is zero at the start.

    Raises:
        ValueError: the parameters are no pairs, or an option is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        moments: Literal["factors", "full"] = "factors",
        delta: float = 1e-8,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "moments": moments,
                "delta": delta,
            },
        )

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        if group["moments"] not in ("factors", "full"):
            raise ValueError(f"Invalid moments value: {group['moments']}. It must be 'factors' or 'full'.")
        if group["moments"] == "full" and not float(group["lr"]) * group["weight_decay"] < 1:
            raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}. Times lr it must be below 1.")

    def _initial_state(self, A: Tensor, B: Tensor, group: Group) -> State:
        if group["moments"] == "full":
            shape = (B.shape[0], A.shape[1])
            return {"exp_avg": A.new_zeros(shape), "exp_avg_sq": A.new_zeros(shape)}
        kinds = {"exp_avg_A": A, "exp_avg_sq_A": A, "exp_avg_B": B, "exp_avg_sq_B": B}
        return {name: torch.zeros_like(factor) for name, factor in kinds.items()}

    def _step_pairs(self, groups: list[tuple[list[Pair], Group]]) -> None:
        for pairs, group in groups:
            move = self._move_full if group["moments"] == "full" else self._move_factors
            spectra = gram_spectra([pair.A for pair in pairs] + [pair.B.mT for pair in pairs])
            for pair, gram_A, gram_B in zip(pairs, spectra[: len(pairs)], spectra[len(pairs) :], strict=True):
                move(pair, gram_A, gram_B, group)

    def _move_factors(self, pair: Pair, gram_A: Spectrum, gram_B: Spectrum, group: Group) -> None:
        g_A, g_B = closest_gradients(pair, pair.grad_A, pair.grad_B, gram_A, gram_B, group["delta"])
        lr = float(group["lr"])
        moved = []
        for side, factor, g in zip("AB", (pair.A, pair.B), balanced(pair, g_A, g_B, gram_A, gram_B), strict=True):
            direction = self._adam(pair, g, f"_{side}", group)
            moved.append((1 - lr * group["weight_decay"]) * factor - lr * direction)
        pair.write(*moved)

    def _move_full(self, pair: Pair, gram_A: Spectrum, gram_B: Spectrum, group: Group) -> None:
        s, lr = pair.scaling, float(group["lr"])
        g_A, g_B = closest_gradients(pair, pair.grad_A, pair.grad_B, gram_A, gram_B, group["delta"])
        direction = self._adam(pair, s * (pair.B @ g_A + g_B @ pair.A), "", group)
        g_A, g_B = closest_gradients(
            pair, s * pair.B.mT @ direction, s * direction @ pair.A.mT, gram_A, gram_B, group["delta"]
        )
        g_A, g_B = balanced(pair, g_A, g_B, gram_A, gram_B)
        kept = math.sqrt(1 - lr * group["weight_decay"])
        pair.write(kept * pair.A - lr * g_A, kept * pair.B - lr * g_B)

    def _adam(self, pair: Pair, g: Tensor, side: str, group: Group) -> Tensor:
        m, v = pair.state[f"exp_avg{side}"], pair.state[f"exp_avg_sq{side}"]
        direction, new_m, new_v = adam_direction(g, m, v, step=pair.step, betas=group["betas"], eps=group["eps"])
        m.copy_(new_m)
        v.copy_(new_v)
        return direction
