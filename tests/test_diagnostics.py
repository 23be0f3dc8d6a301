"""Each figure of `MomentumDiagnostics` against its definition, computed here from dense float64 matrices."""

from __future__ import annotations

import copy
import io
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from _support import assert_same_bits, gradients, make_params, set_grads, snapshot
from lorapre import LoRAPreAdamW, NonFiniteGradientError, momentum_figures
from lorapre.diagnostics import MomentumDiagnostics

BETA = 0.9
CPU = torch.device("cpu")
Shape = tuple[int, ...]


#: Of factors that are kept in float64.
EPS = torch.finfo(torch.float64).eps


def build(
    shape: Shape = (12, 20), dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[nn.Parameter, LoRAPreAdamW]:
    (param,) = make_params([shape], dtype, CPU)
    kwargs = {"lr": 1e-2, "rank": 3, "betas": (BETA, 0.99), "weight_decay": 0.1, **options}
    return param, LoRAPreAdamW([("weight", param)], **kwargs)


def take(optimizer: LoRAPreAdamW, param: nn.Parameter, grad: Tensor | None) -> None:
    set_grads([param], [grad])
    optimizer.step()


def factor(optimizer: LoRAPreAdamW, param: nn.Parameter, key: str) -> np.ndarray:
    """A copy in float64."""
    return np.array(optimizer.state[param][key].double())


def basis(rows: np.ndarray) -> np.ndarray:
    return np.linalg.svd(rows, full_matrices=False)[2].T


def expected_figures(
    before: np.ndarray, B: np.ndarray, A: np.ndarray, G: np.ndarray, M: np.ndarray
) -> dict[str, float]:
    """The definitions, for one matrix; ``before`` is m_A before the step."""
    r = len(A)
    U, S, Vt = np.linalg.svd(M)
    best = (U[:, :r] * S[:r]) @ Vt[:r]
    old, new = basis(before), basis(A)
    cosines = np.linalg.svd(old.T @ new, compute_uv=False)  # of the principal angles
    singular_A = np.linalg.svd(A, compute_uv=False)
    singular_BA = np.linalg.svd(B @ A, compute_uv=False)
    size = np.linalg.norm(M)
    return {
        "ema_error": float(np.linalg.norm(B @ A - M) / size),
        "best_error": float(np.linalg.norm(best - M) / size),
        "ema_cosine": float((B @ A * M).sum() / np.linalg.norm(B @ A) / size),
        "outside": float(np.linalg.norm(G - G @ old @ old.T) ** 2 / np.linalg.norm(G) ** 2),
        "drift": float(np.mean(1 - cosines**2)),
        "condition_m_A": float(singular_A[0] / singular_A[-1]),
        "condition_product": float(singular_BA[0] / singular_BA[r - 1]),
    }


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        pytest.param((12, 20), {}, id="wide"),
        pytest.param((20, 12), {}, id="tall"),
        pytest.param((12, 20), {"regression": "newton"}, id="newton"),
        pytest.param((12, 20), {"regression": "subspace"}, id="subspace"),
        pytest.param((12, 20), {"maximize": True}, id="ascending"),
        pytest.param((4, 9, 14), {}, id="a stack"),
        pytest.param((10, 3, 2, 2), {}, id="a convolution"),
        pytest.param((10, 4, 3), {"view_3d": "flatten"}, id="a flattened convolution"),
    ],
)
def test_every_figure_is_what_its_definition_gives_on_dense_matrices(shape: Shape, options: dict[str, Any]) -> None:
    param, optimizer = build(shape, **options)
    stack = shape if len(shape) == 3 and not options.get("view_3d") else (1, shape[0], math.prod(shape[1:]))
    sign = -1.0 if options.get("maximize") else 1.0
    M = np.zeros(stack)
    with MomentumDiagnostics(optimizer) as diagnostics:
        for step, grad in enumerate(gradients(shape, 12), start=1):
            before, old = factor(optimizer, param, "m_A"), np.array(param.detach().reshape(stack))
            take(optimizer, param, grad)
            G = sign * np.array(grad.reshape(stack))
            M = BETA * M + (1 - BETA) * G
            B, A = factor(optimizer, param, "m_B"), factor(optimizer, param, "m_A")
            single = before.ndim == 2
            each = [
                expected_figures(*parts)
                for parts in zip(*([before[None], B[None], A[None]] if single else [before, B, A]), G, M, strict=True)
            ]
            update = (old * (1 - 1e-2 * 0.1) - np.array(param.detach().reshape(stack))) / 1e-2
            expected = {key: float(np.mean([one[key] for one in each])) for key in each[0]}
            expected["update_rms"] = float(np.mean([np.sqrt(np.mean(one**2)) for one in update]))
            expected["update_max"] = float(np.abs(update).max())
            unit = np.sqrt(stack[1]) + np.sqrt(stack[2])
            expected["update_norm"] = float(np.mean([np.linalg.norm(one, 2) / unit for one in update]))

            found = diagnostics.latest()["weight"]
            assert (found.step, found.name, found.shape, found.rank) == (step, "weight", shape, 3)
            for key, value in expected.items():
                tolerance = 1e-5 if key == "condition_product" else 1e-7
                assert getattr(found, key) == pytest.approx(value, rel=tolerance, abs=1e-7), (step, key)
            np.testing.assert_allclose(diagnostics.true_momentum("weight"), M, rtol=1e-12)
    assert len(diagnostics.records) == 12


