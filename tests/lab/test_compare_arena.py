"""`lorapre compare` as a user runs it: same start for all, rows for what breaks, and nothing lost or repeated."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from _lab import (
    SMALL_COMPARISON,
    Outcome,
    exit_code,
    make_comparison,
    options,
    records,
    summary,
    timeless,
)
from rich.cells import cell_len
from rich.console import Console
from transformers import AutoModelForCausalLM

from lorapre.lab import timing
from lorapre.lab.compare import arena
from lorapre.lab.compare.collect import collect
from lorapre.lab.compare.config import build_compare_config
from lorapre.lab.compare.folder import ArenaFolder
from lorapre.lab.compare.plan import SEARCHES, Job, Planner
from lorapre.lab.compare.pool import ProcessPool, Slot, slots
from lorapre.lab.compare.progress import ArenaProgress
from lorapre.lab.compare.runs import Outcome as RunOutcome
from lorapre.lab.compare.runs import RunStore, record_failure
from lorapre.lab.errors import UserError
from lorapre.lab.optimizers import OPTIMIZERS
from lorapre.lab.timing import WARM_UP_STEPS, summarise

Compare = Callable[..., Outcome]

#: Two optimizers, two rates at a quarter, the better one in full: six runs of about a second.
SMALL = options(**SMALL_COMPARISON)


@pytest.fixture
def compare(here: Path, sketched: None, capfd: pytest.CaptureFixture[str]) -> Compare:
    """``lorapre compare`` in this process, from the folder ``here``."""

    def call(*arguments: str) -> Outcome:
        capfd.readouterr()
        code = exit_code("compare", *arguments)
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def small(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished comparison ``SMALL``."""
    return make_comparison(tmp_path_factory.mktemp("small"), lab / "cache", SMALL)


def run_folders(out: Path) -> set[str]:
    return {str(path.parent.relative_to(out / "runs")) for path in (out / "runs").glob("*/*/job.json")}


def table(out: Path) -> dict[str, dict[str, object]]:
    """The rows of table.json by contestant."""
    rows = json.loads((out / "table.json").read_text())["rows"]
    return {row["contestant"]: row for row in rows}


def stamps(out: Path) -> dict[str, int]:
    """When each finished run was written."""
    return {str(path): path.stat().st_mtime_ns for path in (out / "runs").rglob("summary.json")}


def test_a_comparison_makes_the_planned_runs_and_all_its_files(small: Path) -> None:
    names = {"adamw": "adamw", "lorapre-adamw": "lorapre-adamw@0.25"}
    quarter = {
        f"{folder}/lr{OPTIMIZERS[name].default_lr * factor:g}-seed0-steps3"
        for name, folder in names.items()
        for factor in (1, 4)
    }
    folders = run_folders(small)
    assert quarter < folders
    assert len(folders - quarter) == 2
    assert all(name.endswith("seed0-steps12") for name in folders - quarter)
    for name in ("table.md", "table.csv", "report.html", "loss-tokens.png", "loss-state.png", "learning-rates.png"):
        assert (small / name).stat().st_size > 100
    rows = table(small)
    for key, row in rows.items():
        (full,) = [name for name in folders - quarter if name.startswith(f"{key}/")]
        assert row["loss"] == summary(small / "runs" / full)["valid_loss"]
        assert row["matrix_state_bytes"] == row["formula_bytes"]


def test_all_runs_share_data_order_and_initial_weights(small: Path) -> None:
    # Warm-up rounds to 0 steps of 3 and 1 of 12: before the first step all have seen the same batch with the same
    # weights, so the first training loss is the same.
    first = {records(path.parent)[0]["loss"] for path in (small / "runs").rglob("summary.json")}
    assert len(first) == 1
    configs = [yaml.safe_load(path.read_text()) for path in (small / "runs").rglob("config.yaml")]
    own = {"optimizer", "lr", "steps", "eval_every", "log_every"}
    shared = [{name: value for name, value in config.items() if name not in own} for config in configs]
    assert all(config == shared[0] for config in shared)


def test_a_run_is_what_pretrain_gives(small: Path, here: Path) -> None:
    row = table(small)["adamw"]
    arguments = ["--optimizer", "adamw", "--lr", str(row["lr"]), "--eval-every", "1", "--out", "alone"]
    without = SMALL[: SMALL.index("--optimizers")]
    assert exit_code("pretrain", *without, *arguments) == 0
    assert summary(here / "alone")["valid_loss"] == row["loss"]


