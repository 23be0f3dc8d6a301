"""``lorapre pretrain --diagnose N``: its rows, its figure, and that nothing else of the run depends on it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from _lab import Cli, assert_same_run, cut_before_step, options
from matplotlib.axes import Axes
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lorapre.diagnostics import MomentumRecord
from lorapre.lab import diagnose

RUN = options(
    model="tiny.json",
    data="text.txt",
    tokenizer="bpe:300",
    batch_size=8,
    accumulation=2,
    sequence_length=16,
    steps=14,
    log_every=1,
    save_every=5,
    rank=4,
)
#: The shapes of the tiny model's matrices, and the first of each in `param_groups`' order.
WATCHED = {
    "model.layers.0.self_attn.q_proj.weight": [32, 32],
    "model.layers.0.mlp.gate_proj.weight": [64, 32],
    "model.layers.0.mlp.down_proj.weight": [32, 64],
}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "diagnostics.jsonl").read_text().splitlines()]


@pytest.fixture
def run(pretrain: Cli, here: Path) -> Callable[..., Path]:
    """Trains into a folder of that name and returns it."""

    def train(out: str, *arguments: str) -> Path:
        outcome = pretrain(*RUN, *arguments, "--out", out)
        assert outcome.code == 0, outcome.err
        return here / out

    return train


def test_there_is_a_row_for_each_shape_and_measured_step_and_the_training_is_that_without_it(
    run: Callable[..., Path],
) -> None:
    watched = run("watched", "--diagnose", "3")
    found = rows(watched)
    assert [(row["step"], row["name"]) for row in found] == [(s, name) for s in (3, 6, 9, 12) for name in WATCHED]
    for row in found:
        assert list(row) == list(MomentumRecord.__dataclass_fields__)
        assert (row["shape"], row["rank"]) == (WATCHED[row["name"]], 4)
        assert all(math.isfinite(value) for key, value in row.items() if key not in ("name", "shape"))
        assert 0 < row["best_error"] <= row["ema_error"]
    plain = run("plain")
    assert_same_run(watched, plain)
    assert not list(plain.rglob("diagnostics*"))


def test_the_rows_are_measured_against_the_gradients_that_the_optimizer_got(run: Callable[..., Path]) -> None:
    """The tail of the dense momentum's spectrum, followed here from the clipped and accumulated gradients."""
    name, momentum = next(iter(WATCHED)), np.zeros((32, 32))
    expected = []

    def follow(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        group = next(group for group in optimizer.param_groups if name in group["param_names"])
        grad = group["params"][group["param_names"].index(name)].grad
        momentum[:] = 0.9 * momentum + 0.1 * np.array(grad.double())
        singular = np.linalg.svd(momentum, compute_uv=False)
        expected.append(float(np.linalg.norm(singular[4:]) / np.linalg.norm(singular)))

    handle = register_optimizer_step_pre_hook(follow)
    try:
        folder = run("run", "--diagnose", "1")
    finally:
        handle.remove()
    found = [row["best_error"] for row in rows(folder) if row["name"] == name]
    assert len(found) == 14
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize("cut", [4, 9, 13])
def test_a_run_cut_anywhere_and_resumed_writes_the_rows_of_the_run_left_alone(
    run: Callable[..., Path], pretrain: Cli, here: Path, cut: int
) -> None:
    alone = run("alone", "--diagnose", "2")
    with cut_before_step(cut):
        assert pretrain(*RUN, "--diagnose", "2", "--out", "run").code == 130
    written = here / "run" / "diagnostics.jsonl"
    assert [row["step"] for row in rows(here / "run")][-1] == (cut - 1) // 2 * 2
    written.write_text(written.read_text()[:-30])  # a last line that was cut short
    assert pretrain("--resume", "--out", "run").code == 0
    assert written.read_bytes() == (alone / "diagnostics.jsonl").read_bytes()
    assert_same_run(here / "run", alone)


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize("optimizer", ["lorapre-muon", "lorapre-sgd", "lorapre-lion"])
def test_the_other_optimizers_are_watched_too_and_resume_as_if_left_alone(
    run: Callable[..., Path], pretrain: Cli, here: Path, optimizer: str
) -> None:
    given = ["--optimizer", optimizer, "--diagnose", "3"]
    alone = run("alone", *given)
    assert [(row["step"], row["name"]) for row in rows(alone)] == [(s, n) for s in (3, 6, 9, 12) for n in WATCHED]
    assert all(0 < row["best_error"] <= row["ema_error"] < 1 for row in rows(alone))
    with cut_before_step(9):
        assert pretrain(*RUN, *given, "--out", "run").code == 130
    assert pretrain("--resume", "--out", "run").code == 0
    assert (here / "run" / "diagnostics.jsonl").read_bytes() == (alone / "diagnostics.jsonl").read_bytes()
    assert_same_run(here / "run", alone)


@pytest.mark.usefixtures("sketched")
def test_room_is_made_for_the_dense_momenta_of_every_checkpoint(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(diagnose.RunFolder, "check_space", lambda _, needed: asked.append(needed))
    folder = run("watched", "--diagnose", "7", "--compare", "adamw", "--compare", "lorapre-muon")
    run("plain", "--compare", "adamw", "--compare", "lorapre-muon")
    checkpoints = list((folder / "checkpoints").iterdir())
    assert len(checkpoints) == 2
    saved = [torch.load(path / diagnose.STATE_FILE, weights_only=True)["ema"] for path in checkpoints]
    held = [sum(momentum.nbytes for momentum in momenta.values()) for momenta in saved]
    assert len({*held}) == 1
    assert asked[0] - asked[1] == 2 * (2 + 1) * held[0]  # two runs have factors; two checkpoints and a third on its way


def test_a_run_killed_after_its_last_step_keeps_its_rows_and_is_drawn(run: Callable[..., Path], pretrain: Cli) -> None:
    folder = run("run", "--diagnose", "7", "--save-every", "7")
    before = (folder / "diagnostics.jsonl").read_bytes()
    (folder / "summary.json").unlink()
    (folder / "diagnostics.png").unlink()
    assert pretrain("--resume", "--out", "run").code == 0
    assert (folder / "diagnostics.jsonl").read_bytes() == before
    assert (folder / "diagnostics.png").exists()


@pytest.mark.usefixtures("sketched")
def test_a_checkpoint_without_the_dense_momenta_is_not_resumed_from(
    run: Callable[..., Path], pretrain: Cli, here: Path
) -> None:
    with cut_before_step(8):
        pretrain(*RUN, "--out", "run")
    config = here / "run" / "config.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"diagnose": 2}))
    outcome = pretrain("--resume", "--out", "run")
    assert outcome.code == 2
    assert all(word in outcome.message for word in ("--diagnose 2", "checkpoint-5", "diagnose: null")), outcome.message


@pytest.mark.usefixtures("sketched")
def test_damaged_dense_momenta_are_named_with_their_checkpoint(pretrain: Cli, here: Path) -> None:
    with cut_before_step(8):
        pretrain(*RUN, "--diagnose", "2", "--out", "run")
    state = here / "run" / "checkpoints" / "checkpoint-5" / "diagnostics.pt"
    state.write_bytes(state.read_bytes()[:200])
    outcome = pretrain("--resume", "--out", "run")
    assert outcome.code == 2
    assert all(word in outcome.message for word in ("checkpoint-5", "cannot be read", "Remove")), outcome.message


def test_resuming_with_another_interval_is_refused(pretrain: Cli, here: Path) -> None:
    with cut_before_step(3):
        pretrain(*RUN, "--diagnose", "2", "--out", "run")
    outcome = pretrain("--resume", "--out", "run", "--diagnose", "3")
    assert outcome.code == 2
    assert "--diagnose 3" in outcome.message
    assert "began with 2" in outcome.message


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize("off", [[], ["--diagnose", "0"]])
def test_it_is_off_by_default_and_at_0(run: Callable[..., Path], off: list[str]) -> None:
    folder = run("run", *off, "--optimizer", "adamw", "--steps", "2")
    assert not list(folder.rglob("diagnostics*"))


@pytest.mark.parametrize("optimizer", ["adamw", "galore-ours", "lora"])
def test_an_optimizer_without_factors_is_refused_before_anything_is_written(
    pretrain: Cli, here: Path, optimizer: str
) -> None:
    outcome = pretrain(*RUN, "--optimizer", optimizer, "--diagnose", "5", "--out", "run")
    assert outcome.code == 2
    words = (
        "--diagnose 5",
        f"--optimizer {optimizer}",
        "Leave it out",
        "lorapre-adamw, lorapre-adamw-paper, lorapre-m",
    )
    assert all(word in outcome.message for word in words), outcome.message
    assert not (here / "run").exists()
    announced = pretrain(*RUN, "--optimizer", optimizer, "--diagnose", "5", "--dry-run")
    assert (announced.code, announced.message) == (2, outcome.message)


@pytest.mark.parametrize(
    ("value", "word"), [("-1", "greater than or equal to 0"), ("15", "more than the run's 14 steps")]
)
def test_an_interval_that_measures_nothing_is_refused(pretrain: Cli, here: Path, value: str, word: str) -> None:
    outcome = pretrain(*RUN, "--diagnose", value, "--out", "run")
    assert outcome.code == 2
    assert f"--diagnose {value}" in outcome.message
    assert word in outcome.message
    assert not (here / "run").exists()


@pytest.mark.usefixtures("sketched")
def test_of_the_twins_those_with_factors_are_watched_too(run: Callable[..., Path]) -> None:
    folder = run("run", "--diagnose", "7", "--compare", "adamw", "--compare", "lorapre-adamw-paper")
    ours, other = folder / "compare-lorapre-adamw-paper", folder / "compare-adamw"
    assert [row["step"] for row in rows(ours)] == [row["step"] for row in rows(folder)]
    assert rows(ours) != rows(folder)
    assert not list(other.glob("diagnostics*"))
    recorded = [yaml.safe_load((part / "config.yaml").read_text())["diagnose"] for part in (folder, ours, other)]
    assert recorded == [7, 7, None]


def test_the_figure_draws_every_field_of_every_shape_and_leaves_gaps_where_there_is_no_number(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = diagnose.RunFolder(here)
    figures = ["ema_error", "best_error", "ema_cosine", "outside", "drift", "condition_m_A", "condition_product"]
    figures += ["update_rms", "update_max", "update_norm"]
    lines = [
        {"step": step, "name": f"matrix {shape}", "shape": shape, "rank": 4, **dict.fromkeys(figures, 0.1 * step)}
        for step in (2, 4, 6)
        for shape in ([8, 16], [3, 8, 8])
    ]
    lines[2] |= {"condition_m_A": None, "update_max": None, "drift": 1e-16, "outside": 0.0}
    (here / "diagnostics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn: list[tuple[str, list[float]]] = []
    draw = Axes.plot

    def record(self: Axes, steps: Any, values: Any, *rest: Any, **kwargs: Any) -> Any:
        assert list(steps) == [2, 4, 6]
        drawn.append((kwargs["color"], list(values)))
        return draw(self, steps, values, *rest, **kwargs)

    monkeypatch.setattr(Axes, "plot", record)
    diagnose.plot_diagnostics(folder, "a title")
    fields = [field for _, _, panel in diagnose.PANELS for field, _ in panel]
    assert set(fields) == set(figures) - {"ema_cosine"}
    assert len(drawn) == 2 * len(fields)
    assert len({colour for colour, _ in drawn}) == 2
    gaps = {field for field, (_, values) in zip(fields, drawn[::2], strict=True) if math.isnan(values[1])}
    assert gaps == {"condition_m_A", "update_max", "drift"}
    with Image.open(here / "diagnostics.png") as image:
        assert image.size[0] > 1200
