"""Time of one optimizer step on a Llama's matrices, ours and torch's own, as ratios to fused AdamW in the same run.

    python benchmarks/step_time.py --models llama-60m --ranks 8,32,128 --out benchmarks/results/step-time-cpu
    python benchmarks/step_time.py --models llama-1b --ranks 32,128,512 --dtypes float32,bfloat16 --muon --out DIR

Weights are the matrices of the layers alone, with random gradients that stay. Every optimizer is timed in turn, round
after round, so that what else the machine does falls on all of them; a figure is the median over the rounds of the best
of three. On a GPU the times are CUDA events, and a step's launches and the memory that it needs on top are counted.
Writes ``step_time.json`` (a row a model, dtype, optimizer and rank) and ``table.md``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import nn

from lorapre import LoRAPreAdamW, LoRAPreMuon
from lorapre.lab.models import LLAMAS
from lorapre.lab.provenance import provenance
from lorapre.lab.run_folder import write_json, write_text

REFERENCE = "AdamW, fused"
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Timing:
    """A row of ``step_time.json``; bytes and launches are None where they cannot be counted."""

    device: str
    model: str
    dtype: str
    optimizer: str
    rank: int | None
    step_ms: float
    ratio_to_fused_adamw: float
    extra_bytes: int | None
    launches: int | None


def matrices(model: str, dtype: torch.dtype, device: torch.device) -> list[nn.Parameter]:
    """The seven matrices of each layer of a preset, with gradients."""
    size = LLAMAS[model]
    d, f = size.hidden, size.mlp
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in ([(d, d)] * 4 + [(f, d)] * 2 + [(d, f)]) * size.layers:
        param = nn.Parameter(torch.randn(shape, generator=generator, device=device).mul_(0.02).to(dtype))
        param.grad = torch.randn(shape, generator=generator, device=device).mul_(1e-3).to(dtype)
        params.append(param)
    return params


def optimizers(ranks: list[int], *, muon: bool) -> Iterator[tuple[str, int | None, Make]]:
    """Name, rank and constructor of each; ``muon`` those too that iterate on whole matrices."""
    yield REFERENCE, None, lambda params: torch.optim.AdamW(params, fused=True)
    yield "AdamW, foreach", None, lambda params: torch.optim.AdamW(params, foreach=True)
    yield "SGD, fused", None, lambda params: torch.optim.SGD(params, lr=1e-3, fused=True)
    if muon:
        yield "Muon", None, lambda params: torch.optim.Muon(params, adjust_lr_fn="match_rms_adamw")
    for rank in ranks:
        yield "LoRAPreAdamW", rank, lambda params, rank=rank: LoRAPreAdamW(params, rank=rank)
        if muon:
            yield "LoRAPreMuon", rank, lambda params, rank=rank: LoRAPreMuon(params, rank=rank)


def clocked(step: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one step."""
    if device.type == "cpu":
        began = time.perf_counter()
        step()
        return (time.perf_counter() - began) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def counted(step: Callable[[], object], device: torch.device) -> tuple[int | None, int | None]:
    """Bytes that a step allocates beyond what is held, and its kernel launches; on a GPU alone."""
    if device.type == "cpu":
        return None, None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - held
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return extra, sum(event.count for event in profile.key_averages())


def measure(
    model: str, dtype: torch.dtype, ranks: list[int], rounds: int, device: torch.device, *, muon: bool
) -> list[Timing]:
    """All optimizers on one model and dtype, on the same weights; each is made anew in every round."""
    times: dict[tuple[str, int | None], list[float]] = {}
    counts: dict[tuple[str, int | None], tuple[int | None, int | None]] = {}
    params = matrices(model, dtype, device)
    for number in range(rounds):
        for name, rank, make in optimizers(ranks, muon=muon):
            optimizer = make(params)
            for _ in range(2):
                optimizer.step()
            if number == 0:
                counts[name, rank] = counted(optimizer.step, device)
            times.setdefault((name, rank), []).append(min(clocked(optimizer.step, device) for _ in range(3)))
            del optimizer
    reference = median(times[REFERENCE, None])
    return [
        Timing(
            device=device.type,
            model=model,
            dtype=str(dtype).removeprefix("torch."),
            optimizer=name,
            rank=rank,
            step_ms=round(median(found), 3),
            ratio_to_fused_adamw=round(median(found) / reference, 3),
            extra_bytes=counts[name, rank][0],
            launches=counts[name, rank][1],
        )
        for (name, rank), found in times.items()
    ]


def table(rows: list[Timing], origin: dict[str, object], command: str) -> str:
    """The rows for people, and what they were measured on."""
    foreach = {(row.model, row.dtype): row.step_ms for row in rows if row.optimizer == "AdamW, foreach"}
    lines = [
        "| model | dtype | optimizer | rank | step, ms | to fused AdamW | to foreach AdamW | extra bytes | launches |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = (row.model, row.dtype, row.optimizer, row.rank, f"{row.step_ms:.3g}", f"{row.ratio_to_fused_adamw:.2f}",
                 f"{row.step_ms / foreach[row.model, row.dtype]:.2f}", row.extra_bytes, row.launches)  # fmt: skip
        lines.append("| " + " | ".join("–" if cell is None else str(cell) for cell in cells) + " |")
    versions = ", ".join(f"{name} {version}" for name, version in dict(origin["versions"]).items())  # type: ignore[call-overload]
    threads = f", {torch.get_num_threads()} threads" if rows[0].device == "cpu" else ""
    lines += ["", f"{origin['hardware']}{threads}, {str(origin['date'])[:10]}, {versions}, seed 0; `{command}`."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama-60m", help=f"some of {', '.join(LLAMAS)}")
    parser.add_argument("--ranks", default="8,32,128")
    parser.add_argument("--dtypes", default="float32", help="float32, bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--muon", action="store_true", help="Muon and LoRAPreMuon too: on a CPU some seconds a step")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks = [int(rank) for rank in given.ranks.split(",")]
    rows: list[Timing] = []
    for model in given.models.split(","):
        for dtype in given.dtypes.split(","):
            rows += measure(model, getattr(torch, dtype), ranks, given.rounds, device, muon=given.muon)
    command = f"python benchmarks/step_time.py --models {given.models} --ranks {given.ranks} --dtypes {given.dtypes}"
    command += " --muon" if given.muon else ""
    origin = provenance(seed=0)
    given.out.mkdir(parents=True, exist_ok=True)
    write_json(given.out / "step_time.json", {**origin, "rows": [asdict(row) for row in rows]})
    write_text(given.out / "table.md", table(rows, origin, command))
    print((given.out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
