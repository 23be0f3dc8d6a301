"""What the terminal shows when a run has ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lorapre.optim.summary import format_bytes


def print_summary(summary: dict[str, Any], out: Path, console: Console) -> None:
    """Print one row an optimizer, the bigram model's, and where the files are."""
    runs = [summary, *summary["compare"].values()]
    table = Table(title=f"{escape(summary['model'])}, {summary['parameters']:,} parameters", title_justify="left")
    table.add_column("")
    for heading in ("valid. loss", "perplexity", "state", "time", "tok/s"):
        table.add_column(heading, justify="right")
    for run in runs:
        minutes, seconds = divmod(round(run["seconds"]), 60)
        table.add_row(
            run["optimizer"],
            f"{run['valid_loss']:.4f}",
            f"{run['valid_perplexity']:.2f}",
            format_bytes(run["state_bytes"]),
            f"{minutes}:{seconds:02}",
            f"{run['tokens_per_second']:,.0f}",
        )
    table.add_row("bigram model", f"{summary['bigram_loss']:.4f}", f"{summary['bigram_perplexity']:.2f}", "", "", "")
    console.print(table)
    share = summary["state_bytes"] / summary["adamw_state_bytes"]
    console.print(f"data: {summary['data']}, {summary['tokens']:,} tokens trained on", soft_wrap=True, markup=False)
    console.print(
        f"optimizer state: {format_bytes(summary['state_bytes'])}, {share:.1%} of AdamW's "
        f"{format_bytes(summary['adamw_state_bytes'])} for the same model",
        soft_wrap=True,
    )
    console.print(f"run folder: {out} (loss.png, summary.json, metrics.jsonl, model/)", soft_wrap=True, markup=False)
