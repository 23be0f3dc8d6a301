"""A comparison as a machine might have found it: 14 contestants, 5 rates, 3 seeds, and all that can go wrong."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from statistics import fmean

from lorapre.lab.compare.results import Comparison, Point, Row, Run, Status

TOKENS, STEPS, BATCH = 614_400, 600, 1024
SEEDS = (0, 1, 2)
#: What the browser must not run.
HOSTILE = 'CUDA error: <script>alert("x")</script> | out of memory & more; tried to allocate 1.21 GiB'

#: name, title, rank, best rate, final loss there, matrix state in MB, step ms, peak in MB
SPECS = (
    ("apollo", "APOLLO", 0.25, 4e-3, 3.2604, 4.33, 9.1, 402.0),
    ("adamw", "AdamW", None, 1e-3, 3.2823, 18.87, 5.2, 420.0),
    ("fira", "Fira", 0.25, 1e-3, 3.2823, 6.42, 21.7, None),
    ("lorapre-adamw", "LoRA-Pre AdamW", 0.25, 5e-4, 3.3279, 6.88, 16.4, 405.5),
    ("lorapre-adamw-full-v", "LoRA-Pre AdamW, full second moment", 0.25, 5e-4, 3.2871, 12.87, 12.9, 410.1),
    ("lorapre-muon", "LoRA-Pre Muon", 0.125, 2e-3, 3.3012, 1.72, 33.1, 399.0),
    ("adamw-8bit", "AdamW, 8-bit state (torchao)", None, 1e-3, 3.2841, 4.87, 31.0, 404.0),
    ("galore", "GaLore", 0.25, 4e-3, 3.3532, 6.42, 48.3, 407.0),
    ("adam-mini", "Adam-mini", None, 1e-3, 3.2897, 9.44, 7.7, 411.0),
    ("muon", "Muon", None, 8e-3, 3.2411, 9.43, 41.0, 409.0),
    ("subtrack", "SubTrack++ with recovery scaling and projection-aware state", 64, 2e-3, 3.3120, 6.42, 55.0, 408.0),
    ("low-rank-weights", "W = BA, both trained", 0.25, 2e-3, 4.9133, 8.60, 6.1, 371.0),
)  # fmt: skip


def run(name: str, lr: float, seed: int, loss: float, step_ms: float, *, tokens: int = TOKENS) -> Run:
    """A finished run that falls from about 8 to ``loss``."""
    steps = STEPS * tokens // TOKENS
    points = []
    for step in range(0, steps + 1, 30):
        left = (1 - step / steps) ** 2 * 0.9 + 3.8 * math.exp(-step / 25)
        wobble = 0.01 * math.sin(step / 40 + seed + len(name)) * (1 - step / steps)
        points.append(Point(step, step * BATCH, step * (210 + step_ms) / 1000, loss + left + wobble))
    return Run(name, lr, seed, tokens, "finished", "", loss, tuple(points))


def broken_run(name: str, lr: float, seed: int, status: Status, reason: str, *, tokens: int = TOKENS) -> Run:
    """A run that blew up after 90 steps, or failed before any."""
    losses = () if status == "failed" else (8.01, 6.2, 9.7, math.inf)
    points = tuple(Point(30 * i, 30 * i * BATCH, 6.5 * i, loss) for i, loss in enumerate(losses))
    return Run(name, lr, seed, tokens, status, reason, None, points)


def contestant(spec: tuple[str, str, float | None, float, float, float, float, float | None]) -> tuple[Row, list[Run]]:
    """A row and its runs: the best rate on all seeds, its neighbours in full, the outer rates short or broken."""
    optimizer, title, rank, lr, loss, state, step_ms, peak = spec
    name = optimizer if rank is None else f"{optimizer}@{rank:g}"
    finals = [loss + offset for offset in (-0.0021, 0.0003, 0.0018)]
    runs = [run(name, lr, seed, final, step_ms) for seed, final in zip(SEEDS, finals, strict=True)]
    runs += [run(name, lr / 2, 0, loss + 0.037, step_ms), run(name, lr * 2, 0, loss + 0.061, step_ms)]
    runs += [run(name, rate, 0, loss + 0.61, step_ms, tokens=TOKENS // 2) for rate in (lr / 4, lr / 2, lr, lr * 2)]
    high_breaks = optimizer in ("lorapre-adamw", "galore", "apollo", "muon")
    if high_breaks:
        runs.append(broken_run(name, lr * 4, 0, "diverged", "loss is inf at step 90", tokens=TOKENS // 2))
    else:
        runs.append(run(name, lr * 4, 0, loss + 1.3, step_ms, tokens=TOKENS // 2))
    lr_losses = (
        (lr / 4, loss + 0.61),
        (lr / 2, loss + 0.037),
        (lr, finals[0]),
        (lr * 2, loss + 0.061),
        (lr * 4, None if high_breaks else loss + 1.3),
    )
    if optimizer == "lorapre-muon":  # the lowest of its rates is the best
        lr_losses, runs = lr_losses[2:], [r for r in runs if r.lr >= lr]
    mean = fmean(finals)
    chosen = [r for r in runs if (r.lr, r.tokens) == (lr, TOKENS)]
    row = Row(
        contestant=name,
        optimizer=optimizer,
        title=title,
        rank=rank,
        status="finished",
        lr=lr,
        lr_losses=lr_losses,
        lr_at_edge=optimizer == "lorapre-muon",
        seeds=SEEDS,
        loss=mean,
        loss_spread=max(finals) - min(finals),
        best_loss=fmean(r.best_loss for r in chosen if r.best_loss is not None),
        perplexity=math.exp(mean),
        state_bytes=round((state + 3.59) * 1e6),
        matrix_state_bytes=round(state * 1e6),
        formula_bytes=round(state * 1e6) - 12,
        peak_bytes=None if peak is None else round(peak * 1e6),
        step_ms=step_ms,
        train_ms=210 + step_ms,
        tokens_per_s=BATCH / (210 + step_ms) * 1000,
        tokens_to_adamw=None if mean > 3.2823 else round(TOKENS * (0.9 + (mean - 3.24))),
        limitations="Projector recomputed every 200 steps on one device only."
        if optimizer in ("galore", "fira")
        else "",
        reason="",
    )
    return row, runs


def empty_row(name: str, title: str, status: Status, reason: str, **known: object) -> Row:
    """A row of which nothing was measured."""
    none = dict.fromkeys(field.name for field in fields(Row))
    values = {
        "contestant": f"{name}@0.25", "optimizer": name, "title": title, "rank": 0.25, "status": status,
        "lr_losses": (), "lr_at_edge": False, "seeds": (), "limitations": "", "reason": reason,
    }  # fmt: skip
    return Row(**{**none, **values, **known})  # type: ignore[arg-type]


def fake_comparison() -> Comparison:
    """The whole: 12 contestants that finished, one that diverged at every rate, one that failed at once."""
    found = [contestant(spec) for spec in SPECS]
    rows = sorted((row for row, _ in found), key=lambda row: row.loss or 0.0)
    runs = [r for _, each in found for r in each]
    rates = (1e-3, 2e-3)
    paper = empty_row(
        "lorapre-adamw-paper", "LoRA-Pre Adam (paper)", "diverged", "every learning rate diverged; at 0.001: inf at 90",
        lr=1e-3, lr_losses=tuple((lr, None) for lr in rates), state_bytes=10_460_000, matrix_state_bytes=6_880_000,
        limitations="Algorithm 1 as printed: its early updates are large.",
    )  # fmt: skip
    runs += [broken_run(paper.contestant, lr, 0, "diverged", f"at {lr:g}: loss is inf at step 90") for lr in rates]
    failed = empty_row("flora", "Flora", "failed", HOSTILE)
    runs.append(broken_run(failed.contestant, 1e-3, 0, "failed", HOSTILE))
    return Comparison(
        title="llama-3m on stdlib",
        command="lorapre compare --model llama-3m --optimizers all --rank 0.25 --lr-grid auto --seeds 3 --out runs/all",
        settings={
            "model": "llama-3m", "parameters": 2_807_360, "data": "standard library of Python 3.11 (731 documents)",
            "tokens a run": TOKENS, "batch": "8 x 128 tokens", "schedule": "cosine to 10 %, 60 steps of warm-up",
            "seeds": list(SEEDS), "dense lr": 0.004,
        },
        environment={
            "hardware": "AMD EPYC, 2 cores", "date": "2026-11-22",
            "versions": {"python": "3.11.7", "lorapre": "0.1.0", "torch": "2.13.0+cpu"},
        },
        bigram_loss=3.7541,
        rows=(*rows, paper, failed),
        runs=tuple(runs),
        notes=("The search tried 5 rates at half length and kept 3.", "Budget: 200 runs; nothing was cut."),
    )  # fmt: skip


def unfinished_comparison() -> Comparison:
    """The whole, and two of which no run of full length has been made: one has been searched, one has no run at all."""
    whole, reason = fake_comparison(), "no run of full length has been made yet"
    pairs = ((5e-4, 4.10), (1e-3, 4.02), (2e-3, 4.20))
    searched = empty_row("sophia", "Sophia", "missing", reason, lr_losses=pairs)
    runs = [run(searched.contestant, lr, 0, loss, 9.0, tokens=TOKENS // 2) for lr, loss in pairs]
    untouched = empty_row("shampoo", "Shampoo", "missing", reason)
    return replace(whole, rows=(*whole.rows, searched, untouched), runs=(*whole.runs, *runs))


def small_comparison(*rows: Row) -> Comparison:
    """Rows without runs, for sentences."""
    return replace(fake_comparison(), rows=rows, runs=())
