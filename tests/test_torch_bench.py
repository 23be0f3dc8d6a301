# ruff: noqa: PT009, PT027 (torch's TestCase compares tensors, and knows which test runs where)
"""Our optimizers on the bench that PyTorch tests its own optimizers on: OptimizerInfo, `optims`, device types.

The checks are ours, after the list of those in PyTorch's test/test_optim.py that apply to these optimizers.
LORAPRE_TEST_DEVICE does not matter here: the bench instantiates every device type that there is. It does so for one
class, of all its tests, which is why this file is long.
"""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import tempfile
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from lorapre import LoRAPreAdamW, LoRAPreLion, LoRAPreMuon, LoRAPreSGD

try:
    from torch.testing._internal.common_device_type import instantiate_device_type_tests
    from torch.testing._internal.common_optimizers import (
        ErrorOptimizerInput,
        OptimizerErrorEnum,
        OptimizerInfo,
        OptimizerInput,
        get_error_inputs_for_all_optims,
        optims,
    )
    from torch.testing._internal.common_utils import TestCase
except ImportError as error:  # expecttest is not part of torch
    pytest.skip(f"torch.testing._internal cannot be imported: {error}", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:LoRAPre.* compresses nothing:UserWarning")


PAPER = {"regression": "newton", "residual_gain": None, "damping_mode": "absolute", "damping": 1e-6}
OWN: dict[type[torch.optim.Optimizer], dict[str, dict[str, Any]]] = {
    LoRAPreAdamW: {
        "betas": {"betas": (0.5, 0.9), "eps": 1e-6},
        "full second moment": {"second_moment": "full"},
        "rank-1 second moment": {"second_moment": "rank1", "eps_mode": "absolute"},
        "clipped": {"update_clipping": True, "spectral_clipping": 0.5},
        "hadamard": {"second_moment": "hadamard", "second_moment_rank": 2},
        "the paper": {
            **PAPER,
            "second_moment": "hadamard",
            "bias_correction": "paper",
            "eps_mode": "absolute",
            "bounded": False,
            "scale": 0.25,
        },
    },
    LoRAPreMuon: {
        "betas": {"betas": (0.5, 0.9), "eps": 1e-6},
        "momentum": {"momentum": 0.5, "nesterov": False},
        "even rows": {"normalization": "rows"},
        "iterations": {"ns_steps": 3, "ns_dtype": torch.float64},
        "the paper": {**PAPER, "nesterov": False, "adjust_lr_fn": "original", "scale": 0.25},
    },
    LoRAPreSGD: {"momentum": {"momentum": 0.5, "nesterov": True}, "newton": PAPER},
    LoRAPreLion: {"betas": {"betas": (0.5, 0.9)}, "newton": PAPER},
}


def inputs_of(cls: type[torch.optim.Optimizer], device: Any, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    table: dict[str, dict[str, Any]] = {
        "default": {},
        "lr": {"lr": 5e-4 if cls is LoRAPreSGD else 0.01},  # a sum of gradients overshoots at 0.01
        "weight decay": {"weight_decay": 0.1},
        "maximize": {"weight_decay": 0.1, "maximize": True},
        "capturable": {"capturable": True},
        "capturable, tensor lr": {"capturable": True, "lr": torch.tensor(0.001)},
        "capturable, everything": {"capturable": True, "weight_decay": 0.1, "maximize": True},
        "tensor lr": {"lr": torch.tensor(0.001)},
        "integer rank": {"rank": 2},
        "tangent": {"regression": "tangent"},
        "skipping": {"nonfinite": "skip"},
        **OWN[cls],
    }
    return [OptimizerInput(params=None, kwargs=kwargs, desc=name) for name, kwargs in table.items()]


def error_inputs_of(cls: type[torch.optim.Optimizer], device: Any, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    def refused(kwargs: dict[str, Any], regex: str) -> ErrorOptimizerInput:
        return ErrorOptimizerInput(
            OptimizerInput(params=None, kwargs=kwargs, desc=regex), error_type=ValueError, error_regex=regex
        )

    table = [
        refused({"lr": -1e-2}, "Invalid learning rate: -0.01"),
        refused({"weight_decay": -1}, "Invalid weight_decay value: -1"),
        refused({"rank": 0}, "Invalid rank: 0"),
        refused({"damping": 0}, "Invalid damping value: 0"),
    ]
    if cls is not LoRAPreSGD:
        table.append(refused({"betas": (1.0, 0.0)}, "Invalid beta parameter at index 0: 1.0"))
    if cls in (LoRAPreAdamW, LoRAPreMuon):
        table.append(refused({"eps": -1}, "Invalid eps value: -1"))
    if cls is LoRAPreAdamW:
        table.append(refused({"spectral_clipping": 0.0}, "Invalid spectral_clipping: 0.0"))
        table.append(refused({"sweep_interval": 0}, "Invalid sweep_interval: 0"))
        table.append(refused({"sweep_interval": 2, "regression": "newton"}, "means nothing with regression='newton'"))
        table.append(refused({"sweep_interval": 2, "capturable": True}, "cannot work with capturable=True"))
    if cls in (LoRAPreSGD, LoRAPreMuon):
        table.append(refused({"momentum": -0.5}, "Invalid momentum value: -0.5"))
    return get_error_inputs_for_all_optims(device, dtype) + table


DB = [
    OptimizerInfo(
        cls,
        optim_inputs_func=functools.partial(inputs_of, cls),
        optim_error_inputs_func=functools.partial(error_inputs_of, cls),
        scheduler_inputs=([lambda opt: StepLR(opt, gamma=0.9, step_size=4)], [lambda opt: ReduceLROnPlateau(opt)]),
        supported_impls=(),
        not_og_supported_flags=("maximize", "capturable"),
        has_capturable_arg=True,
        supports_complex=False,
    )
    for cls in OWN
]


def tensor(*shape: int, device: Any, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def build(info: OptimizerInfo, given: OptimizerInput, params: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = info.optim_cls(params, **copy.deepcopy(given.kwargs))
    return optimizer


def problem(info: OptimizerInfo, given: OptimizerInput, device: Any, dtype: torch.dtype, noncontiguous: bool = False):
    """A matrix, a bias, and a closure that fits them; the matrix is compressed."""
    weight, bias = tensor(10, 5, device=device, dtype=dtype), tensor(10, device=device, dtype=dtype, seed=1)
    if noncontiguous:
        weight, bias = torch.stack([weight] * 2, -1)[..., 0], torch.stack([bias] * 2, -1)[..., 0]
    weight, bias = nn.Parameter(weight), nn.Parameter(bias)
    assert weight.is_contiguous() != noncontiguous
    x = tensor(5, device=device, dtype=dtype, seed=2)
    optimizer = build(info, given, [weight, bias])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).square().sum()
        loss.backward()
        return loss

    return optimizer, closure


def weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param.detach().clone() for group in optimizer.param_groups for param in group["params"]]


class TestOnTorchsBench(TestCase):
    def same(self, a: Any, b: Any) -> None:
        self.assertEqual(a, b, rtol=0, atol=0)

    @optims(DB, dtypes=[torch.float32])
    def test_error_inputs_are_refused_with_the_expected_words(self, device, dtype, optim_info) -> None:
        for case in optim_info.optim_error_inputs_func(device, dtype):
            given = case.optimizer_error_input
            params = [nn.Parameter(torch.ones(4, 4, device=device))] if given.params is None else given.params
            assert case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
            if issubclass(case.error_type, Warning):
                with self.assertWarnsRegex(case.error_type, case.error_regex):
                    optim_info.optim_cls(params, **given.kwargs)
            else:
                with self.assertRaisesRegex(case.error_type, case.error_regex):
                    optim_info.optim_cls(params, **given.kwargs)

    @optims(DB, dtypes=[torch.float32, torch.float64])
    def test_it_goes_the_right_direction_with_and_without_schedulers(self, device, dtype, optim_info) -> None:
        for noncontiguous in (False, True):
            for given in optim_info.optim_inputs_func(device=device):
                for makers in ([], *(() if noncontiguous else optim_info.scheduler_inputs)):
                    optimizer, closure = problem(optim_info, given, device, dtype, noncontiguous)
                    schedulers = [make(optimizer) for make in makers]
                    losses = []
                    for _ in range(12):
                        losses.append(optimizer.step(closure).item())
                        for scheduler in schedulers:
                            scheduler.step(*([losses[-1]] if isinstance(scheduler, ReduceLROnPlateau) else []))
                    # not only in the end: lr is small enough for every step
                    steps = itertools.pairwise(losses)
                    ascending = given.kwargs.get("maximize", False)
                    assert all((a < b) == ascending for a, b in steps), given.desc

    @optims(DB, dtypes=[torch.float32])
    def test_a_noncontiguous_run_is_the_contiguous_one(self, device, dtype, optim_info) -> None:
        for given in optim_info.optim_inputs_func(device=device):
            runs = []
            for noncontiguous in (False, True):
                optimizer, closure = problem(optim_info, given, device, dtype, noncontiguous)
                for _ in range(5):
                    optimizer.step(closure)
                runs.append(weights(optimizer))
            self.assertEqual(runs[0], runs[1], rtol=1e-5, atol=1e-6, msg=given.desc)

    @optims(DB, dtypes=[torch.float32])
    def test_groups_keep_learning_rates_and_decays_apart(self, device, dtype, optim_info) -> None:
        for given in optim_info.optim_inputs_func(device=device):
            if "lr" in given.kwargs or "weight_decay" in given.kwargs:
                continue
            params = [nn.Parameter(tensor(8, 6, device=device, dtype=dtype, seed=i)) for i in range(3)]
            groups = [
                {"params": params[:1], "lr": 0.0},
                {"params": params[1:2], "lr": 0.1, "weight_decay": 0.5},
                {"params": params[2:], "lr": 0.1, "weight_decay": 0.0},
            ]
            optimizer, before = build(optim_info, given, groups), [param.detach().clone() for param in params]
            for param in params:
                param.grad = torch.zeros_like(param)
            optimizer.step()
            self.same(params[0].detach(), before[0])
            self.assertEqual(params[1].detach(), 0.95 * before[1])
            self.same(params[2].detach(), before[2])

    @optims(DB, dtypes=[torch.float32])
    def test_a_tensor_lr_gives_what_its_value_gives(self, device, dtype, optim_info) -> None:
        for given in optim_info.optim_inputs_func(device=device):
            kwargs = {key: value for key, value in given.kwargs.items() if key != "lr"}
            runs = []
            for lr in (0.001, torch.tensor(0.001), torch.tensor([[0.001]])):
                case = OptimizerInput(params=None, kwargs={**kwargs, "lr": lr}, desc="")
                optimizer, closure = problem(optim_info, case, device, dtype)
                for _ in range(4):
                    optimizer.step(closure)
                runs.append(weights(optimizer))
            self.assertEqual(runs[0], runs[1])
            self.assertEqual(runs[0], runs[2])

    @optims(DB, dtypes=[torch.float32])
    def test_steps_without_gradients_change_nothing(self, device, dtype, optim_info) -> None:
        for given in optim_info.optim_inputs_func(device=device):
            optimizer, closure = problem(optim_info, given, device, dtype)
            optimizer.step(closure)
            optimizer.zero_grad(set_to_none=True)
            before = copy.deepcopy((weights(optimizer), optimizer.state_dict()["state"]))
            optimizer.step()
            self.same((weights(optimizer), optimizer.state_dict()["state"]), before)

    @optims(DB, dtypes=[torch.float32])
    def test_zero_gradients_on_a_fresh_state_move_nothing_but_decay(self, device, dtype, optim_info) -> None:
        for given in optim_info.optim_inputs_func(device=device):
            optimizer, _ = problem(optim_info, given, device, dtype)
            before = weights(optimizer)
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = torch.zeros_like(param)
            optimizer.step()
            group = optimizer.param_groups[0]
            self.assertEqual(weights(optimizer), [w * (1 - group["lr"] * group["weight_decay"]) for w in before])
            steps = [state["step"].item() for state in optimizer.state.values()]
            assert steps == [1, 1]

    @optims(DB, dtypes=[torch.float32])
    def test_the_state_is_not_empty_and_deterministic(self, device, dtype, optim_info) -> None:
        for given in optim_info.optim_inputs_func(device=device):
            (one, first), (two, second) = (problem(optim_info, given, device, dtype) for _ in range(2))
            for _ in range(3):
                one.step(first)
                two.step(second)
            assert all(len(state) >= 2 for state in one.state.values())
            assert len(one.state) == 2
            self.same(one.state_dict(), two.state_dict())

    @optims(DB, dtypes=[torch.float32])
    def test_a_loaded_state_continues_the_run_and_stays_as_it_was(self, device, dtype, optim_info) -> None:
        for given in optim_info.optim_inputs_func(device=device):
            one, first = problem(optim_info, given, device, dtype)
            for _ in range(3):
                one.step(first)
            two, second = problem(optim_info, given, device, dtype)
            with torch.no_grad():
                for param, value in zip(two.param_groups[0]["params"], weights(one), strict=True):
                    param.copy_(value)
            saved = copy.deepcopy(one.state_dict())
            loaded = copy.deepcopy(saved)
            two.load_state_dict(loaded)
            self.same(loaded, saved)
            for _ in range(3):
                one.step(first)
                two.step(second)
            self.same(weights(two), weights(one))
            self.same(two.state_dict(), one.state_dict())

    @optims(DB, dtypes=[torch.float32])
    def test_a_file_read_with_weights_only_holds_an_equal_state(self, device, dtype, optim_info) -> None:
        for given in optim_info.optim_inputs_func(device=device):
            optimizer, closure = problem(optim_info, given, device, dtype)
            optimizer.step(closure)
            with tempfile.TemporaryFile() as file:
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                loaded = torch.load(file, weights_only=True)
            self.same(loaded, optimizer.state_dict())
            other, _ = problem(optim_info, given, device, dtype)
            other.load_state_dict(loaded)
            self.same(other.state_dict(), optimizer.state_dict())

    @optims(DB, dtypes=[torch.float32])
    def test_an_older_state_without_our_keys_can_be_loaded(self, device, dtype, optim_info) -> None:
        for given in optim_info.optim_inputs_func(device=device):
            for flag in (*optim_info.not_og_supported_flags, "nonfinite", "seed", "view_3d", "compress"):
                optimizer, closure = problem(optim_info, given, device, dtype)
                optimizer.step(closure)
                old = copy.deepcopy(optimizer.state_dict())
                for group in old["param_groups"]:
                    del group[flag]
                optimizer.load_state_dict(old)
                assert optimizer.param_groups[0][flag] == optimizer.defaults[flag]
                optimizer.step(closure)

    @optims(DB, dtypes=[torch.float32])
    def test_a_step_saved_as_a_number_becomes_a_counter(self, device, dtype, optim_info) -> None:
        for given in optim_info.optim_inputs_func(device=device):
            for kind in (int, float):
                one, first = problem(optim_info, given, device, dtype)
                two, second = problem(optim_info, given, device, dtype)
                for _ in range(2):
                    one.step(first)
                    two.step(second)
                saved = copy.deepcopy(one.state_dict())
                for state in saved["state"].values():
                    state["step"] = kind(state["step"].item())
                one.load_state_dict(saved)
                one.step(first)
                two.step(second)
                self.same(one.state_dict(), two.state_dict())
                self.same(weights(one), weights(two))

    @optims(DB, dtypes=[torch.float32])
    def test_a_state_moves_to_parameters_of_another_dtype_and_device(self, device, dtype, optim_info) -> None:
        for given in optim_info.optim_inputs_func(device=device):
            source, closure = problem(optim_info, given, "cpu", dtype)
            source.step(closure)
            for target_dtype in (torch.bfloat16, torch.float64):
                target, other = problem(optim_info, given, device, target_dtype)
                target.load_state_dict(copy.deepcopy(source.state_dict()))
                for state in target.state.values():
                    for key, value in state.items():
                        assert value.dtype == torch.float32, key  # as it was saved
                        on_device = key != "step" or given.kwargs.get("capturable", False)
                        assert value.device.type == (torch.device(device).type if on_device else "cpu")
                target.step(other)
                assert all(state["step"].item() == 2 for state in target.state.values())
                assert all(value.isfinite().all() for value in weights(target))

    @optims(DB, dtypes=[torch.float32])
    def test_states_pass_between_named_and_unnamed_parameters(self, device, dtype, optim_info) -> None:
        for given in optim_info.optim_inputs_func(device=device):
            optimizer, closure = problem(optim_info, given, device, dtype)
            optimizer.step(closure)
            params = optimizer.param_groups[0]["params"]
            named = build(optim_info, given, [("weight", params[0]), ("bias", params[1])])
            named.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            assert named.param_groups[0]["param_names"] == ["weight", "bias"]
            self.same(named.state_dict()["state"], optimizer.state_dict()["state"])
            unnamed = build(optim_info, given, params)
            unnamed.load_state_dict(copy.deepcopy(named.state_dict()))
            self.same(unnamed.state_dict()["state"], optimizer.state_dict()["state"])
            unnamed.step(closure)

    @optims(DB, dtypes=[torch.float32])
    def test_a_deep_copy_keeps_every_public_attribute(self, device, dtype, optim_info) -> None:
        for given in optim_info.optim_inputs_func(device=device):
            optimizer, closure = problem(optim_info, given, device, dtype)
            optimizer.step(closure)
            for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
                public = [{key for key in vars(x) if not key.startswith("_")} for x in (optimizer, twin)]
                assert public[0] == public[1]
                self.same(twin.state_dict(), optimizer.state_dict())
                assert repr(twin) == repr(optimizer)

    @optims(DB, dtypes=[torch.float32])
    def test_it_can_be_printed(self, device, dtype, optim_info) -> None:
        for given in optim_info.optim_inputs_func(device=device):
            optimizer, _ = problem(optim_info, given, device, dtype)
            text = repr(optimizer)
            assert text.startswith(f"{optim_info.optim_cls.__name__} (")
            assert all(f"    {key}: " in text for key in optimizer.defaults)

    @optims(DB, dtypes=[torch.float32])
    def test_step_hooks_of_the_instance_and_of_all_optimizers_run_in_order(self, device, dtype, optim_info) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        optimizer, closure = problem(optim_info, optim_info.optim_inputs_func(device=device)[0], device, dtype)
        calls: list[str] = []
        handles = [
            register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
            register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
            optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
            optimizer.register_step_post_hook(lambda *_: calls.append("post")),
        ]
        optimizer.step(closure)
        for handle in handles:
            handle.remove()
        optimizer.step(closure)
        assert calls == ["global pre", "pre", "post", "global post"]

    @optims(DB, dtypes=[torch.float32])
    def test_state_dict_hooks_run_prepended_ones_first(self, device, dtype, optim_info) -> None:
        optimizer, _ = problem(optim_info, optim_info.optim_inputs_func(device=device)[0], device, dtype)
        calls: list[str] = []

        def mark(name: str, result: Any = None):
            def hook(*_: Any) -> Any:
                calls.append(name)
                return result

            return hook

        optimizer.register_state_dict_pre_hook(mark("save 2"))
        optimizer.register_state_dict_pre_hook(mark("save 1"), prepend=True)
        optimizer.register_state_dict_post_hook(mark("saved 1"))
        optimizer.register_state_dict_post_hook(lambda _, state: {**state, "added": len(calls)})
        state = optimizer.state_dict()
        assert calls == ["save 1", "save 2", "saved 1"]
        assert state["added"] == 3
        calls.clear()
        optimizer.register_load_state_dict_pre_hook(mark("load 2"))
        optimizer.register_load_state_dict_pre_hook(mark("load 1"), prepend=True)
        optimizer.register_load_state_dict_post_hook(mark("loaded 2"))
        optimizer.register_load_state_dict_post_hook(mark("loaded 1"), prepend=True)
        optimizer.load_state_dict(state)
        assert calls == ["load 1", "load 2", "loaded 1", "loaded 2"]

    @optims(DB, dtypes=[torch.float32])
    def test_a_pre_hook_may_replace_the_state_that_is_loaded(self, device, dtype, optim_info) -> None:
        for given in optim_info.optim_inputs_func(device=device):
            optimizer, closure = problem(optim_info, given, device, dtype)
            fresh = copy.deepcopy(optimizer.state_dict())
            optimizer.step(closure)
            trained = optimizer.state_dict()
            optimizer.register_load_state_dict_pre_hook(lambda _, state, fresh=fresh: fresh)
            optimizer.load_state_dict(trained)
            assert all(state["step"].item() == 0 for state in optimizer.state.values())

    @optims(DB, dtypes=[torch.float32])
    def test_gradients_are_never_written_into(self, device, dtype, optim_info) -> None:
        for given in optim_info.optim_inputs_func(device=device):
            optimizer, closure = problem(optim_info, given, device, dtype)
            optimizer.step(closure)
            params = optimizer.param_groups[0]["params"]
            versions, copies = [p.grad._version for p in params], [p.grad.clone() for p in params]
            optimizer.step()
            assert [p.grad._version for p in params] == versions
            self.same([p.grad for p in params], copies)

    @optims(DB, dtypes=[torch.float32])
    def test_parameters_of_mixed_dtypes_and_devices_train_as_they_do_alone(self, device, dtype, optim_info) -> None:
        places = [("cpu", torch.float64), (device, torch.float32), (device, torch.bfloat16), (device, torch.float16)]
        for given in optim_info.optim_inputs_func(device=device):
            kwargs = {**given.kwargs, "nonfinite": "skip"}
            params = [
                (f"{i}.{shape}", nn.Parameter(tensor(*shape, device=where, dtype=kind, seed=i)))
                for i, (where, kind) in enumerate(places)
                for shape in ((8, 6), (8, 6), (5,))
            ]
            copies = [(name, nn.Parameter(param.detach().clone())) for name, param in params]
            unique = [(f"{i}.{name}", param) for i, (name, param) in enumerate(params)]
            together = optim_info.optim_cls(unique, **kwargs)
            alone = [optim_info.optim_cls([(f"{i}.{name}", param)], **kwargs) for i, (name, param) in enumerate(copies)]
            for step in range(3):
                for (_, a), (_, b) in zip(params, copies, strict=True):
                    a.grad = tensor(*a.shape, device=a.device, dtype=a.dtype, seed=100 + step)
                    b.grad = a.grad.clone()
                together.step()
                for optimizer in alone:
                    optimizer.step()
            for (_, a), (_, b) in zip(params, copies, strict=True):
                # A product of several matrices at once is rounded otherwise than that of one, and Newton-Schulz'
                # iteration enlarges the difference; the other dtypes' own tolerances are above it.
                bounds = {"atol": 1e-4, "rtol": 1e-4} if a.dtype == torch.float32 else {}
                self.assertEqual(a, b, msg=given.desc, **bounds)

    @optims(DB, dtypes=[torch.float32])
    def test_the_default_dtype_does_not_change_the_run(self, device, dtype, optim_info) -> None:
        old = torch.get_default_dtype()
        for given in optim_info.optim_inputs_func(device=device):
            runs = []
            for default in (torch.float32, torch.float64, torch.float16):
                optimizer, closure = problem(optim_info, given, device, dtype)
                torch.set_default_dtype(default)
                try:
                    fresh = build(optim_info, given, optimizer.param_groups[0]["params"])
                    for _ in range(2):
                        closure()
                        fresh.step()
                finally:
                    torch.set_default_dtype(old)
                assert all(value.dtype == torch.float32 for state in fresh.state.values() for value in state.values())
                runs.append((weights(fresh), fresh.state_dict()["state"]))
            self.same(runs[1], runs[0])
            self.same(runs[2], runs[0])

    @optims(DB, dtypes=[torch.float32])
    def test_the_inputs_leave_the_choice_of_implementation_to_the_tests(self, device, dtype, optim_info) -> None:
        for given in optim_info.optim_inputs_func(device=device):
            assert not {"foreach", "fused", "differentiable"} & set(given.kwargs)

    @optims(DB, dtypes=[torch.float32])
    def test_every_keyword_of_the_constructor_is_exercised_or_has_a_test_elsewhere(
        self, device, dtype, optim_info
    ) -> None:
        elsewhere = {"view_3d", "state_dtype", "seed", "compress", "stochastic_rounding"}
        if optim_info.optim_cls in (LoRAPreAdamW, LoRAPreMuon):
            elsewhere.add("backend")  # test_triton_dispatch.py, test_triton_muon.py
        if optim_info.optim_cls is LoRAPreAdamW:
            elsewhere.add("sweep_interval")  # test_exactness.py: it goes with no graph
        used = {key for given in optim_info.optim_inputs_func(device=device) for key in given.kwargs}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert used | elsewhere == set(
                build(
                    optim_info, OptimizerInput(params=None, kwargs={}, desc=""), [nn.Parameter(torch.ones(2))]
                ).defaults
            )


instantiate_device_type_tests(TestOnTorchsBench, globals(), only_for=("cpu", "cuda"))
