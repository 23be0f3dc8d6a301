"""What several test files need: gradients to train on, the reference run beside an optimizer, comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorapre import LoRAPreAdamW, reference
from lorapre.optim.checks import sweep_interval
from lorapre.routing import MatrixView, matrix_view

Shape = tuple[int, ...]


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64 on the CPU; 0 if both are zero."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    gap = (actual - expected).norm().item()
    return gap if gap == 0.0 else gap / expected.norm().item()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Within ``tolerance`` relative in the Frobenius norm; NaN fails."""
    gap = relative_difference(actual, expected)
    assert gap <= tolerance, f"{what}: relative difference {gap:.3g}, allowed {tolerance:.3g}"


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Equal to the last bit, type and shape included, through dictionaries and sequences."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def gradients(shape: Shape, steps: int, seed: int = 0, noise: float = 0.1) -> Iterator[Tensor]:
    """Gradients as training has them: a full-rank signal U V whose factors drift slowly, plus noise; float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    if len(shape) < 2:
        for _ in range(steps):
            yield normal(*shape)
        return
    p, q = shape[0], 1
    for side in shape[1:]:
        q *= side
    k = min(p, q) + 2
    U, V = normal(p, k), normal(k, q)
    for _ in range(steps):
        yield (U @ V / k**0.5 + noise * normal(p, q)).reshape(shape)
        U, V = 0.99 * U + 0.14 * normal(p, k), 0.99 * V + 0.14 * normal(k, q)  # stationary: 0.99^2 + 0.14^2 = 1


def make_params(shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[nn.Parameter]:
    """Parameters of the given shapes, normal with deviation 0.1, the same on every device."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return [
        nn.Parameter((0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype))
        for shape in shapes
    ]


def clone_params(params: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().clone()) for param in params]


def set_grads(params: Sequence[nn.Parameter], grads: Sequence[Tensor | None]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.to(param.device, param.dtype)


def random_grads(params: Sequence[nn.Parameter], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(param.shape, generator=generator) for param in params]


def train(optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    """``steps`` steps on random gradients that depend on ``seed`` and the step alone."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(steps):
        set_grads(params, random_grads(params, 7919 * seed + step))
        optimizer.step()


def assert_replays_have_the_bits_of_launches(
    launched: torch.optim.Optimizer, captured: torch.optim.Optimizer, feed: Callable[[Any, int], None], *, steps: int
) -> None:
    """``captured`` takes three steps, is captured in a CUDA graph and replayed; ``feed`` sets a step's gradients."""
    for optimizer in (launched, captured):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.zeros_like(param)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for number in range(3):
            feed(captured, number)
            captured.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for number in range(steps):
        feed(launched, number)
        launched.step()
        if number >= 3:
            feed(captured, number)
            graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(snapshot(captured), snapshot(launched))


def snapshot(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Copies of every parameter and every state tensor."""
    return [
        (param.detach().clone(), {key: value.clone() for key, value in sorted(optimizer.state[param].items())})
        for group in optimizer.param_groups
        for param in group["params"]
    ]


class ReferenceRun:
    """Algorithm 1 by :mod:`lorapre.reference`, in float64 on the CPU, for one compressed parameter.

    Starts from a copy of the optimizer's own initial factors. A stack of matrices, or a flattened convolution,
    is a list of independent matrices here.
    """

    KEYS = ("m_B", "m_A", "v_B", "v_A", "v_row", "v_col")

    def __init__(self, optimizer: LoRAPreAdamW, param: nn.Parameter, group: dict[str, Any]) -> None:
        view = matrix_view(param.shape, group["rank"], group["view_3d"])
        assert view is not None, "the reference is for compressed parameters"
        self.view: MatrixView = view
        self.group = group
        self.shape = param.shape
        self.W = self._matrices(param)
        stored = optimizer.state[param]
        self.states = [
            reference.AdamState(
                **{key: self._split(stored[key])[i] for key in self.KEYS if key in stored},
                v=self._matrices(stored["exp_avg_sq"])[i] if "exp_avg_sq" in stored else None,
                step=int(stored["step"].item()),
            )
            for i in range(view.batch)
        ]

    def _matrices(self, tensor: Tensor) -> list[Tensor]:
        wide = tensor.detach().cpu().double().reshape(self.view.batch, self.view.p, self.view.q)
        return [matrix.clone() for matrix in wide]

    def _split(self, factor: Tensor) -> list[Tensor]:
        wide = factor.detach().cpu().double()
        return [matrix.clone() for matrix in (wide if self.view.stacked else wide[None])]

    def step(self, grad: Tensor) -> None:
        group = self.group
        sign = -1.0 if group["maximize"] else 1.0
        for i, G in enumerate(self._matrices(grad)):
            self.W[i] = reference.lorapre_adam_step(
                self.W[i],
                sign * G,
                self.states[i],
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                scale=group["scale"],
                damping=group["damping"],
                damping_mode=group["damping_mode"],
                eps_mode=group["eps_mode"],
                bounded=group["bounded"],
                update_clipping=group["update_clipping"],
                spectral_clipping=group["spectral_clipping"],
                regression=group["regression"],
                sweeps=self.states[i].step % sweep_interval(group) == 0,
                residual_gain=group["residual_gain"],
                bias_correction=group["bias_correction"],
            )

    def weight(self) -> Tensor:
        return torch.stack(self.W).reshape(self.shape)

    def check(self, optimizer: LoRAPreAdamW, param: nn.Parameter, tolerance: float) -> None:
        """The weight, every state tensor and the momenta that they stand for agree.

        A single float32 factor may be ten times further off than its product: what one factor loses in an
        ill-conditioned direction the other makes up for.
        """
        stored = optimizer.state[param]
        assert_close(param, self.weight(), tolerance, f"W {tuple(self.shape)}")
        factor_tolerance = tolerance * (10 if param.dtype == torch.float32 else 1)
        product: dict[str, list[Tensor]] = {}
        for key in self.KEYS:
            if key in stored:
                expected = torch.stack([getattr(state, key) for state in self.states])
                found = stored[key].reshape(expected.shape)
                # A basis of the same space is as good; (11) defines no other property of the factors.
                if self.group["regression"] == "newton" or key in ("v_row", "v_col"):
                    assert_close(found, expected, factor_tolerance, f"{key} {tuple(self.shape)}")
                if key in ("v_row", "v_col"):
                    continue
                product.setdefault(key[0], []).extend((found.to(expected), expected))
        for moment, (found_B, expected_B, found_A, expected_A) in product.items():
            assert_close(found_B @ found_A, expected_B @ expected_A, tolerance, f"{moment} {tuple(self.shape)}")
        if "exp_avg_sq" in stored:
            expected = torch.stack([state.v for state in self.states if state.v is not None]).reshape(self.shape)
            assert_close(stored["exp_avg_sq"], expected, tolerance, f"v {tuple(self.shape)}")
        assert stored["step"].item() == self.states[0].step
