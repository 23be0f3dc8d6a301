"""The command line: what is asked for, checked before anything is measured."""

from __future__ import annotations

import lorapre.lab.quiet  # noqa: F401  # isort: skip  (first: it keeps packages from printing when imported)

import argparse
import math
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from lorapre.lab.errors import UserError
from lorapre.lab.models import LLAMAS
from lorapre.lab.provenance import provenance
from step_time.clock import limits
from step_time.contestants import CPU_KINDS, KINDS, contestants
from step_time.measure import Effort
from step_time.plan import Plan
from step_time.report import publish, write_readme
from step_time.rows import Results
from step_time.session import Session, say
from step_time.weights import smallest_side

RANKS = (8, 16, 32, 64, 128, 256, 512)
DTYPES = ("float32", "bfloat16")
BACKENDS = ("auto", "triton", "eager")
GPU_MODELS = ("llama-1b", "llama-60m", "llama-350m", "llama-7b")
GPU_TRAINING = ("llama-1b", "llama-350m")
#: Rounds times steps: beyond it plain steps would meet the rare ones of GaLore and its kin.
MOST_STEPS = 150
#: Also in ``provenance``, if they are there.
PACKAGES = ("triton", "torchao", "bitsandbytes", "galore-torch", "apollo-torch", "fira")


def names(option: str, text: str, known: Iterable[str]) -> tuple[str, ...]:
    """Some of ``known``, separated by commas.

    Raises:
        UserError: another name, or one twice.
    """
    found, choice = tuple(text.split(",")), list(known)
    for name in found:
        if name not in choice:
            raise UserError(f"{option} {name}: there is no such choice. Give some of {','.join(choice)}.")
    if len(set(found)) < len(found):
        raise UserError(f"{option} {text}: a name occurs twice. Give each once.")
    return found


def whole(option: str, text: str, least: int = 1) -> int:
    """A whole number from ``least`` on.

    Raises:
        UserError: something else.
    """
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise UserError(f"{option} {text}: is not a whole number from {least} on. Give one such as {max(least, 8)}.")
    return int(text)


def ranks(option: str, text: str, models: Iterable[str]) -> tuple[int, ...]:
    """Whole numbers, separated by commas, all below the smallest side of every model's matrices.

    Raises:
        UserError: otherwise.
    """
    found = tuple(whole(option, one) for one in text.split(","))
    for model in models:
        side = smallest_side(model)
        for rank in found:
            if rank >= side:
                raise UserError(
                    f"{option} {rank}: {model} has matrices of a smaller side of {side}, which would not be "
                    f"compressed. Give ranks below {side}, or leave {option} out, which takes those that fit each "
                    "model."
                )
    return tuple(dict.fromkeys(found))


