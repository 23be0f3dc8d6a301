"""LORO: W = B A, with Adam on the factors and now and then a Riemannian step of their product.

"Parameter and Memory Efficient Pretraining via Low-rank Riemannian Optimization", ICLR 2025, OpenReview i0zzO7Hslk.
The paper's text was not at hand; formulas and settings were read off the authors' program (mzf666/LORO-main).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorapre.lab.baselines.factorised import factorise, restart_factor
from lorapre.lab.baselines.low_rank_weights import LowRankLinear
from lorapre.lab.config import PretrainConfig


def riemannian_step(B: Tensor, A: Tensor, dB: Tensor, dA: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """One step of Riemannian gradient descent from W = B A on the matrices of rank r, without a (p, q) matrix.

    With dB = G A^T and dA = B^T G, the gradients of the factors, the direction is G projected onto the tangent space,

        D = P G + (I - P) G R,   P = B B^+,   R = A^+ A,   P G = (B^+)^T dA,   G R = dB (A^+)^T,

    and the result is the best rank-r approximation of W - lr D, with singular values shared evenly between the
    factors. It depends on W and G alone: any B C, C^-1 A gives the same. Where dB and dA belong to no common G, the
    part that both could give is taken from dA, as the authors do.

    Args:
        B: (p, r), r <= min(p, q).
        A: (r, q).
        dB: (p, r).
        dA: (r, q).
        lr: step size.

    Returns:
        The new B and A, in their own dtypes. Directions in which a factor is singular get no update.
    """
    dtype = torch.promote_types(B.dtype, torch.float32)
    r = B.shape[1]
    U, S = torch.linalg.qr(B.to(dtype))  # B = U S
    V, T = torch.linalg.qr(A.mT.to(dtype))  # A = T^T V^T
    GV = dB.to(dtype) @ torch.linalg.pinv(T)  # (p, r)
    UG = torch.linalg.pinv(S).mT @ dA.to(dtype)  # (r, q)
    UGV = UG @ V
    # W - lr D = left @ core @ right^T. One QR a side keeps this exact where 2 r exceeds p or q.
    left, X = torch.linalg.qr(torch.cat([U, GV - U @ (U.mT @ GV)], dim=1))
    right, Y = torch.linalg.qr(torch.cat([V, (UG - UGV @ V.mT).mT], dim=1))
    eye = torch.eye(r, dtype=dtype, device=B.device)
    core = torch.cat([torch.cat([S @ T.mT - lr * UGV, -lr * eye], 1), torch.cat([-lr * eye, 0 * eye], 1)], 0)
    P, sigma, Qt = torch.linalg.svd(X @ core @ Y.mT, full_matrices=False)
    root = sigma[:r].sqrt()
    return (left @ (P[:, :r] * root)).to(B.dtype), ((root[:, None] * Qt[:r]) @ right.mT).to(A.dtype)


class LOROAdamW(Optimizer):
    """Adam on pairs of factors; every ``every``-th step `riemannian_step` instead, after which Adam starts anew.

    As in the authors' program: in ordinary steps the rate is lr r / min(p, q) (they divide by the hidden size, which
    is that in Llama), in Riemannian ones lr; dB and dA of the latter are Adam's directions, not the gradients, so
    that it has Adam's step size (and no longer depends on W and G alone); the moments and Adam's bias correction
    begin again after it, and so does a warm-up of ``rewarmup`` steps (`restart_factor`). Ours: eps enters as in
    torch's AdamW, weight decay is decoupled and acts on the factors in all steps, other parameters keep their
    moments.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float,
        every: int,
        rewarmup: int,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """``params`` are groups whose parameters are B, A of one layer, B, A of the next, and so on.

        Raises:
            ValueError: they do not come in such pairs.
        """
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.every, self.rewarmup = every, rewarmup
        for group in self.param_groups:
            lefts, rights = group["params"][::2], group["params"][1::2]
            if len(lefts) != len(rights) or any(
                B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0] for B, A in zip(lefts, rights, strict=True)
            ):
                shapes = [tuple(param.shape) for param in group["params"]]
                raise ValueError(f"params must be pairs B (p, r), A (r, q), in turn; their shapes are {shapes}.")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; layers without gradients are left out."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for B, A in zip(group["params"][::2], group["params"][1::2], strict=True):
                if B.grad is not None and A.grad is not None:
                    self._step_pair(B, A, group)
        return loss

    def _step_pair(self, B: Tensor, A: Tensor, group: dict[str, Any]) -> None:
        dB, dA = self._direction(B, group), self._direction(A, group)
        done = int(self.state[B]["step"])
        lr = float(group["lr"]) * restart_factor(done - 1, self.every, self.rewarmup)
        for factor in (B, A):
            factor.mul_(1 - lr * group["weight_decay"])
        if done % self.every:
            scale = B.shape[1] / min(B.shape[0], A.shape[1])
            B.sub_(dB, alpha=lr * scale)
            A.sub_(dA, alpha=lr * scale)
            return
        new_B, new_A = riemannian_step(B, A, dB, dA, lr)
        for factor, new in ((B, new_B), (A, new_A)):
            factor.copy_(new)
            self.state[factor]["exp_avg"].zero_()
            self.state[factor]["exp_avg_sq"].zero_()

    def _direction(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        """Advance the moments of ``param``, and give Adam's direction, bias-corrected since the last restart."""
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        state["step"] += 1
        t = (int(state["step"]) - 1) % self.every + 1
        beta1, beta2 = group["betas"]
        m, v = state["exp_avg"], state["exp_avg_sq"]
        assert param.grad is not None  # checked by step()
        m.lerp_(param.grad, 1 - beta1)
        v.mul_(beta2).addcmul_(param.grad, param.grad, value=1 - beta2)
        direction: Tensor = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + group["eps"])
        return direction


def xavier_stds(p: int, q: int, r: int) -> tuple[float, float]:
    """Deviations of B (p, r) and A (r, q) under ``nn.init.xavier_normal_``, the authors' choice."""
    return (2 / (p + r)) ** 0.5, (2 / (q + r)) ** 0.5


def loro_prepare(model: nn.Module, config: PretrainConfig) -> None:
    """Turn every attention and MLP linear layer above ``config.rank`` into a `LowRankLinear`, Xavier-normal.

    Raises:
        UserError: as `factorise` does.
    """

    def replace(name: str, layer: nn.Linear, rank: int) -> LowRankLinear:
        stds = xavier_stds(layer.out_features, layer.in_features, rank)
        return LowRankLinear(layer, rank, name=name, seed=config.seed, stds=stds)

    factorise(model, config.rank, replace)