def test_repeating_a_finished_comparison_trains_nothing_and_writes_the_report_again(
    small: Path, here: Path, compare: Compare
) -> None:
    before = stamps(small)
    (small / "report.html").unlink()
    ended = compare(*SMALL, "--out", str(small))
    assert ended.code == 0
    assert stamps(small) == before
    assert (small / "report.html").exists()
    assert "steps:" not in ended.out
    (small / "table.json").unlink()
    assert compare("--render", "--out", str(small)).code == 0
    assert set(table(small)) == {"adamw", "lorapre-adamw@0.25"}


def test_more_optimizers_and_seeds_add_their_runs_alone(small: Path, here: Path, compare: Compare) -> None:
    before, folders = stamps(small), run_folders(small)
    more = [*SMALL, "--optimizers", "lorapre-adamw,adamw,muon", "--seeds", "2", "--out", str(small)]
    assert compare(*more).code == 0
    assert stamps(small).items() > before.items()
    added = run_folders(small) - folders
    assert sum(name.startswith("muon/") for name in added) == 4
    assert sum("seed1" in name for name in added if not name.startswith("muon/")) == 2
    assert len(added) == 6
    assert [table(small)[key]["seeds"] for key in ("adamw", "muon")] == [[0, 1]] * 2
    # Fewer again, in figures as in rows; and --diagnose 0 is the training that it began with.
    assert compare(*SMALL, "--diagnose", "0", "--out", str(small)).code == 0
    assert [row["seeds"] for row in table(small).values()] == [[0]] * 2
    assert {run.seed for run in collect(ArenaFolder(small)).runs} == {0}