def seconds(option: str, text: str) -> float:
    """90s, 9m or 1.5h.

    Raises:
        UserError: something else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if match is None:
        raise UserError(f"{option} {text}: is not a time. Write it as 90s, 9m or 1.5h.")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def pattern(option: str, text: str) -> re.Pattern[str]:
    """A regular expression.

    Raises:
        UserError: it is none.
    """
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(f"{option} {text}: is no regular expression ({error}). Give one such as LoRAPre.") from None


def batches(option: str, text: str) -> dict[str, int]:
    """``llama-1b=8,llama-350m=16``.

    Raises:
        UserError: otherwise.
    """
    found = {}
    for part in text.split(","):
        model, _, batch = part.partition("=")
        names(option, model, LLAMAS)
        found[model] = whole(option, batch)
    return found


def parser(description: str | None) -> argparse.ArgumentParser:
    """All options as text; `plan_of` reads them."""
    made = argparse.ArgumentParser(
        prog="step_time", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Callable[..., Any] = made.add_argument
    add("--out", type=Path, required=True, help="folder of step_time.json; rows that it has are not made again")
    add("--models", help=f"of {','.join(LLAMAS)}; on a GPU by default {','.join(GPU_MODELS)}, else llama-60m")
    add("--dtypes", help="of float32,bfloat16; default: both on a GPU, else float32")
    add("--ranks", help=f"of LoRAPreAdamW; default: those of {','.join(map(str, RANKS))} that fit each model")
    add("--other-ranks", help="of all others that have a rank, and of the CUDA graph; default: 128")
    add("--contestants", help=f"of {','.join(KINDS)}; default: all on a GPU, else {','.join(CPU_KINDS)}")
    add("--backends", default="auto", help="of LoRAPreAdamW and LoRAPreMuon: auto,triton,eager")
    add("--layers", default="fit", help="a number, or as many as the GPU's memory allows")
    add(
        "--training",
        help="models of whole training steps, or none; default: on a GPU llama-1b,llama-350m if --models has them",
    )
    add("--training-ranks", help="of LoRAPreAdamW there; default: those of 32,128,512 that fit")
    add("--batch", help="of whole training steps, such as llama-1b=8; halved until it fits")
    add("--sequence", default="1024", help="tokens of a sequence there")
    add("--rounds", default="5", help="turns that a row and fused AdamW take at most")
    add("--steps", default="5", help="timed steps of each turn")
    add("--row-seconds", default="20s", help="no turn of a row begins later")
    add("--rare-layers", default="1", help="layers whose SVD is timed; the whole is extrapolated")
    add("--budget", help="90s, 9m, 1.5h: no row begins later; the same command goes on")
    add(
        "--again",
        help="a regular expression: rows of optimizers whose name has it are made anew, all that "
        "are asked for; leave it out to go on",
    )
    add("--publish", action="store_true", help="measure nothing: table and figures of the rows in --out")
    add("--readme", action="store_true", help="put them into README.md too")
    return made


def plan_of(given: argparse.Namespace, *, on_gpu: bool) -> Plan:
    """What is to be measured.

    Raises:
        UserError: an option makes no sense.
    """
    models = names("--models", given.models or (",".join(GPU_MODELS) if on_gpu else "llama-60m"), LLAMAS)
    dtypes = names("--dtypes", given.dtypes or (",".join(DTYPES) if on_gpu else "float32"), DTYPES)
    kinds = names("--contestants", given.contestants or ",".join(KINDS if on_gpu else CPU_KINDS), KINDS)
    training: tuple[str, ...] = ()
    if on_gpu and given.training is None:
        training = tuple(model for model in GPU_TRAINING if model in models)
    if given.training not in (None, "none"):
        training = names("--training", given.training, LLAMAS)
    everyone = contestants(names("--backends", given.backends, BACKENDS))
    return Plan(
        models=models,
        dtypes=dtypes,
        contestants=[one for one in everyone if one.kind in kinds],
        ranks=RANKS if given.ranks is None else ranks("--ranks", given.ranks, models),
        other_ranks=(128,) if given.other_ranks is None else ranks("--other-ranks", given.other_ranks, models),
        training=training,
        training_ranks=(32, 128, 512)
        if given.training_ranks is None
        else ranks("--training-ranks", given.training_ranks, training),
        batches={} if given.batch is None else batches("--batch", given.batch),
    )


def effort_of(given: argparse.Namespace) -> Effort:
    """How much time a row takes.

    Raises:
        UserError: it would not be measured as said.
    """
    rounds, steps = whole("--rounds", given.rounds), whole("--steps", given.steps)
    if rounds * (steps + 1) > MOST_STEPS:
        raise UserError(
            f"--rounds {rounds} --steps {steps}: are more than {MOST_STEPS} steps of a row, and GaLore's would meet an "
            "SVD. Give fewer."
        )
    row_seconds, rare_layers = seconds("--row-seconds", given.row_seconds), whole("--rare-layers", given.rare_layers)
    return Effort(rounds, steps, row_seconds, rare_layers)


def measure(given: argparse.Namespace, began: float) -> Session:
    """Read the options, and make the rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan, effort = plan_of(given, on_gpu=device.type == "cuda"), effort_of(given)
    layers = None if given.layers == "fit" else whole("--layers", given.layers)
    again = None if given.again is None else pattern("--again", given.again)
    sequence = whole("--sequence", given.sequence, 2)
    budget = math.inf if given.budget is None else seconds("--budget", given.budget)
    if given.out.exists() and not given.out.is_dir():
        raise UserError(f"--out {given.out}: is a file. Give a folder.")
    results = Results.load(given.out)
    found = provenance(*PACKAGES, seed=0)
    commands = results.origin.get("commands", [])
    results.go_on(found)
    machine = limits(device, plan.dtypes)
    results.origin |= {"threads": torch.get_num_threads() if device.type == "cpu" else None}
    results.origin |= {"limits": {"copy_bytes_per_second": machine.copy, "product_flops": machine.product}}
    results.origin |= {"commands": list(dict.fromkeys([*commands, _command(given)]))}
    products = ", ".join(f"{dtype} products {rate / 1e12:.4g} TFLOP/s" for dtype, rate in machine.product.items())
    say(f"{found['hardware']}: copy {machine.copy / 1e9:.4g} GB/s, {products}")
    session = Session(
        results,
        plan,
        device=device,
        limits=machine,
        effort=effort,
        layers=layers,
        sequence=sequence,
        deadline=began + budget,
        again=again,
    )
    session.run()
    return session


def _command(given: argparse.Namespace) -> str:
    """What was asked for, without what says how long and where."""
    silent = {"out", "budget", "again", "publish", "readme"}
    said = {name: value for name, value in vars(given).items() if name not in silent}
    changed = {name: value for name, value in said.items() if value != parser(None).get_default(name)}
    return " ".join(
        ["python benchmarks/step_time", *(f"--{name.replace('_', '-')} {changed[name]}" for name in changed)]
    )


def main(began: float, description: str | None, arguments: list[str] | None = None) -> None:
    """Parse, measure, publish. ``began`` is when the process did, by `time.monotonic`."""
    given = parser(description).parse_args(arguments)
    try:
        session = None if given.publish else measure(given, began)
        results = Results.load(given.out)
        if not results.steps:
            raise UserError(f"--out {given.out}: has no row of which a table could be made. Measure first.")
        publish(results)
        if given.readme:
            write_readme(results)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted; go on with the same command")
    print((given.out / "table.md").read_text(encoding="utf-8"))
    if session is not None and session.left:
        say(f"{session.left} rows are left: the same command goes on ({time.monotonic() - began:.0f} s so far).")
    if session is not None and session.failed:
        sys.exit("failed: " + "; ".join(session.failed))
