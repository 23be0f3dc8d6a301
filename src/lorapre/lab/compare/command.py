"""``lorapre compare``: options to configuration, runs to report."""

from __future__ import annotations

import hashlib
import importlib.util
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lorapre.lab import cli_options as opt
from lorapre.lab.compare.folder import ArenaFolder
from lorapre.lab.errors import UserError

_COMPARISON = "Comparison"


def compare(
    optimizers: Annotated[
        str | None,
        opt.option(
            "Comma-separated names of `lorapre optimizers`; NAME@RANK sets a rank, NAME@=OTHER the rank whose state is "
            "as large as OTHER's, NAME+OPTION=VALUE@RANK also an option (default "
            "lorapre-adamw,adamw,galore-ours,fira-ours).",
            _COMPARISON,
        ),
    ] = None,
    lr_grid: Annotated[
        str | None,
        opt.option(
            "auto (default: each optimizer's own grid, grown where the best rate is at its edge), rates for all "
            "(5e-4,1e-3), or multiples of each default (x0.5,x1,x2).",
            _COMPARISON,
        ),
    ] = None,
    search: Annotated[
        str | None,
        opt.option(
            "grid (all rates at full length), halving (default: all at 1/4, the best two and better neighbours in "
            "full) or quick (all at 1/4, the best one in full). With --budget: the most thorough that fits.",
            _COMPARISON,
        ),
    ] = None,
    seeds: Annotated[int | None, opt.option("Seeds at the best rate, from --seed on (default 1).", _COMPARISON)] = None,
    budget: Annotated[
        str | None,
        opt.option("Time for all runs, such as 20m or 1h30m: chooses the search and stops in time.", _COMPARISON),
    ] = None,
    validations: Annotated[
        int | None, opt.option("Validations of a run of full length (default 8).", _COMPARISON)
    ] = None,
    jobs_per_device: Annotated[
        int | None, opt.option("Runs at a time on a GPU or on the CPU; above 1 no time is reported.", _COMPARISON)
    ] = None,
    model: Annotated[
        str | None,
        opt.option("llama-1m (default), -3m, -20m, -60m to -7b, a config.json, or a checkpoint.", opt.MODEL),
    ] = None,
    data: opt.DataOption = None,
    text_field: opt.TextFieldOption = None,
    valid_data: opt.ValidDataOption = None,
    valid_fraction: opt.ValidFractionOption = None,
    valid_tokens: opt.ValidTokensOption = None,
    tokenizer: opt.TokenizerOption = None,
    rank: opt.RankOption = None,
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
    diagnose: opt.DiagnoseOption = None,
    seed: opt.SeedOption = None,
    preset: opt.PresetOption = None,
    config: Annotated[
        Path | None,
        opt.option("YAML file of options: a comparison.yaml, or a run's config.yaml; the command line wins.", opt.RUN),
    ] = None,
    out: Annotated[
        Path | None,
        opt.option("Folder of the comparison (default runs/compare-<digest of the training's options>).", opt.RUN),
    ] = None,
    retry_failed: Annotated[
        bool, opt.option("Make runs that failed again; diverged ones stay.", opt.RUN, "--retry-failed")
    ] = False,
    render: Annotated[
        bool, opt.option("Only write tables, figures and page again, from the runs in --out.", opt.RUN, "--render")
    ] = False,
) -> None:
    """Compare optimizers: same data, same start, each at its best learning rate.

    The same command goes on where an interrupted one ended. Without options: four optimizers on the source code of
    Python's standard library, a few minutes on two cores.
    """
    training = opt.training_options(locals(), rank)
    # Slow to import, and not needed for --help.
    from lorapre.lab.compare.arena import run_comparison
    from lorapre.lab.compare.config import build_compare_config
    from lorapre.lab.compare.contestants import split_names
    from lorapre.lab.config import option_name

    comparison = {
        "optimizers": None if optimizers is None else split_names(optimizers),
        "lr_grid": lr_grid,
        "search": search,
        "seeds": seeds,
        "budget": budget,
        "validations": validations,
        "jobs_per_device": jobs_per_device,
    }
    _check_plotly()
    console = opt.standard_output()
    if render:
        if out is None:
            raise UserError("--render: of which comparison? Give its folder with --out.")
        others = {**training, **comparison, "preset": preset, "config": config, "retry_failed": retry_failed or None}
        idle = ", ".join(option_name(name) for name, value in others.items() if value is not None)
        if idle:
            raise UserError(
                f"--render: shows the runs in {out} as they were asked for, which {idle} would not change. Give --out "
                "alone, or leave --render out."
            )
        _report(ArenaFolder(out), console)
        return
    given = {name: value for name, value in comparison.items() if value is not None}
    settings = build_compare_config(training, given, preset=preset, config_file=config)
    out = out or _default_out(settings.training.to_yaml())
    command = shlex.join(["lorapre", *sys.argv[1:]])
    try:
        run_comparison(settings, out, console, command=command, retry_failed=retry_failed)
    except KeyboardInterrupt:
        console.print(
            f"Interrupted. The runs that were complete are safe in {out}; the same command goes on from there.",
            soft_wrap=True,
            markup=False,
        )
        raise typer.Exit(130) from None
    _report(ArenaFolder(out), console)


def _default_out(training: str) -> Path:
    """The same for the same training, so that repeating a command finds what it has."""
    return Path("runs") / f"compare-{hashlib.sha256(training.encode()).hexdigest()[:8]}"


def _check_plotly() -> None:
    if importlib.util.find_spec("plotly") is None:
        raise UserError("lorapre compare: its page needs the package plotly. Install it: pip install 'lorapre[lab]'.")


def _report(folder: ArenaFolder, console: Console) -> None:
    from lorapre.lab.compare.collect import collect
    from lorapre.lab.compare.figures import write_figures
    from lorapre.lab.compare.page import write_page
    from lorapre.lab.compare.tables import rich_table, write_tables

    comparison = collect(folder)
    page = folder.path / "report.html"
    write_tables(comparison, folder.path)
    write_figures(comparison, folder.path)
    write_page(comparison, page)
    console.print(rich_table(comparison))
    for note in comparison.notes:
        console.print(note, soft_wrap=True, markup=False)
    console.print(f"report: {page} (also table.md, table.csv, table.json, *.png)", soft_wrap=True, markup=False)
