"""Which backend `LoRAPreAdamW` steps with, and what it says where that is not the kernels."""

from __future__ import annotations

import copy
import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from _support import assert_close, assert_same_bits, gradients, make_params, set_grads, snapshot
from _triton import OPTIONS, exact_products, needs_triton, scalars_as_bounds  # noqa: F401
from lorapre import LoRAPreAdamW
from lorapre.backends import dispatch, eager
from lorapre.backends import triton as backend

pytestmark = needs_triton
SHAPES = ((17, 33), (3, 12, 20), (17, 33), (7,))


def trained(device: torch.device, steps: int = 3, **options: Any) -> LoRAPreAdamW:
    optimizer = LoRAPreAdamW(make_params(SHAPES, torch.float32, device), **{"rank": 4, **OPTIONS, **options})
    train(optimizer, steps)
    return optimizer


def train(optimizer: LoRAPreAdamW, steps: int, seed: int = 0) -> None:
    streams = [gradients(shape, steps, seed=seed + i) for i, shape in enumerate(SHAPES)]
    for grads in zip(*streams, strict=True):
        set_grads(optimizer.param_groups[0]["params"], grads)
        optimizer.step()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends in the order in which they stepped buckets."""
    made: list[str] = []
    for module, name, function in ((eager, "eager", "lorapre_adamw"), (backend, "triton", "open_step")):
        original = getattr(module, function)

        def counted(*args: Any, original: Any = original, name: str = name, **kwargs: Any) -> Any:
            made.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, function, counted)
    return made


@pytest.mark.parametrize("second_moment", ["rank1", "full"])
def test_the_kernels_give_what_batched_torch_gives(second_moment: str, device: torch.device, calls: list[str]) -> None:
    by_kernels = trained(device, backend="triton", second_moment=second_moment)
    assert set(calls) == {"triton"}
    calls.clear()
    in_torch = trained(device, backend="eager", second_moment=second_moment)
    assert set(calls) == {"eager"}
    for (weight, state), (other, its_state) in zip(snapshot(by_kernels), snapshot(in_torch), strict=True):
        assert_close(weight, other, 1e-4)
        for key in state:
            assert_close(state[key], its_state[key], 1e-4, key)


def test_auto_takes_the_kernels_up_to_the_rank_at_which_they_were_measured_to_be_faster(
    device: torch.device, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for largest, expected in ((0, "eager"), (3, "eager"), (4, "triton")):
        monkeypatch.setattr(dispatch, "MEASURED", {"adamw": {device.type: largest}, "muon": {}})
        trained(device, steps=1)
        assert set(calls) == {expected}
        calls.clear()
    monkeypatch.setattr(dispatch, "MEASURED", {"adamw": {"another": 512}})
    trained(device, steps=1)
    assert set(calls) == {"eager"}


def test_auto_says_once_that_a_rank_is_above_what_was_measured(
    device: torch.device, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_said", set())
    for measured, expected in (({}, []), ({device.type: 3}, ["Matrices at rank 4 .* plain torch: up to rank 3 .*"])):
        monkeypatch.setattr(dispatch, "MEASURED", {"adamw": measured, "muon": {}})
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="lorapre"):
            trained(device, steps=2)
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == len(expected)
        assert all(re.match(pattern, message) for pattern, message in zip(expected, said, strict=True))


@pytest.mark.parametrize(("hip", "measured"), [(None, True), ("6.4", False)])
def test_what_was_measured_on_nvidia_is_not_said_of_amd(
    hip: str | None, measured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    bucket: Any = SimpleNamespace(view=SimpleNamespace(rank=dispatch.MEASURED["adamw"]["cuda"]))
    hyper: Any = SimpleNamespace(regressor=SimpleNamespace(regression="subspace"))
    assert (dispatch._most_measured(hyper, "cuda") >= bucket.view.rank) is measured


def test_auto_takes_the_kernels_of_the_papers_regression_as_far_as_they_were_measured(
    device: torch.device, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"regression": "newton", "second_moment": "hadamard", "update_clipping": False, "spectral_clipping": None}
    for largest, expected in ((3, "eager"), (4, "triton")):
        measured = {"adamw": {device.type: 512}, "newton": {device.type: largest}, "muon": {}}
        monkeypatch.setattr(dispatch, "MEASURED", measured)
        trained(device, steps=1, **options)
        assert set(calls) == {expected}
        calls.clear()


def test_what_only_batched_torch_can_do_is_refused_by_the_kernels_and_logged_by_auto(
    device: torch.device, calls: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"backend='triton' cannot step .*\(17, 33\): regression='tangent'.*'auto'"):
        trained(device, backend="triton", regression="tangent")
    assert calls == []
    monkeypatch.setattr(dispatch, "MEASURED", {"adamw": {device.type: 512}})
    monkeypatch.setattr(dispatch, "_said", set())
    with caplog.at_level(logging.INFO, logger="lorapre"):
        trained(device, regression="tangent")
    assert set(calls) == {"eager"}
    said = sorted(record.getMessage() for record in caplog.records)
    assert len(said) == 2, "once for each shape, not at every step"
    assert all("plain torch: regression='tangent'" in message for message in said)
    assert "(17, 33)" in said[0]
    assert "(3, 12, 20)" in said[1]


def test_a_copy_and_a_loaded_optimizer_go_on_with_addresses_of_their_own(device: torch.device) -> None:
    optimizer = trained(device, steps=1, backend="triton")
    twin = copy.deepcopy(optimizer)
    for each in (optimizer, twin):
        train(each, 1, seed=9)
    assert_same_bits(snapshot(twin), snapshot(optimizer))
    params = [param.detach().clone().requires_grad_() for param in optimizer.param_groups[0]["params"]]
    loaded = LoRAPreAdamW(params, rank=4, **{**OPTIONS, "backend": "triton"})
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, loaded):
        train(each, 1, seed=19)
    assert_same_bits(snapshot(loaded), snapshot(optimizer))
