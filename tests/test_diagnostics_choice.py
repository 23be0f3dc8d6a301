"""What `MomentumDiagnostics` watches, what it refuses, and which recursion it takes for an optimizer's momentum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from _support import make_params, set_grads
from lorapre import LoRAPreAdamW, LoRAPreLion, LoRAPreMuon, LoRAPreSGD
from lorapre.diagnostics import MomentumDiagnostics, momentum_rule

CPU = torch.device("cpu")


# What is watched.


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(10, 16)
        self.gate = nn.Linear(10, 16)
        self.down = nn.Linear(16, 10)


def experts(**options: Any) -> tuple[Experts, LoRAPreAdamW]:
    model = Experts()
    return model, LoRAPreAdamW(model.named_parameters(), rank=3, **options)


def test_by_default_the_first_compressed_parameter_of_each_shape_is_watched() -> None:
    _, optimizer = experts()
    assert MomentumDiagnostics(optimizer).names == ["up.weight", "down.weight"]


@pytest.mark.parametrize(
    ("choose", "names"),
    [
        (lambda model: "gate.weight", ["gate.weight"]),
        (lambda model: ["down.*", "?p.*"], ["up.weight", "down.weight"]),
        (lambda model: "*", ["up.weight", "gate.weight", "down.weight"]),
        (lambda model: model.gate.weight, ["gate.weight"]),
        (lambda model: [model.gate.weight, "gate.weight", "up.weight"], ["up.weight", "gate.weight"]),
    ],
)
def test_names_patterns_and_tensors_choose_what_is_watched(choose: Callable[[Experts], Any], names: list[str]) -> None:
    model, optimizer = experts()
    diagnostics = MomentumDiagnostics(optimizer, choose(model))
    assert diagnostics.names == names
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert list(diagnostics.latest()) == names


def test_parameters_without_names_go_by_their_index() -> None:
    params = make_params([(5,), (8, 10), (9, 9)], torch.float32, CPU)
    optimizer = LoRAPreAdamW(params, rank=3)
    assert MomentumDiagnostics(optimizer).names == ["1", "2"]
    assert MomentumDiagnostics(optimizer, "2").names == ["2"]


@pytest.mark.parametrize(
    ("choose", "words"),
    [
        (lambda model: "up.bias", ["'up.bias'", "(16,)", "not compressed", "smaller side exceeds the rank"]),
        (lambda model: model.down.bias, ["'down.bias'", "not compressed"]),
        (lambda model: "*.bias", ["'up.bias'", "not compressed"]),
        (lambda model: "left.weight", ["'left.weight'", "matches no parameter", "'up.weight'"]),
        (lambda model: torch.ones(7, 8), ["(7, 8)", "matches no parameter"]),
        (lambda model: [], ["params is empty"]),
    ],
)
def test_what_cannot_be_watched_is_named_with_the_remedy(choose: Callable[[Experts], Any], words: list[str]) -> None:
    model, optimizer = experts()
    with pytest.raises(ValueError) as refused:  # noqa: PT011  (the words are checked below)
        MomentumDiagnostics(optimizer, choose(model))
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.filterwarnings("ignore:LoRAPreAdamW compresses nothing")
def test_an_optimizer_that_compresses_nothing_has_nothing_to_watch() -> None:
    with pytest.raises(ValueError, match="compresses nothing"):
        MomentumDiagnostics(LoRAPreAdamW(make_params([(5,)], torch.float32, CPU)))


def test_two_parameters_of_one_name_cannot_both_be_watched() -> None:
    one, other = make_params([(8, 10), (9, 10)], torch.float32, CPU)
    optimizer = LoRAPreAdamW([{"params": [("w", one)]}, {"params": [("w", other)]}], rank=3)
    with pytest.raises(ValueError, match="are called 'w'"):
        MomentumDiagnostics(optimizer)


def test_an_optimizer_without_factors_is_refused() -> None:
    with pytest.raises(TypeError, match=r"AdamW keeps no factors m_B and m_A.*wrapper"):
        MomentumDiagnostics(torch.optim.AdamW(make_params([(8, 10)], torch.float32, CPU)))


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_steps_between_measurements_are_a_positive_integer(every: Any) -> None:
    with pytest.raises(ValueError, match="Invalid every"):
        MomentumDiagnostics(LoRAPreAdamW(make_params([(12, 20)], torch.float32, CPU), rank=3), every=every)


# The recursion that is the true one.


def optimizer_like(name: str, **members: Any) -> torch.optim.Optimizer:
    kind: Any = type(name, (torch.optim.SGD,), members)
    built: torch.optim.Optimizer = kind(make_params([(4, 5)], torch.float32, CPU), lr=0.1)
    return built


@pytest.mark.parametrize(
    ("optimizer", "group", "expected"),
    [
        (optimizer_like("Adam"), {"betas": (0.9, 0.99)}, (0.9, 0.1)),
        (optimizer_like("Sum"), {"momentum": 0.95}, (0.95, 1.0)),
        (
            optimizer_like("Average", momentum_gain=staticmethod(lambda group: 1 - group["momentum"])),
            {"momentum": 0.95},
            (0.95, 0.05),
        ),
        (
            optimizer_like("Damped", momentum_gain=staticmethod(lambda group: 1 - group["dampening"])),
            {"momentum": 0.9, "dampening": 0.25},
            (0.9, 0.75),
        ),
    ],
    ids=["betas", "a sum", "an average", "a gain of its own"],
)
def test_decay_and_gain_are_those_that_the_optimizer_means(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], expected: tuple[float, float]
) -> None:
    assert momentum_rule(optimizer, group) == pytest.approx(expected)


#: Each class, what makes its momentum decay, and the recursion that it then keeps: decay, gain.
REAL: dict[str, tuple[Any, dict[str, Any], tuple[float, float]]] = {
    "Adam": (LoRAPreAdamW, {"betas": (0.8, 0.99)}, (0.8, 0.2)),
    "Muon": (LoRAPreMuon, {"momentum": 0.7, "betas": (0.9, 0.99)}, (0.7, 1.0)),
    "SGD": (LoRAPreSGD, {"momentum": 0.7}, (0.7, 1.0)),
    "Nesterov": (LoRAPreSGD, {"momentum": 0.7, "nesterov": True}, (0.7, 1.0)),
    "Lion": (LoRAPreLion, {"betas": (0.9, 0.8)}, (0.8, 0.2)),
}


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("kind", "options", "rule"), REAL.values(), ids=list(REAL))
def test_the_true_momentum_is_what_each_optimizer_would_keep_if_its_factors_were_large_enough(
    kind: Any, options: dict[str, Any], rule: tuple[float, float], maximize: bool
) -> None:
    """Gradients of the factors' own rank in one space: nothing of the momentum is lost, whatever its recursion."""
    (param,) = make_params([(12, 20)], torch.float64, CPU)
    optimizer = kind([("weight", param)], rank=3, regression="subspace", maximize=maximize, **options)
    left, right = torch.randn(12, 3, dtype=torch.float64), torch.randn(3, 20, dtype=torch.float64)
    M = torch.zeros(12, 20, dtype=torch.float64)
    decay, gain = rule
    with MomentumDiagnostics(optimizer) as diagnostics:
        for _ in range(8):
            grad = left @ torch.randn(3, 3, dtype=torch.float64) @ right
            set_grads([param], [grad])
            optimizer.step()
            M = decay * M + (-gain if maximize else gain) * grad
            np.testing.assert_allclose(diagnostics.true_momentum("weight")[0], M, rtol=1e-12, atol=1e-13)
            assert diagnostics.records[-1].ema_error < 1e-9