def test_a_constant_gradient_of_the_factors_rank_is_followed_without_error_and_lies_inside() -> None:
    param, optimizer = build(damping=1e-12)
    grad = torch.randn(12, 3, dtype=torch.float64) @ torch.randn(3, 20, dtype=torch.float64)
    with MomentumDiagnostics(optimizer) as diagnostics:
        for _ in range(300):
            take(optimizer, param, grad)
    first, last = diagnostics.records[0], diagnostics.records[-1]
    assert first.outside > 0.5  # of 20 dimensions the random rows hold 3
    assert last.outside < 1e-4
    assert last.drift < 1e-6
    assert last.best_error < 1e-6
    assert last.ema_error < 1e-3
    assert last.ema_cosine == pytest.approx(1.0, abs=1e-6)


def test_no_approximation_beats_the_best_one() -> None:
    param, optimizer = build((16, 24), rank=4)
    with MomentumDiagnostics(optimizer) as diagnostics:
        for grad in gradients((16, 24), 30):
            take(optimizer, param, grad)
    for record in diagnostics.records:
        assert 0.05 < record.best_error <= record.ema_error


def test_narrow_weights_are_measured_in_float32_and_their_momentum_kept_in_it() -> None:
    param, optimizer = build((8, 10), torch.bfloat16)
    M = torch.zeros(1, 8, 10)
    with MomentumDiagnostics(optimizer) as diagnostics:
        for grad in gradients((8, 10), 5):
            old = param.detach().double()
            take(optimizer, param, grad)
            M = BETA * M + (1 - BETA) * grad.bfloat16().float()
            update = (old * (1 - 1e-2 * 0.1) - param.detach().double()) / 1e-2
            assert diagnostics.records[-1].update_max == pytest.approx(float(update.abs().max()))
    kept = diagnostics.true_momentum("weight")
    assert kept.dtype == torch.float32
    torch.testing.assert_close(kept, M)


def test_watching_changes_nothing_of_the_training() -> None:
    states = []
    for watched in (False, True):
        param, optimizer = build(dtype=torch.float32)
        diagnostics = MomentumDiagnostics(optimizer) if watched else None
        for grad in gradients((12, 20), 4):
            take(optimizer, param, grad)
        assert diagnostics is None or len(diagnostics.records) == 4
        states.append(snapshot(optimizer))
    assert_same_bits(states[0], states[1])


