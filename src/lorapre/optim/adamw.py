"""LoRAPreAdamW: AdamW whose moments are factored (Algorithm 1), dense AdamW for everything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lorapre.backends.dispatch import Backend
from lorapre.backends.eager import AdamHyperparameters
from lorapre.factors import Regression
from lorapre.optim.backed import BackedOptimizer
from lorapre.optim.base import Group, keywords
from lorapre.optim.checks import check_betas, check_choice, check_sweep_interval
from lorapre.routing import MatrixView, View3D, check_rank, with_rank


class LoRAPreAdamW(BackedOptimizer):
    """AdamW with a low-rank momentum, m = m_B m_A, and a second moment of rank 1 (after arXiv 2602.24283).

    Each step forms m_t from the momentum of step t - 1 and the whole gradient, so the weight update is full-rank, and
    then moves the factors towards the new average. A matrix of shape (p, q) costs (p + q) (r + 1) numbers of state
    instead of AdamW's 2 p q. The defaults are equations (11) to (15) of `lorapre.reference`; `paper` is Algorithm 1.

    Matrices with min(p, q) > rank are compressed, stacks of matrices (3-D) one by one, convolutions as
    (out, in * kernel). All other parameters take torch's own AdamW with the same lr, betas, eps and weight decay.
    Embeddings and output heads look like matrices; `lorapre.param_groups` tells them apart by module type.

    Args:
        params: parameters, named parameters, or groups of them; a group may set any option below, and
            ``compress=False`` to keep its parameters dense.
        lr: learning rate, a float or a one-element tensor.
        rank: rank r of the factors, or a fraction of each matrix's smaller side.
        betas: decay rates of m and v.
        eps: added to sqrt(v).
        weight_decay: decoupled, as in AdamW.
        regression: how the factors follow the average: "subspace", one sweep of block least squares (11); "tangent",
            which reads the gradient once; "newton", the paper's (Theorem 3.1).
        sweep_interval: steps from one sweep of "subspace" to the next. Between two of them the right factor stays, and
            the left one is the average's projection on it, so that G is read for one product instead of two and no
            basis is made: steps at high ranks take a fraction of the time. 1 sweeps in every step. None is 4, and 1
            with ``capturable``, as a CUDA graph repeats one step, or with another regression.
        second_moment: "rank1" keeps row and column means of G^2 (13); "hadamard" is the paper's (v_B v_A)^2; "full" is
            Adam's own (``exp_avg_sq``).
        second_moment_rank: rank of a "hadamard" second moment, or a fraction; None is m's.
        residual_gain: weight of the gradient's part outside the tracked subspace (12), where a constant gradient
            gathers 1 inside. Above 1 the whole is divided by it: the update keeps its size, and the tracked, strong
            directions count less than the rest. None is the paper's, 1 - beta1.
        damping: added to the diagonal of the r x r matrices that "newton" inverts, above 0.
        damping_mode: "relative" to their mean diagonal, which makes the step invariant to the gradient's scale;
            "absolute" as in the paper (Appendix C.1).
        bias_correction: "exact" divides a "hadamard" v by the weight that has really arrived in it (see
            `lorapre.factors.second_moment_correction`), "paper" by 1 - beta2^t.
        eps_mode: eps of compressed matrices is "relative" to the root of their mean v, so that no step depends on the
            gradient's scale, or "absolute", in the units of the gradient, as in Adam. Dense parameters take Adam's.
        bounded: no element of a compressed matrix's m / sqrt(v) exceeds 1 / sqrt(1 - beta2), and
            where v is 0 (a column that never had a gradient) nothing moves, as under Adam.
        update_clipping: divide the update of a compressed matrix by max(1, RMS of G / sqrt(v)) (14), as StableAdamW
            does (arXiv 2304.13013): a gradient that v did not expect moves the weights no further than others.
        spectral_clipping: divide the update of a compressed matrix so that its largest singular value, estimated by a
            sketch (15), is at most this times sqrt(p) + sqrt(q), which a random matrix has whose elements are of
            mean square 1. Outside the subspace the gradient is not averaged, and a direction in which it turns round
            from step to step would grow. None switches it off.
        scale: multiplies the update of compressed matrices, not their weight decay; GaLore and the paper use 0.25.
        backend: "triton" steps compressed matrices by kernels, which up to rank 128 hold no temporary of a matrix's
            size, "eager" in batched torch; "auto" takes the kernels where `lorapre.backends.dispatch.MEASURED` says so.
        view_3d: a 3-D weight is a "stack" of matrices, or to be flattened to (out, in * kernel): "flatten".
        state_dtype: dtype of the state; None is the parameter's own, but at least float32.
        stochastic_rounding: round new bfloat16 weights up or down by chance, drawn from ``seed``, the step and the
            element, so that updates too small for bfloat16 arrive on average; dense parameters' too. Weights of other
            dtypes are not concerned.
        seed: of the random right factors and of stochastic rounding. Each parameter draws from its own streams, the
            same in every process.
        maximize: ascend instead of descend.
        capturable: keep the step counters on the device, so that ``step()`` can be captured in a CUDA graph.
        nonfinite: what to do when a gradient holds inf or nan: "raise" a RuntimeError, or "skip" the whole step.
            Either way nothing changes. None means "raise", or "skip" with ``capturable``, where it must be. Where
            kernels take part, ``step()`` does not wait for the device: that a step was left out is said, and its
            count taken back, by the next call of ``step``, ``state_dict``, ``load_state_dict`` or ``settle``, which
            does nothing else if it raises. Squares of a
            compressed matrix whose sum is beyond float32 (3.4e38) count as inf.

    Raises:
        ValueError: an option is out of range, or ``stochastic_rounding`` is on without any bfloat16 parameter.
        TypeError: a parameter is complex, sharded or flattened.
    """

    _added: ClassVar[Mapping[str, Any]] = {**BackedOptimizer._added, "spectral_clipping": None, "sweep_interval": 1}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        rank: int | float = 0.25,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        regression: Regression = "subspace",
        sweep_interval: int | None = None,
        second_moment: Literal["rank1", "hadamard", "full"] = "rank1",
        second_moment_rank: int | float | None = None,
        residual_gain: float | None = 4.0,
        damping: float = 1e-4,
        damping_mode: Literal["absolute", "relative"] = "relative",
        bias_correction: Literal["paper", "exact"] = "exact",
        eps_mode: Literal["absolute", "relative"] = "relative",
        bounded: bool = True,
        update_clipping: bool = True,
        spectral_clipping: float | None = 3.0,
        scale: float = 1.0,
        backend: Backend = "auto",
        view_3d: View3D = "stack",
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        maximize: bool = False,
        capturable: bool = False,
        nonfinite: Literal["raise", "skip"] | None = None,
    ) -> None:
        super().__init__(params, keywords(locals()))

    @classmethod
    def paper(
        cls, params: ParamsT, lr: float | Tensor = 1e-3, rank: int | float = 128, **overrides: Any
    ) -> LoRAPreAdamW:
        """Algorithm 1 exactly: absolute damping 1e-6, bias correction as printed, no weight decay, scale 0.25."""
        return cls(params, lr, rank, **{**PAPER_PRESET, **overrides})

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_betas(group["betas"])
        check_choice("bias_correction", group["bias_correction"], ("paper", "exact"))
        check_choice("eps_mode", group["eps_mode"], ("absolute", "relative"))
        check_choice("second_moment", group["second_moment"], ("rank1", "hadamard", "full"))
        check_sweep_interval(group)
        limit = group["spectral_clipping"]
        if limit is not None and not 0 < limit < float("inf"):
            raise ValueError(
                f"Invalid spectral_clipping: {limit}. Give a number above 0, such as 3.0, or None to switch it off."
            )
        if group["second_moment_rank"] is not None:
            check_rank(group["second_moment_rank"], "second_moment_rank")
            if group["second_moment"] != "hadamard":
                raise ValueError(
                    f"second_moment_rank={group['second_moment_rank']} means nothing with second_moment="
                    f"{group['second_moment']!r}. Leave it out, or use second_moment='hadamard'."
                )

    def _init_param_state(self, param: Tensor, view: MatrixView | None, group: Group, key: str) -> dict[str, Tensor]:
        if view is None:
            return self._init_dense_state(param, group)
        dtype = self._state_dtype(param, group)
        state = {"step": self._new_step(param, group), **self._init_momentum(param, view, group, key, "m")}
        if group["second_moment"] == "hadamard":
            rank = group["second_moment_rank"]
            state |= self._init_momentum(param, view if rank is None else with_rank(view, rank), group, key, "v")
        elif group["second_moment"] == "rank1":
            state["v_row"] = self._init_average(param, view, group, view.p)
            state["v_col"] = self._init_average(param, view, group, view.q)
        else:
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        return state

    def _hyperparameters(self, group: Group, device: torch.device) -> AdamHyperparameters:
        beta1, beta2 = group["betas"]
        gain = group["residual_gain"]
        return AdamHyperparameters(
            lr=self._lr(group, device),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            relative_eps=group["eps_mode"] == "relative",
            weight_decay=group["weight_decay"],
            scale=group["scale"],
            residual_gain=1.0 - beta1 if gain is None else gain,
            bounded=group["bounded"],
            update_clipping=group["update_clipping"],
            spectral_clipping=group["spectral_clipping"],
            regressor=self._regressor(group),
            bias_correction=group["bias_correction"],
        )


#: Algorithm 1 as printed, with the settings of the paper's pre-training runs.
PAPER_PRESET: Mapping[str, Any] = {
    "betas": (0.9, 0.95),
    "weight_decay": 0.0,
    "regression": "newton",
    "residual_gain": None,
    "damping": 1e-6,
    "damping_mode": "absolute",
    "bias_correction": "paper",
    "second_moment": "hadamard",
    "eps_mode": "absolute",
    "bounded": False,
    "update_clipping": False,
    "spectral_clipping": None,
    "scale": 0.25,
}
