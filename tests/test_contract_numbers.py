"""The contract of torch.optim: dense parameters, narrow weights, layouts, devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from _contract import (
    ADAMW,
    KINDS,
    MUON,
    MUON_PAPER,
    PAPER,
    SHAPES,
    TANGENT,
    Kind,
    build,
    every_kind,
    params_of,
)
from _formulas import run_beside
from _support import (
    ReferenceRun,
    assert_close,
    assert_same_bits,
    clone_params,
    gradients,
    make_params,
    random_grads,
    set_grads,
    snapshot,
    train,
)
from lorapre import LoRAPreMuon
from lorapre.optim import dense as dense_module

# Dense parameters of AdamW and Muon; those of SGD and Lion are in test_momentum_optimizers.py.

ADAM_DENSE = pytest.mark.parametrize("kind", [ADAMW, PAPER, MUON, MUON_PAPER], ids=str)


@ADAM_DENSE
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.1, "maximize": True}, {"betas": (0.8, 0.99), "eps": 1e-3}, {"capturable": True}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dense_parameters_take_torchs_adamw_bit_for_bit(
    kind: Kind, options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    shapes = ((7,), (), (9, 11), (3, 3))
    ours = kind(
        [
            {"params": make_params(shapes[:2], dtype, device)},
            {"params": make_params(shapes[2:], dtype, device), "compress": False},
            {"params": make_params([(12, 20)], dtype, device, seed=4)},  # and nothing compressed disturbs them
        ],
        **{"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 1e-2, "rank": 3, **options},
    )
    fused = {"capturable": True, "fused": True} if options.get("capturable") else {}
    copies = clone_params(params_of(ours)[:4])
    theirs = torch.optim.AdamW(
        [{"params": copies[:2]}, {"params": copies[2:]}],
        **{"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 1e-2, **options, **fused},
    )
    for step in range(5):
        grads = random_grads(params_of(ours), step)
        set_grads(params_of(ours), grads)
        set_grads(copies, grads[:4])
        ours.step()
        theirs.step()
    assert_same_bits(snapshot(ours)[:4], snapshot(theirs))


@ADAM_DENSE
@pytest.mark.parametrize("keys", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_injected_foreach_and_fused_choose_torchs_implementation(
    kind: Kind, keys: dict[str, bool], device: torch.device
) -> None:
    called: list[tuple[Any, Any]] = []
    original = dense_module.adamw

    def spy(*args: Any, **kwargs: Any) -> None:
        called.append((kwargs["foreach"], kwargs["fused"]))
        original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense_module, "adamw", spy)
        ours = build(kind, device, betas=(0.9, 0.95), weight_decay=1e-2)
        for group in ours.param_groups:
            group.update(keys, param_names=[f"p{i}" for i in range(len(SHAPES))], something_else=object())
        copies = clone_params(params_of(ours)[3:])
        theirs = torch.optim.AdamW(copies, betas=(0.9, 0.95), weight_decay=1e-2, **keys)
        train(ours, 1)
        set_grads(copies, [param.grad for param in params_of(ours)[3:]])
        theirs.step()
    assert called == [(keys.get("foreach"), keys.get("fused"))]
    for (weight, state), (their_weight, their_state) in zip(snapshot(ours)[3:], snapshot(theirs), strict=True):
        assert_same_bits(weight, their_weight)
        for key, value in their_state.items():  # torch counts on the device when fused, we on the CPU
            assert_same_bits(state[key], value.to(state[key].device))


@ADAM_DENSE
def test_a_tensor_lr_overrules_an_injected_foreach_that_torch_would_refuse(kind: Kind, device: torch.device) -> None:
    plain, injected = (build(kind, device, lr=torch.tensor(0.1)) for _ in range(2))
    injected.param_groups[0]["foreach"] = True
    train(plain, 2)
    train(injected, 2)
    assert_same_bits(snapshot(injected), snapshot(plain))


# Narrow weights.


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=str)
def test_narrow_weights_are_rounded_once_a_step(
    kind: Kind, dtype: torch.dtype, options: dict[str, Any], device: torch.device
) -> None:
    shapes = (*SHAPES, (9, 2, 2, 3))
    narrow = build(kind, device, dtype, shapes=shapes, weight_decay=0.1, lr=1e-2, **options)
    wide = kind(
        [nn.Parameter(param.detach().float()) for param in params_of(narrow)],
        rank=3,
        weight_decay=0.1,
        lr=1e-2,
        **options,
    )
    for step in range(6):
        for ours, theirs in zip(params_of(narrow), params_of(wide), strict=True):
            theirs.data.copy_(ours)  # the float32 computation, from the same weights
        set_grads(params_of(narrow), random_grads(params_of(narrow), step))
        set_grads(params_of(wide), [param.grad for param in params_of(narrow)])
        narrow.step()
        wide.step()
        for ours, theirs in zip(params_of(narrow), params_of(wide), strict=True):
            if ours.ndim < 2 and "exp_avg" in kind.dense_keys:
                # torch's AdamW on wide copies: one rounding
                assert_same_bits(ours.detach(), theirs.detach().to(dtype))
            else:
                # here float32 adds once for weights of its own dtype and once for others: up to a last bit of
                # float32, which moves a narrow number only if it lies at the middle between two
                apart = ours.detach() != theirs.detach().to(dtype)
                assert apart.float().mean() <= 0.005
            assert_same_bits(narrow.state[ours], wide.state[theirs])


@every_kind
def test_a_bfloat16_state_is_the_float32_computation_rounded_each_step(kind: Kind, device: torch.device) -> None:
    narrow, wide = (build(kind, device, state_dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    for step in range(5):
        for ours, theirs in zip(params_of(narrow), params_of(wide), strict=True):
            for key, value in wide.state[theirs].items():
                value.copy_(narrow.state[ours][key])
        grads = random_grads(params_of(narrow), step)
        for optimizer in (narrow, wide):
            set_grads(params_of(optimizer), grads)
            optimizer.step()
        for ours, theirs in zip(params_of(narrow), params_of(wide), strict=True):
            assert_same_bits(ours.detach(), theirs.detach())
            for key, value in wide.state[theirs].items():
                assert_same_bits(narrow.state[ours][key], value.to(narrow.state[ours][key].dtype))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not TANGENT], ids=str)
def test_a_weight_moves_by_the_formulas_from_a_bfloat16_state(kind: Kind, device: torch.device) -> None:
    optimizer = build(kind, device, state_dtype=torch.bfloat16, shapes=((12, 20),))
    param = params_of(optimizer)[0]
    for grad in gradients((12, 20), 5):
        run = run_beside(optimizer, param, optimizer.param_groups[0])  # from the rounded state, every step
        param.grad = grad.to(device, torch.float32)
        run.step(param.grad)
        optimizer.step()
        # Newton-Schulz multiplies float32's rounding; a GPU sums in another order.
        assert_close(
            param, run.weight(), (3e-5 if device.type == "cpu" else 5e-5) if kind.cls is LoRAPreMuon else 1e-6, "W"
        )
        if not isinstance(run, ReferenceRun):
            continue
        for key in ("m_B", "m_A", "v_B", "v_A") if kind is PAPER else ("v_row", "v_col"):
            exact, stored = getattr(run.states[0], key), optimizer.state[param].get(key)
            if stored is not None:
                gap = (stored.cpu().double() - exact).abs()
                assert (gap <= exact.abs() * 2**-8 + 1e-12).all(), key  # half a unit in the last of 8 bits


# Layouts and devices.


@every_kind
def test_noncontiguous_parameters_and_gradients_are_updated_like_contiguous_ones(
    kind: Kind, device: torch.device
) -> None:
    for options in ({}, {"capturable": True}):
        plain = build(kind, device, shapes=((12, 20), (12, 20), (7,), (2, 8, 10)), **options)
        strided = [nn.Parameter(plain_param.detach().clone()) for plain_param in params_of(plain)]
        strided[0] = nn.Parameter(params_of(plain)[0].detach().T.contiguous().T)
        strided[1] = nn.Parameter(torch.stack([params_of(plain)[1].detach()] * 2, -1)[..., 0])
        strided[2] = nn.Parameter(torch.stack([params_of(plain)[2].detach()] * 2, -1)[..., 0])
        strided[3] = nn.Parameter(params_of(plain)[3].detach().permute(2, 0, 1).contiguous().permute(1, 2, 0))
        optimizer = kind(strided, rank=3, **options)
        assert not any(param.is_contiguous() for param in strided)
        for step in range(4):
            grads = random_grads(params_of(plain), step)
            set_grads(params_of(plain), grads)
            for param, grad in zip(strided, grads, strict=True):
                param.grad = torch.empty_strided(param.shape, param.stride(), device=device).copy_(grad)
            plain.step()
            optimizer.step()
        for ours, expected in zip(strided, params_of(plain), strict=True):
            assert_close(ours, expected, 1e-6)


@every_kind
def test_channels_last_convolutions_are_the_same_matrices(kind: Kind, device: torch.device) -> None:
    plain = build(kind, device, shapes=((12, 4, 3, 3),))
    last = nn.Parameter(params_of(plain)[0].detach().clone(memory_format=torch.channels_last))
    optimizer = kind([last], rank=3)
    for step in range(3):
        grads = random_grads([last], step)
        set_grads(params_of(plain), grads)
        last.grad = grads[0].to(device).contiguous(memory_format=torch.channels_last)
        plain.step()
        optimizer.step()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert_close(last, params_of(plain)[0], 1e-6)


@every_kind
@pytest.mark.parametrize("capturable", [False, True])
def test_empty_parameters_are_carried_along(kind: Kind, capturable: bool, device: torch.device) -> None:
    optimizer = build(kind, device, shapes=((0, 5), (12, 20), (0,), (2, 0, 4)), capturable=capturable)
    alone = build(kind, device, shapes=((0, 5), (12, 20)), capturable=capturable)
    train(optimizer, 2)
    set_grads(params_of(alone), [None, None])
    for step in range(2):
        set_grads(params_of(alone), random_grads(params_of(optimizer), step)[:2])
        alone.step()
    assert_same_bits(snapshot(optimizer)[1], snapshot(alone)[1])
    set_grads(params_of(optimizer), [torch.zeros(0, 5), None, None, None])
    optimizer.step()  # nothing but an empty gradient
    assert optimizer.state[params_of(optimizer)[0]]["step"].item() == 3


@every_kind
def test_parameters_on_meta_have_their_state_there(kind: Kind) -> None:
    for capturable in (False, True):
        optimizer = kind(
            [nn.Parameter(torch.empty(4096, 2048, device="meta")), nn.Parameter(torch.empty(9, device="meta"))],
            rank=256,
            capturable=capturable,
        )
        for param in params_of(optimizer):
            for key, value in optimizer.state[param].items():
                assert value.device.type == ("cpu" if key == "step" and not capturable else "meta")
        assert optimizer.state[params_of(optimizer)[0]]["m_A"].shape == (256, 2048)
        optimizer.load_state_dict(optimizer.state_dict())