def test_only_every_nth_step_is_measured_but_each_enters_the_true_momentum() -> None:
    runs = []
    for every in (1, 3):
        param, optimizer = build()
        with MomentumDiagnostics(optimizer, every=every) as diagnostics:
            for grad in gradients((12, 20), 8):
                take(optimizer, param, grad)
        runs.append(diagnostics)
    dense, sparse = runs
    assert [record.step for record in sparse.records] == [3, 6]
    assert sparse.records == [dense.records[2], dense.records[5]]
    assert_same_bits(sparse.true_momentum("weight"), dense.true_momentum("weight"))


def test_without_the_true_momentum_only_what_needs_it_is_missing() -> None:
    param, optimizer = build()
    with MomentumDiagnostics(optimizer) as full, MomentumDiagnostics(optimizer, track_ema=False) as cheap:
        for grad in gradients((12, 20), 3):
            take(optimizer, param, grad)
    missing = {"ema_error", "best_error", "ema_cosine"}
    for one, other in zip(full.to_dicts(), cheap.to_dicts(), strict=True):
        assert {key for key, value in other.items() if value is None} == missing
        assert {key: one[key] for key in one.keys() - missing} == {key: other[key] for key in one.keys() - missing}
    with pytest.raises(KeyError):
        cheap.true_momentum("weight")


def test_a_closed_watcher_measures_no_more_and_leaves_no_hook() -> None:
    param, optimizer = build()
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    before = [len(hook) for hook in hooks]
    diagnostics = MomentumDiagnostics(optimizer)
    assert [len(hook) for hook in hooks] == [count + 1 for count in before]
    grads = list(gradients((12, 20), 3))
    take(optimizer, param, grads[0])
    diagnostics.close()
    diagnostics.close()
    assert [len(hook) for hook in hooks] == before
    take(optimizer, param, grads[1])
    assert [record.step for record in diagnostics.records] == [1]


def test_a_resumed_run_goes_on_as_the_run_left_alone() -> None:
    grads = list(gradients((12, 20), 9))
    param, optimizer = build(dtype=torch.float32)
    saved = io.BytesIO()
    with MomentumDiagnostics(optimizer, every=2) as alone:
        for step, grad in enumerate(grads):
            if step == 5:
                torch.save((param.detach(), optimizer.state_dict(), alone.state_dict()), saved)
            take(optimizer, param, grad)

    saved.seek(0)
    weight, optimizer_state, state = torch.load(saved, weights_only=True)
    param, optimizer = build(dtype=torch.float32)
    resumed = MomentumDiagnostics(optimizer, every=2)
    with torch.no_grad():
        param.copy_(weight)
    optimizer.load_state_dict(optimizer_state)  # replaces the groups
    resumed.load_state_dict(state)
    for grad in grads[5:]:
        take(optimizer, param, grad)
    assert [record.step for record in resumed.records] == [6, 8]
    assert resumed.records == alone.records[2:]
    assert_same_bits(resumed.state_dict(), alone.state_dict())


def test_a_state_of_other_parameters_is_refused_and_changes_nothing() -> None:
    param, optimizer = build()
    take(optimizer, param, torch.ones(12, 20))
    diagnostics = MomentumDiagnostics(optimizer)
    before = copy.deepcopy(diagnostics.state_dict())
    other = MomentumDiagnostics(build((20, 12))[1])
    without = MomentumDiagnostics(build()[1], track_ema=False)
    for wrong, word in ((other, r"\(1, 20, 12\)"), (without, "none")):
        with pytest.raises(ValueError, match=word):
            diagnostics.load_state_dict(wrong.state_dict())
    assert_same_bits(diagnostics.state_dict(), before)


def test_a_watcher_that_comes_late_counts_on_from_the_optimizer_and_averages_from_zero() -> None:
    param, optimizer = build()
    grads = list(gradients((12, 20), 4))
    for grad in grads[:3]:
        take(optimizer, param, grad)
    with MomentumDiagnostics(optimizer) as diagnostics:
        take(optimizer, param, grads[3])
    assert [record.step for record in diagnostics.records] == [4]
    np.testing.assert_allclose(diagnostics.true_momentum("weight")[0], (1 - BETA) * grads[3], rtol=1e-12)


