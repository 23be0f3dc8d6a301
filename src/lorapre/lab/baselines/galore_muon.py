"""GaLore with Muon inside: the projected gradient's momentum is made orthogonal and projected back."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lorapre.lab.baselines._matrix_optimizer import Group, MatrixOptimizer, State
from lorapre.lab.baselines.galore import current_projection, laid_as, low_rank_state, wide

#: Muon's quintic: it takes singular values in (0, 1] near 1, to within about 0.3, in five rounds.
_QUINTIC = (3.4445, -4.7750, 2.0315)


def newton_schulz(R: Tensor, steps: int) -> Tensor:
    """U V^T for R = U S V^T (r, n), r <= n, as nearly as Muon's iteration comes; zeros stay zeros."""
    a, b, c = _QUINTIC
    X: Tensor = R / (R.norm() + 1e-7)
    for _ in range(steps):
        A = X @ X.mT  # (r, r)
        X = a * X + (b * A + c * A @ A) @ X
    return X


def galore_muon_direction(
    G: Tensor, P: Tensor, m: Tensor, *, beta: float, nesterov: bool, steps: int
) -> tuple[Tensor, Tensor]:
    """P NewtonSchulz(m) for G (k, n), P (k, r), momentum (r, n): the direction (k, n), before its scale, and m."""
    R = P.mT @ G  # (r, n)
    m = beta * m + (1 - beta) * R
    return P @ newton_schulz(beta * m + (1 - beta) * R if nesterov else m, steps), m


class GaLoreMuon(MatrixOptimizer):
    """Muon in GaLore's subspace. State of a (p, q) matrix: (k + n) r numbers, k <= n: one moment, not Adam's two.

    R = P^T G as in `GaLore`, momentum m of R, and W <- W - lr scale P NewtonSchulz(m). The composition is the baseline
    "GaLore-Muon" of LoRA-Pre's table 3 (arXiv 2602.24283), and of arXiv 2510.17802, which writes it without Nesterov
    momentum and without a scale. With what settings the former's figures were made is not known here. Both are
    options, and torch.optim.Muon's are the defaults. Where P holds r of k directions, the update's root mean square is
    sqrt(r / k) times Muon's, and 0.2 sqrt(r / k) with "match_rms_adamw".

    Newton-Schulz runs in the parameter's dtype, on r x n instead of p x q; torch's Muon takes bfloat16.

    Args:
        params: matrices, named ones, or groups of them; a group may set any option below.
        lr: learning rate.
        rank: r, at most the shorter side of each matrix.
        beta: decay rate of the momentum.
        weight_decay: decoupled.
        update_gap: steps between two projections.
        nesterov: make beta m + (1 - beta) R orthogonal instead of m.
        adjust_lr_fn: "match_rms_adamw" scales by 0.2 sqrt(max(p, q)), "original" by sqrt(max(1, p / q)).
        newton_schulz_steps: rounds of the iteration.

    Raises:
        ValueError: a parameter is no float32 or float64 matrix, or an option is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        rank: int = 128,
        beta: float = 0.95,
        weight_decay: float = 0.0,
        *,
        update_gap: int = 200,
        nesterov: bool = True,
        adjust_lr_fn: str = "match_rms_adamw",
        newton_schulz_steps: int = 5,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "rank": rank,
                "beta": beta,
                "weight_decay": weight_decay,
                "update_gap": update_gap,
                "nesterov": nesterov,
                "adjust_lr_fn": adjust_lr_fn,
                "newton_schulz_steps": newton_schulz_steps,
            },
        )

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        if group["adjust_lr_fn"] not in ("match_rms_adamw", "original"):
            raise ValueError(
                f"Invalid adjust_lr_fn value: {group['adjust_lr_fn']!r}. Choose 'match_rms_adamw' or 'original'."
            )

    def _initial_state(self, param: Tensor, group: Group) -> State:
        return low_rank_state(param, group["rank"], ("momentum_buffer",))

    def _direction(self, G: Tensor, state: State, group: Group, step: int) -> tuple[Tensor, State]:
        P = current_projection(G, state, group, step)
        direction, m = galore_muon_direction(
            wide(G),
            P,
            state["momentum_buffer"],
            beta=group["beta"],
            nesterov=group["nesterov"],
            steps=group["newton_schulz_steps"],
        )
        p, q = G.shape
        scale = 0.2 * max(p, q) ** 0.5 if group["adjust_lr_fn"] == "match_rms_adamw" else max(1.0, p / q) ** 0.5
        return scale * laid_as(direction, G), {"projection": P, "momentum_buffer": m}
