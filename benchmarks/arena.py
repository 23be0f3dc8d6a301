"""The arena behind ``results/arena-*``: LoRA-Pre against its rivals on real text, learning rates searched for each.

    python benchmarks/arena.py 20m --corpus corpus --work runs/arena-20m --jobs-per-device 3 --seeds 2

goes on with the runs that ``results/arena-20m/runs.tar.xz`` holds, makes those that are missing, and writes the folder
again. ``--corpus`` is a folder with ``train-00.txt.xz``, ``train-01.txt.xz``, ``valid.txt.xz`` and ``tokenizer.json``
(English prose and technical prose, 45 million training tokens in the tokenizer's 32,000 entries; its licences do not
allow it to be part of this repository). ``--publish`` makes no run.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

#: The paper's preset at two ranks, the same regression with this library's safeguards, and the rivals that the paper
#: and its reviewers name; GaLore once more at the bytes of LoRA-Pre's lower rank.
CONTESTANTS = (
    "lorapre-adamw-paper@1/4,lorapre-adamw-paper@1/32,"
    "lorapre-adamw+regression=newton+second_moment=hadamard+residual_gain=null+eps_mode=absolute@1/4,"
    "adamw,adam-beta1-0,muon,galore@1/4,fira@1/4,apollo@1/4,galore-ours@=lorapre-adamw-paper@1/32,adafactor,adamw-8bit"
)

#: What all arenas share: 50 million tokens in 1,525 steps of 128 x 256, embeddings, head and norms at one rate.
TRAINING = (
    "--data 'corpus/train-0[01].txt.xz' --valid-data corpus/valid.txt.xz --tokenizer corpus/tokenizer.json "
    "--tokens 50000000 --batch-size 128 --sequence-length 256 --valid-tokens 250000 --dense-lr 2.5e-3 --bf16 --compile "
    "--log-every 25 --validations 15"
)

ARENAS = {size: f"--model llama-{size} {TRAINING} --optimizers {CONTESTANTS} --search quick" for size in ("20m", "60m")}

REPORT = ("report.html", "table.md", "table.csv", "table.json", "comparison.yaml", "plan.json", "provenance.json")


def restore(archive: Path, work: Path) -> None:
    """Unpack the published runs into ``work``, unless it has runs of its own."""
    if archive.exists() and not (work / "runs").exists():
        work.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            tar.extractall(work, filter="data")


def publish(work: Path, results: Path) -> None:
    """Copy the report of ``work``, and its runs without their logs, which name paths of the machine."""
    results.mkdir(parents=True, exist_ok=True)
    for name in (*REPORT, *(path.name for path in work.glob("*.png"))):
        shutil.copyfile(work / name, results / name)
    kept = ("comparison.yaml", "plan.json", "provenance.json", "runs", "timings")
    with tarfile.open(results / "runs.tar.xz", "w:xz") as tar:
        for name in kept:
            if (work / name).exists():
                tar.add(work / name, arcname=name, filter=lambda item: None if item.name.endswith("log.txt") else item)


def main() -> None:
    """Parse the command line, compare, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arena", choices=ARENAS)
    parser.add_argument("--corpus", type=Path, default=Path("corpus"))
    parser.add_argument("--work", type=Path, required=True, help="folder of the comparison")
    parser.add_argument("--publish", action="store_true", help="only write the report again and copy it")
    arguments, options = parser.parse_known_args()
    results, work = RESULTS / f"arena-{arguments.arena}", arguments.work.resolve()
    restore(results / "runs.tar.xz", work)
    lorapre = [sys.executable, "-c", "from lorapre.lab.cli import main; main()", "compare"]
    if arguments.publish:
        subprocess.run([*lorapre, "--render", "--out", str(work)], check=True)
    else:
        command = [*shlex.split(ARENAS[arguments.arena]), *options]
        # The command in the report names the corpus relative to where it ran.
        subprocess.run([*lorapre, *command, "--out", work.name], cwd=_beside(work, arguments.corpus), check=True)
    publish(work, results)


def _beside(work: Path, corpus: Path) -> Path:
    """The folder of ``work``, with the corpus as ``corpus`` in it."""
    work.parent.mkdir(parents=True, exist_ok=True)
    link = work.parent / "corpus"
    if not link.exists():
        link.symlink_to(corpus.resolve())
    return work.parent


if __name__ == "__main__":
    main()
