"""What optimizers of LoRA adapters share: pairs of factors, their checks and checkpoints, the algebra of rank r."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from lorapre.lab.baselines._matrix_optimizer import CheckedOptimizer, Group, State

_DTYPES = (torch.bfloat16, torch.float32, torch.float64)
_AT_LEAST_ZERO = ("lr", "eps", "weight_decay", "delta")


def lora_pair_groups(model: nn.Module, adapter: str = "default") -> list[Group]:
    """Parameter groups of the trained LoRA pairs in a peft ``model``, a group for each scaling that occurs.

    A pair are ``<module>.lora_A.<adapter>.weight`` (r, in) and ``<module>.lora_B.<adapter>.weight`` (out, r), and its
    scaling is ``<module>.scaling[adapter]``: alpha / r, or alpha / sqrt(r) where the adapter was made so.
    Embeddings' pairs (``lora_embedding_A``) and everything else that is trained are left to another optimizer.

    Raises:
        ValueError: ``model`` has no such pair, one is trained in half, or is no plain W + scaling B A (DoRA).
    """
    named = dict(model.named_parameters())
    groups: dict[float, list[tuple[str, nn.Parameter]]] = {}
    for name, A in named.items():
        match = re.fullmatch(rf"(.*)\.lora_A\.{re.escape(adapter)}\.weight", name)
        if match is None:
            continue
        other = f"{match[1]}.lora_B.{adapter}.weight"
        if other not in named or A.requires_grad != named[other].requires_grad:
            raise ValueError(
                f"{name}: {other} is not there, or only one of the two is trained. The optimizers of pairs need both; "
                "train such an adapter with torch.optim.AdamW."
            )
        module: Any = model.get_submodule(match[1])
        if adapter in getattr(module, "lora_variant", {}):
            raise ValueError(
                f"{match[1]}: its adapter is {type(module.lora_variant[adapter]).__name__}, not W + scaling B A, which "
                "the optimizers of pairs assume. Make the adapter without use_dora and its like."
            )
        if A.requires_grad:
            scaling = float(module.scaling[adapter])
            groups.setdefault(scaling, []).extend([(name, A), (other, named[other])])
    if not groups:
        raise ValueError(
            f"The model has no trained LoRA pair of an adapter {adapter!r} (names lora_A.{adapter}.weight)."
        )
    return [{"params": params, "scaling": scaling} for scaling, params in groups.items()]


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues (r,), at least 0, and eigenvectors (r, r) of a Gram matrix, in float64."""

    values: Tensor
    vectors: Tensor

    def inverse(self, delta: float) -> Tensor:
        """(S + delta I)^-1, (r, r); where an eigenvalue plus delta is zero, the pseudo-inverse."""
        return (self.vectors * _reciprocal(self.values + delta)) @ self.vectors.mT


def _reciprocal(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1.0 / x, torch.zeros_like(x))


def gram_spectra(factors: Sequence[Tensor]) -> list[Spectrum]:
    """Of F F^T for each F (r, n) in ``factors``; those of one rank are decomposed together.

    In float64, since the condition of a Gram matrix is the square of its factor's. Rounding below zero is cut off.
    """
    found: dict[int, Spectrum] = {}
    for rank in {factor.shape[0] for factor in factors}:
        places = [place for place, factor in enumerate(factors) if factor.shape[0] == rank]
        wide = [factors[place].double() for place in places]
        values, vectors = torch.linalg.eigh(torch.stack([factor @ factor.mT for factor in wide]))
        for place, *parts in zip(places, values.clamp(min=0), vectors, strict=True):
            found[place] = Spectrum(*parts)
    return [found[place] for place in range(len(factors))]


def solve_sylvester(left: Spectrum, right: Spectrum, C: Tensor) -> Tensor:
    """X (r, r) of L X + X R = C for Gram matrices L and R; zero along eigenvectors whose eigenvalues are both zero."""
    rotated = left.vectors.mT @ C @ right.vectors
    X = rotated * _reciprocal(left.values[:, None] + right.values[None, :])
    return left.vectors @ X @ right.vectors.mT


@dataclass(frozen=True)
class Pair:
    """One adapter at one step: W = W0 + scaling B A with A (r, in), B (out, r).

    ``A``, ``B`` and the gradients are in the dtype of the arithmetic; ``write`` puts new factors where they belong.
    """

    A: Tensor
    B: Tensor
    grad_A: Tensor
    grad_B: Tensor
    scaling: float
    state: State
    params: tuple[Tensor, Tensor]

    @property
    def step(self) -> int:
        """Counts from 1."""
        return int(self.state["step"].item())

    def write(self, A: Tensor, B: Tensor) -> None:
        """Round ``A`` and ``B`` to the parameters' dtype."""
        for param, value in zip(self.params, (A, B), strict=True):
            param.copy_(value)


