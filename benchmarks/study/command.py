"""The command line of the study."""

from __future__ import annotations

import lorapre.lab.quiet  # noqa: F401  # isort: skip  (first: it keeps packages from printing when imported)

import argparse
import math
import re
import shutil
import signal
import sys
from pathlib import Path

from study.figures import write_figures
from study.plan import STAGES
from study.profiles import PROFILES
from study.report import write_tables
from study.rows import Rows
from study.session import Session, say

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "benchmarks" / "results" / "study"
RESULTS = {"main": STUDY, "variants": STUDY / "variants"}
#: Figures that a page of the documentation shows; a page can only show what lies beside it.
SHOWN = {RESULTS["main"] / "curves.png": "study-curves.png", RESULTS["variants"] / "gain.png": "study-gain.png"}


def seconds(text: str) -> float:
    """90s, 25m or 1.5h."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not written as 90s, 25m or 1.5h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def stages(text: str) -> tuple[str, ...]:
    """Names of `STAGES`, separated by commas."""
    names = tuple(text.split(","))
    if not set(names) <= set(STAGES) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r}: name some of {','.join(STAGES)}, each once")
    return names


def pattern(text: str) -> re.Pattern[str]:
    """A regular expression."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression ({error})") from None


def main(began: float, description: str | None) -> None:
    """Parse the command line; train, publish. ``began`` is when the process did, by `time.monotonic`."""
    parser = argparse.ArgumentParser(
        prog="study", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, default=Path("corpus"))
    parser.add_argument("--profile", choices=PROFILES, default="main")
    parser.add_argument("--work", type=Path, help="folder of rows.jsonl and what is made of it; default: the results")
    parser.add_argument("--jobs-per-device", type=int, help="runs at a time on one GPU (default 3) or the CPU (1)")
    parser.add_argument("--budget", type=seconds, default=math.inf, help="90s, 25m, 1.5h; default: all that is wanted")
    parser.add_argument("--stages", type=stages, default=STAGES, help=f"default: {','.join(STAGES)}")
    parser.add_argument("--only", type=pattern, help="a regular expression: only runs whose printed name has it")
    parser.add_argument("--publish", action="store_true", help="make no run")
    arguments = parser.parse_args()
    work: Path | None = arguments.work or RESULTS.get(arguments.profile)
    if work is None:
        parser.error(f"--profile {arguments.profile} has no results in this repository. Give --work.")
    # As an end like any other: its processes are stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal; go on with the same command"))
    profile = PROFILES[arguments.profile]
    try:
        rows = Rows(work / "rows.jsonl")
        if not arguments.publish:
            session = Session(profile, rows, arguments.stages, began + arguments.budget, arguments.only)
            session.make_runs(arguments.corpus, arguments.jobs_per_device)
    except KeyboardInterrupt:
        sys.exit("interrupted; go on with the same command")
    if rows.all:
        write_tables(rows, profile, work)
        write_figures(rows, profile.model, profile.tokens, work)
        for figure, name in SHOWN.items():
            if figure.parent == work.resolve():
                shutil.copyfile(figure, ROOT / "docs" / "figures" / name)
        say(f"{len(rows.all)} runs; tables and figures are in {work}")
    else:
        say(f"{rows.path} holds no run, of which nothing can be written.")
