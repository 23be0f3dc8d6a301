"""README's figure and numbers of the main job: `lorapre pretrain --compare adamw`, from scratch.

python benchmarks/main_job.py            # about 8 minutes on 2 cores; then README.md and results/main-job change
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lorapre.optim.summary import format_bytes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "main-job"
BEGIN, END = "<!-- main job: begin -->", "<!-- main job: end -->"


def section(summary: dict[str, Any], origin: dict[str, Any]) -> str:
    """What README says of the run."""
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    lines = [
        f"`lorapre pretrain --compare adamw`: a Llama of {summary['parameters']:,} parameters, {summary['tokens']:,} "
        f"tokens of {summary['data']}.",
        "",
        "| | learning rate | validation loss | perplexity | optimizer state | training time |",
        "|---|---|---|---|---|---|",
    ]
    for run in (summary, *summary["compare"].values()):
        lines.append(
            f"| {run['optimizer']} | {run['lr']:g} | {run['valid_loss']:.3f} | {run['valid_perplexity']:.1f} "
            f"| {format_bytes(run['state_bytes'])} | {run['seconds']:.0f} s |"
        )
    lines += [
        f"| bigram model (Kneser-Ney) | | {summary['bigram_loss']:.3f} | {summary['bigram_perplexity']:.1f} | | |",
        "",
        "![Loss of LoRA-Pre and AdamW against tokens](benchmarks/results/main-job/loss.png)",
        "",
        f"{origin['hardware']}, {origin['date'][:10]}, {versions}, seed {origin['seed']}; made by "
        "`python benchmarks/main_job.py`. AdamW's rate is the best of a search on two seeds "
        "([table](benchmarks/results/learning-rates/table.md), `python benchmarks/learning_rates.py`); LoRA-Pre's "
        "is that of [the study](docs/study-defaults.md). One seed, and a run thousands of times shorter than the "
        "paper's: it shows that the recipe works, not which optimizer is better.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Train, keep the small files, and rewrite README's section."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "main-job"
        command = [sys.executable, "-c", "from lorapre.lab.cli import main; main()", "pretrain", "--compare", "adamw"]
        subprocess.run([*command, "--out", str(out)], check=True)
        RESULTS.mkdir(parents=True, exist_ok=True)
        for name in ("config.yaml", "loss.png", "metrics.jsonl", "provenance.json", "summary.json"):
            shutil.copyfile(out / name, RESULTS / name)
        shutil.copyfile(out / "compare-adamw" / "metrics.jsonl", RESULTS / "metrics-adamw.jsonl")
    summary = json.loads((RESULTS / "summary.json").read_text(encoding="utf-8"))
    origin = json.loads((RESULTS / "provenance.json").read_text(encoding="utf-8"))
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{section(summary, origin)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
