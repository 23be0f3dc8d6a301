"""LoFT: AdamW of the full weight, seen through one factor of an adapter at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lorapre.lab.baselines._matrix_optimizer import Group, State
from lorapre.lab.baselines.lora_pairs import LoRAPairOptimizer, Pair, gram_spectra


@dataclass(frozen=True)
class Side:
    """One factor U (n, r) of an adapter's weight U V^T (or of its transpose), the other one standing still.

    ``V`` (k, r) has the adapter's scaling in it, ``inverse`` is (V^T V + delta I)^-1, and ``g`` (n, r) the gradient of
    U times ``inverse``: then g V^T is the weight's gradient, projected onto V's columns.
    """

    g: Tensor
    V: Tensor
    inverse: Tensor

    def squared_norm(self) -> Tensor:
        """||g V^T||^2, without the product."""
        return (self.g @ (self.V.mT @ self.V) * self.g).sum()


def calibrated(
    side: Side, m: Tensor, cross: Tensor, last_V: Tensor, betas: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """The moments of a factor, carried from the last V (k, r) to this one and advanced.

    ``m`` (n, r) is the momentum, ``cross`` (n, r, r) the mean of the products g_i g_j of each row.
    The calibration is C = (V_last^T V)(V^T V)^-1 (arXiv 2505.21289).
    """
    beta1, beta2 = betas
    C = last_V.mT @ side.V @ side.inverse
    m = beta1 * (m @ C) + (1 - beta1) * side.g
    return m, beta2 * (C.mT @ cross @ C) + (1 - beta2) * side.g[:, :, None] * side.g[:, None, :]


def seen_update(side: Side, m: Tensor, cross: Tensor, *, step: int, betas: tuple[float, float], eps: float) -> Tensor:
    """The direction (n, r) of U whose product with V^T is the weight's AdamW step, projected onto V's columns."""
    V = side.V
    # The weight's second moment (n, k), from products of pairs: the Khatri-Rao product of V with itself.
    squares = (V[:, :, None] * V[:, None, :]).flatten(1)
    v = (cross.flatten(1) @ squares.mT).clamp(min=0)
    mhat, vhat = (m @ V.mT) / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    return (mhat / (vhat.sqrt() + eps)) @ V @ side.inverse


def state_bytes(groups: list[Group]) -> int:
    """Bytes of `LoFT`'s state for float32 pairs, given as `lora_pair_groups` gives them: a counter, V and m of both
    factors, and their cross terms."""
    params = [param for group in groups for _, param in group["params"]]
    sides = ((A.shape[0], A.shape[1] + B.shape[0]) for A, B in zip(params[::2], params[1::2], strict=True))
    return sum(4 * ((r * r + 2 * r) * both + 1) for r, both in sides)


class LoFT(LoRAPairOptimizer):
    """LoFT-AdamW (arXiv 2505.21289) on pairs A (r, in), B (out, r) of W = W0 + scaling B A.

    Steps 1, 3, ... move B and steps 2, 4, ... move A, so that no product of two updates arises; the moments of both
    advance at every step. At full rank (square A and B) the weight moves as under AdamW. The state of a pair is
    (r^2 + 2 r) (in + out) numbers: momentum, products of the gradient's entries, and both factors of the last step.

    The scaling cancels: with another one, and factors of the same product, the weight takes the same steps. Differs
    from the released code, which scales B's gradient with an A that the same step has already moved, ignores the
    scaling, adds 1e-6 to B's Gram matrix and 1e-8 to A's, has eps = 1e-4, and decays without the learning rate.

    Args:
        params: A and B in turn, named or not, or groups of them with their ``scaling`` (`lora_pair_groups`).
        lr: learning rate, of the weight.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; the moved factor, and so the product B A, shrinks by lr weight_decay.
        delta: added to the diagonal of a Gram matrix before it is inverted; B is zero at the start.
        max_grad_norm: clip all gradients together by the norm that their projections have as gradients of the
            weights, over the factors that this step moves; None does not. Leave out any other clipping then.

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
        delta: float = 1e-8,
        max_grad_norm: float | None = None,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"Invalid max_grad_norm value: {max_grad_norm}. It must be above 0, or None.")
        self.max_grad_norm = max_grad_norm
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "delta": delta})

    def _initial_state(self, A: Tensor, B: Tensor, group: Group) -> State:
        r = A.shape[0]
        state = {}
        for name, U, V in (("A", A.mT, B), ("B", B, A.mT)):
            state[f"exp_avg_{name}"] = U.new_zeros(U.shape)
            state[f"cross_{name}"] = U.new_zeros(U.shape[0], r, r)
            state[f"other_{name}"] = V.new_zeros(V.shape)  # V of the last step; the moments are still zero
        return state

    def _step_pairs(self, groups: list[tuple[list[Pair], Group]]) -> None:
        pairs = [(pair, group) for present, group in groups for pair in present]
        spectra = gram_spectra(
            [pair.scaling * V.mT for pair, _ in pairs for V in (pair.B, pair.A.mT)]  # in the order of `_sides`
        )
        sides = []
        for (pair, group), *grams in zip(pairs, spectra[::2], spectra[1::2], strict=True):
            inverses = [gram.inverse(group["delta"]).to(pair.A.dtype) for gram in grams]
            sides.append(_sides(pair, inverses))
        shrink = self._shrink([both[_moved(pair)] for (pair, _), both in zip(pairs, sides, strict=True)])
        for (pair, group), both in zip(pairs, sides, strict=True):
            self._move(pair, {name: replace(side, g=shrink * side.g) for name, side in both.items()}, group)

    def _shrink(self, moved: list[Side]) -> Tensor | float:
        """What all gradients are multiplied by, so that the norm of those that count is at most `max_grad_norm`."""
        if self.max_grad_norm is None or not moved:
            return 1.0
        norm = torch.stack([side.squared_norm().to(moved[0].g) for side in moved]).sum().sqrt()
        return (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)

    def _move(self, pair: Pair, sides: dict[str, Side], group: Group) -> None:
        state, moved, factors = pair.state, _moved(pair), {"A": pair.A, "B": pair.B}
        for name, side in sides.items():
            moments = state[f"exp_avg_{name}"], state[f"cross_{name}"]
            for old, new in zip(
                moments, calibrated(side, *moments, state[f"other_{name}"], group["betas"]), strict=True
            ):
                old.copy_(new)
            state[f"other_{name}"].copy_(side.V)
        direction = seen_update(
            sides[moved],
            state[f"exp_avg_{moved}"],
            state[f"cross_{moved}"],
            step=pair.step,
            betas=group["betas"],
            eps=group["eps"],
        )
        lr = float(group["lr"])
        step = direction.mT if moved == "A" else direction
        factors[moved] = (1 - lr * group["weight_decay"]) * factors[moved] - lr * step
        pair.write(factors["A"], factors["B"])


def _moved(pair: Pair) -> str:
    """B comes first: it is zero at the start, where A could not move the weight."""
    return "B" if pair.step % 2 else "A"


def _sides(pair: Pair, inverses: list[Tensor]) -> dict[str, Side]:
    """Both factors of a pair, ``inverses`` being those of the Gram matrices of B and of A."""
    of_A = Side(pair.grad_A.mT @ inverses[0], pair.scaling * pair.B, inverses[0])
    of_B = Side(pair.grad_B @ inverses[1], pair.scaling * pair.A.mT, inverses[1])
    return {"A": of_A, "B": of_B}