def test_a_step_that_the_optimizer_leaves_out_is_no_step_of_the_true_momentum() -> None:
    param, optimizer = build(nonfinite="skip")
    first, last = gradients((12, 20), 2)
    with MomentumDiagnostics(optimizer) as diagnostics:
        for grad in (first, None, torch.full((12, 20), math.nan), last):
            take(optimizer, param, grad)
    expected = BETA * (1 - BETA) * first + (1 - BETA) * last
    np.testing.assert_allclose(diagnostics.true_momentum("weight")[0], expected, rtol=1e-12)
    assert [record.step for record in diagnostics.records] == [1, 4]


def test_a_step_that_raises_is_not_counted() -> None:
    param, optimizer = build()
    first, last = gradients((12, 20), 2)
    with MomentumDiagnostics(optimizer) as diagnostics:
        take(optimizer, param, first)
        with pytest.raises(NonFiniteGradientError):
            take(optimizer, param, torch.full((12, 20), math.inf))
        take(optimizer, param, last)
    assert [record.step for record in diagnostics.records] == [1, 2]


def test_a_gradient_that_a_closure_makes_is_the_one_that_is_measured() -> None:
    param, optimizer = build()
    stale, fresh = gradients((12, 20), 2)
    set_grads([param], [stale])

    def closure() -> float:
        assert torch.is_grad_enabled()
        set_grads([param], [fresh])
        return 0.0

    with MomentumDiagnostics(optimizer) as diagnostics:
        optimizer.step(closure)
    np.testing.assert_allclose(diagnostics.true_momentum("weight")[0], (1 - BETA) * fresh, rtol=1e-12)


def test_gradients_that_another_hook_clears_within_the_step_are_missed_aloud() -> None:
    param, optimizer = build()
    handle = optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())
    MomentumDiagnostics(optimizer)
    with pytest.raises(RuntimeError, match="'weight' was gone"):
        take(optimizer, param, torch.ones(12, 20))
    handle.remove()


