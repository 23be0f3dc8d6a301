"""ReLoRA's merges and LORO's Riemannian steps, against the formulas written out for one dense matrix."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from _support import assert_close, assert_same_bits
from lorapre.lab.baselines.factorised import restart_factor
from lorapre.lab.baselines.lora import LoRALinear
from lorapre.lab.baselines.loro import LOROAdamW, riemannian_step
from lorapre.lab.baselines.low_rank_weights import LowRankLinear
from lorapre.lab.baselines.relora import PRUNED, ReLoRAAdamW, prune_moments
from lorapre.lab.config import PretrainConfig
from lorapre.lab.optimizers.weights import ENTRIES

ROWS = {entry.name: entry for entry in ENTRIES}
P, Q, R, EVERY, WARM = 14, 11, 3, 5, 2
LR, BETAS = 0.02, (0.9, 0.95)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_layer() -> nn.Linear:
    layer = nn.Linear(Q, P, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(0.2 * normal(P, Q, seed=1))
    return layer


def relora() -> tuple[LoRALinear, ReLoRAAdamW]:
    layer = LoRALinear(plain_layer(), R, name="layer", seed=5, alpha=6.0)
    groups = [{"params": [layer.lora_B, layer.lora_A]}]
    optimizer = ReLoRAAdamW(groups, [layer], every=EVERY, rewarmup=WARM, lr=LR, betas=BETAS, eps=1e-8, weight_decay=0.1)
    return layer, optimizer


def loro(scale: float = 1.0) -> tuple[LowRankLinear, LOROAdamW]:
    layer = LowRankLinear(plain_layer(), R, name="layer", seed=5, stds=(0.5 * scale, 0.5 / scale))
    groups = [{"params": [layer.B, layer.A]}]
    return layer, LOROAdamW(groups, lr=LR, every=EVERY, rewarmup=WARM, betas=BETAS, weight_decay=0.1)


def loss_of(layer: nn.Module, step: int) -> Tensor:
    """A regression on data that changes from step to step; its gradient has full rank."""
    x, y = normal(40, Q, seed=100 + step), normal(40, P, seed=200 + step)
    loss: Tensor = (layer(x) - y).square().mean()
    return loss


def train(layer: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(layer, step).backward()
        optimizer.step()


def weight_gradient(W: Tensor, step: int) -> Tensor:
    x, y = normal(40, Q, seed=100 + step), normal(40, P, seed=200 + step)
    return 2 * (x @ W.mT - y).mT @ x / y.numel()


class PlainAdam:
    """Adam's direction for one matrix, as its paper prints it."""

    def __init__(self, shape: torch.Size) -> None:
        self.m, self.v = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)

    def direction(self, G: Tensor, t: int) -> Tensor:
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * G
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * G**2
        return (self.m / (1 - BETAS[0] ** t)) / ((self.v / (1 - BETAS[1] ** t)).sqrt() + 1e-8)

    def prune(self, share: float) -> None:
        ascending = self.m.abs().flatten().argsort()
        gone = ascending[: int(share * len(ascending))]
        self.m.view(-1)[gone] = 0
        self.v.view(-1)[gone] = 0


def rank_of(W: Tensor) -> int:
    return int(torch.linalg.matrix_rank(W, rtol=1e-9))


