"""The command line: ``lorapre pretrain | compare | finetune | evaluate | optimizers``."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lorapre.lab import cli_options as opt
from lorapre.lab.cli_errors import explained
from lorapre.lab.compare.command import compare
from lorapre.lab.config import PretrainConfig, build_config, check_as_recorded, parse_options, validated
from lorapre.lab.errors import UserError
from lorapre.lab.evaluate.command import evaluate
from lorapre.lab.finetune.command import finetune

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def lorapre() -> None:
    """LoRA-Pre: optimizers whose momenta are kept as two thin factors."""


@app.command()
def pretrain(
    model: opt.ModelOption = None,
    data: opt.DataOption = None,
    text_field: opt.TextFieldOption = None,
    valid_data: opt.ValidDataOption = None,
    valid_fraction: opt.ValidFractionOption = None,
    valid_tokens: opt.ValidTokensOption = None,
    tokenizer: opt.TokenizerOption = None,
    optimizer: Annotated[
        str | None, opt.option("lorapre-adamw (default), or another that `lorapre optimizers` lists.", opt.OPTIMIZER)
    ] = None,
    compare: Annotated[
        list[str] | None,
        opt.option("Train a twin with this optimizer from the same start, into one figure. Repeatable.", opt.OPTIMIZER),
    ] = None,
    rank: opt.RankOption = None,
    settings: Annotated[
        list[str] | None,
        opt.option(
            "NAME=VALUE: an option of the --optimizer itself, such as second_moment=full; `lorapre optimizers` lists "
            "them. Repeatable.",
            opt.OPTIMIZER,
            "--set",
        ),
    ] = None,
    lr: Annotated[
        float | None, opt.option("Peak learning rate of the matrices (default: the optimizer's).", opt.OPTIMIZER)
    ] = None,
    dense_lr: opt.DenseLrOption = None,
    beta1: opt.Beta1Option = None,
    beta2: opt.Beta2Option = None,
    weight_decay: opt.WeightDecayOption = None,
    max_grad_norm: opt.MaxGradNormOption = None,
    schedule: opt.ScheduleOption = None,
    warmup: opt.WarmupOption = None,
    min_lr_ratio: opt.MinLrRatioOption = None,
    batch_size: opt.BatchSizeOption = None,
    accumulation: opt.AccumulationOption = None,
    sequence_length: opt.SequenceLengthOption = None,
    steps: opt.StepsOption = None,
    tokens: opt.TokensOption = None,
    bf16: opt.Bf16Option = None,
    compile: opt.CompileOption = None,
    log_every: opt.LogEveryOption = None,
    eval_every: Annotated[int | None, opt.option("Steps between validations (default 20 %).", opt.RUN)] = None,
    save_every: Annotated[int | None, opt.option("Steps between checkpoints (default 20 %).", opt.RUN)] = None,
    keep_checkpoints: Annotated[int | None, opt.option("Checkpoints to keep, at least 2 (default 2).", opt.RUN)] = None,
    diagnose: opt.DiagnoseOption = None,
    seed: opt.SeedOption = None,
    preset: opt.PresetOption = None,
    config: Annotated[
        Path | None, opt.option("YAML file of options, such as a run's config.yaml; the command line wins.", opt.RUN)
    ] = None,
    out: Annotated[Path | None, opt.option("Folder of the run (default runs/<optimizer>-<time>).", opt.RUN)] = None,
    resume: Annotated[bool, opt.option("Go on with the interrupted run in --out.", opt.RUN, "--resume")] = False,
    dry_run: Annotated[bool, opt.option("Print model, memory and steps, and stop.", opt.RUN, "--dry-run")] = False,
) -> None:
    """Pre-train a language model with LoRA-Pre.

    Without options: a small Llama on the source code of Python's standard library.
    """
    options = opt.training_options(locals(), rank)
    if settings:
        options["options"] = parse_options(settings)
    # Slow to import, and not needed for --help.
    from lorapre.lab import dry_run as dry
    from lorapre.lab import pretrain as job
    from lorapre.lab.report import print_summary

    console = opt.standard_output()
    if resume:
        wanted = _resumed(out, options, preset, config)
    else:
        wanted = build_config(options, preset=preset, config_file=config)
    if dry_run:
        dry.print_dry_run(wanted, console)
        return
    out = out or job.default_out(wanted.optimizer)
    with explained(out, console, "pretrain"):
        summary = job.run_pretraining(wanted, out, console, resume=resume)
    print_summary(summary, out, console)


app.command()(compare)
app.command()(finetune)
app.command()(evaluate)


@app.command()
def optimizers() -> None:
    """List every optimizer that can be named, with its source, state and learning rate."""
    from lorapre.lab.optimizers.listing import optimizer_table

    opt.standard_output().print(optimizer_table())


#: Two ways to give the length of a run, of which the configuration takes one.
_LENGTHS = ("steps", "tokens")


def _resumed(out: Path | None, options: dict[str, Any], preset: str | None, config: Path | None) -> PretrainConfig:
    from lorapre.lab.optimizers import find_optimizer, read_options
    from lorapre.lab.pretrain import load_resumable

    if out is None:
        raise UserError("--resume: which run? Give its folder with --out.")
    if preset is not None or config is not None:
        raise UserError("--resume: takes all options from the run's config.yaml. Leave --preset and --config out.")
    settings = load_resumable(out)
    given = read_options(find_optimizer(settings.optimizer), options.get("options", {}))

    def build(together: dict[str, Any]) -> PretrainConfig:
        # Not `build_config`, which refuses what was given and is not read: here most is recorded.
        together["options"] = {**settings.options, **given}
        return validated(PretrainConfig, [("the command line", together)])

    check_as_recorded(settings, options, out, _LENGTHS, build)
    return settings


def main() -> None:
    """Entry point: a `UserError` becomes one paragraph on standard error and exit code 2."""
    # Decided here, before a tokenizer is used: the library warns when it must guess after a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    importlib.import_module("lorapre.lab.quiet")
    try:
        app()
    except UserError as error:
        opt.print_error(str(error))
        sys.exit(2)