@pytest.mark.parametrize("step", [2, 5])
@pytest.mark.parametrize("name", ["SGD", "Nesterov", "Lion"])
def test_the_update_leaves_out_a_weight_decay_that_is_decoupled(name: str, step: int) -> None:
    kind, options, _ = REAL[name]
    (param,) = make_params([(12, 20)], torch.float64, CPU)
    optimizer = kind([("weight", param)], lr=1e-2, weight_decay=5.0, rank=3, regression="subspace", **options)
    left, right = torch.randn(12, 3, dtype=torch.float64), torch.randn(3, 20, dtype=torch.float64)
    M = torch.zeros(12, 20, dtype=torch.float64)
    with MomentumDiagnostics(optimizer) as diagnostics:
        for _ in range(step):  # from the second on the gradient is inside the factors' space
            grad = left @ torch.randn(3, 3, dtype=torch.float64) @ right
            set_grads([param], [grad])
            optimizer.step()
            M = 0.7 * M + grad
    update = {"SGD": M, "Nesterov": grad + 0.7 * M, "Lion": torch.ones(12, 20)}[name]
    record = diagnostics.records[-1]
    assert record.update_rms == pytest.approx(float(update.square().mean().sqrt()), rel=1e-9)
    assert record.update_max == pytest.approx(float(update.abs().max()), rel=1e-9)


def test_an_optimizer_of_unknown_momentum_is_refused_unless_the_true_one_is_not_asked_for() -> None:
    with pytest.raises(TypeError, match="neither betas nor momentum"):
        momentum_rule(optimizer_like("Plain"), {"lr": 0.1})
