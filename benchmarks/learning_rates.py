"""Which learning rate each optimizer of the main job wants: the search behind the recipes' defaults.

    python benchmarks/learning_rates.py --jobs 2                    # about 3 hours on 2 cores
    python benchmarks/learning_rates.py --jobs 12                   # 2 minutes on one H100

Trains the main job (`lorapre pretrain`: llama-3m on the standard library's source, 600 steps of 8 x 128 tokens) at
every rate and seed, the matrices' rate varied and the dense parameters' kept, and writes `table.json` and `table.md`.
Runs that have finished in the work folder are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

RESULTS = Path(__file__).parent / "results" / "learning-rates"
DENSE_LR = 4e-3
GRID = {
    "lorapre-adamw": (5e-4, 1e-3, 2e-3),
    "lorapre-adamw-paper": (5e-4, 1e-3, 2e-3, 4e-3),
    "adamw": (5e-4, 1e-3, 2e-3),
}


def train(work: Path, optimizer: str, lr: float, seed: int, threads: int) -> Path:
    """One run in its own process; returns its folder."""
    out = work / f"{optimizer}-{lr:g}-{seed}"
    if not (out / "summary.json").exists():
        options = ["--optimizer", optimizer, "--lr", f"{lr:g}", "--dense-lr", f"{DENSE_LR:g}", "--seed", str(seed)]
        resume = ["--resume", "--out", str(out)] if (out / "config.yaml").exists() else [*options, "--out", str(out)]
        command = [sys.executable, "-c", "from lorapre.lab.cli import main; main()", "pretrain", *resume]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return out


def table(folders: list[Path]) -> dict[str, Any]:
    """All runs, with what they were measured on."""
    rows = []
    for folder in folders:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        seed = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["seed"]
        keys = ("optimizer", "rank", "lr", "dense_lr", "tokens", "valid_loss", "bigram_loss", "state_bytes")
        rows.append({**{key: summary[key] for key in keys}, "seed": seed})
    origin = json.loads((folders[0] / "provenance.json").read_text(encoding="utf-8"))
    return {**{key: origin[key] for key in ("date", "hardware", "versions", "data")}, "rows": rows}


def markdown(content: dict[str, Any]) -> str:
    """Mean over seeds and their spread, a line a rate."""
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    lines = [
        f"Validation loss of the main job, {content['hardware']}, {content['date'][:10]}, {versions}; "
        f"{content['data']['description']}; dense parameters at {DENSE_LR:g}.",
        "",
        "| optimizer | lr of matrices | mean loss | seeds |",
        "|---|---|---|---|",
    ]
    for optimizer, rates in GRID.items():
        for lr in rates:
            losses = [row["valid_loss"] for row in content["rows"] if (row["optimizer"], row["lr"]) == (optimizer, lr)]
            each = ", ".join(f"{loss:.4f}" for loss in losses)
            lines.append(f"| {optimizer} | {lr:g} | {mean(losses):.4f} | {each} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/learning-rates"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    arguments.work.mkdir(parents=True, exist_ok=True)
    cells = [(name, lr, seed) for seed in range(arguments.seeds) for name, rates in GRID.items() for lr in rates]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        folders = list(pool.map(lambda cell: train(arguments.work, *cell, threads), cells))
    content = table(folders)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "table.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "table.md").write_text(markdown(content), encoding="utf-8")
    print(markdown(content))


if __name__ == "__main__":
    main()