class LoRAPairOptimizer(CheckedOptimizer):
    """Base of optimizers that move both factors of an adapter together.

    ``params`` hold A (r, in) and B (out, r) in turn: A, B, A, B, ...; ``scaling`` of a group is that of its adapters.
    bfloat16 factors are updated in float32 and rounded; the state is float32 then, and stays so in a checkpoint.
    The state of a pair lies under its B, with a counter ``step``, created at the first step that has gradients.
    """

    def _initial_state(self, A: Tensor, B: Tensor, group: Group) -> State:
        """The fresh state of a pair, without its counter; ``A`` and ``B`` are in the dtype of the arithmetic."""
        raise NotImplementedError

    def _step_pairs(self, groups: list[tuple[list[Pair], Group]]) -> None:
        """Move every pair that has gradients; ``groups`` hold them with their options."""
        raise NotImplementedError

    def __init__(self, params: ParamsT, defaults: Group) -> None:
        super().__init__(params, {"scaling": 1.0, **defaults})

    def _check_group(self, group: Group) -> None:
        values = [(name, group[name]) for name in _AT_LEAST_ZERO]
        values += [(f"betas[{index}]", beta) for index, beta in enumerate(group["betas"])]
        for name, value in values:
            if not value >= 0 or (name.startswith("betas") and not value < 1):
                raise ValueError(f"Invalid {name} value: {value}.")
        if not group["scaling"] > 0:
            raise ValueError(f"Invalid scaling value: {group['scaling']}. It must be above 0.")
        params = group["params"]
        shapes = [tuple(param.shape) for param in params]
        if len(params) % 2 or any(
            len(a) != 2 or len(b) != 2 or a[0] != b[1] for a, b in zip(shapes[::2], shapes[1::2], strict=True)
        ):
            raise ValueError(
                f"{type(self).__name__} moves LoRA pairs alone: A (r, in) and B (out, r) in turn, but a group has the "
                f"shapes {shapes}. lora_pair_groups finds the pairs of a peft model."
            )
        for param in params:
            if param.dtype not in _DTYPES:
                raise ValueError(f"{type(self).__name__} moves bfloat16, float32 and float64, not {param.dtype}.")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every pair that has gradients.

        Args:
            closure: reevaluates the model with gradients and returns the loss.

        Raises:
            RuntimeError: one factor of a pair has a gradient and the other has none, or one is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self._pairs()
        for pairs, _ in groups:
            for pair in pairs:
                pair.state["step"] += 1
        self._step_pairs(groups)
        return loss

    def _pairs(self) -> list[tuple[list[Pair], Group]]:
        """The pairs that have gradients, with their groups; their state is made where it is missing."""
        found = []
        for group in self.param_groups:
            params = group["params"]
            pairs = [self._pair(A, B, group) for A, B in zip(params[::2], params[1::2], strict=True)]
            if present := [pair for pair in pairs if pair is not None]:
                found.append((present, group))
        return found

    def _pair(self, A: Tensor, B: Tensor, group: Group) -> Pair | None:
        if A.grad is None and B.grad is None:
            return None
        if A.grad is None or B.grad is None or A.grad.is_sparse or B.grad.is_sparse:
            raise RuntimeError(
                f"{type(self).__name__} needs a dense gradient of both factors of a pair ({tuple(A.shape)}, "
                f"{tuple(B.shape)}), and one has none."
            )
        dtype = torch.promote_types(A.dtype, torch.float32)
        wide_A, wide_B = A.to(dtype), B.to(dtype)
        state: State = self.state[B]
        if not state:
            # On the CPU, as in torch: reading it is free.
            state["step"] = torch.zeros((), dtype=torch.float32)
            state.update(self._initial_state(wide_A, wide_B, group))
        scaling = float(group["scaling"])
        return Pair(wide_A, wide_B, A.grad.to(dtype), B.grad.to(dtype), scaling, state, (A, B))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as it was saved: it keeps its dtype, which torch would make the parameters'.

        Raises:
            ValueError: the state belongs to other groups.
        """
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if name != "step":
                    self.state[param][name] = value.detach().to(param.device, copy=True)
