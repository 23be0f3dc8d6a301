"""The contract of torch.optim: what is refused, the signatures, the presets, the warning."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from _contract import (
    ADAMW,
    LION,
    MUON,
    MUON_PAPER,
    PAPER,
    SGD,
    Kind,
    each_class,
    params_of,
)
from _support import (
    ReferenceRun,
    assert_close,
    assert_same_bits,
    gradients,
    make_params,
    relative_difference,
    snapshot,
    train,
)
from lorapre import LoRAPreAdamW, LoRAPreLion, LoRAPreMuon, LoRAPreSGD, reference


class FlatParameter(nn.Parameter):
    """As torch.distributed.fsdp names its own."""


class DTensor(nn.Parameter):
    """As torch.distributed.tensor names its own."""


def with_ds_id() -> nn.Parameter:
    param = nn.Parameter(torch.ones(4, 4))
    param.ds_id = 3  # type: ignore[attr-defined]
    return param


@each_class
@pytest.mark.parametrize(
    ("param", "match"),
    [
        (FlatParameter(torch.ones(16)), "is an FSDP1 FlatParameter.*DDP"),
        (DTensor(torch.ones(4, 4)), "is a DTensor.*DDP"),
        (with_ds_id(), "is partitioned by DeepSpeed ZeRO-3.*DDP"),
        (nn.Parameter(torch.ones(4, 4, dtype=torch.complex64)), "is complex.*view_as_real"),
        (nn.Parameter(torch.ones(4, 4, dtype=torch.int32), requires_grad=False), "has dtype torch.int32"),
    ],
    ids=["FSDP1", "DTensor", "DeepSpeed", "complex", "integer"],
)
def test_parameters_that_would_be_trained_wrongly_are_refused_with_the_remedy(
    kind: Kind, param: nn.Parameter, match: str
) -> None:
    with pytest.raises(TypeError, match=f"'w' of {kind.cls.__name__} {match}"):
        kind([("w", param)])


@each_class
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": -1.0}, "learning rate: -1.0"),
        ({"lr": float("nan")}, "learning rate: nan"),
        ({"lr": torch.tensor(-1.0)}, "learning rate: -1.0"),
        ({"lr": torch.tensor([0.1, 0.2])}, r"lr must be 1-element.*\(2,\)"),
        ({"lr": torch.tensor([0.1, 0.2]), "capturable": True}, "lr must be 1-element"),
        ({"rank": 0}, "rank: 0"),
        ({"rank": -3}, "rank: -3"),
        ({"rank": 1.0}, "rank: 1.0"),
        ({"rank": 0.0}, "rank: 0.0"),
        ({"rank": 2.5}, "rank: 2.5"),
        ({"rank": float("nan")}, "rank: nan"),
        ({"rank": True}, "rank: True"),
        ({"rank": "8"}, "rank: '8'"),
        ({"rank": None}, "rank: None"),
        ({"betas": (1.0, 0.9)}, "beta parameter at index 0: 1.0"),
        ({"betas": (-0.1, 0.9)}, "beta parameter at index 0: -0.1"),
        ({"betas": (0.9, 1.5)}, "beta parameter at index 1: 1.5"),
        ({"betas": (0.9, float("nan"))}, "beta parameter at index 1: nan"),
        ({"betas": (0.9,)}, r"betas: \(0.9,\)"),
        ({"betas": (0.9, 0.9, 0.9)}, r"betas: \(0.9, 0.9, 0.9\)"),
        ({"betas": 0.9}, "betas: 0.9"),
        ({"eps": -1e-8}, "eps value: -1e-08"),
        ({"eps": float("nan")}, "eps value: nan"),
        ({"eps": float("inf")}, "eps value: inf.*finite"),
        ({"lr": float("inf")}, "learning rate: inf.*finite"),
        ({"weight_decay": -0.1}, "weight_decay value: -0.1"),
        ({"scale": -1.0}, "scale value: -1.0"),
        ({"scale": float("nan")}, "scale value: nan"),
        ({"damping": 0.0}, "damping value: 0.0"),
        ({"damping": -1e-6}, "damping value: -1e-06"),
        ({"damping": float("nan")}, "damping value: nan"),
        ({"damping": float("inf")}, "damping value: inf"),
        ({"bounded": "False"}, "bounded: 'False'.*True or False"),
        ({"update_clipping": 1}, "update_clipping: 1.*True or False"),
        ({"nesterov": "no"}, "nesterov: 'no'.*True or False"),
        ({"maximize": 0}, "maximize: 0.*True or False"),
        ({"capturable": None}, "capturable: None.*True or False"),
        ({"damping_mode": "both"}, "damping_mode: 'both'.*'absolute', 'relative'"),
        ({"bias_correction": True}, "bias_correction: True.*'paper', 'exact'"),
        ({"eps_mode": "both"}, "eps_mode: 'both'.*'absolute', 'relative'"),
        ({"backend": "cuda"}, "backend: 'cuda'.*'auto', 'eager', 'triton'"),
        ({"second_moment": "rank2"}, "second_moment: 'rank2'.*'rank1', 'hadamard', 'full'"),
        ({"second_moment": "hadamard", "second_moment_rank": 0}, "second_moment_rank: 0"),
        ({"second_moment": "hadamard", "second_moment_rank": 1.5}, r"second_moment_rank: 1.5.*second_moment_rank=0.25"),
        ({"second_moment": "rank1", "second_moment_rank": 4}, "second_moment_rank=4 means nothing.*'rank1'"),
        ({"second_moment": "full", "second_moment_rank": 4}, "second_moment_rank=4 means nothing.*'full'"),
        ({"regression": "sequential"}, "regression: 'sequential'.*'newton', 'subspace', 'tangent'"),
        ({"residual_gain": -0.5}, "residual_gain: -0.5"),
        ({"residual_gain": float("inf")}, "residual_gain: inf"),
        ({"residual_gain": float("nan")}, "residual_gain: nan"),
        ({"momentum": 1.0}, "momentum value: 1.0"),
        ({"momentum": -0.1}, "momentum value: -0.1"),
        ({"momentum": float("nan")}, "momentum value: nan"),
        ({"ns_steps": 0}, "ns_steps: 0"),
        ({"ns_steps": 100}, "ns_steps: 100"),
        ({"ns_steps": 2.5}, "ns_steps: 2.5"),
        ({"ns_dtype": torch.int8}, "ns_dtype: torch.int8"),
        ({"ns_dtype": "bfloat16"}, "ns_dtype: 'bfloat16'"),
        ({"normalization": "columns"}, "normalization: 'columns'.*'none', 'rows', 'longer_side'"),
        ({"adjust_lr_fn": None}, "adjust_lr_fn: None.*'original', 'match_rms_adamw'"),
        ({"view_3d": "conv"}, "view_3d: 'conv'.*'stack', 'flatten'"),
        ({"state_dtype": torch.int32}, "state_dtype: torch.int32"),
        ({"state_dtype": torch.complex64}, "state_dtype: torch.complex64"),
        ({"state_dtype": torch.float8_e4m3fn}, "state_dtype: torch.float8_e4m3fn"),
        ({"state_dtype": "float32"}, "state_dtype: 'float32'"),
        ({"stochastic_rounding": "yes"}, "stochastic_rounding: 'yes'"),
        ({"seed": 1.5}, "seed value: 1.5"),
        ({"seed": True}, "seed value: True"),
        ({"nonfinite": "ignore"}, "nonfinite: 'ignore'.*'raise', 'skip'"),
        ({"nonfinite": ""}, "nonfinite: ''"),
        ({"nonfinite": "raise", "capturable": True}, "nonfinite='raise' cannot work with capturable=True"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_named_with_its_value(kind: Kind, options: dict[str, Any], match: str) -> None:
    if not options.keys() <= inspect.signature(kind.cls).parameters.keys():
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            kind([nn.Parameter(torch.ones(6, 6))], **options)
        return
    with pytest.raises(ValueError, match=match):
        kind([nn.Parameter(torch.ones(6, 6))], **{"rank": 2, **options})
    if "rank" not in options:  # the same in a group
        with pytest.raises(ValueError, match=match):
            kind([{"params": [nn.Parameter(torch.ones(6, 6))], **options}], rank=2)


# The signature.

PEERS = {
    ADAMW: (torch.optim.AdamW, {"params", "lr", "betas", "eps", "weight_decay", "maximize", "capturable"}),
    MUON: (
        torch.optim.Muon,
        {"params", "lr", "weight_decay", "momentum", "nesterov", "eps", "ns_steps", "adjust_lr_fn"},
    ),
    SGD: (torch.optim.SGD, {"params", "lr", "momentum", "nesterov", "weight_decay", "maximize"}),
}


@pytest.mark.parametrize("kind", PEERS, ids=str)
def test_shared_keywords_mean_what_they_mean_in_torchs_class(kind: Kind) -> None:
    peer, expected = PEERS[kind]
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (kind.cls, peer))
    shared = {name for name in ours if name in theirs and name != "self"}
    assert shared == expected
    if kind is ADAMW:
        for name in ("lr", "eps", "weight_decay", "maximize", "capturable"):
            assert ours[name].default == theirs[name].default, name
        for name in shared:
            assert ours[name].kind == theirs[name].kind, name


@each_class
def test_all_but_the_commonest_options_are_keywords_and_every_one_is_a_key_of_the_groups(kind: Kind) -> None:
    ours = inspect.signature(kind.cls.__init__).parameters
    positional = {name for name, option in ours.items() if option.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert list(ours)[:4] == ["self", "params", "lr", "rank"]
    assert positional <= {"self", "params", "lr", "rank", "betas", "eps", "weight_decay", "momentum", "nesterov"}
    assert set(kind([nn.Parameter(torch.ones(8, 8))]).param_groups[0]) == (
        set(ours) - {"self", "params"} | {"params", "compress"}
    )
    assert issubclass(kind.cls, torch.optim.Optimizer)
    step = inspect.signature(kind.cls.step).parameters
    assert list(step) == list(inspect.signature(torch.optim.AdamW.step).parameters)


# A value of every option that is nobody's default.
COMMON = {
    "lr": 0.5,
    "rank": 2,
    "weight_decay": 0.5,
    "regression": "newton",
    "residual_gain": 0.75,
    "damping": 0.5,
    "damping_mode": "absolute",
    "view_3d": "flatten",
    "state_dtype": torch.float64,
    "stochastic_rounding": True,
    "seed": 5,
    "maximize": True,
    "capturable": True,
    "nonfinite": "skip",
    "compress": True,
}
EVERY = set(range(1, 9))
OWN: dict[Kind, dict[str, Any]] = {
    ADAMW: {
        "betas": (0.1, 0.2),
        "eps": 0.5,
        "second_moment": "hadamard",
        "second_moment_rank": 3,
        "bias_correction": "paper",
        "eps_mode": "absolute",
        "bounded": False,
        "update_clipping": True,
        "spectral_clipping": 0.01,
        "sweep_interval": 1,  # of another regression; test_exactness.py
        "backend": "eager",
        "scale": 0.5,
    },
    MUON: {
        "betas": (0.1, 0.2),
        "eps": 0.5,
        "momentum": 0.5,
        "nesterov": False,
        "ns_steps": 2,
        "ns_dtype": torch.float32,
        "adjust_lr_fn": "original",
        "backend": "eager",
        "normalization": "rows",
        "scale": 0.5,
    },
    SGD: {"momentum": 0.5, "nesterov": True},
    LION: {"betas": (0.1, 0.2)},
}


@each_class
def test_every_option_may_be_set_in_a_group_and_matters(kind: Kind) -> None:
    values = {**COMMON, **OWN[kind]}

    def trained(params_of_group: dict[str, Any], **options: Any) -> Any:
        params = make_params([(6, 8, 5), (7,)], torch.float32, torch.device("cpu"))
        params += make_params([(6, 8, 5)], torch.bfloat16, torch.device("cpu"))
        optimizer = kind([{"params": params, **params_of_group}], **options)
        train(optimizer, 3)
        return optimizer

    in_group = trained(values, rank=1)
    assert {key: in_group.param_groups[0][key] for key in values} == values
    assert set(values) == set(in_group.defaults)
    by_options = trained({}, **{key: value for key, value in values.items() if key != "compress"})
    assert_same_bits(snapshot(in_group), snapshot(by_options))
    # and each of them reaches the step: left at its default, it gives another result
    unseen = {"nonfinite", "capturable", "compress", "backend", "sweep_interval"}  # by finite gradients on a CPU
    # the bound and the clipping are met by other gradients, in test_contract_gradients.py
    for key in values.keys() - unseen - {"bounded", "update_clipping"}:
        changed = {**values, key: inspect.signature(kind.cls).parameters[key].default}
        if key == "second_moment":
            del changed["second_moment_rank"]
        assert not same(snapshot(in_group), snapshot(trained(changed, rank=1))), key


@pytest.mark.parametrize(
    ("options", "moved"),
    [({}, {1, 5}), ({"sweep_interval": 4}, {1, 5}), ({"sweep_interval": 3}, {1, 4, 7}), ({"capturable": True}, EVERY),
     ({"sweep_interval": 1}, EVERY), ({"regression": "tangent"}, EVERY), ({"regression": "newton"}, EVERY)],
    ids=str,
)  # fmt: skip
def test_bases_move_in_every_fourth_step_unless_told_otherwise_or_a_graph_repeats_one(
    options: dict[str, Any], moved: set[int], device: torch.device
) -> None:
    optimizer = LoRAPreAdamW(make_params([(12, 20)], torch.float32, device), rank=3, **options)
    (state,) = optimizer.state.values()
    found = set()
    for step in range(1, 9):
        before = state["m_A"].clone()
        train(optimizer, 1, seed=step)
        if not torch.equal(before, state["m_A"]):
            found.add(step)
    assert found == moved


def same(one: Any, other: Any) -> bool:
    try:
        assert_same_bits(one, other)
    except AssertionError:
        return False
    return True


# The presets.


def test_the_adamw_preset_is_the_reference_with_the_papers_settings(device: torch.device) -> None:
    params = make_params([(12, 20)], torch.float64, device)
    optimizer = LoRAPreAdamW.paper(params, 1e-2, 3)
    # written out here, not read from the optimizer: these are the paper's
    settings: dict[str, Any] = {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.0, "scale": 0.25, "damping": 1e-6}
    state = ReferenceRun(optimizer, params[0], optimizer.param_groups[0]).states[0]
    W = params[0].detach().cpu().double()
    for grad in gradients((12, 20), 30):
        params[0].grad = grad.to(device)
        W = reference.lorapre_adam_step(W, grad, state, lr=1e-2, bias_correction="paper", **settings)
        optimizer.step()
    assert_close(params[0], W, 1e-12)
    assert LoRAPreAdamW.paper([nn.Parameter(torch.ones(200, 200))]).param_groups[0]["rank"] == 128
    assert LoRAPreAdamW.paper(params, rank=2, scale=1.0).param_groups[0]["scale"] == 1.0


@pytest.mark.parametrize("kind", [PAPER, MUON_PAPER], ids=str)
def test_a_preset_pins_every_option_that_the_paper_has_a_value_for(kind: Kind) -> None:
    (group,) = kind.cls.paper([nn.Parameter(torch.ones(200, 200))]).param_groups
    assert {key: group[key] for key in kind.options} == kind.options
    assert group["rank"] == 128
    # what is left to the defaults means nothing here, or is nobody's choice but the user's
    free = {"params", "lr", "rank", "second_moment_rank", "view_3d", "state_dtype", "seed", "maximize", "capturable"}
    free |= {"stochastic_rounding", "nonfinite", "compress", "backend", "eps", "betas", "ns_steps", "ns_dtype", "scale"}
    free.add("sweep_interval")
    assert set(group) <= free | set(kind.options)


@pytest.mark.parametrize("cls", [LoRAPreAdamW, LoRAPreMuon])
def test_a_default_differs_from_the_paper(cls: Any, device: torch.device) -> None:
    default, paper = (make(make_params([(12, 20)], torch.float64, device), 1e-2, 3) for make in (cls, cls.paper))
    train(default, 5)
    train(paper, 5)
    assert relative_difference(params_of(default)[0], params_of(paper)[0]) > 1e-3


@pytest.mark.parametrize(
    "make",
    [LoRAPreAdamW, LoRAPreAdamW.paper, LoRAPreMuon, LoRAPreMuon.paper, LoRAPreSGD, LoRAPreLion],
    ids=lambda make: make.__qualname__,
)
def test_the_warning_names_the_ranks_and_blames_the_caller(make: Any) -> None:
    with pytest.warns(UserWarning, match=r"none of its 2 parameters .* exceeds the rank \(9\)") as caught:
        make([nn.Parameter(torch.ones(9, 9)), nn.Parameter(torch.ones(3))], rank=9)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match="no group is to be compressed"):
        make([{"params": [nn.Parameter(torch.ones(9, 9))], "compress": False}], rank=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make([nn.Parameter(torch.ones(9, 9)), nn.Parameter(torch.ones(3))], rank=3)
