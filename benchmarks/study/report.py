"""The tables: every run, and each contestant at its best rate."""

from __future__ import annotations

import math
from pathlib import Path

from lorapre.lab.run_folder import write_json, write_text
from lorapre.optim.summary import format_bytes
from study.profiles import Profile
from study.rows import Best, Rows

KEPT = (
    "model", "tokens", "stage", "contestant", "optimizer", "options", "settings", "rank", "d", "lr", "seed",
    "batch_size", "sequence_length", "valid_tokens", "dense_lr", "loss", "state_bytes", "update_rms_5", "update_max_5",
    "largest_rise", "largest_rise_step", "hardware", "date", "versions", "note",
)  # fmt: skip

HEADER = (
    "| contestant | state of the matrices | learning rate (loss at others) | final loss | seeds "
    "| update 5: RMS, largest | largest rise |\n|---|---:|---|---:|---:|---:|---:|\n"
)
EDGE = "†"
NOTES = """
The final loss is on the whole validation text, in nats a token. Each contestant is at the rate with the lowest loss of
the first seed; where more seeds were run at it, the loss is their mean, and ± the largest minus the smallest. † marks a
search that ended with its best rate at the edge of those tried. On larger models the search begins at the best rate of
the first one; longer runs were made at that rate and at half of it. Rates are those of the matrices; all else is
trained by AdamW at {dense_lr:g}.
Update 5: root mean square and largest element of the fifth update of the matrices, divided by the learning rate.
Largest rise: how far the training loss rose above the mean of the 20 steps before it, after step 60.

{hardware}; {versions}.
"""


def write_tables(rows: Rows, profile: Profile, folder: Path) -> None:
    """``table.json`` (every run) and ``table.md`` (each contestant at its best rate, the lowest loss first)."""
    write_json(folder / "table.json", [{key: row.get(key) for key in KEPT} for row in rows.all])
    parts = []
    for model, tokens in rows.settings():
        best = sorted(rows.best(model, tokens).items(), key=lambda item: item[1].mean)
        searched = tokens == profile.tokens
        lines = [_line(contestant, found, searched=searched) for contestant, found in best]
        parts.append(f"## {model}, {tokens / 1e6:.3g} million tokens\n\n{HEADER}" + "".join(lines))
    last = rows.all[-1]
    notes = NOTES.format(
        dense_lr=last["dense_lr"],
        hardware=" and ".join(dict.fromkeys(f"{row['hardware']}, {row['date'][:10]}" for row in rows.all)),
        versions=", ".join(f"{name} {version}" for name, version in last["versions"].items()),
    )
    write_text(folder / "table.md", "\n".join(parts) + notes)


def _line(contestant: str, best: Best, *, searched: bool) -> str:
    row = best.row
    others = ", ".join(f"{rate:g}: {_loss(loss)}" for rate, loss in best.by_rate.items() if rate != best.lr)
    at_edge = searched and best.losses and best.lr in (min(best.by_rate), max(best.by_rate))
    rates = f"{best.lr:g}{EDGE if at_edge else ''}" + (f" ({others})" if others else "")
    loss = _loss(best.mean) + ("" if best.spread is None else f" ± {best.spread:.3f}")
    if best.losses and best.diverged:
        loss += f", {best.diverged} diverged"
    update = f"{_number(row['update_rms_5'], 2)}, {_number(row['update_max_5'], 1)}"
    cells = (f"`{contestant}`", format_bytes(row["state_bytes"]), rates, loss, len(best.losses) + best.diverged, update)
    return "| " + " | ".join(map(str, cells)) + f" | {_number(row['largest_rise'], 2)} |\n"


def _loss(loss: float) -> str:
    return f"{loss:.3f}" if loss < math.inf else "diverged"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
