"""LoRAPreAdamW: AdamW whose moments are factored (Algorithm 1), dense AdamW for everything else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from lorapre import factors
from lorapre.backends import eager
from lorapre.optim.base import FactoredOptimizer, Group, check_betas, check_choice, run_closure
from lorapre.routing import MatrixView, View3D


class LoRAPreAdamW(FactoredOptimizer):
    """AdamW with low-rank moments: m = m_B m_A and v = (v_B v_A)^2 element-wise (arXiv 2602.24283).

    Each step forms m_t = beta1 m_B m_A + (1 - beta1) G, so the weight update is full-rank, and moves the factors
    towards the least-squares fit of the gradient in closed form. A matrix of shape (p, q) costs 2 (p + q) r numbers
    of state instead of AdamW's 2 p q.

    Matrices with min(p, q) > rank are compressed, stacks of matrices (3-D) one by one, convolutions as
    (out, in * kernel). All other parameters take torch's own AdamW with the same lr, betas, eps and weight decay.
    Embeddings and output heads look like matrices; `lorapre.param_groups` tells them apart by module type.

    Args:
        params: parameters, named parameters, or groups of them; a group may set any option below, and
            ``compress=False`` to keep its parameters dense.
        lr: learning rate, a float or a one-element tensor.
        rank: rank r of the factors, or a fraction of each matrix's smaller side.
        betas: decay rates of m and v.
        eps: added to sqrt(v), in the units of the gradient.
        weight_decay: decoupled, as in AdamW.
        damping: added to the diagonal of the r x r matrices that are inverted, above 0.
        damping_mode: "relative" to their mean diagonal, which makes the step invariant to the gradient's scale;
            "absolute" as in the paper (Appendix C.1).
        bias_correction: "exact" divides v by the weight that has really arrived in it (see
            `lorapre.factors.second_moment_correction`), "paper" by 1 - beta2^t. They differ for a factored v only.
        second_moment: "hadamard" factors v as above, "full" keeps Adam's own (``exp_avg_sq``).
        scale: multiplies the update of compressed matrices, not their weight decay; GaLore and the paper use 0.25.
        view_3d: a 3-D weight is a "stack" of matrices, or to be flattened to (out, in * kernel): "flatten".
        state_dtype: dtype of the state; None is the parameter's own, but at least float32.
        seed: of the random right factors. Each parameter draws from its own stream, the same in every process.
        maximize: ascend instead of descend.
        capturable: keep the step counters on the device, so that ``step()`` can be captured in a CUDA graph.
        nonfinite: what to do when a gradient holds inf or nan: "raise" a RuntimeError, or "skip" the whole step.
            Either way nothing changes. None means "raise", or "skip" with ``capturable``, where it must be.

    Raises:
        ValueError: an option is out of range.
        TypeError: a parameter is complex, sharded or flattened.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        rank: int | float = 0.25,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        damping: float = 1e-4,
        damping_mode: Literal["absolute", "relative"] = "relative",
        bias_correction: Literal["paper", "exact"] = "exact",
        second_moment: Literal["hadamard", "full"] = "hadamard",
        scale: float = 1.0,
        view_3d: View3D = "stack",
        state_dtype: torch.dtype | None = None,
        seed: int = 0,
        maximize: bool = False,
        capturable: bool = False,
        nonfinite: Literal["raise", "skip"] | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "rank": rank,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "damping": damping,
                "damping_mode": damping_mode,
                "bias_correction": bias_correction,
                "second_moment": second_moment,
                "scale": scale,
                "view_3d": view_3d,
                "state_dtype": state_dtype,
                "seed": seed,
                "maximize": maximize,
                "capturable": capturable,
                "nonfinite": nonfinite,
            },
        )

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
        check_choice("second_moment", group["second_moment"], ("hadamard", "full"))

    def _init_param_state(self, param: Tensor, view: MatrixView | None, group: Group, key: str) -> dict[str, Tensor]:
        if view is None:
            return self._init_dense_state(param, group)
        dtype, device = self._state_dtype(param, group), param.device

        def left() -> Tensor:
            return torch.zeros(view.left_shape, dtype=dtype, device=device)

        def right(name: str) -> Tensor:
            return factors.initial_right_factor(
                view.right_shape, seed=group["seed"], key=f"{key}.{name}", dtype=dtype, device=device
            )

        state = {"step": self._new_step(param, group), "m_B": left(), "m_A": right("m_A")}
        if group["second_moment"] == "hadamard":
            state |= {"v_B": left(), "v_A": right("v_A")}
        else:
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        return state

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; those without keep their state and step count.

        Args:
            closure: reevaluates the model with gradients and returns the loss.

        Raises:
            RuntimeError: a gradient is sparse; nothing has changed then.
            NonFiniteGradientError: a gradient is not finite (see ``nonfinite``); nothing has changed then.
        """
        self._check_graph_capture()
        loss = cast("float | None", run_closure(closure))
        enabled = self._check_gradients()
        if enabled is False:
            return loss
        mask = enabled if isinstance(enabled, Tensor) else None
        for group in self.param_groups:
            dense: list[Tensor] = []
            matrices: list[tuple[Tensor, MatrixView]] = []
            for param in group["params"]:
                if param.grad is None:
                    continue
                view = self._view(param, group)
                if view is None:
                    dense.append(param)
                else:
                    matrices.append((param, view))
            self._step_matrices(matrices, group, mask)
            self._step_dense(dense, group, mask)
        return loss

    def _step_matrices(self, matrices: list[tuple[Tensor, MatrixView]], group: Group, mask: Tensor | None) -> None:
        """Bucket by everything that must be equal within a batch, then one call of the backend a bucket."""
        buckets: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        for param, view in matrices:
            state = self.state[param]
            # Counters on the device stay unread; a batch then carries one coefficient a matrix.
            count = None if group["capturable"] else state["step"].item()
            key = (view, param.shape, param.device, param.dtype, state["m_A"].dtype, count)
            buckets[key].append(param)
        for (view, *_, count), params in buckets.items():
            states = [self.state[param] for param in params]
            steps = [state["step"] for state in states]
            step = torch.stack(steps) + 1 if count is None else count + 1.0
            factored = group["second_moment"] == "hadamard"
            eager.lorapre_adamw(
                eager.AdamBucket(
                    view=view,
                    params=params,
                    grads=[cast(Tensor, param.grad) for param in params],
                    m_Bs=[state["m_B"] for state in states],
                    m_As=[state["m_A"] for state in states],
                    v_Bs=[state["v_B"] for state in states] if factored else [],
                    v_As=[state["v_A"] for state in states] if factored else [],
                    exp_avg_sqs=[] if factored else [state["exp_avg_sq"] for state in states],
                ),
                _hyperparameters(group, params[0].device),
                step=step,
                enabled=None if mask is None else mask.to(params[0].device),
            )
            if mask is None:
                torch._foreach_add_(steps, 1.0)
            else:  # as a list: given one tensor, the CUDA kernel asks the host for its value
                torch._foreach_add_(steps, [mask.to(steps[0].device, steps[0].dtype)] * len(steps))

    def _step_dense(self, params: list[Tensor], group: Group, mask: Tensor | None) -> None:
        """torch's own AdamW; weights narrower than their state are updated through a wide copy."""
        if not params:
            return
        states = [self.state[param] for param in params]
        grads = [cast(Tensor, param.grad) for param in params]
        averages = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]
        dtypes = [
            torch.promote_types(torch.promote_types(param.dtype, average.dtype), torch.float32)
            for param, average in zip(params, averages, strict=True)
        ]

        capturable = group["capturable"]
        fused = True if capturable else group.get("fused")

        def widened(tensors: list[Tensor]) -> list[Tensor]:
            wide = [tensor.to(dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
            # torch's fused CPU kernel walks through memory without a look at the strides.
            return [tensor.contiguous() for tensor in wide] if fused else wide

        wide_params, wide_averages, wide_squares = widened(params), widened(averages), widened(squares)
        steps = [state["step"] for state in states]
        # The fused kernel wants its counters beside the weights; ours stay on the CPU unless they are captured.
        counters = [step.to(param.device) for step, param in zip(steps, params, strict=True)] if fused else steps
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
            foreach=None if capturable or isinstance(group["lr"], Tensor) else group.get("foreach"),
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
        for original, result in zip(
            params + averages + squares, wide_params + wide_averages + wide_squares, strict=True
        ):
            if original is not result:
                original.copy_(result)
        for step, counter in zip(steps, counters, strict=True):
            if step is not counter:
                step.add_(1.0)


#: Algorithm 1 as printed, with the settings of the paper's pre-training runs.
PAPER_PRESET: Mapping[str, Any] = {
    "betas": (0.9, 0.95),
    "weight_decay": 0.0,
    "damping": 1e-6,
    "damping_mode": "absolute",
    "bias_correction": "paper",
    "second_moment": "hadamard",
    "scale": 0.25,
}


def _hyperparameters(group: Group, device: torch.device) -> eager.AdamHyperparameters:
    lr = group["lr"]
    if isinstance(lr, Tensor):
        # Only a captured step may not read the value: it must follow the tensor when the graph is replayed.
        lr = lr.to(device).reshape(()) if group["capturable"] else lr.item()
    beta1, beta2 = group["betas"]
    return eager.AdamHyperparameters(
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        scale=group["scale"],
        damping=group["damping"],
        damping_mode=group["damping_mode"],
        bias_correction=group["bias_correction"],
        maximize=group["maximize"],
    )
