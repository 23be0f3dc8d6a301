"""What the rivals hold, and that they resume, follow a schedule and name their packages."""

from __future__ import annotations

import importlib.metadata
import io
import subprocess
import sys
from typing import Any

import pytest
import torch
from _peer_formulas import Run
from _peers import DENSE_LR, ENTRIES, LR, Net, installed, llama, make, matrix_part, train
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from _support import assert_same_bits
from lorapre.lab.errors import UserError
from lorapre.lab.optimizers.measure import state_bytes


@pytest.mark.parametrize("shape", [(40, 16), (16, 40), (24, 24), (50, 10), (64, 80), (96, 64), (65, 64), (300, 20)])
@pytest.mark.parametrize("rank", [1, 7])
@pytest.mark.parametrize("name", ENTRIES)
def test_a_matrix_holds_the_bytes_that_the_row_says(name: str, shape: tuple[int, int], rank: int) -> None:
    entry = installed(name)
    model = Net(*shape)
    optimizer = make(entry, model, Run(rank=rank))
    train(model, optimizer, 4)
    part = matrix_part(optimizer)
    mlp = [param for name, param in model.named_parameters() if name.startswith("mlp.") and param.requires_grad]
    assert state_bytes(part, mlp) == entry.state_bytes(*shape, rank)


@pytest.mark.parametrize("name", ENTRIES)
def test_a_model_holds_the_sum_over_its_matrices(name: str) -> None:
    entry = installed(name)
    model = llama()
    shapes = [layer.weight.shape for name, layer in model.named_modules() if name.endswith("_proj")]
    optimizer = make(entry, model)
    train(model, optimizer, 2)
    expected = sum(entry.state_bytes(p, q, 3) for p, q in shapes)
    if entry.name == "adamw-8bit-bnb":
        expected -= (len(shapes) - 1) * 2048  # the tables are shared, as the row says
    if entry.name == "adam-mini":
        expected -= 2 * 2 * 4 * (64 - 2)  # query and key of two layers: two heads, not 64 rows
    matrices = [param for group in matrix_part(optimizer).param_groups for param in group["params"]]
    assert state_bytes(optimizer, matrices) == expected


def reloaded(optimizer: Optimizer, types: list[type]) -> Any:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    with torch.serialization.safe_globals(types):
        return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("name", ENTRIES)
def test_a_resumed_run_takes_the_same_steps_to_the_bit(name: str) -> None:
    entry = installed(name)
    model, twin = Net(), Net()
    optimizer, resumed = make(entry, model), make(entry, twin)
    train(model, optimizer, 4)
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(reloaded(optimizer, entry.checkpoint_types()))
    train(model, optimizer, 4, seed=1)
    train(twin, resumed, 4, seed=1)
    assert_same_bits(dict(twin.state_dict()), dict(model.state_dict()))
    assert state_bytes(matrix_part(resumed)) == state_bytes(matrix_part(optimizer))


@pytest.mark.parametrize("name", ["galore", "fira", "apollo", "apollo-mini"])
def test_python_objects_in_the_state_need_the_types_of_the_row(name: str) -> None:
    model = Net()
    optimizer = make(installed(name), model)
    train(model, optimizer, 1)
    with pytest.raises(Exception, match="Weights only load failed"):
        reloaded(optimizer, [])


@pytest.mark.parametrize("name", ["galore", "fira", "apollo", "apollo-mini"])
def test_a_loaded_projection_lies_where_its_matrix_does(name: str) -> None:
    """A checkpoint is read into the CPU; the packages' objects would stay there and fail at the next step."""
    model = Net()
    optimizer = make(installed(name), model)
    train(model, optimizer, 1)
    elsewhere = Net().to("meta")
    resumed = make(installed(name), elsewhere)
    resumed.load_state_dict(optimizer.state_dict())
    state = matrix_part(resumed).state[elsewhere.mlp.weight]
    assert state["projector"].ortho_matrix.device == state["exp_avg"].device == torch.device("meta")


@pytest.mark.parametrize("name", ENTRIES)
def test_a_schedule_reaches_every_group(name: str) -> None:
    entry = installed(name)
    model = Net()
    optimizer = make(entry, model)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step if step < 3 else 0.0)
    rates = [float(group["lr"]) for part in optimizer.parts for group in part.param_groups]  # type: ignore[attr-defined]
    assert set(rates) == {LR, DENSE_LR}
    for number in range(1, 3):
        train(model, optimizer, 1)
        scheduler.step()
        for part in optimizer.parts:  # type: ignore[attr-defined]
            for group in part.param_groups:
                assert float(group["lr"]) == pytest.approx(float(group["initial_lr"]) * 0.5**number)
    train(model, optimizer, 1)
    scheduler.step()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    train(model, optimizer, 1, seed=1)
    assert_same_bits({name: param.detach() for name, param in model.named_parameters()}, before)


def test_the_registry_loads_without_any_peer() -> None:
    packages = {"galore_torch", "fira", "apollo_torch", "flora_opt", "adam_mini", "came_pytorch", "pytorch_optimizer"}
    packages |= {"torchao", "bitsandbytes"}
    code = f"""
import sys
import lorapre.lab.optimizers
from lorapre.lab.optimizers import galore_family, packaged, torch_peers
print(sorted({packages} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.package is not None])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(UserError, match=f"--compare {name}: needs the package {ENTRIES[name].package},"):
        ENTRIES[name].check_installed("--compare")
