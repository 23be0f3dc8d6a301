"""Options of fine-tuning: what they mean, what is refused before anything is made, help and dry run."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.rich_utils
from _finetune import ADAPTED, KINDS, SHORT, finetune, pairs
from _lab import exit_code, optimizer_steps, options, summary, tree
from rich.cells import cell_len

from lorapre import LoRAPreAdamW
from lorapre.lab.config import option_name
from lorapre.lab.finetune.config import FinetuneConfig
from lorapre.lab.finetune.methods import LORAPLUS_RATIO, METHODS, PRETRAINED_LR
from lorapre.lab.finetune.presets import PRESETS
from lorapre.lab.finetune.tiny import tiny_model, tiny_tokenizer
from lorapre.lab.optimizers import OPTIMIZERS


def leaves(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    inner = get_args(annotation)
    return set().union(*map(leaves, inner)) if inner else {annotation}


def test_every_optimizer_that_keeps_the_weights_is_a_method_and_adapters_are_too() -> None:
    rows = {name for name, entry in OPTIMIZERS.items() if entry.prepare is None} - {"adamw"} | {"full-adamw"}
    assert set(METHODS) == rows | {"lora", "rslora", "lora+", "dora", "lora-pro", "loft"}
    assert FinetuneConfig(method="adamw").method == "full-adamw"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "adagrad"}, "--method adagrad: there is no such method. Choose one of"),
        ({"method": "lora", "adapter": "dora"}, "--adapter dora: --method lora brings its own adapter"),
        ({"method": "lora", "rank": "1/4"}, "--rank 0.25: an adapter's rank is a whole number"),
        ({"method": "lora", "adapter_rank": 4}, "--adapter-rank 4: --method lora takes its rank from --rank"),
        ({"adapter": "lora"}, "--adapter lora: of which rank?"),
        ({"alpha": 16}, "--alpha: is an adapter's, and --method lorapre-adamw trains all weights"),
        ({"loraplus_ratio": 4}, "--loraplus-ratio 4.0: is for --method lora+ alone"),
        ({"method": "lora", "target_modules": "nothing"}, "--target-modules nothing"),
        (
            {"method": "lora", "target_modules": ["q_proj", "v_prj"]},
            "--target-modules v_prj: the model has no such module. Choose among embed_tokens, q_proj, k_proj, v_proj",
        ),
        ({"method": "lora", "target_modules": ["q_proj", "proj"]}, "--target-modules proj: the model has no such"),
        *(
            ({"method": name, "dense_lr": 0.1}, f"--dense-lr 0.1: --method {name} trains an adapter alone, at --lr")
            for name, method in METHODS.items()
            if method.adapter is not None
        ),
        ({"method": "lora", "set": "beta=1"}, "--set: --method lora takes no options"),
        ({"rank": 64}, "--rank 64: no matrix of --model tiny has a smaller side above it"),
        ({"set": "second_moment=half"}, "--set second_moment=half"),
        ({"batch_size": 9, "accumulation": 2}, "--batch-size 9: cannot be split"),
        ({"steps": 3, "epochs": 2}, "--steps 3 and --epochs 2.0 exclude each other"),
        ({"model": "no-such-folder"}, "--model no-such-folder: is neither tiny, nor a folder, nor a hub name"),
        ({"preset": "metamath"}, "--preset metamath: there is no such preset"),
        ({"template": "qa", "chat_template": "x.jinja"}, "--chat-template x.jinja: is not used by --template qa"),
        ({"chat_template": "x.jinja"}, "--chat-template x.jinja: cannot be read"),
        ({"save_every": 3, "log_every": 2}, "--save-every 3: must be a multiple of --log-every 2"),
        ({"max_length": 3}, "--max-length 3: 20 examples are left out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_options_that_do_not_fit_are_refused_before_anything_is_made(
    own: Path, capsys: pytest.CaptureFixture[str], given: dict[str, Any], words: str
) -> None:
    before = tree(own)
    base = {key: value for key, value in SHORT.items() if key != "steps" or "epochs" not in given}
    outcome = finetune(capsys, *options(**{**base, **given}), "--out", "run")
    assert outcome.code == 2, outcome
    assert words in outcome.message
    assert tree(own) == before


#: What 0 means something to; every other number is at least one, or above 0.
ZERO = {"dropout", "beta1", "beta2", "weight_decay", "max_grad_norm", "warmup", "min_lr_ratio", "answers", "seed"}
NUMBERS = [name for name, field in FinetuneConfig.model_fields.items() if {int, float} & leaves(field.annotation)]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", NUMBERS)
def test_an_option_of_0_is_taken_or_refused_and_never_passed_over(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    taken: list[FinetuneConfig] = []
    monkeypatch.setattr("lorapre.lab.finetune.report.print_dry_run", lambda config, _: taken.append(config))
    outcome = finetune(capsys, "--dry-run", *options(**{name: 0}))
    if name in ZERO:
        assert outcome.code == 0
        assert getattr(taken[0], name) == 0
        assert name in taken[0].model_fields_set
    else:
        assert outcome.code == 2
        assert f"{option_name(name)} 0" in outcome.message


def test_cut_answers_are_counted_in_the_summary_and_said(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = finetune(capsys, *options(**{**SHORT, "max_length": 12, "steps": 1, "save_every": 1}), "--out", "run")
    lengths = [(len(pair["prompt"]) + 3, len(pair["response"]) + 1) for pair in pairs()]
    kept = summary(own / "run")["examples"]
    named = re.findall(r"(training|validation): --max-length 12: (\d+) answers? (?:are|is) cut", outcome.out)
    assert sum(int(count) for _, count in named) == kept["cut"]
    # All examples, of which 20 and 4 were drawn.
    assert 0 < kept["cut"] <= sum(prompt < 12 < prompt + answer for prompt, answer in lengths)
    assert kept["train"] + kept["valid"] + kept["dropped"] == 24


def test_lora_pre_on_an_adapter_moves_the_adapter_alone_and_compresses_it(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with optimizer_steps() as taken:
        assert finetune(capsys, *options(**SHORT, **ADAPTED), "--out", "run").code == 0
    kinds = {type(one) for one in taken if not type(one).__name__.startswith("Accelerated")}
    assert kinds == {LoRAPreAdamW}
    facts = summary(own / "run")
    # 2 layers of q, k, v, o (64 x 64), gate, up (128 x 64) and down (64 x 128), each as A (8, in) and B (out, 8).
    shapes = 2 * (4 * [(64, 64)] + 2 * [(128, 64)] + [(64, 128)])
    assert facts["trainable_parameters"] == sum(8 * (p + q) for p, q in shapes)
    assert facts["compressed_matrices"] == 2 * len(shapes)
    # Rank 2 of an (8, q) matrix: two factors, a row and a column of v, a counter.
    sides = [side for shape in shapes for side in shape]
    assert facts["state_bytes"] == sum(4 * ((8 + side) * 2 + 8 + side) + 4 for side in sides)
    assert facts["adamw_state_bytes"] == sum(2 * 4 * 8 * side + 4 for side in sides)
    assert facts["parameters"] == sum(p.numel() for p in tiny_model(0).parameters())


def test_it_is_said_when_nothing_of_an_adapter_is_compressed(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = options(**{**SHORT, **ADAPTED, "rank": 8, "steps": 1, "save_every": 1})
    outcome = finetune(capsys, *given, "--out", "run")
    assert outcome.code == 0
    assert "Warning: --rank 8: nothing is compressed" in " ".join(outcome.out.split())
    assert "--adapter-rank 8" in outcome.out
    assert summary(own / "run")["compressed_matrices"] == 0
    assert "nothing is compressed" not in finetune(capsys, *options(**SHORT, **ADAPTED), "--dry-run").out


def test_lora_plus_moves_b_sixteen_times_as_fast_as_a(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with optimizer_steps() as taken:
        given = {**SHORT, "method": "lora+", "lr": 0.01, "schedule": "constant", "warmup": 0}
        assert finetune(capsys, *options(**given), "--out", "run").code == 0
    (optimizer,) = {id(one): one for one in taken}.values()
    rates = {
        (8 if shape[0] == 8 else "out", group["lr"])
        for group in optimizer.param_groups
        for shape in [tuple(param.shape) for param in group["params"]]
    }
    assert rates == {(8, 0.01), ("out", 0.16)}


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("preset", "vocabulary", "mlp", "keys"),
    [("metamath-llama2-7b", 32_000, 11_008, 4096), ("metamath-llama3.1-8b", 128_256, 14_336, 1024)],
)
def test_a_dry_run_of_a_preset_needs_no_weights_and_says_the_papers_protocol(
    here: Path, capsys: pytest.CaptureFixture[str], preset: str, vocabulary: int, mlp: int, keys: int
) -> None:
    before = tree(here)
    outcome = finetune(capsys, "--preset", preset, "--dry-run")
    assert outcome.code == 0
    assert tree(here) == before
    words = " ".join(outcome.out.split())
    d = 4096
    shapes = 32 * ([(d, d)] * 2 + [(keys, d)] * 2 + [(d, mlp)] * 3)
    dense, vectors = 2 * vocabulary * d, 65 * d
    parameters = dense + vectors + sum(p * q for p, q in shapes)
    # Algorithm 1 at rank 8: four factors and a counter a matrix; AdamW for the rest.
    state = sum(2 * 4 * (p + q) * 8 + 4 for p, q in shapes) + 8 * (dense + vectors) + 4 * (2 + 65)
    assert f"{parameters:,} parameters, {parameters:,} trained" in words
    assert f"{state / 1e9:.2f} GB (AdamW:" in words
    assert f"{math.ceil(100_000 / 32):,}, of 32 sequences" in words
    assert "at most 100,000 examples, at most 102,400,000 tokens (1,024 each)" in words
    assert "lorapre-adamw-paper, rank 8, 224 of 224 matrices compressed" in words


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_says_what_the_run_then_does(own: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    given = options(**{**SHORT, **KINDS[kind]})
    words = " ".join(finetune(capsys, *given, "--dry-run").out.split())
    assert finetune(capsys, *given, "--out", "run").code == 0
    facts = summary(own / "run")
    from lorapre.optim.summary import format_bytes

    assert f"steps {facts['steps']:,}, of 8 sequences" in words
    assert f"{facts['trainable_parameters']:,} trained" in words
    assert f"optimizer state {format_bytes(facts['state_bytes'])} " in words
    assert f"(AdamW: {format_bytes(facts['adamw_state_bytes'])})" in words


def test_epochs_take_every_example_and_the_last_step_what_is_left(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {key: value for key, value in SHORT.items() if key not in ("steps", "save_every")}
    assert finetune(capsys, *options(**given, epochs=2), "--out", "run").code == 0
    assert summary(own / "run")["steps"] == 2 * math.ceil(20 / 8)


@pytest.mark.usefixtures("here")
def test_help_fits_80_columns_and_lists_every_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(typer.rich_utils, "MAX_WIDTH", 80)
    assert exit_code("finetune", "--help") == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert max(cell_len(line) for line in text.splitlines()) <= 80
    names = {option_name(name).removeprefix("--") for name in FinetuneConfig.model_fields}
    names |= {"preset", "config", "out", "resume", "dry-run", "help"}
    assert names - set(re.findall(r"--([a-z0-9-]+)", text)) == set()
    assert "…" not in text
    words = " ".join(re.sub("[│]", " ", text).split())
    for preset in PRESETS:
        assert preset in words


@pytest.mark.usefixtures("here")
def test_help_names_the_true_defaults(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typer.rich_utils, "MAX_WIDTH", 2000)
    monkeypatch.setenv("COLUMNS", "2000")
    assert exit_code("finetune", "--help") == 0
    text = capsys.readouterr().out
    config, checked = FinetuneConfig(), 0
    for line in re.findall(r"^│ --.*$", text, re.MULTILINE):
        name = re.match(r"│ --([a-z0-9-]+)", line)[1].replace("-", "_")  # type: ignore[index]
        stated = re.search(r"default (\d[\d.]*\d|\d)(?=[ ;)])(?! %)", line)
        if stated and getattr(config, name, None) is not None:
            assert float(stated[1]) == getattr(config, name), name
            checked += 1
    assert checked >= 12
    assert (PRETRAINED_LR, LORAPLUS_RATIO, config.total_epochs, FinetuneConfig(data="x").total_epochs) == (
        2e-5,
        16,
        15,
        1,
    )


def test_it_is_said_that_weights_in_bfloat16_lose_small_updates(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warning = "Warning: --dtype bfloat16: weights of 8 bits lose updates"
    said = " ".join(finetune(capsys, "--dtype", "bfloat16", "--dry-run").out.split())
    assert warning in said
    assert "or round by chance: --set stochastic_rounding=true." in said
    by_chance = finetune(capsys, "--dtype", "bfloat16", "--set", "stochastic_rounding=true", "--dry-run")
    assert by_chance.code == 0
    assert "bfloat16: weights" not in by_chance.out
    others = finetune(capsys, "--dtype", "bfloat16", "--method", "full-adamw", "--dry-run").out
    assert warning in " ".join(others.split())
    assert "stochastic_rounding" not in others
    assert "bfloat16: weights" not in finetune(capsys, "--dtype", "bfloat16", "--method", "lora", "--dry-run").out
    assert "bfloat16: weights" not in finetune(capsys, "--dry-run").out


@pytest.mark.parametrize("given", [[], ["--adapter", "lora"]], ids=["float32", "adapter"])
@pytest.mark.parametrize("method", ["lorapre-adamw", "lorapre-sgd"])
def test_stochastic_rounding_of_weights_that_are_not_in_bfloat16_is_refused(
    own: Path, capsys: pytest.CaptureFixture[str], given: list[str], method: str
) -> None:
    dtype = ["--dtype", "bfloat16", "--adapter-rank", "8", "--rank", "2"] if given else []
    arguments = [*given, *dtype, "--method", method, "--set", "stochastic_rounding=true", "--dry-run"]
    outcome = finetune(capsys, *arguments)
    assert outcome.code == 2
    assert "--set stochastic_rounding=true: " in outcome.message
    assert "there are none: the parameters are of torch.float32" in outcome.message


def test_a_tokenizer_that_can_neither_end_nor_pad_is_refused(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model(0).save_pretrained(own / "mine")
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(own / "mine")
    outcome = finetune(capsys, *options(**SHORT, model="mine"), "--out", "run")
    assert outcome.code == 2
    assert "--model mine: its tokenizer has neither a padding nor an end-of-text token" in outcome.message
    assert not (own / "run").exists()


def test_lorapre_moves_its_bases_in_every_step_of_a_fine_tuning_unless_told_otherwise() -> None:
    from lorapre.lab.finetune.config import build_finetune_config

    assert build_finetune_config({}).options == {"sweep_interval": 1}
    given = {"options": {"sweep_interval": 8, "scale": 0.5}}
    assert build_finetune_config(given).options == given["options"]
    assert build_finetune_config({"method": "lora"}).options == {}
    assert build_finetune_config({}, preset="metamath-llama2-7b").options == {}


def test_a_recorded_run_is_repeated_by_another_method_without_the_options_of_its_own(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorapre.lab.finetune.config import build_finetune_config

    file = own / "run.yaml"
    file.write_text(build_finetune_config({"options": {"scale": 0.5}}).to_yaml())
    assert finetune(capsys, "--config", "run.yaml", "--method", "lora", "--dry-run").code == 0
    merged = {
        "lora": {},
        "lorapre-muon": {},
        "lorapre-adamw": {"sweep_interval": 1, "scale": 0.5},
    }
    for name, expected in merged.items():
        assert build_finetune_config({"method": name}, config_file=file).options == expected
    set_too = build_finetune_config({"method": "lorapre-muon", "options": {"nesterov": False}}, config_file=file)
    assert set_too.options == {"nesterov": False}
    assert build_finetune_config({"options": {"scale": 1.0}}, config_file=file).options == {
        "sweep_interval": 1,
        "scale": 1.0,
    }
    file.write_text("method: full-adamw\noptions: {eps: 1.0e-6}\n")
    assert build_finetune_config({"method": "adamw"}, config_file=file).options == {"eps": 1e-6}
    file.write_text("options: {scale: 0.5}\n")  # of whatever method
    assert build_finetune_config({"method": "lorapre-muon"}, config_file=file).options == {"scale": 0.5}
