"""Where the time of one step of LoRAPreAdamW goes on a GPU, kernel by kernel.

    python benchmarks/step_profile.py --ranks 16,64,128 --out benchmarks/results/step-time
    python benchmarks/step_profile.py --ranks 16,64,128,512 --resting --out benchmarks/results/step-time

Writes ``profile.json`` and ``profile.md`` there, or ``resting.json`` and ``resting.md`` of steps that do not sweep. The
weights are those of ``benchmarks/step_time``; times are the device's, by torch.profiler, a mean of some steps, so that
what lies between two kernels is in none of them.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from step_time.clock import EXECUTED, traced
from step_time.command import DTYPES, names, ranks
from step_time.measure import WARM_UP, cycle
from step_time.weights import Matrices, fitting_layers

from lorapre import LoRAPreAdamW, param_groups
from lorapre.lab.errors import UserError
from lorapre.lab.models import LLAMAS
from lorapre.lab.provenance import provenance
from lorapre.lab.run_folder import write_json, write_text

STEPS = 5
#: Kernels whose share is below it are summed up.
LEAST_SHARE = 0.01
#: Steps from sweep to sweep where none is to be profiled.
LONG = 1000
REST = "others"


def kernels(events: Iterable[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Milliseconds and launches a step by name of the kernel, the dearest first; small ones as `REST` at the end."""
    spent: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") in EXECUTED:
            spent[str(event["name"])].append(float(event["dur"]) / 1e3)
    total = sum(sum(times) for times in spent.values())
    rows, rest = [], list[float]()
    for name, times in spent.items():
        if sum(times) < LEAST_SHARE * total:
            rest += times
        else:
            rows.append(_row(name, times, steps, total))
    rows.sort(key=lambda row: -row["ms"])
    return [*rows, _row(REST, rest, steps, total)] if rest else rows


def _row(name: str, times: list[float], steps: int, total: float) -> dict[str, Any]:
    return {
        "kernel": name,
        "launches": round(len(times) / steps, 2),
        "ms": round(sum(times) / steps, 4),
        "share": round(sum(times) / total, 4),
    }


def table(found: Iterable[dict[str, Any]]) -> str:
    """All profiles in Markdown."""
    lines = ["| dtype | r | kernel | launches | ms | share |", "|---|---:|---|---:|---:|---:|"]
    for one in found:
        for row in one["kernels"]:
            name = row["kernel"] if len(row["kernel"]) <= 60 else row["kernel"][:57] + "..."
            lines.append(
                f"| {one['dtype']} | {one['rank']} | `{name}` | {row['launches']:g} | {row['ms']:.2f} "
                f"| {row['share']:.0%} |"
            )
        lines.append(f"| {one['dtype']} | {one['rank']} | **sum** | | **{one['ms']:.2f}** | |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Profile, write."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--model", default="llama-1b", choices=tuple(LLAMAS))
    made.add_argument("--dtypes", default=",".join(DTYPES))
    made.add_argument("--ranks", default="16,64,128")
    made.add_argument("--resting", action="store_true", help="steps between two sweeps, not those that sweep")
    made.add_argument("--backend", default="auto", choices=("auto", "triton", "eager"))
    given = made.parse_args(arguments)
    dtypes, chosen = names("--dtypes", given.dtypes, DTYPES), ranks("--ranks", given.ranks, (given.model,))
    if not torch.cuda.is_available():
        raise UserError("No GPU is there, and what is profiled is a GPU's time. Run this on a machine that has one.")
    device = torch.device("cuda")
    memory = torch.cuda.get_device_properties(device).total_memory
    found = []
    for dtype in dtypes:
        kind = getattr(torch, dtype)
        module = Matrices(given.model, fitting_layers(given.model, kind, memory), kind, device)
        for rank in chosen:
            interval = LONG if given.resting else 1
            optimizer = LoRAPreAdamW(param_groups(module), 1e-5, rank, backend=given.backend, sweep_interval=interval)
            for _ in range(WARM_UP):
                optimizer.step()
            rows = kernels(traced(cycle(optimizer.step, STEPS)), STEPS)
            ms = round(sum(row["ms"] for row in rows), 4)
            found.append({"model": given.model, "dtype": dtype, "rank": rank, "ms": ms, "kernels": rows})
            del optimizer
            torch.cuda.empty_cache()
    origin = provenance("triton", seed=0)
    name = "resting" if given.resting else "profile"
    write_json(given.out / f"{name}.json", {"profiles": found, "provenance": origin})
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    command = f"python benchmarks/step_profile.py --model {given.model} --dtypes {given.dtypes} --ranks {given.ranks}"
    command += " --resting" if given.resting else ""
    command += "" if given.backend == "auto" else f" --backend {given.backend}"
    tail = f"{origin['hardware']}, {origin['date'][:10]}, {versions}; `{command}`."
    write_text(given.out / f"{name}.md", f"{table(found)}\n\n{tail}\n")
    print(table(found))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
