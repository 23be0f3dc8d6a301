"""What a run leaves behind, and that its figures are true."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
from datetime import datetime, timedelta, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from _lab import FINISHED, TINY, Cli, losses, optimizer_steps, options, records, sentences, summary, timeless
from matplotlib.axes import Axes
from matplotlib.image import imread
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorapre.lab.config import PretrainConfig, build_config
from lorapre.lab.plots import COLOURS, plot_loss
from lorapre.lab.run_folder import RunFolder, write_atomically

MAIN, TWIN = ".", "compare-adamw"
# Of TINY, with a vocabulary of 300: (p, q) of every matrix, and the numbers kept dense.
MATRICES = 2 * ([(32, 32)] * 4 + [(64, 32)] * 2 + [(32, 64)])
DENSE = [300 * 32, 300 * 32, *[32] * 5]
TENSORS = len(MATRICES) + len(DENSE)


@pytest.fixture(scope="module")
def run(finished: tuple[Path, str]) -> Path:
    return finished[0]


@pytest.mark.parametrize("part", [MAIN, TWIN])
def test_a_run_has_the_files_that_it_promises_and_no_others(run: Path, part: str) -> None:
    expected = {"config.yaml", "provenance.json", "metrics.jsonl", "checkpoints", "model", "loss.png", "summary.json"}
    assert {path.name for path in (run / part).iterdir()} == expected | ({TWIN} if part == MAIN else set())


@pytest.mark.parametrize(("part", "optimizer"), [(MAIN, "lorapre-adamw"), (TWIN, "adamw")])
def test_its_config_loads_back_equal_and_begins_the_same_run(run: Path, lab: Path, part: str, optimizer: str) -> None:
    expected = PretrainConfig(
        model=str(lab / "tiny.json"),
        data=[str(lab / "text.txt")],
        valid_data=[str(lab / "valid.txt")],
        **FINISHED,
        optimizer=optimizer,
        compare=["adamw"] if part == MAIN else [],
    )
    path = run / part / "config.yaml"
    assert PretrainConfig.model_validate(yaml.safe_load(path.read_text())) == expected
    assert build_config({}, config_file=path) == expected


@pytest.mark.parametrize("part", [MAIN, TWIN])
def test_its_model_loads_by_transformers_and_has_the_validation_loss_of_its_summary(
    run: Path, lab: Path, part: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / part / "model")
    model = AutoModelForCausalLM.from_pretrained(run / part / "model").eval()
    # The held-out blocks, made anew: documents with their ends, in a row, cut every 16 tokens.
    assert (lab / "valid.txt").read_text().split("\n<|endoftext|>\n")[:-1] == sentences(4, seed=1)
    ids: list[int] = []
    for document in sentences(4, seed=1):
        ids += [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
    blocks = torch.tensor(ids[: len(ids) // 16 * 16]).reshape(-1, 16)
    assert len(blocks) > 10
    assert len(blocks) % 4  # the last batch is not a full one
    with torch.no_grad():
        logits = model(blocks).logits.double()
    wanted = blocks[:, 1:, None]
    nats = logits[:, :-1].logsumexp(-1) - logits[:, :-1].gather(-1, wanted)[..., 0]
    facts = summary(run / part)
    assert nats.mean().item() == pytest.approx(facts["valid_loss"], abs=1e-5)
    assert facts["valid_perplexity"] == pytest.approx(np.exp(facts["valid_loss"]))
    assert records(run / part)[-1]["valid_loss"] == facts["valid_loss"]


def test_its_first_loss_is_that_of_fresh_weights(run: Path) -> None:
    # Fresh weights of standard deviation 0.02 know nothing: the loss is that of guessing.
    assert losses(run)[0] == pytest.approx(np.log(300), abs=0.05)
    assert losses(run)[-1] < losses(run)[0] - 1


@pytest.mark.parametrize("part", [MAIN, TWIN])
def test_metrics_hold_every_step_in_order_with_its_tokens(run: Path, part: str) -> None:
    lines = records(run / part)
    training = [line for line in lines if "loss" in line]
    validation = [line for line in lines if "valid_loss" in line]
    assert [line["step"] for line in training] == list(range(1, 51))
    assert [line["step"] for line in validation] == [20, 40, 50]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    for line in lines:
        assert line["tokens"] == line["step"] * 8 * 16
        assert line["seconds"] >= 0
    for line in training:
        assert set(line) == {
            "step", "tokens", "loss", "perplexity", "lr", "grad_norm", "tokens_per_second", "seconds",
        }  # fmt: skip
        assert line["perplexity"] == pytest.approx(np.exp(line["loss"]))
        assert line["tokens_per_second"] > 0
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("part", [MAIN, TWIN])
def test_the_summary_says_what_was_trained(run: Path, lab: Path, part: str) -> None:
    facts = summary(run / part)
    assert facts["optimizer"] == ("lorapre-adamw" if part == MAIN else "adamw")
    assert facts["model"] == str(lab / "tiny.json")
    assert facts["parameters"] == sum(p * q for p, q in MATRICES) + sum(DENSE)
    assert facts["steps"] == 50
    assert facts["tokens"] == 50 * 8 * 16
    assert facts["rank"] == (0.25 if part == MAIN else None)
    assert "text.txt (60 documents" in facts["data"]
    assert "validated on valid.txt" in facts["data"]
    assert facts["tokens_per_second"] == pytest.approx(facts["tokens"] / facts["seconds"], rel=0.2)
    assert facts["bigram_perplexity"] == pytest.approx(np.exp(facts["bigram_loss"]))
    assert facts["peak_bytes"] > 4 * facts["parameters"]


@pytest.mark.parametrize("part", [MAIN, TWIN])
def test_bytes_of_state_equal_the_formula(run: Path, part: str) -> None:
    # A quarter of the smaller side: rank 8 for all of them. In float32 m's factors, v's row and column; a counter.
    factored = sum((p + q) * (8 + 1) * 4 for p, q in MATRICES)
    dense = sum(2 * numel * 4 for numel in DENSE)
    adamw = sum(2 * p * q * 4 for p, q in MATRICES) + dense + 4 * TENSORS
    facts = summary(run / part)
    assert facts["state_bytes"] == (factored + dense + 4 * TENSORS if part == MAIN else adamw)
    assert facts["adamw_state_bytes"] == adamw


@pytest.mark.parametrize(
    ("arguments", "ranks"),
    [
        (["--rank", "5", "--set", "second_moment=hadamard"], 5 + 5),
        (["--rank", "5", "--set", "second_moment=hadamard", "--set", "second_moment_rank=2"], 5 + 2),
        (["--rank", "5", "--set", "second_moment=rank1"], 5 + 1),
        (["--optimizer", "lorapre-adamw-paper"], 8 + 8),
    ],
)
def test_bytes_of_state_follow_rank_and_options_and_equal_what_the_dry_run_announces(
    pretrain: Cli, tiny: list[str], here: Path, arguments: list[str], ranks: int
) -> None:
    announced = pretrain(*tiny, *arguments, "--dry-run").out
    assert pretrain(*tiny, *arguments, "--out", "run").code == 0
    expected = sum((p + q) * ranks * 4 for p, q in MATRICES) + sum(2 * n * 4 for n in DENSE) + 4 * TENSORS
    assert summary(here / "run")["state_bytes"] == expected
    assert f"{expected / 1000:.2f} kB" in announced


@pytest.mark.parametrize("part", [MAIN, TWIN])
def test_provenance_names_hardware_versions_date_and_seed(run: Path, part: str) -> None:
    facts = json.loads((run / part / "provenance.json").read_text())
    date = datetime.fromisoformat(facts["date"])
    assert date.utcoffset() == timedelta(0)
    assert timedelta(0) <= datetime.now(timezone.utc) - date < timedelta(hours=1)
    assert facts["seed"] == 3
    assert facts["versions"]["python"] == platform.python_version()
    for package in ("lorapre", "torch", "transformers", "accelerate", "tokenizers"):
        assert facts["versions"][package] == version(package)
    cores = re.fullmatch(r".{3,}, (\d+) cores", facts["hardware"])
    assert torch.cuda.is_available() or (cores is not None and int(cores[1]) == os.cpu_count())
    assert facts["data"]["train_tokens"] % 16 == facts["data"]["valid_tokens"] % 16 == 0


def test_the_name_of_the_host_is_in_no_file(
    pretrain: Cli, tiny: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "host-that-must-not-leak"
    uname = os.uname()
    monkeypatch.setattr(socket, "gethostname", lambda: secret)
    monkeypatch.setattr(socket, "getfqdn", lambda *_: secret)
    monkeypatch.setattr(platform, "node", lambda: secret)
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((uname[0], secret, *uname[2:])))
    assert pretrain(*tiny, "--out", "run").code == 0
    files = [path for path in (here / "run").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if secret.encode() in path.read_bytes()] == []


def test_the_real_name_of_the_host_is_in_no_text_file(run: Path) -> None:
    name = re.compile(rf"(?<![\w-]){re.escape(socket.gethostname())}(?![\w-])")
    texts = [path for path in run.rglob("*") if path.suffix in (".json", ".jsonl", ".yaml", ".txt", ".md")]
    assert len(texts) > 10
    assert [path for path in texts if name.search(path.read_text().replace(str(run.parent), ""))] == []


def colours(path: Path) -> set[str]:
    pixels = (imread(path)[..., :3] * 255).round().astype(np.uint8).reshape(-1, 3)
    return {"#{:02X}{:02X}{:02X}".format(*pixel) for pixel in np.unique(pixels, axis=0)}


def test_the_figure_shows_the_run_and_its_twin(run: Path) -> None:
    for part in (MAIN, TWIN):
        path = run / part / "loss.png"
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert path.stat().st_size > 10_000
        height, width = imread(path).shape[:2]
        assert width >= 800
        assert height >= 500
    assert {COLOURS[0], COLOURS[1]} <= colours(run / MAIN / "loss.png")
    assert COLOURS[0] in colours(run / TWIN / "loss.png")
    assert COLOURS[1] not in colours(run / TWIN / "loss.png")


def test_the_figure_draws_as_many_runs_as_there_are_under_any_title(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, tuple[str, str]] = {}
    draw = Axes.plot

    def record(self: Axes, *points: Any, **kwargs: Any) -> Any:
        drawn[kwargs["label"]] = (kwargs["color"], kwargs["linestyle"])
        return draw(self, *points, **kwargs)

    monkeypatch.setattr(Axes, "plot", record)
    runs: dict[str, Any] = {f"run {number}": [{"tokens": 100, "loss": 2.0}] for number in range(10)}
    plot_loss(tmp_path / "loss.png", runs, bigram=1.0, title="llama-3m on a$_$.txt")
    assert list(drawn) == [f"{name}, training" for name in runs]
    assert len(set(drawn.values())) == 10


@pytest.mark.parametrize("part", [MAIN, TWIN])
def test_only_the_last_checkpoints_are_kept_each_complete(run: Path, part: str) -> None:
    kept = sorted(path.name for path in (run / part / "checkpoints").iterdir())
    assert kept == ["checkpoint-45", "checkpoint-50"]
    assert all((run / part / "checkpoints" / name / "complete").exists() for name in kept)


def test_more_checkpoints_are_kept_where_asked(pretrain: Cli, tiny: list[str], here: Path) -> None:
    arguments = options(save_every=1, keep_checkpoints=3, out="run")
    assert pretrain(*tiny, *arguments).code == 0
    kept = sorted(path.name for path in (here / "run" / "checkpoints").iterdir())
    assert kept == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_the_twin_starts_from_the_same_weights_and_sees_the_same_data(run: Path) -> None:
    main, twin = records(run / MAIN), records(run / TWIN)
    # The first loss is of the same weights on the same batch, with the same dropout; so is the gradient.
    assert main[0]["loss"] == twin[0]["loss"]
    assert main[0]["grad_norm"] == twin[0]["grad_norm"]
    assert main[10]["loss"] != twin[10]["loss"]
    assert [line["step"] for line in main] == [line["step"] for line in twin]


def test_the_twin_is_the_run_that_its_optimizer_alone_would_be(pretrain: Cli, tiny: list[str], here: Path) -> None:
    assert pretrain(*tiny, "--compare", "adamw", "--out", "both").code == 0
    with optimizer_steps() as taken:
        assert pretrain(*tiny, "--optimizer", "adamw", "--out", "alone").code == 0
    assert {type(optimizer) for optimizer in taken} == {torch.optim.AdamW}
    assert timeless(records(here / "both" / TWIN)) == timeless(records(here / "alone"))


def test_both_are_in_the_summary(run: Path) -> None:
    both = summary(run)
    assert both["compare"] == {"adamw": summary(run / TWIN)}
    assert both["optimizer"] == "lorapre-adamw"
    assert both["bigram_loss"] == both["compare"]["adamw"]["bigram_loss"]
    assert TINY["vocab_size"] == 300


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def half(temporary: Path) -> None:
        temporary.write_text("ha")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_atomically(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]

    def folder(temporary: Path) -> None:
        temporary.mkdir()
        (temporary / "x").write_text("new")

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "stale").write_text("old")
    write_atomically(tmp_path / "model", folder)
    assert [entry.name for entry in (tmp_path / "model").iterdir()] == ["x"]


def test_the_newest_complete_checkpoint_is_that_of_the_highest_step(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.last_checkpoint() is None
    for step in (9, 10, 100, 1000):
        (folder.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
        if step < 1000:
            (folder.checkpoints / f"checkpoint-{step}" / "complete").touch()
    last: Any = folder.last_checkpoint()
    assert last.name == "checkpoint-100"
    assert not (folder.checkpoints / "checkpoint-1000").exists()
