"""Options that are set between steps, and keys of groups that are no options."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from _contract import ADAMW, LION, MUON, PAPER, SGD, SHAPES, Kind, each_class
from _support import assert_same_bits, make_params, snapshot, train
from lorapre import LoRAPreAdamW, LoRAPreMuon, LoRAPreSGD, estimate_memory, param_groups


def begun(kind: Kind, device: torch.device, **options: Any) -> Any:
    """An optimizer after two steps."""
    optimizer = kind(make_params(SHAPES, torch.float32, device), **{"rank": 3, **options})
    train(optimizer, 2)
    return optimizer


@pytest.mark.parametrize(
    ("kind", "options", "changes"),
    [
        (ADAMW, {}, {"rank": 5}),
        (MUON, {}, {"rank": 12}),
        (SGD, {}, {"rank": 0.5}),
        (LION, {}, {"compress": False}),
        (ADAMW, {}, {"view_3d": "flatten"}),
        (ADAMW, {}, {"second_moment": "full"}),
        (PAPER, {}, {"second_moment_rank": 2}),
        (MUON, {}, {"normalization": "none"}),
        (SGD, {}, {"state_dtype": torch.float64}),
        (PAPER, {}, {"regression": "subspace"}),
    ],
    ids=str,
)
def test_an_option_that_the_state_was_made_by_cannot_change_between_steps(
    kind: Kind, options: dict[str, Any], changes: dict[str, Any], device: torch.device
) -> None:
    optimizer = begun(kind, device, **options)
    (name, value), (group,) = *changes.items(), optimizer.param_groups
    before, old = snapshot(optimizer), group[name]
    for _ in range(2):  # it is not forgotten
        group[name] = value
        with pytest.raises(ValueError, match=f"{name} was {old!r} when.*is {value!r} now.*Set it back"):
            train(optimizer, 1)
        assert_same_bits(snapshot(optimizer), before)
    group[name] = old
    train(optimizer, 1)


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        (ADAMW, {"lr": float("nan")}, "learning rate: nan"),
        (LION, {"lr": -1.0}, "learning rate: -1.0"),
        (ADAMW, {"betas": (1.5, 0.9)}, "index 0: 1.5"),
        (ADAMW, {"spectral_clipping": -1}, "spectral_clipping: -1"),
        (ADAMW, {"sweep_interval": 0}, "sweep_interval: 0"),
        (ADAMW, {"backend": "x"}, "backend: 'x'"),
        (MUON, {"momentum": 1.0}, "momentum value: 1.0"),
        (SGD, {"residual_gain": -1.0}, "residual_gain: -1.0"),
        (SGD, {"regression": "foo"}, "regression: 'foo'"),
        (SGD, {"weight_decay": float("nan")}, "weight_decay value: nan"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused_between_steps_too(
    kind: Kind, changes: dict[str, Any], match: str, device: torch.device
) -> None:
    optimizer = begun(kind, device)
    before = snapshot(optimizer)
    optimizer.param_groups[0].update(changes)
    with pytest.raises(ValueError, match=match):
        train(optimizer, 1)
    assert_same_bits(snapshot(optimizer), before)


@each_class
def test_other_options_may_change_and_count_from_the_next_step_on(kind: Kind, device: torch.device) -> None:
    changed, built = begun(kind, device), begun(kind, device)
    changes = {"lr": 0.5, "weight_decay": 0.25, "residual_gain": 0.75, "maximize": True, "regression": "tangent"}
    changed.param_groups[0].update(changes)
    other = kind([{"params": built.param_groups[0]["params"]}], **{"rank": 3, **changes})
    other.load_state_dict({**built.state_dict(), "param_groups": other.state_dict()["param_groups"]})
    train(changed, 3)
    train(other, 3)
    assert_same_bits(snapshot(changed), snapshot(other))


@each_class
def test_copies_and_loaded_optimizers_know_what_their_state_was_made_by(kind: Kind, device: torch.device) -> None:
    optimizer = begun(kind, device)
    loaded = kind(make_params(SHAPES, torch.float32, device), rank=3)
    loaded.load_state_dict(optimizer.state_dict())
    for other in (copy.deepcopy(optimizer), loaded):
        other.param_groups[0]["rank"] = 4
        with pytest.raises(ValueError, match="rank was 3"):
            train(other, 1)


@pytest.mark.parametrize(
    ("cls", "options", "match"),
    [
        (LoRAPreAdamW, {"residual_gian": 1.0}, r"LoRAPreAdamW has no option 'residual_gian' \(=1.0\).*'residual_gain'"),
        (LoRAPreAdamW, {"dense": {"lrr": 3.0}}, "no option 'lrr'.*'lr'"),
        (LoRAPreAdamW, {"normalization": "rows"}, "no option 'normalization'.*LoRAPreMuon has it"),
        (LoRAPreMuon, {"second_moment": "full"}, "no option 'second_moment'.*LoRAPreAdamW has it"),
        (LoRAPreSGD, {"betas": (0.9, 0.9)}, "no option 'betas'.*LoRAPreAdamW and LoRAPreLion and LoRAPreMuon have it"),
    ],
    ids=str,
)
def test_a_key_that_looks_like_an_option_is_refused(cls: Any, options: dict[str, Any], match: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    with pytest.raises(ValueError, match=match):
        cls(param_groups(model, rank=2, **options))
    with pytest.raises(ValueError, match=match):
        estimate_memory(param_groups(model, rank=2, **options), optimizer=cls)


def test_keys_of_ones_own_are_left_alone() -> None:
    own = {"name": "decoder", "lr_scale": 0.5, "initial_lr": 0.1}
    optimizer = LoRAPreAdamW([{"params": [nn.Parameter(torch.ones(6, 6))], **own}], rank=2)
    assert {key: optimizer.param_groups[0][key] for key in own} == own
    train(optimizer, 1)


def test_sgd_refuses_nesterov_without_momentum() -> None:
    with pytest.raises(ValueError, match="nesterov=True means nothing with momentum=0"):
        LoRAPreSGD([nn.Parameter(torch.ones(6, 6))], rank=2, momentum=0.0, nesterov=True)
