"""``benchmarks/step_time``: what it refuses, wants, counts and shares out; no test looks at a time."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from step_time import command, costs, weights
from step_time.clock import Launches, Limits, counted, each_step
from step_time.contestants import KINDS, REFERENCE
from step_time.measure import amortised, cycle, with_shares
from step_time.rare import Amortised, extrapolated, make_rare_now, rare_ms, without_svd
from step_time.replay import same_bits
from step_time.rows import StepRow
from step_time.weights import Matrices, fitting_layers, smallest_side

from lorapre import LoRAPreAdamW

CPU = torch.device("cpu")
COMMITTED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "step-time-cpu"
#: The smallest run: one row takes milliseconds.
TINY = ("--models", "llama-1m", "--rounds", "1", "--steps", "1", "--layers", "1")


def run(*arguments: str) -> None:
    command.main(time.monotonic(), None, list(arguments))


def read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "step_time.json").read_text(encoding="utf-8"))
    return content


def row(**changes: Any) -> StepRow:
    given = StepRow("cuda", "llama-1b", "float32", "LoRAPreAdamW", 64, 8.0, 0.6, 1000, 18)
    return replace(given, layers=24, parameter_bytes=100_000, kernels=16, copies=0, **changes)


# The command line.

WRONG = [
    (["--dtypes", "foo"], "--dtypes foo"),
    (["--dtypes", "float32,float32"], "--dtypes float32,float32"),
    (["--models", "llama-2b"], "--models llama-2b"),
    (["--models", "llama-60m", "--ranks", "8,512"], "--ranks 512"),
    (["--models", "llama-60m", "--other-ranks", "1024"], "--other-ranks 1024"),
    (["--training", "llama-1m", "--training-ranks", "128"], "--training-ranks 128"),
    (["--ranks", "eight"], "--ranks eight"),
    (["--ranks", "0"], "--ranks 0"),
    (["--contestants", "adam"], "--contestants adam"),
    (["--backends", "cuda"], "--backends cuda"),
    (["--layers", "many"], "--layers many"),
    (["--budget", "9"], "--budget 9"),
    (["--batch", "llama-1b"], "--batch"),
    (["--again", "["], "--again ["),
    (["--rounds", "40"], "--rounds 40"),
    (["--training", "gpt2"], "--training gpt2"),
]


@pytest.mark.parametrize(("arguments", "named"), WRONG, ids=[" ".join(given) for given, _ in WRONG])
def test_a_bad_argument_ends_with_one_line_that_names_it_and_what_to_give(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        run(*arguments, "--out", str(tmp_path / "out"))
    said = capsys.readouterr()
    assert ending.value.code == 2
    assert said.err.startswith(f"error: {named}")
    assert said.err.count("\n") == 1
    assert "Give " in said.err or "Write " in said.err
    assert not (tmp_path / "out").exists()


def test_ranks_that_are_not_asked_for_are_those_that_fit_each_model() -> None:
    plan = command.plan_of(command.parser(None).parse_args(["--out", "x"]), on_gpu=True)
    ranks: dict[str, list[int]] = {}
    for job in plan.jobs():
        for one in job.rows:
            if one.title == "LoRAPreAdamW" and job.dtype == "bfloat16" and one.rank is not None:
                ranks.setdefault(job.model, []).append(one.rank)
    assert ranks["llama-1b"] == [8, 16, 32, 64, 128, 256, 512]
    assert ranks["llama-60m"] == [8, 16, 32, 64, 128, 256]  # its matrices have a side of 512
    assert smallest_side("llama-60m") == 512


def test_the_most_urgent_rows_come_first() -> None:
    plan = command.plan_of(command.parser(None).parse_args(["--out", "x"]), on_gpu=True)
    jobs = list(plan.jobs())
    assert [(job.model, job.dtype) for job in jobs[:5]] == [
        ("llama-1b", "float32"),
        ("llama-1b", "bfloat16"),
        ("llama-1b", "float32"),
        ("llama-1b", "bfloat16"),
        ("llama-60m", "float32"),
    ]
    assert jobs[0].rows[0].title == REFERENCE
    assert {one.title.partition(",")[0] for one in jobs[0].rows[1:]} == {"LoRAPreAdamW"}
    assert {job.dtype for job in jobs[-2:]} == {None}


# What a step must move and multiply, by hand for one matrix of 6 x 10 at rank 2 in float32: n = 60.


@pytest.mark.parametrize(
    ("cost_of", "moved", "flops"),
    [
        (costs.adamw, 60 * 28, 0),
        (costs.sgd, 60 * 12, 0),
        (costs.adamw_8bit, 60 * (12 + 4 + 16 / 256), 0),
        # Newton-Schulz with the side of 6: two products of 6 x 6 x 10 and one of 6 x 6 x 6, five times
        (costs.muon, 60 * 20, 5 * (2 * 2 * 360 + 2 * 216)),
        # m_B 6 x 2, m_A 2 x 10, a row of 6, a column of 10: 48 numbers read and written; three products of 6 x 10 x 2
        (costs.lorapre_adamw, 60 * 16 + 48 * 8, 3 * 2 * 120),
        # two pairs of factors, 64 numbers; six products
        (costs.lorapre_adamw_paper, 60 * 12 + 64 * 8, 6 * 2 * 120),
        # factors of 32 numbers and an average of 10
        (costs.lorapre_muon, 60 * 16 + 42 * 8, 3 * 2 * 120 + 5 * (2 * 2 * 360 + 2 * 216)),
        # the projection 6 x 2 is read; two moments of 2 x 10 are read and written; projected and back
        (costs.galore, 60 * 12 + 4 * (12 + 80), 2 * 2 * 120),
        (costs.fira, 60 * 16 + 4 * (12 + 80), 2 * 2 * 120),
        (costs.apollo, 60 * 16 + 4 * (12 + 80), 2 * 120),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bytes_and_operations_of_one_matrix_are_those_counted_by_hand(
    cost_of: costs.CostOf, moved: float, flops: float
) -> None:
    for p, q in ((6, 10), (10, 6)):
        found = cost_of(p, q, 2, 4)
        assert found.bytes_moved == pytest.approx(moved)
        assert found.flops == pytest.approx(flops)


def test_lora_pres_state_is_counted_as_large_as_it_is() -> None:
    module = Matrices("llama-1m", 1, torch.float32, CPU)
    optimizer = KINDS["lorapre-adamw"].make(module, 8)
    optimizer.step()
    held = sum(
        tensor.numel() * tensor.element_size()
        for state in optimizer.state.values()
        for key, tensor in state.items()
        if key != "step"
    )
    found = costs.total(costs.lorapre_adamw, weights.layer_shapes("llama-1m"), 8, 4)
    weights_bytes = sum(param.numel() * 4 for param in module.parameters())
    assert found.bytes_moved == 4 * weights_bytes + 2 * held


def test_shares_are_of_the_machines_rates() -> None:
    found = with_shares(row(bytes_moved=12e9, flops=2e12), Limits(copy=3e12, product={"float32": 500e12}))
    assert found.copy_share == pytest.approx(12e9 / 8e-3 / 3e12)
    assert found.product_share == pytest.approx(2e12 / 8e-3 / 500e12)


def test_as_many_layers_are_stepped_as_fit() -> None:
    each = (4 * 4096**2 + 3 * 4096 * 11008) * 4
    assert fitting_layers("llama-7b", torch.float32, 80 * 2**30) == int(0.85 * 80 * 2**30 / (7 * each))
    assert fitting_layers("llama-7b", torch.float32, 2**30) == 1
    assert fitting_layers("llama-1b", torch.bfloat16, 80 * 2**30) == 24
    assert fitting_layers("llama-7b", torch.float32, None) == 32


# What is rare.


def test_rare_work_is_shared_out_over_two_hundred_steps() -> None:
    assert extrapolated(50.0, 8.0, measured=2, layers=24) == pytest.approx(42.0 * 12)
    assert extrapolated(7.9, 8.0, measured=2, layers=24) == 0.0  # noise is no work
    mean = Amortised(plain_ms=10.0, rare_ms=400.0)
    assert mean.step_ms == pytest.approx((199 * 10.0 + 410.0) / 200)
    plain = replace(row(), step_ms=10.0, ratio_to_fused_adamw=2.0)
    found = amortised(plain, mean, 1, Limits(1e12, {}))
    assert found.step_ms == pytest.approx(12.0)
    assert found.ratio_to_fused_adamw == pytest.approx(2.4)
    assert (found.plain_ms, found.rare_ms, found.rare_every, found.rare_layers) == (10.0, 400.0, 200, 1)


@pytest.mark.parametrize("kind", ["galore", "fira"])
def test_the_svds_are_timed_once_a_matrix_and_never_in_plain_steps(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("galore_torch" if kind == "galore" else "fira")
    shapes: list[tuple[int, ...]] = []
    true = torch.linalg.svd

    def watched(matrix: torch.Tensor, full_matrices: bool = True) -> Any:
        shapes.append(tuple(matrix.shape))
        return true(matrix, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    options = {"model": "llama-1m", "layers": 4, "measured": 2, "dtype": torch.float32, "device": CPU}
    rare_ms(KINDS[kind], 16, **options)  # type: ignore[arg-type]
    expected = [*weights.layer_shapes("llama-1m") * 2, (64, 64)]  # the last warms the library up
    assert sorted(shapes) == sorted(expected)


def test_a_plain_step_without_svd_has_projections_of_the_true_shape() -> None:
    pytest.importorskip("galore_torch")
    module = Matrices("llama-1m", 1, torch.float32, CPU)
    optimizer = KINDS["galore"].make(module, 16)
    with without_svd():
        optimizer.step()
    state = [optimizer.state[param]["projector"].ortho_matrix.shape for param in module.parameters()]
    make_rare_now(optimizer)
    optimizer.step()
    assert state == [optimizer.state[param]["projector"].ortho_matrix.shape for param in module.parameters()]
    with pytest.raises(RuntimeError, match="no state with a projector"):
        make_rare_now(torch.optim.AdamW(module.parameters()))


# What the profiler and the graph say.


def test_only_what_the_gpu_executes_is_a_launch() -> None:
    events = [
        {"cat": "kernel", "name": "project"},
        {"cat": "kernel", "name": "project"},
        {"cat": "kernel", "name": "update"},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD"},
        {"cat": "gpu_memset", "name": "Memset"},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel"},
        {"cat": "gpu_user_annotation", "name": "Optimizer.step#LoRAPreAdamW.step"},
        {"name": "process_name"},
    ]
    assert counted(events) == Launches(launches=3, kernels=2, copies=2)
    assert counted(events[5:]) is None


@pytest.mark.parametrize(("broken", "same"), [(None, True), ("weight", False), ("state", False), ("still", False)])
def test_a_replay_is_compared_by_every_bit_of_weights_and_state(broken: str | None, same: bool) -> None:
    module = Matrices("llama-1m", 1, torch.float32, CPU)
    params = list(module.parameters())
    optimizer = LoRAPreAdamW(params, rank=4, capturable=True)
    optimizer.step()

    def replayed() -> None:
        if broken == "still":
            return
        optimizer.step()
        if broken == "weight":
            params[-1].data[3, 5] = torch.nextafter(params[-1].data[3, 5], torch.tensor(9.0))
        elif broken == "state":
            optimizer.state[params[0]]["step"] += 1

    assert same_bits(module, optimizer, replayed) == same


def test_a_step_that_is_timed_is_taken_once_for_each_time() -> None:
    taken: list[int] = []
    assert len(each_step(lambda: taken.append(1), 4, CPU)) == 4
    assert len(taken) == 5  # one before, which fills the queue


def test_steps_that_are_not_alike_are_timed_as_one_and_their_mean_counts() -> None:
    made = []
    step = cycle(lambda: made.append(len(made)), 4)
    step()
    step()
    assert len(made) == 8
    assert cycle(step, 1) is step


def test_a_step_without_a_sweep_spares_a_product_and_a_write() -> None:
    every, seldom = costs.lorapre_adamw(100, 200, 8, 4), costs.sweeping(10**9)(100, 200, 8, 4)
    assert every.flops - seldom.flops == pytest.approx(2 * 100 * 200 * 8)
    assert every.bytes_moved - seldom.bytes_moved == pytest.approx(4 * 200 * 8)
    assert costs.sweeping(1)(100, 200, 8, 4) == every
