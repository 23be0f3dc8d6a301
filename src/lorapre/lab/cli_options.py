"""The options that the commands share, each with its help."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel

from lorapre.lab.config import PRESETS, PretrainConfig, parse_rank

MODEL, OPTIMIZER, TRAINING, RUN = "Model and data", "Optimizer", "Training", "Run"


def option(help_text: str, panel: str, *names: str) -> Any:
    """A typer option whose default the help text itself tells."""
    return typer.Option(*names, help=help_text, rich_help_panel=panel, show_default=False)


ModelOption = Annotated[
    str | None,
    option("llama-3m (default), -1m, -20m, -60m, -130m, -350m, -1b, -7b, a config.json, or a checkpoint.", MODEL),
]
DataOption = Annotated[
    list[str] | None,
    option(
        "stdlib (default: the source of Python's standard library), files or globs (txt, jsonl, parquet; xz, gz, "
        "zst; quote globs), or hf:<dataset>:<config>; hf alone is C4. Repeatable.",
        MODEL,
    ),
]
TextFieldOption = Annotated[str | None, option("Field or column that holds the text (default text).", MODEL)]
ValidDataOption = Annotated[
    list[str] | None, option("Files or globs to validate on, instead of a held-out part. Repeatable.", MODEL)
]
ValidFractionOption = Annotated[float | None, option("Share of documents to hold out (default 0.05).", MODEL)]
ValidTokensOption = Annotated[int | None, option("Validate on at most so many tokens (default 50000).", MODEL)]
TokenizerOption = Annotated[
    str | None,
    option("bpe:SIZE (default: trained on the data), a tokenizer.json, a folder, or a hub name.", MODEL),
]
RankOption = Annotated[str | None, option("Rank, or fraction of each matrix's smaller side (default 0.25).", OPTIMIZER)]
DenseLrOption = Annotated[float | None, option("Peak learning rate of embeddings, head, norms (likewise).", OPTIMIZER)]
Beta1Option = Annotated[float | None, option("Decay of the first moment (default 0.9).", OPTIMIZER)]
Beta2Option = Annotated[float | None, option("Decay of the second moment (default 0.95).", OPTIMIZER)]
WeightDecayOption = Annotated[float | None, option("Decoupled weight decay of matrices (default 0).", OPTIMIZER)]
MaxGradNormOption = Annotated[float | None, option("Clip the gradient's norm; 0 does not (default 1).", OPTIMIZER)]
ScheduleOption = Annotated[str | None, option("cosine (default), linear or constant.", TRAINING)]
WarmupOption = Annotated[float | None, option("Share of steps to warm up in (default 0.1).", TRAINING)]
MinLrRatioOption = Annotated[
    float | None, option("Share of the peak at which cosine and linear end (default 0.1).", TRAINING)
]
BatchSizeOption = Annotated[int | None, option("Sequences a step, over all processes (default 8).", TRAINING)]
AccumulationOption = Annotated[
    int | None, option("Forward passes that a process splits its share into (default 1).", TRAINING)
]
SequenceLengthOption = Annotated[int | None, option("Tokens a sequence (default 128).", TRAINING)]
StepsOption = Annotated[int | None, option("Optimizer steps (default 600).", TRAINING)]
TokensOption = Annotated[int | None, option("Training tokens, instead of steps.", TRAINING)]
Bf16Option = Annotated[bool | None, option("Autocast to bfloat16; weights stay float32.", TRAINING)]
CompileOption = Annotated[bool | None, option("Compile the model with torch.compile.", TRAINING)]
LogEveryOption = Annotated[int | None, option("Steps between records of the loss (default 1 %).", RUN)]
DiagnoseOption = Annotated[
    int | None, option("Steps between measurements of the momentum (default: none are made).", RUN)
]
SeedOption = Annotated[int | None, option("Of weights, factors and data order (default 0).", RUN)]
PresetOption = Annotated[str | None, option(f"The paper's protocol: {', '.join(PRESETS)}.", RUN)]


def training_options(given: dict[str, Any], rank: str | None) -> dict[str, Any]:
    """What was given of the options of `PretrainConfig`, from a command's ``locals()``."""
    known = {name: value for name, value in given.items() if name in PretrainConfig.model_fields}
    options = {name: value for name, value in known.items() if value is not None and value != []}
    if rank is not None:
        options["rank"] = parse_rank(rank, f"--rank {rank}")
    return options


def standard_output() -> Console:
    """Standard output of the first process; the others of a torchrun job are silent."""
    return Console(quiet=os.environ.get("RANK", "0") != "0", highlight=False)


def print_error(message: str) -> None:
    """On the first process: in a torchrun job all fail for the same reason."""
    console = Console(stderr=True, highlight=False, quiet=os.environ.get("RANK", "0") != "0")
    console.print(Panel(message, title="Error", title_align="left", border_style="red"), markup=False)
