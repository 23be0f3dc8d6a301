"""LoRAPreMuon: Muon whose momentum is factored (Algorithm 2), AdamW for everything that is no matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lorapre.backends.dispatch import Backend
from lorapre.backends.eager_muon import MuonHyperparameters, Normalization, ShapeScale
from lorapre.factors import Regression
from lorapre.optim.backed import BackedOptimizer
from lorapre.optim.base import Group, keywords
from lorapre.optim.checks import check_betas, check_choice, check_momentum
from lorapre.routing import MatrixView, View3D


class LoRAPreMuon(BackedOptimizer):
    """Muon with a low-rank momentum: W moves along the polar factor of mu m_B m_A + G (arXiv 2602.24283).

    A matrix of shape (p, q) costs (p + q) r numbers of state instead of Muon's p q. Matrices with min(p, q) > rank
    are updated this way, stacks of matrices (3-D) one by one, convolutions as (out, in * kernel). All other
    parameters take torch's own AdamW. Embeddings and output heads look like matrices; `lorapre.param_groups` tells
    them apart by module type.

    Args:
        params: parameters, named parameters, or groups of them; a group may set any option below, and
            ``compress=False`` to keep its parameters with AdamW.
        lr: learning rate of both, a float or a one-element tensor; a group may have its own.
        rank: rank r of the factors, or a fraction of each matrix's smaller side.
        momentum: decay mu of the momentum, which is a sum, not an average.
        nesterov: look one step ahead, G + mu m_t.
        weight_decay: decoupled, as in AdamW.
        betas: decay rates of AdamW's moments; the second one also of ``normalization``'s averages.
        eps: added to sqrt(v) by AdamW.
        regression: how the factors follow the momentum: "subspace", "tangent" (one read of the gradient) or
            "newton", the paper's.
        residual_gain: weight of the gradient's part outside the tracked subspace, as a share of the weight that a
            constant gradient gathers inside; None gives it the weight of a single gradient, as the paper does.
        normalization: "rows" divides each row of the orthogonal update by the root of its average mean square, as
            NorMuon does (arXiv 2510.05491), "longer_side" the columns of wide matrices instead, whose rows are alike
            already; both keep the update's norm and cost a number a row or column of state.
        ns_steps: Newton-Schulz iterations.
        ns_dtype: dtype of the iteration; None is bfloat16 on a GPU, as in torch.optim.Muon, and the weights' own
            (at least float32) on the CPU, where bfloat16 is slower.
        adjust_lr_fn: torch's name for the scale of the update: "match_rms_adamw" is 0.2 sqrt(max(p, q)), at which
            AdamW's learning rates and weight decays fit; "original" is sqrt(max(1, p / q)).
        damping: added to the diagonal of the r x r matrices that "newton" inverts, above 0.
        damping_mode: "relative" to their mean diagonal, or "absolute" as in the paper.
        scale: multiplies the update of compressed matrices, not their weight decay.
        backend: "triton" steps compressed matrices with the "subspace" regression by kernels, and Newton-Schulz, whose
            iterates are the only temporaries of a matrix's size, in its own dtype; "eager" in batched torch; "auto"
            takes the kernels where `lorapre.backends.dispatch.MEASURED` says so.
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
            None means "raise", or "skip" with ``capturable``, where it must be. Where kernels take part it is said by
            the next call, as by `LoRAPreAdamW`.

    Raises:
        ValueError: an option is out of range, or ``stochastic_rounding`` is on without any bfloat16 parameter.
        TypeError: a parameter is complex, sharded or flattened.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        rank: int | float = 0.25,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 1e-2,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        regression: Regression = "subspace",
        residual_gain: float | None = 4.0,
        normalization: Normalization = "longer_side",
        ns_steps: int = 5,
        ns_dtype: torch.dtype | None = None,
        adjust_lr_fn: ShapeScale = "match_rms_adamw",
        damping: float = 1e-4,
        damping_mode: Literal["absolute", "relative"] = "relative",
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
    ) -> LoRAPreMuon:
        """Algorithm 2 exactly: Newton's regression with absolute damping 1e-6, no Nesterov, no weight decay."""
        return cls(params, lr, rank, **{**PAPER_PRESET, **overrides})

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_betas(group["betas"])
        check_momentum(group["momentum"])
        check_choice("adjust_lr_fn", group["adjust_lr_fn"], ("original", "match_rms_adamw"))
        check_choice("normalization", group["normalization"], ("none", "rows", "longer_side"))
        if not isinstance(group["ns_steps"], int) or not 0 < group["ns_steps"] < 100:
            raise ValueError(f"Invalid ns_steps: {group['ns_steps']!r}. Give an integer from 1 to 99.")
        if group["ns_dtype"] not in (None, torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise ValueError(f"Invalid ns_dtype: {group['ns_dtype']!r}. Give a floating torch.dtype, or None.")

    def _init_param_state(self, param: Tensor, view: MatrixView | None, group: Group, key: str) -> dict[str, Tensor]:
        if view is None:
            return self._init_dense_state(param, group)
        state = {"step": self._new_step(param, group), **self._init_momentum(param, view, group, key, "m")}
        if group["normalization"] != "none":
            by_row = group["normalization"] == "rows" or view.p >= view.q
            key, size = ("u_row", view.p) if by_row else ("u_col", view.q)
            state[key] = self._init_average(param, view, group, size)
        return state

    def _hyperparameters(self, group: Group, device: torch.device) -> MuonHyperparameters:
        return MuonHyperparameters(
            lr=self._lr(group, device),
            mu=group["momentum"],
            nesterov=group["nesterov"],
            residual_gain=group["residual_gain"],
            regressor=self._regressor(group),
            beta2=group["betas"][1],
            ns_steps=group["ns_steps"],
            ns_dtype=group["ns_dtype"],
            shape_scale=group["adjust_lr_fn"],
            weight_decay=group["weight_decay"],
            scale=group["scale"],
        )


#: Algorithm 2 as printed.
PAPER_PRESET: Mapping[str, Any] = {
    "momentum": 0.95,
    "nesterov": False,
    "weight_decay": 0.0,
    "regression": "newton",
    "residual_gain": None,
    "normalization": "none",
    "scale": 1.0,
    "damping": 1e-6,
    "damping_mode": "absolute",
    "adjust_lr_fn": "original",
}
