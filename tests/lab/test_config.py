"""Options: defaults < preset < YAML < command line, and the presets' numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lorapre.lab.config import PRESETS, PretrainConfig, build_config
from lorapre.lab.errors import UserError


@pytest.fixture
def options_file(tmp_path: Path) -> Path:
    path = tmp_path / "options.yaml"
    path.write_text("seed: 7\nbatch_size: 64\nbeta1: 0.8\n")
    return path


def test_each_layer_wins_over_the_one_before_and_leaves_the_rest(options_file: Path) -> None:
    default = PretrainConfig()
    preset = build_config({}, preset="galore-130m")
    file = build_config({}, preset="galore-130m", config_file=options_file)
    line = build_config({"batch_size": 32}, preset="galore-130m", config_file=options_file)
    assert [config.model for config in (default, preset, file, line)] == ["llama-3m", *["llama-130m"] * 3]
    assert [config.batch_size for config in (preset, file, line)] == [512, 64, 32]
    assert default.batch_size not in (512, 64, 32)
    assert [config.seed for config in (default, preset, file, line)] == [0, 0, 7, 7]
    assert [config.beta1 for config in (default, preset, file, line)] == [0.9, 0.9, 0.8, 0.8]
    assert {config.rank for config in (preset, file, line)} == {256}
    untouched = set(PretrainConfig.model_fields) - set(PRESETS["galore-130m"]) - {"seed", "batch_size", "beta1"}
    assert "beta2" in untouched
    for name in untouched:
        assert getattr(line, name) == getattr(default, name), name


@pytest.mark.parametrize(
    ("preset", "file", "line", "expected"),
    [
        ("galore-60m", None, {"steps": 10}, (10, None)),
        ("galore-60m", "steps: 20", {}, (20, None)),
        ("galore-60m", "steps: 20", {"tokens": 2_000_000}, (None, 2_000_000)),
        ("galore-60m", "tokens: 3000000", {}, (None, 3_000_000)),
        (None, "tokens: 3000000", {"steps": 5}, (5, None)),
        (None, "steps: 20", {"steps": 30}, (30, None)),
        # A run's config.yaml names both, one of them empty.
        (None, "steps: 20\ntokens: null", {"tokens": 2_000_000}, (None, 2_000_000)),
        ("galore-60m", "steps: 20\ntokens: null", {}, (20, None)),
    ],
)
def test_steps_replace_the_tokens_of_an_earlier_layer_and_the_other_way_round(
    tmp_path: Path, preset: str | None, file: str | None, line: dict[str, Any], expected: tuple[int | None, int | None]
) -> None:
    path = tmp_path / "options.yaml"
    if file is not None:
        path.write_text(file)
    config = build_config(line, preset=preset, config_file=None if file is None else path)
    assert (config.steps, config.tokens) == expected


def test_another_optimizer_leaves_the_options_of_the_first_behind(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: lorapre-adamw\noptions: {second_moment: full}\n")
    assert build_config({}, config_file=path).options == {"second_moment": "full"}
    assert build_config({"options": {"eps": 1.0}}, config_file=path).options == {"second_moment": "full", "eps": 1.0}
    other = {"optimizer": "lorapre-muon"}
    assert build_config(other, config_file=path).options == {}
    assert build_config(other | {"options": {"eps": 1.0}}, config_file=path).options == {"eps": 1.0}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"valid_fraction": 0.1, "valid_data": ["v.txt"]}, "--valid-fraction 0.1.*--valid-data v.txt.*Leave it out"),
        ({"valid_fraction": 0.05, "data": ["hf"]}, "--valid-fraction 0.05.*--data hf:allenai/c4:en"),
        ({"min_lr_ratio": 0.0, "schedule": "constant"}, "--min-lr-ratio 0.0.*cosine or linear"),
    ],
)
def test_an_option_that_nothing_reads_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_config(options)


def test_steps_and_tokens_in_one_layer_exclude_each_other() -> None:
    with pytest.raises(UserError, match="--steps 5 and --tokens 100000 exclude each other"):
        build_config({"steps": 5, "tokens": 100_000})


def test_steps_follow_from_tokens_rounded_down() -> None:
    config = PretrainConfig(tokens=10_000, batch_size=4, sequence_length=100)
    assert config.total_steps == 25
    assert PretrainConfig(tokens=10_399, batch_size=4, sequence_length=100).total_steps == 25
    assert PretrainConfig(steps=12).total_steps == 12


# shared/algorithm.md, section 4.
PAPER = [
    ("galore-60m", "llama-60m", 1_100_000_000, 128),
    ("galore-130m", "llama-130m", 2_200_000_000, 256),
    ("galore-350m", "llama-350m", 6_400_000_000, 256),
    ("galore-1b", "llama-1b", 13_100_000_000, 512),
]


@pytest.mark.parametrize(("preset", "model", "tokens", "rank"), PAPER)
def test_the_presets_hold_the_papers_protocol(preset: str, model: str, tokens: int, rank: int) -> None:
    config = build_config({}, preset=preset)
    assert config.model == model
    assert config.tokens == tokens
    assert config.rank == rank
    assert isinstance(config.rank, int)
    assert config.data == ["hf:allenai/c4:en"]
    assert config.tokenizer == "t5-base"
    assert (config.batch_size, config.sequence_length) == (512, 256)
    assert (config.schedule, config.warmup, config.min_lr_ratio) == ("cosine", 0.1, 0.1)
    assert (config.beta1, config.beta2, config.weight_decay) == (0.9, 0.95, 0.0)
    assert config.optimizer == "lorapre-adamw-paper"
    assert config.total_steps == tokens // (512 * 256)


def test_there_is_no_other_preset() -> None:
    assert set(PRESETS) == {name for name, *_ in PAPER}


@pytest.mark.parametrize(("text", "rank"), [("1/4", 0.25), ("'1/32'", 1 / 32), ("'16'", 16), ("16", 16), ("0.1", 0.1)])
def test_a_rank_in_a_file_is_written_as_on_the_command_line(tmp_path: Path, text: str, rank: float) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(f"rank: {text}\n")
    config = build_config({}, config_file=path)
    assert config.rank == rank
    assert type(config.rank) is type(rank)


@pytest.mark.parametrize("text", ["5/4", "1/0", "quarter", "'0'", "true", "1.5"])
def test_what_is_no_rank_in_a_file_is_refused_with_examples(tmp_path: Path, text: str) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(f"rank: {text}\n")
    with pytest.raises(UserError, match=r"^--rank .*integer >= 1, or a f.*0\.25"):
        build_config({}, config_file=path)


def test_hf_alone_is_c4() -> None:
    assert build_config({"data": ["hf"]}).data == ["hf:allenai/c4:en"]
    assert build_config({"data": ["hf:a/b"]}).data == ["hf:a/b"]


EXTREMES: list[dict[str, Any]] = [
    {},
    {"rank": 7, "steps": 9, "compare": ["adamw"], "valid_tokens": None},
    {"rank": 0.1, "lr": 1e-5, "dense_lr": 1e-12, "tokens": 123_456_789, "data": ["a b.txt", "c: d.txt", "# e"]},
    {"weight_decay": 0.1 + 0.2, "bf16": True, "seed": 2**32 - 1, "model": "yes", "tokenizer": "1e3"},
]


@pytest.mark.parametrize("options", EXTREMES)
def test_a_config_written_as_yaml_reads_back_equal(tmp_path: Path, options: dict[str, Any]) -> None:
    config = build_config(options)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert build_config({}, config_file=path) == config
    assert type(build_config({}, config_file=path).rank) is type(config.rank)
    assert list(yaml.safe_load(path.read_text())) == list(PretrainConfig.model_fields)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 99, 100, 101, 333, 600, 12_345])
def test_checkpoints_fall_on_records_of_the_loss(steps: int) -> None:
    config = PretrainConfig(steps=steps)
    assert config.save_interval % config.log_interval == 0
    assert config.log_interval >= 1
    assert config.eval_interval >= 1
    # About a hundred records and five checkpoints, where there are as many steps.
    assert steps / config.log_interval <= 200
    assert steps < 100 or steps / config.log_interval >= 100
    assert steps < 10 or 5 <= steps / config.save_interval <= 10
