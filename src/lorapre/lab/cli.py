"""The command line: ``lorapre pretrain``."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel

from lorapre import NonFiniteGradientError
from lorapre.lab.config import PRESETS, PretrainConfig, build_config
from lorapre.lab.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def lorapre() -> None:
    """LoRA-Pre: optimizers whose momenta are kept as two thin factors."""


def _parse_rank(text: str) -> int | float:
    """An integer, or a fraction if it is written as one; what cannot be either is left for the checks to refuse."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--rank {text}: is neither an integer nor a fraction such as 0.25.") from None


_MODEL, _OPTIMIZER, _TRAINING, _RUN = "Model and data", "Optimizer", "Training", "Run"


def _option(help_text: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, show_default=False)


@app.command()
def pretrain(
    model: Annotated[
        str | None,
        _option("llama-3m (default), -20m, -60m, -130m, -350m, -1b, -7b, a config.json, or a checkpoint.", _MODEL),
    ] = None,
    data: Annotated[
        list[str] | None,
        _option(
            "stdlib (default: the source of Python's standard library), files or globs (txt, jsonl, parquet; xz, gz, "
            "zst; quote globs), or hf:<dataset>:<config>; hf alone is C4. Repeatable.",
            _MODEL,
        ),
    ] = None,
    text_field: Annotated[str | None, _option("Field or column that holds the text (default text).", _MODEL)] = None,
    valid_data: Annotated[
        list[str] | None, _option("Files or globs to validate on, instead of a held-out part. Repeatable.", _MODEL)
    ] = None,
    valid_fraction: Annotated[float | None, _option("Share of documents to hold out (default 0.05).", _MODEL)] = None,
    valid_tokens: Annotated[int | None, _option("Validate on at most so many tokens (default 50000).", _MODEL)] = None,
    tokenizer: Annotated[
        str | None,
        _option("bpe:SIZE (default: trained on the data), a tokenizer.json, a folder, or a hub name.", _MODEL),
    ] = None,
    optimizer: Annotated[
        str | None, _option("lorapre-adamw (default), lorapre-adamw-paper, or adamw.", _OPTIMIZER)
    ] = None,
    compare: Annotated[
        list[str] | None,
        _option("Train a twin with this optimizer from the same start, into one figure. Repeatable.", _OPTIMIZER),
    ] = None,
    rank: Annotated[
        str | None, _option("Rank, or fraction of each matrix's smaller side (default 0.25).", _OPTIMIZER)
    ] = None,
    lr: Annotated[
        float | None, _option("Peak learning rate of the matrices (default: the optimizer's).", _OPTIMIZER)
    ] = None,
    dense_lr: Annotated[
        float | None, _option("Peak learning rate of embeddings, head, norms (likewise).", _OPTIMIZER)
    ] = None,
    beta1: Annotated[float | None, _option("Decay of the first moment (default 0.9).", _OPTIMIZER)] = None,
    beta2: Annotated[float | None, _option("Decay of the second moment (default 0.95).", _OPTIMIZER)] = None,
    weight_decay: Annotated[
        float | None, _option("Decoupled weight decay of matrices (default 0).", _OPTIMIZER)
    ] = None,
    max_grad_norm: Annotated[
        float | None, _option("Clip the gradient's norm; 0 does not (default 1).", _OPTIMIZER)
    ] = None,
    schedule: Annotated[str | None, _option("cosine (default), linear or constant.", _TRAINING)] = None,
    warmup: Annotated[float | None, _option("Share of steps to warm up in (default 0.1).", _TRAINING)] = None,
    min_lr_ratio: Annotated[
        float | None, _option("Share of the peak at which cosine and linear end (default 0.1).", _TRAINING)
    ] = None,
    batch_size: Annotated[int | None, _option("Sequences a step, over all processes (default 8).", _TRAINING)] = None,
    accumulation: Annotated[
        int | None, _option("Forward passes that a process splits its share into (default 1).", _TRAINING)
    ] = None,
    sequence_length: Annotated[int | None, _option("Tokens a sequence (default 128).", _TRAINING)] = None,
    steps: Annotated[int | None, _option("Optimizer steps (default 600).", _TRAINING)] = None,
    tokens: Annotated[int | None, _option("Training tokens, instead of steps.", _TRAINING)] = None,
    bf16: Annotated[bool | None, _option("Autocast to bfloat16; weights stay float32.", _TRAINING)] = None,
    log_every: Annotated[int | None, _option("Steps between records of the loss (default 1 %).", _RUN)] = None,
    eval_every: Annotated[int | None, _option("Steps between validations (default 20 %).", _RUN)] = None,
    save_every: Annotated[int | None, _option("Steps between checkpoints (default 20 %).", _RUN)] = None,
    keep_checkpoints: Annotated[int | None, _option("Checkpoints to keep, at least 2 (default 2).", _RUN)] = None,
    seed: Annotated[int | None, _option("Of weights, factors and data order (default 0).", _RUN)] = None,
    preset: Annotated[str | None, _option(f"The paper's protocol: {', '.join(PRESETS)}.", _RUN)] = None,
    config: Annotated[
        Path | None, _option("YAML file of options, such as a run's config.yaml; the command line wins.", _RUN)
    ] = None,
    out: Annotated[Path | None, _option("Folder of the run (default runs/<optimizer>-<time>).", _RUN)] = None,
    resume: Annotated[bool, _option("Go on with the interrupted run in --out.", _RUN, "--resume")] = False,
    dry_run: Annotated[bool, _option("Print model, memory, tokens and steps, and stop.", _RUN, "--dry-run")] = False,
) -> None:
    """Pre-train a language model with LoRA-Pre.

    Without options: a small Llama on the source code of Python's standard library.
    """
    given = {name: value for name, value in locals().items() if name in PretrainConfig.model_fields}
    options = {name: value for name, value in given.items() if value is not None and value != []}
    if rank is not None:
        options["rank"] = _parse_rank(rank)
    # Slow to import, and not needed for --help.
    from lorapre.lab import dry_run as dry
    from lorapre.lab import pretrain as job
    from lorapre.lab.report import print_summary

    console = _console()
    if resume:
        settings = _resumed(out, options, preset, config)
    else:
        settings = build_config(options, preset=preset, config_file=config)
    if dry_run:
        dry.print_dry_run(settings, console)
        return
    out = out or job.default_out(settings)
    try:
        summary = job.run_pretraining(settings, out, console, resume=resume)
    except KeyboardInterrupt:
        console.print(f"Interrupted. {_way_on(out)}", soft_wrap=True, markup=False)
        raise typer.Exit(130) from None
    except NonFiniteGradientError as error:
        _print_error(
            f"The training has diverged: {error.args[0].partition('. ')[0]}. Start again with a smaller --lr or "
            f"--dense-lr, a longer --warmup, or a --max-grad-norm; {out} keeps the metrics up to here."
        )
        raise typer.Exit(1) from None
    except Exception as error:
        if isinstance(error, UserError) or not _disk_is_full(error):
            raise
        _print_error(f"--out {out}: its disk is full. Free some space. {_way_on(out)}")
        raise typer.Exit(1) from None
    print_summary(summary, out, console)