def test_no_cuda_graph_is_captured_while_it_is_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    param, optimizer = build()
    MomentumDiagnostics(optimizer)
    set_grads([param], [torch.ones(12, 20)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA graph"):
        optimizer.step()


def test_a_learning_rate_of_zero_has_no_update_in_its_units() -> None:
    param, optimizer = build(lr=torch.tensor(0.0))
    with MomentumDiagnostics(optimizer) as diagnostics:
        take(optimizer, param, torch.ones(12, 20))
    (row,) = diagnostics.to_dicts()
    assert (row["update_rms"], row["update_max"], row["update_norm"]) == (None, None, None)
    assert row["ema_error"] is not None


def test_matrices_of_a_stack_without_gradients_are_left_out_of_the_mean() -> None:
    param, optimizer = build((3, 8, 10))
    alone, single = build((1, 8, 10))
    with torch.no_grad():
        optimizer.state[param]["m_A"][1] = single.state[alone]["m_A"][0]
    with MomentumDiagnostics(optimizer) as stack, MomentumDiagnostics(single) as one:
        for grad in gradients((1, 8, 10), 3):
            padded = torch.zeros(3, 8, 10, dtype=torch.float64)
            padded[1] = grad[0]
            take(optimizer, param, padded)
            take(single, alone, grad)
    for key in ("ema_error", "best_error", "ema_cosine", "outside"):
        assert getattr(stack.records[-1], key) == pytest.approx(getattr(one.records[-1], key), rel=1e-9), key


def test_a_singular_factor_spans_what_it_spans_and_has_no_finite_condition() -> None:
    param, optimizer = build(regression="tangent")  # reflections would repair it
    G = torch.zeros(12, 20, dtype=torch.float64)
    G[0, 0], G[0, 1] = 3.0, 4.0
    m_A = torch.zeros(3, 20, dtype=torch.float64)
    m_A[0, 0] = m_A[1, 0] = 1.0  # twice the same direction, and a row of zeros
    optimizer.state[param]["m_A"].copy_(m_A)
    with MomentumDiagnostics(optimizer) as diagnostics:
        take(optimizer, param, G)
    (record,) = diagnostics.records
    assert record.outside == pytest.approx(16 / 25)
    assert record.condition_m_A == record.condition_product == math.inf
    assert json.loads(json.dumps(record.to_dict(), allow_nan=False))["condition_m_A"] is None
    assert 0 <= record.drift <= 1


def test_drift_is_nothing_for_one_subspace_all_for_orthogonal_ones_and_the_sine_between() -> None:
    def spanned(*rows: list[float]) -> tuple[Tensor, Tensor]:
        return momentum_figures.row_space(torch.tensor([rows], dtype=torch.float64), EPS)

    x, y, z = [1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]
    w, none = [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]
    mixed = [1.0, 1.0, 0.0, 0.0]
    angle = 0.3
    turned = [math.cos(angle), 0.0, math.sin(angle), 0.0]

    def turn(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> float:
        return momentum_figures.drift(old, new).item()

    assert turn(spanned(x, y), spanned(mixed, x)) == pytest.approx(0.0, abs=1e-14)
    assert turn(spanned(x, y), spanned(z, w)) == pytest.approx(1.0)
    assert turn(spanned(x, y), spanned(turned, y)) == pytest.approx(math.sin(angle) ** 2 / 2)
    assert turn(spanned(x, none), spanned(mixed, x)) == pytest.approx(0.5)  # one direction of two is shared
    assert math.isnan(turn(spanned(none, none), spanned(none, none)))


def test_the_condition_of_the_product_survives_factors_that_are_each_badly_scaled() -> None:
    generator = torch.Generator().manual_seed(1)
    U = torch.linalg.qr(torch.randn(12, 3, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(20, 3, generator=generator, dtype=torch.float64)).Q
    scale = torch.tensor([1e5, 1.0, 1e-5], dtype=torch.float64)
    core = torch.tensor([4.0, 3.0, 2.0], dtype=torch.float64)
    m_B, m_A = (U * core / scale)[None], (V * scale).mT[None]
    of_A, of_product = momentum_figures.conditions(m_B, m_A, EPS)
    assert of_A.item() == pytest.approx(1e10, rel=1e-4)
    assert of_product.item() == pytest.approx(2.0, rel=1e-4)


def test_rows_that_depend_on_each_other_are_singular_whatever_rounding_leaves_of_them() -> None:
    m_B, m_A = torch.randn(2, 12, 3, dtype=torch.float64), torch.randn(2, 3, 20, dtype=torch.float64)
    m_A[1, 2] = 0.3 * m_A[1, 0] + 0.7 * m_A[1, 1]
    for condition in momentum_figures.conditions(m_B, m_A, EPS):
        assert condition.isinf().tolist() == [False, True]
    assert momentum_figures.row_space(m_A, EPS)[1].tolist() == [3, 2]
    # Kept in float32 the dependent row is off by that dtype's rounding, which is no direction either, ...
    kept, eps = m_A.float().double(), torch.finfo(torch.float32).eps
    for condition in momentum_figures.conditions(m_B, kept, eps):
        assert condition.isinf().tolist() == [False, True]
    assert momentum_figures.row_space(kept, eps)[1].tolist() == [3, 2]
    # ... while a short row keeps its own digits.
    short = (m_A * torch.tensor([1.0, 1e-10, 1.0], dtype=torch.float64)[:, None]).float().double()
    (of_A, _), directions = momentum_figures.conditions(m_B, short, eps), momentum_figures.row_space(short, eps)[1]
    assert 1e9 < of_A[0].item() < 1e12
    assert directions[0].item() == 3


def test_factors_that_are_no_longer_finite_give_no_figures_and_no_error() -> None:
    param, optimizer = build()
    with MomentumDiagnostics(optimizer) as diagnostics:
        take(optimizer, param, torch.ones(12, 20))
        optimizer.state[param]["m_A"].fill_(math.nan)
        take(optimizer, param, torch.ones(12, 20))
    row = diagnostics.to_dicts()[-1]
    figures = set(row) - {"step", "name", "shape", "rank"}
    assert {key for key in figures if row[key] is not None} == set()