def test_a_killed_comparison_goes_on_and_repeats_no_finished_run(here: Path, compare: Compare) -> None:
    command = [sys.executable, "-c", "from lorapre.lab.cli import main; main()", "compare", *SMALL, "--out", "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(stamps(here / "out")) < 2:
        assert time.monotonic() < deadline
        assert first.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = stamps(here / "out")
    interrupted = run_folders(here / "out")
    # Its worker must not go on writing: it ends with the process that asked for it.
    time.sleep(1.5)
    assert stamps(here / "out").keys() - before.keys() <= {
        str(here / "out" / "runs" / name / "summary.json") for name in interrupted
    }
    before = stamps(here / "out")
    second = compare(*SMALL, "--out", "out")
    assert second.code == 0, second.err
    after = stamps(here / "out")
    assert after.items() > before.items()
    assert len(after) == 6
    assert second.out.count("steps:") == 6 - len(before)


#: Asks a worker to do nothing for a minute, and waits for it.
ASKING = """
import multiprocessing, os, pathlib, sys, time

def work(place):
    from lorapre.lab.compare.worker import _end_with_parent
    _end_with_parent()
    pathlib.Path(place + ".new").write_text(str(os.getpid()))
    os.rename(place + ".new", place)
    time.sleep(60)

if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=work, args=(sys.argv[1],))
    worker.start()
    worker.join()
"""


def test_a_worker_ends_with_the_process_that_asked_for_it(tmp_path: Path) -> None:
    (tmp_path / "asking.py").write_text(ASKING, encoding="utf-8")
    place = tmp_path / "pid"
    asking = subprocess.Popen([sys.executable, str(tmp_path / "asking.py"), str(place)])
    try:
        _wait(place.exists, 60, "no worker has begun")
        worker = psutil.Process(int(place.read_text(encoding="utf-8")))
        assert worker.is_running()
    finally:
        asking.kill()
        asking.wait()
    ended = lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE  # noqa: E731
    try:
        _wait(ended, 20, "the worker goes on")
    finally:
        if not ended():
            worker.kill()


def _wait(happened: Callable[[], bool], seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


def test_a_killed_worker_is_a_row_and_not_the_end(here: Path, compare: Compare) -> None:
    original = ProcessPool.start

    def start(self: ProcessPool[Job], key: Job, slot: Slot, target: object, argument: object) -> None:
        original(self, key, slot, _end_silently if key.contestant == "adamw" else target, argument)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessPool, "start", start)
        assert compare(*SMALL, "--out", "out").code == 0
    rows = table(here / "out")
    assert rows["lorapre-adamw@0.25"]["status"] == "finished"
    assert (rows["adamw"]["status"], rows["adamw"]["loss"]) == ("failed", None)
    assert "exit code 3" in str(rows["adamw"]["reason"])
    # The same command keeps the row; asked to, it makes the failed runs again.
    assert compare(*SMALL, "--out", "out").code == 0
    assert table(here / "out")["adamw"]["status"] == "failed"
    assert compare(*SMALL, "--out", "out", "--retry-failed").code == 0
    assert table(here / "out")["adamw"]["status"] == "finished"


def _end_silently(assignment: object) -> None:
    os._exit(3)


def test_a_diverging_run_is_a_row(here: Path, compare: Compare) -> None:
    arguments = [*SMALL, "--optimizers", "sgd,adamw", "--lr-grid", "1e-3,1e30", "--max-grad-norm", "0", "--out", "out"]
    assert compare(*arguments).code == 0
    ended = ArenaFolder(here / "out").runs.outcomes().items()
    found = {job.lr: outcome for job, outcome in ended if job.contestant == "sgd"}
    assert found[1e30].status == "diverged"
    assert "is nan at step" in found[1e30].reason or "is inf at step" in found[1e30].reason
    row = table(here / "out")["sgd"]
    assert (row["status"], row["lr"]) == ("finished", 1e-3)
    assert row["lr_losses"][1] == [1e30, None]  # type: ignore[index]


def test_a_budget_that_ends_leaves_a_report_that_says_so(here: Path, compare: Compare) -> None:
    ended = compare(*SMALL, "--search", "quick", "--budget", "1s", "--out", "out")
    assert ended.code == 0
    assert "The budget of 1s ended with" in ended.out
    assert "The budget of 1s ended with" in (here / "out" / "table.md").read_text()


def test_a_run_that_the_trials_say_to_be_too_long_is_not_begun(
    here: Path, compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It was the first of its kind, so that nothing but its trial tells.
    monkeypatch.setattr(arena.Arena, "_trial_speeds", lambda *_: ({"adamw": 60.0, "lorapre-adamw@0.25": 0.01}, 1.0))
    ended = compare(*SMALL[: SMALL.index("--search")], "--budget", "2m", "--out", "out")
    assert ended.code == 0
    assert "more than the" in ended.out
    finished = {name.partition("/")[0] for name in run_folders(here / "out")}
    assert finished == {"lorapre-adamw@0.25"}
    assert "not run yet" in (here / "out" / "table.md").read_text()


def test_a_budget_without_a_search_plans_from_trial_runs(here: Path, compare: Compare) -> None:
    ended = compare(*SMALL[: SMALL.index("--search")], "--budget", "30m", "--out", "out")
    assert ended.code == 0
    assert "Search: every learning rate at full length" in ended.out
    assert len(list((here / "out" / "trials").rglob("summary.json"))) == 2
    assert {name.rpartition("steps")[2] for name in run_folders(here / "out")} == {"12"}


def test_shared_devices_are_timed_afterwards_alone(
    here: Path, compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena, "TIMING_STEPS", 9)
    ended = compare(*SMALL, "--jobs-per-device", "2", "--optimizers", "adamw", "--lr-grid", "x1", "--out", "out")
    assert ended.code == 0
    (timing,) = (here / "out" / "timings").rglob("summary.json")
    row = table(here / "out")["adamw"]
    assert row["step_ms"] == json.loads(timing.read_text())["optimizer_ms"]
    assert all(outcome.shared_device for outcome in ArenaFolder(here / "out").runs.outcomes().values())
    # A timing that failed is made again too.
    timing.unlink()
    record_failure(timing.parent, "failed", "out of memory")
    again = [*SMALL, "--optimizers", "adamw", "--lr-grid", "x1", "--out", "out"]
    assert compare(*again).code == 0
    assert table(here / "out")["adamw"]["step_ms"] is None
    assert compare(*again, "--retry-failed").code == 0
    assert table(here / "out")["adamw"]["step_ms"] is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers", "adam"], "--optimizers adam: there is no such optimizer"),
        (["--optimizers", "galore-ours@64"], "--optimizers galore-ours@64: no matrix of --model tiny.json has a"),
        (["--optimizers", "galore-ours", "--rank", "64"], "--rank 64: no matrix of --model tiny.json has a smaller"),
        (["--optimizers", ","], "names nobody. Give names of `lorapre optimizers`"),
        (["--lr-grid", "fast"], "--lr-grid fast: is no grid"),
        (["--seeds", "0"], "--seeds 0: must be"),
        (["--search", "deep"], "--search deep: must be"),
        (["--budget", "soon"], "--budget soon: is no length of time"),
        (["--render"], "--render: shows the runs in out as they were asked for, which --model, --data,"),
        (["--batch-size", "400"], "fewer than --batch-size"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(
    here: Path, compare: Compare, arguments: list[str], message: str
) -> None:
    ended = compare(*SMALL, *arguments, "--out", "out")
    assert ended.code == 2
    assert message in ended.message
    assert not (here / "out" / "runs").exists()


def test_another_training_in_the_same_folder_is_refused(small: Path, here: Path, compare: Compare) -> None:
    ended = compare(*SMALL, "--warmup", "0.5", "--out", str(small))
    assert ended.code == 2
    assert "--warmup 0.5: the comparison in" in ended.message
    assert "began with 0.1" in ended.message
    ended = compare(*SMALL, "--dense-lr", "0.5", "--out", str(small))
    assert "--dense-lr 0.5: the comparison in" in ended.message
    assert "began without it" in ended.message


def test_there_is_nothing_to_render_where_no_comparison_is(here: Path, compare: Compare) -> None:
    ended = compare("--render", "--out", "out")
    assert (ended.code, "holds no comparison" in ended.message) == (2, True)


def test_a_folder_that_holds_something_else_is_left_alone(here: Path, compare: Compare) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "notes.txt").write_text("keep me")
    ended = compare(*SMALL, "--out", "mine")
    assert ended.code == 2
    assert "holds no comparison" in ended.message
    assert [path.name for path in (here / "mine").iterdir()] == ["notes.txt"]


def test_the_same_command_finds_its_folder_again(here: Path, compare: Compare) -> None:
    few = [*SMALL, "--optimizers", "adamw", "--lr-grid", "x1"]
    assert compare(*few).code == 0
    assert compare(*few, "--seeds", "2").code == 0
    assert len(list((here / "runs").iterdir())) == 1


def test_factorised_weights_train_beside_the_others_and_pretrain_saves_them_merged(here: Path) -> None:
    without = SMALL[: SMALL.index("--optimizers")]
    assert exit_code("pretrain", *without, "--optimizer", "sltrain", "--out", "run") == 0
    model = AutoModelForCausalLM.from_pretrained(here / "run" / "model")
    assert {name.rpartition(".")[2] for name, _ in model.named_parameters()} == {"weight"}
    facts = summary(here / "run")
    assert facts["matrix_state_bytes"] == facts["formula_bytes"]


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize("optimizer", ["galore-ours", "muon", "sltrain", "relora"])
def test_a_rivals_run_resumes_exactly(here: Path, optimizer: str) -> None:
    from _lab import cut_before_step

    without = [*SMALL[: SMALL.index("--optimizers")], "--optimizer", optimizer, "--save-every", "4"]
    assert exit_code("pretrain", *without, "--out", "whole") == 0
    with cut_before_step(10):
        assert exit_code("pretrain", *without, "--out", "cut") == 130
    assert exit_code("pretrain", "--resume", "--out", "cut") == 0
    assert timeless(records(here / "cut")) == timeless(records(here / "whole"))


def test_a_store_forgets_what_was_interrupted_and_keeps_what_ended(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    jobs = [Job("a@0.25", 1e-3, seed, 5) for seed in range(3)]
    folders = [store.begin(job, tokens_per_step=10, shared_device=False) for job in jobs]
    record_failure(folders[0].path, "failed", "out of memory")
    record_failure(folders[1].path, "diverged", "loss is nan")
    assert set(store.outcomes()) == set(jobs[:2])
    (folders[2].path / "metrics.jsonl").write_text("half")
    assert store.begin(jobs[2], tokens_per_step=10, shared_device=False).read_metrics() == []
    assert store.forget_failures() == 1
    assert set(store.outcomes()) == {jobs[1]}


def test_a_damaged_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    folder = RunStore(tmp_path / "runs").begin(Job("adamw", 1e-3, 0, 5), tokens_per_step=10, shared_device=False)
    record_failure(folder.path, "failed", "out of memory")
    (folder.path / "job.json").write_text('{"contestant":')
    with pytest.raises(UserError, match=r"job\.json: cannot be read .* Remove its folder"):
        RunStore(tmp_path / "runs").outcomes()
    (tmp_path / "comparison.yaml").write_text(build_compare_config({}, {}, preset=None, config_file=None).to_yaml())
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(UserError, match=r"plan\.json: holds a list, not an object\. The command that made"):
        collect(ArenaFolder(tmp_path))


def test_slots_share_the_cores_of_a_machine_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert slots(1) == (Slot(None, None, 0),)
    assert slots(3) == tuple(Slot(None, 2, number) for number in range(3))


def test_slots_deal_the_gpus_out_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [slot.gpu for slot in slots(2)] == [0, 1, 0, 1]


@pytest.mark.parametrize(("outer", "seen"), [(None, "1"), ("5,7", "7")])
def test_a_worker_sees_its_gpu_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outer: str | None, seen: str
) -> None:
    if outer is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", outer)
    slot = Slot(1, None, 0)
    pool: ProcessPool[str] = ProcessPool([slot], [])
    pool.start("job", slot, os.system, f"printenv CUDA_VISIBLE_DEVICES > {tmp_path / 'seen'}")
    while pool.running:
        list(pool.ended(1.0))
    assert (tmp_path / "seen").read_text().strip() == seen
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == outer


def test_a_terminal_sees_the_whole_matrix_and_what_is_under_way_in_80_columns(tmp_path: Path) -> None:
    screen = StringIO()
    console = Console(force_terminal=True, width=80, file=screen, highlight=False)
    key = "lorapre-adamw-paper@0.03125"
    planner = Planner(key, (1e-3, 2e-3), False, (0,), 100, SEARCHES["quick"])
    store = RunStore(tmp_path)
    done, running = Job(key, 1e-3, 0, 25), Job(key, 2e-3, 0, 25)
    folder = store.begin(running, tokens_per_step=10, shared_device=False)
    with ArenaProgress(console, {key: planner}, store, 1) as progress:
        for job in (done, running):
            progress.started(job)
        progress._started[done] -= 50.0  # two seconds a step
        progress.ended(done, RunOutcome(done, "finished", "", {"valid_loss": 3.25}, (), 10, False))
        folder.metrics.write_text(json.dumps({"step": 17, "loss": 4.5, "seconds": 1}) + "\n" + '{"step": 1')
        progress.refresh([running])
        progress._live.refresh()  # type: ignore[union-attr]
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", text)]
    assert max(map(cell_len, lines)) <= 80
    assert any("lr 0.001 seed 0, 25 steps: loss 3.2500 (0:50)" in line for line in lines)
    # One of three runs is done; 125 of 150 steps are left.
    assert any(re.fullmatch(r"runs [━╸╺]+ 1/3 ETA 4:10", line) for line in lines), lines
    assert f"  {key} lr 0.002 seed 0: step 17/25 loss 4.500" in lines


def test_step_times_leave_out_the_warm_up_and_share_out_rare_work() -> None:
    begins, ends, now = [], [], 0.0
    for step in range(WARM_UP_STEPS + 10):
        length = 500.0 if step < WARM_UP_STEPS else (102.0 if step == WARM_UP_STEPS + 4 else 2.0)
        begins.append(now)
        ends.append(now + length)
        now += length + 8.0  # forward and backward
    found = summarise(begins, ends)
    assert found["optimizer_ms"] == pytest.approx((9 * 2.0 + 102.0) / 10)
    assert found["training_ms"] == pytest.approx(10.0 + 10.0)  # the median step, and 100 ms every ten steps


def test_too_few_steps_have_no_times() -> None:
    assert summarise([0.0] * 6, [1.0] * 6) == {"optimizer_ms": None, "training_ms": None}


def test_the_clock_of_a_gpu_keeps_few_events_and_stays_exact_over_a_long_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now, alive, most = 0.0, 0, 0

    class Event:
        """Torch's, on a GPU whose every operation takes 3.125 ms; a difference is float32, as CUDA's is."""

        def __init__(self, enable_timing: bool) -> None:
            nonlocal alive, most
            assert enable_timing
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

        def record(self) -> None:
            nonlocal now
            now += 3.125
            self.at = now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return torch.tensor(other.at - self.at, dtype=torch.float32).item()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    gpu = timing._CudaClock()
    marks = 3 * timing._CudaClock.KEPT + 5
    for _ in range(marks):
        gpu.mark()
    assert gpu.milliseconds() == [3.125 * number for number in range(marks)]
    assert gpu.milliseconds() == [3.125 * number for number in range(marks)]  # reading does not add to them
    assert most <= timing._CudaClock.KEPT + 1
    assert timing._CudaClock().milliseconds() == []
