"""Plain formulas for one matrix in float64, written from the papers and not from the code under test."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from _support import ReferenceRun, assert_close
from lorapre import LoRAPreAdamW, LoRAPreLion, LoRAPreMuon, reference
from lorapre.routing import matrix_view


def random_matrix(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spanned(columns: Tensor) -> Tensor:
    """An orthonormal basis of what ``columns`` span, by SVD; narrower than they where they are dependent."""
    U, S, _ = torch.linalg.svd(columns, full_matrices=False)
    return U[:, S.gt(1e-12 * S.max())]


def tangent_projection(B: Tensor, A: Tensor, X: Tensor) -> Tensor:
    """The part of X (p, q) in the tangent space of the manifold of rank-r matrices at B A."""
    left, right = spanned(B), spanned(A.T)
    inside_rows, inside_columns = left @ (left.T @ X), (X @ right) @ right.T
    return inside_rows + inside_columns - left @ (left.T @ X @ right) @ right.T


def tangent_momentum(B: Tensor, A: Tensor, G: Tensor, *, decay: float, gain: float) -> Tensor:
    """The momentum after one tangent step: M' = decay B A + gain G, projected on the tangent space of B A, seen
    from the left by what M' makes of the old right space, and from the right by what M'^T makes of the old left."""
    moved = decay * (B @ A) + gain * G
    U, V = spanned(moved @ spanned(A.T)), spanned(moved.T @ spanned(B)) if B.any() else spanned(A.T)
    return U @ (U.T @ tangent_projection(B, A, moved) @ V) @ V.T


def lion(m: Tensor, G: Tensor, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Lion (arXiv 2302.06675, Algorithm 2): the direction, a matrix of signs, and the new momentum."""
    return torch.sign(betas[0] * m + (1 - betas[0]) * G), betas[1] * m + (1 - betas[1]) * G


class MomentumRun:
    """LoRAPreMuon, LoRAPreSGD or LoRAPreLion for one compressed parameter; a stack is a list of matrices.

    Starts from a copy of the optimizer's own factors, and takes the momentum as the product of the two.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, param: nn.Parameter, group: dict[str, Any]) -> None:
        view = matrix_view(param.shape, group["rank"], group["view_3d"])
        assert view is not None
        self.cls, self.group, self.view, self.shape = type(optimizer), group, view, param.shape
        self.W = list(self._wide(param, view.p, view.q))
        state = optimizer.state[param]
        self.B = list(self._wide(state["m_B"], view.p, view.rank))
        self.A = list(self._wide(state["m_A"], view.rank, view.q))
        self.t = int(state["step"])
        if "u_row" in state:
            self.u = list(self._wide(state["u_row"], view.p, 1))
        elif "u_col" in state:
            self.u = list(self._wide(state["u_col"], 1, view.q))

    def _wide(self, tensor: Tensor, *shape: int) -> Tensor:
        return tensor.detach().cpu().double().reshape(self.view.batch, *shape).clone()

    def step(self, grad: Tensor) -> None:
        group = self.group
        self.t += 1
        lr, keep_weight = float(group["lr"]), 1 - float(group["lr"]) * group["weight_decay"]
        for i, G in enumerate(self._wide(grad, self.view.p, self.view.q)):
            direction = self._direction(i, -G if group["maximize"] else G)
            if group.get("normalization", "none") != "none":
                direction = self._normalized(i, direction)
            self.W[i] = keep_weight * self.W[i] - lr * direction

    def _direction(self, i: int, G: Tensor) -> Tensor:
        """What is subtracted at lr 1, from the factors of the step before, which advance."""
        group = self.group
        old = self.B[i] @ self.A[i]
        P = self._tracked(self.A[i], G)
        residual, gain = G - P, group["residual_gain"]
        if self.cls is LoRAPreLion:
            beta1, beta2 = group["betas"]
            self._advance(i, G, decay=beta2, gain=1 - beta2)
            return torch.sign(beta1 * old + (1 - beta1) * P + (1 - beta1 if gain is None else gain) * residual)
        mu = group["momentum"]
        self._advance(i, G, decay=mu, gain=1.0)
        # torch's order: the buffer takes the gradient, then Nesterov looks ahead of it
        inside = mu * old + P
        inside = P + mu * inside if group["nesterov"] else inside
        if gain is None:
            m = inside + (1 + mu if group["nesterov"] else 1.0) * residual
        else:
            m = inside + gain / (1 - mu) * residual  # a share of what a constant gradient adds up to
        if self.cls is not LoRAPreMuon:
            return m
        return self._size(m) * reference.newton_schulz(m, group["ns_steps"])

    def _size(self, m: Tensor) -> float:
        p, q = m.shape
        original = self.group["adjust_lr_fn"] == "original"
        return float(self.group["scale"] * (math.sqrt(max(1, p / q)) if original else 0.2 * math.sqrt(max(p, q))))

    def _normalized(self, i: int, O: Tensor) -> Tensor:  # noqa: E741  (the paper's name)
        """NorMuon, Algorithm 1: O over the root of the average of its rows' mean squares, at O's Frobenius norm."""
        p, q = O.shape
        side = 1 if self.group["normalization"] == "rows" or p >= q else 0
        beta2 = self.group["betas"][1]
        self.u[i] = beta2 * self.u[i] + (1 - beta2) * (O**2).mean(dim=side, keepdim=True)
        even = torch.where(self.u[i] > 0, O / self.u[i].sqrt(), 0.0)
        return even * O.norm() / even.norm() if O.any() else O

    def _tracked(self, A: Tensor, G: Tensor) -> Tensor:
        """P(G): the part of the gradient in the row space of the factors."""
        if self.group["regression"] != "newton":
            return G @ A.T @ A
        return reference.left_target(A, G, self.group["damping"], self.group["damping_mode"]) @ A

    def _advance(self, i: int, G: Tensor, *, decay: float, gain: float) -> None:
        group, B, A = self.group, self.B[i], self.A[i]
        if group["regression"] == "subspace":
            self.B[i], self.A[i] = reference.subspace_sweep(B, A, G, keep=decay, gain=gain)
            return
        root = math.sqrt(decay)
        self.B[i], self.A[i] = reference.advance_factors(
            B,
            A,
            G,
            keep=root,
            gain=gain * (1 - root) / (1 - decay),  # equation (9)
            damping=group["damping"],
            damping_mode=group["damping_mode"],
        )

    def weight(self) -> Tensor:
        return torch.stack(self.W).reshape(self.shape)

    def check(self, optimizer: torch.optim.Optimizer, param: nn.Parameter, tolerance: float) -> None:
        """The weight and the momentum agree."""
        assert_close(param, self.weight(), tolerance, f"W {tuple(self.shape)}")
        state, view = optimizer.state[param], self.view
        B, A = self._wide(state["m_B"], view.p, view.rank), self._wide(state["m_A"], view.rank, view.q)
        assert_close(B @ A, torch.stack(self.B) @ torch.stack(self.A), tolerance, f"m {tuple(self.shape)}")


def run_beside(optimizer: Any, param: nn.Parameter, group: dict[str, Any]) -> ReferenceRun | MomentumRun:
    """The formulas of ``optimizer``'s class for one compressed parameter."""
    return (ReferenceRun if isinstance(optimizer, LoRAPreAdamW) else MomentumRun)(optimizer, param, group)