def _way_on(out: Path) -> str:
    from lorapre.lab.run_folder import RunFolder

    if not RunFolder(out).config.exists():
        return "Nothing was trained."
    return f"What was complete is safe; go on with: lorapre pretrain --resume --out {out}"


def _disk_is_full(error: BaseException) -> bool:
    """Whether ``error`` says so: as an OSError, or in the words of safetensors or torch, whose errors are not."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    text = str(error)
    return "No space left on device" in text or "Disk quota exceeded" in text or "inline_container.cc" in text


def _resumed(out: Path | None, options: dict[str, Any], preset: str | None, config: Path | None) -> PretrainConfig:
    from lorapre.lab.pretrain import load_resumable

    if out is None:
        raise UserError("--resume: which run? Give its folder with --out.")
    if preset is not None or config is not None:
        raise UserError("--resume: takes all options from the run's config.yaml. Leave --preset and --config out.")
    settings = load_resumable(out)
    wanted = build_config(settings.model_dump(exclude_none=True) | options)
    for name in options:
        before, now = getattr(settings, name), getattr(wanted, name)
        if before != now:
            raise UserError(
                f"--{name.replace('_', '-')} {now}: the run in {out} began with {before}, and a resumed run keeps its "
                "options. Leave it out, or start a new run with another --out."
            )
    return settings


def _console() -> Console:
    """Standard output of the first process; the others of a torchrun job are silent."""
    return Console(quiet=os.environ.get("RANK", "0") != "0", highlight=False)


def _print_error(message: str) -> None:
    """On the first process: in a torchrun job all fail for the same reason."""
    console = Console(stderr=True, highlight=False, quiet=os.environ.get("RANK", "0") != "0")
    console.print(Panel(message, title="Error", title_align="left", border_style="red"), markup=False)


def main() -> None:
    """Entry point: a `UserError` becomes one paragraph on standard error and exit code 2."""
    # Decided here, before a tokenizer is used: the library warns when it must guess after a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        app()
    except UserError as error:
        _print_error(str(error))
        sys.exit(2)
