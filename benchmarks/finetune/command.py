"""The command line of the fine-tuning tables."""

from __future__ import annotations

import lorapre.lab.quiet  # noqa: F401  # isort: skip  (first: it keeps packages from printing when imported)

import argparse
import math
import signal
import sys
from collections import Counter
from pathlib import Path

from study.command import pattern, seconds
from study.session import say

from finetune.figures import write_figures
from finetune.material import make_data, make_model
from finetune.plan import STAGES, forecast
from finetune.profiles import PROFILES, Profile, tiny
from finetune.report import write_tables
from finetune.rows import Rows
from finetune.session import Session
from lorapre.lab.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def stages(text: str) -> tuple[str, ...]:
    """Names of `STAGES`, separated by commas."""
    names = tuple(text.split(","))
    if not set(names) <= set(STAGES) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r}: name some of {','.join(STAGES)}, each once")
    return names


def main(began: float, description: str | None) -> None:
    """Parse the command line; prepare, train, publish. ``began`` is when the process did, by `time.monotonic`."""
    parser = argparse.ArgumentParser(
        prog="finetune", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prepare", choices=("model", "data"), help="make this part of the material, and stop")
    parser.add_argument("--gguf", type=Path, help="for --prepare model")
    parser.add_argument("--gsm8k", type=Path, help="for --prepare data: folder of train.jsonl and test.jsonl")
    parser.add_argument("--material", type=Path, default=Path("material"), help="folder of model and data")
    parser.add_argument("--task", choices=PROFILES)
    parser.add_argument("--profile", choices=("main", "tiny"), default="main")
    parser.add_argument("--work", type=Path, help="folder of rows.jsonl and what is made of it; default: the results")
    parser.add_argument("--jobs-per-device", type=int, help="runs at a time on one GPU (default 3) or the CPU (1)")
    parser.add_argument("--budget", type=seconds, default=math.inf, help="90s, 25m, 1.5h; default: all that is wanted")
    parser.add_argument("--stages", type=stages, default=STAGES, help=f"default: {','.join(STAGES)}")
    parser.add_argument("--only", type=pattern, help="a regular expression: only runs whose printed name has it")
    parser.add_argument("--first", type=pattern, help="likewise: these runs before all others, whatever their stage")
    parser.add_argument("--dry-run", action="store_true", help="say what is still to be made, and stop")
    parser.add_argument("--publish", action="store_true", help="make no run")
    arguments = parser.parse_args()
    # As an end like any other: its processes are stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal; go on with the same command"))
    try:
        if arguments.prepare:
            _prepare(parser, arguments)
            return
        if arguments.task is None:
            parser.error("Which --task?")
        profile = PROFILES[arguments.task] if arguments.profile == "main" else tiny(PROFILES[arguments.task])
        work: Path | None = arguments.work
        if work is None:
            if arguments.profile != "main":
                parser.error(f"--profile {arguments.profile} has no results in this repository. Give --work.")
            work = RESULTS / f"finetune-{profile.task.name}"
        rows = Rows(work / "rows.jsonl")
        if arguments.dry_run:
            print(cost(profile, rows, arguments.stages))
            return
        if not arguments.publish:
            session = Session(
                profile, rows, arguments.stages, began + arguments.budget, arguments.only, arguments.first
            )
            session.make_runs(arguments.material, arguments.jobs_per_device)
    except KeyboardInterrupt:
        sys.exit("interrupted; go on with the same command")
    except (UserError, ValueError) as error:
        sys.exit(str(error))
    if rows.all:
        write_tables(rows, profile, work)
        write_figures(rows, profile, work)
        say(f"{len(rows.all)} runs; tables and figures are in {work}")
    else:
        say(f"{rows.path} holds no run, of which nothing can be written.")


def _prepare(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    option, make = ("gguf", make_model) if arguments.prepare == "model" else ("gsm8k", make_data)
    source = getattr(arguments, option)
    if source is None:
        parser.error(f"--prepare {arguments.prepare}: where from? Give --{option}.")
    make(source, arguments.material)
    say(f"{arguments.prepare} is in {arguments.material}")


def cost(profile: Profile, rows: Rows, wanted: tuple[str, ...]) -> str:
    """What is still to be made at least, in runs, tokens and (where such runs were made) seconds of one process."""
    coming = forecast(profile, rows.losses, wanted)
    counts = Counter((run.stage, run.kind) for run in coming)
    task = profile.task
    tests = sum(run.kind == "test" for run in coming)
    lines = [f"{task.name}: {len(coming)} runs at least, if every first rate is the best."]
    lines += [f"  {stage}: {count} x {kind}" for (stage, kind), count in sorted(counts.items())]
    session = Session(profile, rows, wanted, math.inf)
    train, asked = profile.train_examples or task.train_size, task.test_size or task.questions
    tokens = round(train * task.example_tokens)
    lines.append(
        f"  training: {len(coming)} x {tokens / 1e6:.2f} M tokens = {len(coming) * tokens / 1e6:.1f} M tokens, "
        f"{6 * PARAMETERS * len(coming) * tokens:.1e} operations"
    )
    generated = tests * asked * task.max_new_tokens
    lines.append(
        f"  tests: {tests} x {asked} answers of {task.max_new_tokens} tokens at most = {generated / 1e6:.1f} M"
    )
    estimate = sum(session.estimate(run) for run in coming)
    if estimate:
        lines.append(f"  at the pace of the rows: {estimate / 60:.0f} minutes of one process")
    return "\n".join(lines)


#: Of SmolLM2-135M; twice as many operations a token forwards, and four times backwards.
PARAMETERS = 134_515_008
