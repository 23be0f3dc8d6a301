"""Options of an optimizer set from the lab: which there are, how they are read and written, what they reach, refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from _lab import Cli, exit_code, optimizer_steps, options, summary
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorapre import LoRAPreAdamW
from lorapre.lab.compare.collect import collect
from lorapre.lab.compare.contestants import parse_contestants, split_names
from lorapre.lab.compare.facts import label
from lorapre.lab.compare.folder import ArenaFolder
from lorapre.lab.compare.page import render_page
from lorapre.lab.compare.tables import markdown
from lorapre.lab.config import PretrainConfig, build_config, parse_options
from lorapre.lab.errors import UserError
from lorapre.lab.optimizers import OPTIMIZERS, check_options, matrix_state_bytes
from lorapre.lab.optimizers.measure import state_bytes
from lorapre.lab.optimizers.options import OWNED, Option, options_of
from lorapre.optim.adamw import PAPER_PRESET

OLD_PLAN = Path(__file__).parents[2] / "benchmarks" / "results" / "arena-20m"
OURS = OPTIMIZERS["lorapre-adamw"]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=100,
                hidden_size=64,
                intermediate_size=160,
                num_hidden_layers=2,
                num_attention_heads=2,
            )
        )


class Later(torch.optim.SGD):
    """An optimizer that has been given more keywords than the lab knows of."""

    def __init__(
        self, params: Any, lr: float, *, gain: float | None = 1.0, kind: Literal["a", "b"] = "a", **rest: Any
    ) -> None:
        super().__init__(params, lr, **rest)


# Which there are, and how they are read.


def test_the_options_are_the_keywords_of_the_class_without_those_that_the_lab_sets() -> None:
    assert set(options_of(Later)) == {"gain", "kind"}
    assert set(options_of(Later, owned={**OWNED, "gain": "--gain sets it"})) == {"kind"}
    names = {"eps", "damping", "damping_mode", "bias_correction", "second_moment", "scale", "state_dtype"}
    names |= {"update_clipping", "spectral_clipping", "stochastic_rounding"}
    for entry in (OURS, OPTIMIZERS["lorapre-adamw-paper"]):
        assert names <= set(entry.options)
        assert not set(entry.options) & set(OWNED)
    assert [name for name, entry in OPTIMIZERS.items() if name == "adamw" and entry.options] == []


def test_defaults_are_the_presets_where_there_is_one() -> None:
    paper = OPTIMIZERS["lorapre-adamw-paper"].options
    for name in paper:
        assert paper[name].default == PAPER_PRESET.get(name, OURS.options[name].default), name
    assert (paper["scale"].default, OURS.options["scale"].default) == (0.25, 1.0)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (float, "1", 1.0),
        (float, "1e-6", 1e-6),  # text to YAML 1.1
        (float | None, "null", None),
        (int | float | None, "4", 4),
        (int | float | None, "0.25", 0.25),
        (int | float | None, "1/4", 0.25),
        (bool, "true", True),
        (Literal["subspace", "1e-6"], "subspace", "subspace"),
        (Literal["subspace", "1e-6"], "1e-6", "1e-6"),
        (tuple[float, float], "[0.9,0.95]", (0.9, 0.95)),
        (torch.dtype | None, "bfloat16", torch.bfloat16),
    ],
)
def test_a_value_is_read_as_yaml_and_taken_as_its_keyword_wants_it(kind: Any, text: str, value: Any) -> None:
    read = Option(kind, None).read(parse_options([f"x={text}"])["x"])
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (float, "true", "number"),
        (float, "much", "number"),
        (float, ".nan", "finite"),
        (float, ".inf", "finite"),
        (bool, "1", "boolean"),
        (Literal["a", "b"], "c", "'a' or 'b'"),
        (torch.dtype | None, "sin", "torch.dtype"),
        (int | float | None, "[1]", "a valid integer or a valid number or null"),
        (float, "1/0", "number"),
    ],
)
def test_a_value_of_another_type_is_refused(kind: Any, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^must be") as refused:
        Option(kind, None).read(parse_options([f"x={text}"])["x"])
    assert message in str(refused.value)


def test_layers_set_options_one_by_one(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("options: {scale: 0.5, eps: 1e-6}\n")
    config = build_config({"options": {"eps": 1e-3}}, config_file=file)
    assert config.options == {"scale": 0.5, "eps": 1e-3}
    assert PretrainConfig().options == {}


# What they cost.


@pytest.mark.parametrize("shape", [(24, 10), (9, 30), (16, 16)])
@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        ({"second_moment": "hadamard"}, lambda p, q, r: 2 * (p + q) * r),
        ({"second_moment": "hadamard", "second_moment_rank": 2}, lambda p, q, r: (p + q) * (r + 2)),
        ({"second_moment": "hadamard", "second_moment_rank": 0.5}, lambda p, q, r: (p + q) * (r + min(p, q) // 2)),
        ({"second_moment": "hadamard", "second_moment_rank": 99}, lambda p, q, r: (p + q) * (r + min(p, q))),
        ({"second_moment": "rank1"}, lambda p, q, r: (p + q) * r + p + q),
        ({"second_moment": "full"}, lambda p, q, r: (p + q) * r + p * q),
    ],
    ids=["hadamard", "hadamard of rank 2", "hadamard of half", "hadamard of full rank", "rank 1", "full"],
)
@pytest.mark.parametrize(("dtype", "width"), [(None, 4), ("float32", 4), ("bfloat16", 2), ("float64", 8)])
def test_the_formula_knows_the_options_and_is_what_is_held(
    shape: tuple[int, int], given: dict[str, Any], numbers: Any, dtype: str | None, width: int
) -> None:
    given = given | {"state_dtype": dtype}
    (p, q), r = shape, 3
    expected = width * numbers(p, q, r) + 4
    assert OURS.formula(given)(p, q, r) == expected
    body = nn.Sequential(nn.Linear(q, p, bias=False))
    config = PretrainConfig(rank=r, options=given)
    kind, kwargs = OURS.build(body, config, 1e-3, 1e-3)
    assert state_bytes(kind(**kwargs)) == expected == matrix_state_bytes(OURS, body, r, given)


@pytest.mark.parametrize("name", [name for name, entry in OPTIMIZERS.items() if entry.state_bytes_with])
def test_without_options_the_formula_is_that_of_the_defaults(name: str) -> None:
    entry = OPTIMIZERS[name]
    kind, kwargs = entry.build(nn.Sequential(nn.Linear(30, 9, bias=False)), PretrainConfig(rank=3), 1e-3, 1e-3)
    assert state_bytes(kind(**kwargs)) == entry.state_bytes(9, 30, 3) == entry.formula({})(9, 30, 3)


def test_matrices_below_the_rank_and_others_rows_take_the_width_and_the_formula_that_are_theirs() -> None:
    body = nn.Sequential(nn.Linear(30, 9, bias=False), nn.Linear(9, 2, bias=False))
    held = 2 * (39 * 3 + 39) + 4 + 2 * 2 * 18 + 4  # the second is plain AdamW, in the same bfloat16
    given = {"second_moment": "rank1", "state_dtype": "bfloat16"}
    kind, kwargs = OURS.build(body, PretrainConfig(rank=3, options=given), 1e-3, 1e-3)
    assert matrix_state_bytes(OURS, body, 3, given) == held == state_bytes(kind(**kwargs))
    assert matrix_state_bytes(OPTIMIZERS["adamw"], body, 3) == 2 * 4 * (270 + 18) + 8


# Where they go.

RUN = {"model": "tiny.json", "data": "text.txt", "tokenizer": "bpe:300", "batch_size": 8, "sequence_length": 16}


def test_they_reach_the_matrices_alone_and_are_recorded_as_numbers(pretrain: Cli, here: Path) -> None:
    given = ["eps=1e-3", "scale=1", "second_moment=full"]
    with optimizer_steps() as taken:
        assert pretrain(*options(**RUN, steps=2, set=given, compare="lorapre-adamw-paper", out="run")).code == 0
    both = {id(step): step for step in taken if isinstance(step, LoRAPreAdamW)}
    mine, twin = both.values()
    expected = {"eps": 1e-3, "scale": 1.0, "second_moment": "full"}
    for group in mine.param_groups:
        untouched = {name: mine.defaults[name] for name in expected}
        assert {name: group[name] for name in expected} == (expected if group["compress"] else untouched)
    for group in twin.param_groups:  # a twin has none of them
        assert {name: group[name] for name in expected} == {name: twin.defaults[name] for name in expected}
    assert twin.defaults["scale"] == 0.25
    facts = summary(here / "run")
    assert facts["options"] == expected
    assert facts["compare"]["lorapre-adamw-paper"]["options"] == {}
    assert facts["formula_bytes"] == facts["matrix_state_bytes"]
    assert yaml.safe_load((here / "run" / "config.yaml").read_text())["options"] == expected


@pytest.mark.parametrize("name", ["lorapre-adamw", "lorapre-muon"])
def test_stochastic_rounding_alone_reaches_what_is_dense_too(name: str) -> None:
    body = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 30)).bfloat16()
    config = PretrainConfig(rank=3, options={"stochastic_rounding": True})
    kind, kwargs = OPTIMIZERS[name].build(body, config, 1e-3, 1e-3)
    groups = kind(**kwargs).param_groups
    assert len(groups) == 3
    assert [group["stochastic_rounding"] for group in groups] == [True] * 3


def test_a_resumed_run_keeps_its_options(pretrain: Cli, here: Path) -> None:
    arguments = options(**RUN, steps=2, set=["eps=1e-3", "scale=1"], out="run")
    assert pretrain(*arguments).code == 0
    assert pretrain("--resume", "--out", "run", "--set", "eps=1e-3").code == 0
    refused = pretrain("--resume", "--out", "run", "--set", "eps=1e-4")
    assert refused.code == 2
    assert "--set" in refused.message
    assert "a resumed run keeps its options" in refused.message


@pytest.mark.parametrize("text", ["1/4", "0.25", "8", "1e-1"])
def test_ranks_are_written_alike_for_a_run_and_for_a_contestant(
    pretrain: Cli, here: Path, model: LlamaForCausalLM, text: str
) -> None:
    (contestant,) = parse_contestants([f"lorapre-adamw@{text}"], 0.5, model)
    assert f"lorapre-adamw, rank {contestant.rank}\n" in " ".join(
        line.rstrip() + "\n" for line in pretrain(*options(**RUN, rank=text, dry_run=True)).out.splitlines()
    )


# Contestants.


@pytest.mark.parametrize(
    ("spec", "key"),
    [
        ("lorapre-adamw+scale=1@1/32", "lorapre-adamw+scale=1.0@0.03125"),
        ("lorapre-adamw+second_moment=full+eps=1e-6", "lorapre-adamw+eps=1.0e-06+second_moment=full@0.25"),
        ("lorapre-adamw+eps=1e+2+scale=1@8", "lorapre-adamw+eps=100.0+scale=1.0@8"),
        ("lorapre-adamw+state_dtype=null@8", "lorapre-adamw+state_dtype=null@8"),
        ("lorapre-adamw-paper+state_dtype=bfloat16", "lorapre-adamw-paper+state_dtype=bfloat16@0.25"),
    ],
)
def test_a_contestants_key_is_canonical(model: LlamaForCausalLM, spec: str, key: str) -> None:
    (contestant,) = parse_contestants([spec], 0.25, model)
    assert contestant.key == key
    (again,) = parse_contestants([key], 0.5, model)
    assert again == contestant
    assert json.loads(json.dumps(contestant.options)) == contestant.options


def test_equal_bytes_count_the_options_of_both(model: LlamaForCausalLM) -> None:
    other = "lorapre-adamw+second_moment=full@4"
    (full, half) = parse_contestants(
        [other, f"lorapre-adamw+state_dtype=bfloat16+second_moment=rank1@={other}"], 2, model
    )
    assert isinstance(half.rank, int)
    shapes = 2 * ([(64, 64)] * 4 + [(64, 160)] * 3)
    allowed = sum(4 * ((p + q) * 4 + p * q) + 4 for p, q in shapes)
    assert matrix_state_bytes(OURS, model, 4, full.options) == allowed

    def held(r: int) -> int:
        return sum(2 * ((p + q) * (r + 1) if r < 64 else 2 * p * q) + 4 for p, q in shapes)

    assert held(half.rank) <= allowed
    assert half.rank == 63 or held(half.rank + 1) > allowed


def test_commas_within_brackets_do_not_separate_names() -> None:
    text = "lorapre-adamw+x=[0.9,0.95]+eps=1@8, adamw,,muon"
    assert split_names(text) == ["lorapre-adamw+x=[0.9,0.95]+eps=1@8", "adamw", "muon"]


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        (["adamw+eps=1e-6"], ["adamw takes no options", "lorapre-adamw"]),
        (["lorapre-adamw+dampng=1"], ["dampng=1", "no option 'dampng'", "damping=0.0001"]),
        (["lorapre-adamw+damping=0"], ["damping=0.0", "must be above 0"]),
        (["lorapre-adamw+damping=0.1"], ["damping=0.1: would change nothing", "Set regression=newton too"]),
        (["lorapre-muon+damping_mode=absolute+regression=tangent"], ["nothing reads it with regression=tangent"]),
        (["lorapre-adamw+bias_correction=paper@8"], ["would change nothing", "Set second_moment=hadamard too"]),
        (["lorapre-adamw+rank=8"], ["rank=8", "--rank sets it"]),
        (["lorapre-adamw+scale=much@8"], ["scale=much", "number"]),
        (["lorapre-adamw+scale=1+scale=2"], ["scale is set twice"]),
        (["lorapre-adamw+scale=[1"], ["not valid YAML"]),
        (["lorapre-adamw+scale=1", "lorapre-adamw+scale=1.0@0.25"], ["lorapre-adamw+scale=1.0@0.25 occurs twice"]),
        (["galore-ours@=lorapre-adamw+scale=-1@8"], ["scale=-1.0", "at least 0"]),
    ],
)
def test_impossible_options_of_a_contestant_are_refused(
    model: LlamaForCausalLM, specs: list[str], words: list[str]
) -> None:
    with pytest.raises(UserError, match=r"^--optimizers") as refused:
        parse_contestants(specs, 0.25, model)
    assert [word for word in words if word not in str(refused.value)] == []


def test_damping_is_taken_where_something_is_inverted(model: LlamaForCausalLM) -> None:
    specs = ["lorapre-adamw+damping=0.1+regression=newton", "lorapre-muon-paper+damping=0.1"]
    assert [contestant.options["damping"] for contestant in parse_contestants(specs, 0.25, model)] == [0.1, 0.1]


def test_of_several_options_the_one_that_is_refused_is_named(model: LlamaForCausalLM) -> None:
    given = {"eps": 1e-6, "damping": -1, "scale": 2}
    with pytest.raises(UserError, match=r"^--set damping=-1\.0: ") as refused:
        check_options(OURS, model, PretrainConfig(options=given))
    assert "eps=1.0e-06" not in str(refused.value)
    together = {"second_moment": "full", "second_moment_rank": 4}
    with pytest.raises(UserError, match=r"^--set second_moment=full --set second_moment_rank=4: "):
        check_options(OURS, model, PretrainConfig(options=together))


def test_contestants_that_differ_in_options_alone_are_told_apart_everywhere(tmp_path: Path) -> None:
    for name in ("comparison.yaml", "plan.json"):
        shutil.copy2(OLD_PLAN / name, tmp_path / name)
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["contestants"] = [contestant for contestant in plan["contestants"] if not contestant.get("options")]
    for contestant in plan["contestants"]:  # as plans were before there were options
        contestant.pop("options", None)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    old = collect(ArenaFolder(tmp_path))
    assert {row.contestant for row in old.rows} >= {"adamw", "lorapre-adamw-paper@0.25"}
    assert {row.title for row in old.rows} == {OPTIMIZERS[row.optimizer].title for row in old.rows}
    ours = [{"optimizer": "lorapre-adamw", "rank": 0.25, "options": {"scale": scale}} for scale in (0.5, 1.0)]
    plan["contestants"] = [*ours, {"optimizer": "lorapre-adamw", "rank": 0.25, "options": {}}]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    rows = collect(ArenaFolder(tmp_path)).rows
    labels = {
        "LoRA-Pre AdamW, scale=0.5 r=0.25",
        "LoRA-Pre AdamW, scale=1.0 r=0.25",
        "LoRA-Pre AdamW r=0.25",
    }
    assert {label(row) for row in rows} == labels
    comparison = collect(ArenaFolder(tmp_path))
    assert [text for text in labels if text not in render_page(comparison)] == []
    for cell in ("| LoRA-Pre AdamW, scale=0.5 |", "| LoRA-Pre AdamW, scale=1.0 |", "| LoRA-Pre AdamW |"):
        assert cell in markdown(comparison)


def test_a_comparison_trains_each_contestant_with_its_options(here: Path) -> None:
    names = "lorapre-adamw@8,lorapre-adamw+second_moment=full+eps=1@8"
    arguments = options(**RUN, steps=4, optimizers=names, lr_grid="x1", search="grid", out="out")
    assert exit_code("compare", *arguments) == 0
    plan = json.loads((here / "out" / "plan.json").read_text())
    expected = {
        "lorapre-adamw@8": {},
        "lorapre-adamw+eps=1.0+second_moment=full@8": {"eps": 1.0, "second_moment": "full"},
    }
    assert [contestant["options"] for contestant in plan["contestants"]] == list(expected.values())
    assert {path.name for path in (here / "out" / "runs").iterdir()} == set(expected)
    losses = set()
    for key, given in expected.items():
        (run,) = (here / "out" / "runs" / key).iterdir()
        facts = summary(run)
        assert facts["options"] == given
        assert facts["formula_bytes"] == facts["matrix_state_bytes"]
        losses.add(facts["valid_loss"])
    assert len(losses) == 2  # an eps of 1 all but stops the matrices