def test_relora_follows_the_formulas_written_out_over_four_restarts() -> None:
    layer, optimizer = relora()
    scaling = 6.0 / R
    W, B, A = layer.weight.clone(), torch.zeros(P, R, dtype=torch.float64), layer.lora_A.detach().clone()
    adam_B, adam_A = PlainAdam(B.shape), PlainAdam(A.shape)
    for step in range(4 * EVERY + 2):
        train(layer, optimizer, range(step, step + 1))
        G = weight_gradient(W + scaling * B @ A, step)
        # Two steps of warm-up after a restart: a third, two thirds, one.
        lr = LR * (1 if step < EVERY else [1 / 3, 2 / 3, 1, 1, 1][step % EVERY])
        dB, dA = adam_B.direction(scaling * G @ A.mT, step + 1), adam_A.direction(scaling * B.mT @ G, step + 1)
        B, A = (1 - 0.1 * lr) * B - lr * dB, (1 - 0.1 * lr) * A - lr * dA
        if (step + 1) % EVERY == 0:
            W = W + scaling * B @ A
            B, A = torch.zeros_like(B), layer.initial_A(R, str((step + 1) // EVERY)).double()
            adam_B.prune(0.99)
            adam_A.prune(0.99)
        assert_close(layer.merged_weight(), W + scaling * B @ A, 1e-12, f"weight at step {step}")
        assert_close(optimizer.state[layer.lora_A]["exp_avg"], adam_A.m, 1e-10, f"moment of A at step {step}")
        assert_close(optimizer.state[layer.lora_B]["exp_avg_sq"], adam_B.v, 1e-10, f"moment of B at step {step}")


def test_a_merge_leaves_the_weight_and_starts_with_a_zero_product_and_another_A() -> None:
    layer, optimizer = relora()
    train(layer, optimizer, range(EVERY - 1))
    old_A, frozen = layer.lora_A.detach().clone(), layer.weight.clone()
    merged = {}

    def before_restart(number: int) -> None:
        merged["weight"] = layer.merged_weight().detach().clone()
        restart(number)

    restart, optimizer._restart = optimizer._restart, before_restart  # type: ignore[method-assign]
    train(layer, optimizer, range(EVERY - 1, EVERY))
    assert_same_bits(layer.merged_weight().detach(), merged["weight"])
    assert_same_bits(layer.weight.detach(), merged["weight"])
    assert (layer.weight - frozen).norm() > 1e-2
    assert not layer.lora_B.any()
    assert (layer.lora_A != old_A).all()
    assert not layer.weight.requires_grad


def test_the_accumulated_change_has_rank_r_before_a_merge_and_r_more_with_every_merge() -> None:
    layer, optimizer = relora()
    start = layer.weight.clone()
    for cycle in range(3):
        train(layer, optimizer, range(cycle * EVERY, cycle * EVERY + EVERY - 1))
        assert rank_of(layer.merged_weight() - start) == (cycle + 1) * R
        train(layer, optimizer, range(cycle * EVERY + EVERY - 1, cycle * EVERY + EVERY))
    assert rank_of(layer.merged_weight() - start) == 3 * R > R


def test_pruning_keeps_the_largest_means_and_their_squares_alone() -> None:
    mean, square = normal(20, 15, seed=1), normal(20, 15, seed=2).square()
    kept_mean, kept_square = mean.clone(), square.clone()
    prune_moments(kept_mean, kept_square, PRUNED)
    largest = mean.abs().flatten().topk(3).indices  # a hundredth of 300
    expected = torch.zeros(300, dtype=torch.bool).index_fill_(0, largest, True).view(20, 15)
    assert_same_bits(kept_mean, mean * expected)
    assert_same_bits(kept_square, square * expected)


def test_after_a_merge_no_entry_of_A_takes_a_step_beyond_adams_bound() -> None:
    """A has no gradient then: a mean that had outlived its square would be divided by eps."""
    layer, optimizer = relora()
    train(layer, optimizer, range(EVERY))
    before = layer.lora_A.detach().clone()
    train(layer, optimizer, range(EVERY, EVERY + 1))
    bound = 0.1 * before.abs() + (1 - BETAS[0]) / (1 - BETAS[1]) ** 0.5 * 10
    assert ((layer.lora_A - before).abs() <= LR * bound).all()


@pytest.mark.parametrize(("every", "length"), [(5, 2), (10, 0), (1000, 100)])
def test_restart_factor_rises_evenly_after_each_restart_but_the_first_start(every: int, length: int) -> None:
    factors = [restart_factor(step, every, length) for step in range(3 * every)]
    ramp = [(index + 1) / (length + 1) for index in range(length)] + [1.0] * (every - length)
    assert factors == pytest.approx([1.0] * every + ramp + ramp)


def riemannian_reference(W: Tensor, G: Tensor, lr: float, r: int) -> Tensor:
    """Project G onto the tangent space at W, step, and cut the singular values after the r-th."""
    U, _, Vt = torch.linalg.svd(W)
    PU, PV = U[:, :r] @ U[:, :r].mT, Vt[:r].mT @ Vt[:r]
    D = PU @ G @ PV + (torch.eye(len(PU)) - PU) @ G @ PV + PU @ G @ (torch.eye(len(PV)) - PV)
    L, sigma, Rt = torch.linalg.svd(W - lr * D, full_matrices=False)
    return (L[:, :r] * sigma[:r]) @ Rt[:r]


@pytest.mark.parametrize("lr", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize(("p", "q", "r"), [(14, 11, 3), (11, 14, 3), (12, 12, 11), (9, 20, 7), (12, 5, 1)])
def test_riemannian_step_is_projection_and_retraction_of_the_dense_matrix(p: int, q: int, r: int, lr: float) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        B, A, G = normal(p, r, seed=1), normal(r, q, seed=2), normal(p, q, seed=3)
        new_B, new_A = riemannian_step(B, A, G @ A.mT, B.mT @ G, lr)
        assert_close(new_B @ new_A, riemannian_reference(B @ A, G, lr, r), 1e-10)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(torch.linalg.svdvals(new_B), torch.linalg.svdvals(new_A), 1e-10, "balance")


def test_riemannian_step_does_not_depend_on_the_balance_of_the_factors() -> None:
    B, A, G = normal(P, R, seed=1), normal(R, Q, seed=2), normal(P, Q, seed=3)
    C = torch.eye(R, dtype=torch.float64) + 0.5 * normal(R, R, seed=4)
    C[:, 0] *= 100
    other_B, other_A = B @ C, torch.linalg.solve(C, A)
    new_B, new_A = riemannian_step(B, A, G @ A.mT, B.mT @ G, 0.3)
    same_B, same_A = riemannian_step(other_B, other_A, G @ other_A.mT, other_B.mT @ G, 0.3)
    assert_close(same_B @ same_A, new_B @ new_A, 1e-11)
    plain = (other_B - 0.3 * G @ other_A.mT) @ (other_A - 0.3 * other_B.mT @ G)  # gradient descent on the factors does
    assert (plain - (B - 0.3 * G @ A.mT) @ (A - 0.3 * B.mT @ G)).norm() > 1.0


def test_riemannian_step_with_a_singular_factor_stays_finite_and_moves_in_the_directions_it_has() -> None:
    B, A, G = normal(P, R, seed=1), normal(R, Q, seed=2), normal(P, Q, seed=3)
    B[:, 2] = B[:, 1]
    new_B, new_A = riemannian_step(B, A, G @ A.mT, B.mT @ G, 1e-6)
    assert_close(new_B @ new_A, B @ A, 1e-5)
    assert (new_B @ new_A - B @ A).norm() > 1e-9


def test_riemannian_step_keeps_bfloat16_factors_in_their_dtype() -> None:
    B, A, G = normal(P, R, seed=1), normal(R, Q, seed=2), normal(P, Q, seed=3)
    exact = riemannian_step(B, A, G @ A.mT, B.mT @ G, 0.1)
    rounded = riemannian_step(*(tensor.bfloat16() for tensor in (B, A, G @ A.mT, B.mT @ G)), 0.1)
    assert [tensor.dtype for tensor in rounded] == 2 * [torch.bfloat16]
    assert_close(rounded[0].double() @ rounded[1].double(), exact[0] @ exact[1], 3e-2)


def test_loro_follows_the_formulas_written_out_over_three_cycles() -> None:
    layer, optimizer = loro()
    B, A = layer.B.detach().clone(), layer.A.detach().clone()
    adam_B, adam_A = PlainAdam(B.shape), PlainAdam(A.shape)
    for step in range(3 * EVERY + 2):
        train(layer, optimizer, range(step, step + 1))
        G = weight_gradient(B @ A, step)
        t = step % EVERY + 1  # Adam starts anew with every cycle
        dB, dA = adam_B.direction(G @ A.mT, t), adam_A.direction(B.mT @ G, t)
        lr = LR * (1 if step < EVERY else [1 / 3, 2 / 3, 1, 1, 1][step % EVERY])
        B, A = (1 - 0.1 * lr) * B, (1 - 0.1 * lr) * A
        if t < EVERY:
            B, A = B - lr * R / min(P, Q) * dB, A - lr * R / min(P, Q) * dA
            assert_close(layer.B, B, 1e-9)
            assert_close(layer.A, A, 1e-9)
        else:
            D = torch.linalg.pinv(B).mT @ dA
            D = D + dB @ torch.linalg.pinv(A).mT - B @ torch.linalg.pinv(B) @ dB @ torch.linalg.pinv(A).mT
            U, sigma, Vt = torch.linalg.svd(B @ A - lr * D, full_matrices=False)
            assert_close(layer.B @ layer.A, (U[:, :R] * sigma[:R]) @ Vt[:R], 1e-9)
            assert_close(torch.linalg.svdvals(layer.B), sigma[:R].sqrt(), 1e-9)
            B, A = layer.B.detach().clone(), layer.A.detach().clone()  # the signs of singular vectors are free
            adam_B, adam_A = PlainAdam(B.shape), PlainAdam(A.shape)
            for factor in (layer.B, layer.A):
                assert not optimizer.state[factor]["exp_avg"].any()
                assert not optimizer.state[factor]["exp_avg_sq"].any()


def test_loro_refuses_parameters_that_are_not_pairs() -> None:
    layer, _ = loro()
    for params in ([layer.B], [layer.A, layer.B], [layer.B, nn.Parameter(torch.ones(R))]):
        with pytest.raises(ValueError, match=r"pairs B \(p, r\), A \(r, q\)"):
            LOROAdamW([{"params": params}], lr=LR, every=EVERY, rewarmup=WARM)


@pytest.mark.parametrize("make", [relora, loro])
@pytest.mark.parametrize("cut", [EVERY - 1, EVERY, EVERY + 1])
def test_a_run_cut_around_a_restart_goes_on_to_the_bit_from_its_checkpoint(make: Any, cut: int) -> None:
    layer, optimizer = make()
    train(layer, optimizer, range(cut))
    file = io.BytesIO()
    torch.save({"model": layer.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(layer, optimizer, range(cut, 3 * EVERY + 1))

    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    resumed, again = make()
    with torch.no_grad():
        for param in resumed.parameters():
            param.fill_(7.0)  # all must come from the checkpoint
    resumed.load_state_dict(checkpoint["model"])
    again.load_state_dict(checkpoint["optimizer"])
    train(resumed, again, range(cut, 3 * EVERY + 1))
    assert_same_bits(resumed.state_dict(), layer.state_dict())
    assert_same_bits(again.state_dict()["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize("make", [relora, loro])
def test_a_step_without_gradients_neither_counts_nor_restarts_twice(make: Any) -> None:
    layer, optimizer = make()
    train(layer, optimizer, range(EVERY))
    before = copy.deepcopy((layer.state_dict(), optimizer.state_dict()["state"]))
    optimizer.zero_grad()
    optimizer.step()
    assert_same_bits((layer.state_dict(), optimizer.state_dict()["state"]), before)


@pytest.mark.parametrize("make", [relora, loro])
def test_the_schedulers_rate_is_left_as_it_was(make: Any) -> None:
    layer, optimizer = make()
    train(layer, optimizer, range(EVERY + 1))  # the next step is in a warm-up
    assert optimizer.param_groups[0]["lr"] == LR


@pytest.mark.parametrize(("name", "cycles", "warm"), [("relora", 10, 100), ("loro", 20, 5)])
def test_a_run_restarts_as_often_as_the_authors_do_but_not_within_fifty_steps(
    name: str, cycles: int, warm: int
) -> None:
    model = nn.Sequential(nn.Linear(Q, P))
    config = PretrainConfig(rank=R, steps=10_000)
    prepare = ROWS[name].prepare
    assert prepare is not None
    prepare(model, config)
    for steps, every, rewarmup in (
        (10_000, 10_000 // cycles, warm),
        (600, max(50, 600 // cycles), 5 + (name == "relora")),
    ):
        cls, kwargs = ROWS[name].build(model, config.model_copy(update={"steps": steps}), 1e-3, 1e-3)
        part: Any = cls(kwargs["params"]).parts[0]  # type: ignore[attr-defined]
        assert (part.every, part.rewarmup) == (every, rewarmup)
