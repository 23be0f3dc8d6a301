"""The table of a comparison: Markdown, CSV, JSON, and the terminal's."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from io import StringIO
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from lorapre.lab.compare.diagnostics import HEADING, LAST_COLUMNS, explanation, last_figures
from lorapre.lab.compare.facts import full_length, headlines, label, loss_text, not_run_yet, short_rates
from lorapre.lab.compare.results import Comparison, Row
from lorapre.lab.run_folder import write_json, write_text
from lorapre.optim.summary import format_bytes

DASH = "–"
SPREAD_NOTE = "± is the largest minus the smallest final loss over the seeds; no ± means a single seed."
SHORT_NOTE = "† not run at full length: a loss of a shorter run of the search."
_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: tuples as lists, numbers that are not finite as None, other objects as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)


def printable(value: Any) -> str:
    """A setting or a fact of the environment, for people."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {printable(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(printable, value))
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_number(value: float | None, decimals: int) -> str:
    """``value`` with thousands separated, a dash for None."""
    return DASH if value is None else f"{value:,.{decimals}f}"


def format_lr(lr: float | None) -> str:
    """Two significant digits, a dash for None."""
    return DASH if lr is None else f"{lr:.2g}".replace("e-0", "e-")


def format_size(count: int | None) -> str:
    """Bytes as elsewhere in the library, a dash for None."""
    return DASH if count is None else format_bytes(count)


def format_ms(value: float | None) -> str:
    """Milliseconds to three digits, a dash for None."""
    return DASH if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def format_tokens(count: int | None) -> str:
    """Millions of tokens, a dash for None."""
    return DASH if count is None else f"{count / 1e6:,.3g} M"


def rate_losses(comparison: Comparison, row: Row, *, neighbours: bool = False) -> list[str]:
    """``lr: loss`` for each rate tried or, with ``neighbours``, for those next to the chosen one."""
    short = short_rates(comparison, row)
    pairs = list(row.lr_losses)
    if neighbours:
        at = next((i for i, (lr, _) in enumerate(pairs) if lr == row.lr), None)
        pairs = [] if at is None else [pairs[i] for i in (at - 1, at + 1) if 0 <= i < len(pairs)]
    return [
        f"{format_lr(lr)}: " + ("broke off" if loss is None else f"{loss:.3f}" + ("†" if lr in short else ""))
        for lr, loss in pairs
    ]


def _cell(text: str) -> str:
    for character in "\\|*`":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.replace("<", "&lt;").split())


def _rate_cell(comparison: Comparison, row: Row) -> str:
    beside = rate_losses(comparison, row, neighbours=True)
    edge = ", edge" if row.lr_at_edge else ""
    return format_lr(row.lr) + edge + (f" ({'; '.join(beside)})" if beside else "")


def footnotes(comparison: Comparison) -> dict[str, int]:
    """Number of each limitation, in the order of the rows; rows with the same one share it."""
    numbers: dict[str, int] = {}
    for row in comparison.rows:
        if row.limitations:
            numbers.setdefault(row.limitations, len(numbers) + 1)
    return numbers


def _bullets(heading: str, items: list[str]) -> list[str]:
    return ["", f"## {heading}", "", *(f"- {item}" for item in items)] if items else []


def _momentum(comparison: Comparison) -> list[str]:
    """How the factors stood at the last measured step; nothing where none was measured."""
    if not comparison.momentum:
        return []
    lines = [f"| {' | '.join(('', *LAST_COLUMNS))} |", "|---|" + "---:|" * len(LAST_COLUMNS)]
    lines += [f"| {' | '.join((_cell(label(row)), *cells))} |" for row, cells in last_figures(comparison)]
    return ["", f"## {HEADING}", "", *lines, "", f"At the last measured step. {explanation(comparison)}"]


def markdown(comparison: Comparison) -> str:
    """Headlines, the table, and under it what a reader needs to judge it or make it again."""
    notes = footnotes(comparison)
    columns = (
        "",
        "rank",
        "learning rate (loss at its neighbours, first seed)",
        "final loss",
        "best on the way",
        "perplexity",
        "seeds",
        "state, matrices",
        "state, all",
        "peak memory",
        "optimizer step, ms",
        "training step, ms",
        "tokens/s",
        "tokens to AdamW's loss",
    )
    lines = [f"# {_cell(comparison.title)}", "", *(f"- {_cell(fact)}" for fact in headlines(comparison)), ""]
    lines += [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for row in comparison.rows:
        mark = str(notes[row.limitations]).translate(_SUPERSCRIPT) if row.limitations else ""
        cells = (
            _cell(row.title) + mark,
            DASH if row.rank is None else f"{row.rank:g}",
            _rate_cell(comparison, row),
            loss_text(row),
            format_number(row.best_loss, 3),
            format_number(row.perplexity, 1),
            str(len(row.seeds)) if row.seeds else DASH,
            format_size(row.matrix_state_bytes),
            format_size(row.state_bytes),
            format_size(row.peak_bytes),
            format_ms(row.step_ms),
            format_ms(row.train_ms),
            format_number(row.tokens_per_s, 0),
            format_tokens(row.tokens_to_adamw),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"{SPREAD_NOTE} Bigram model: {comparison.bigram_loss:.3f}."]
    lines += [SHORT_NOTE] if any("†" in _rate_cell(comparison, row) for row in comparison.rows) else []
    lines += _momentum(comparison)
    lines += _bullets("Did not finish", [_cell(f"{who} {how}: {why}") for who, how, why in reasons(comparison)])
    if notes:
        lines += ["", "## Limitations", "", *(f"{number}. {_cell(text)}" for text, number in notes.items())]
    lines += _bullets("Notes", [_cell(note) for note in comparison.notes])
    for heading, content in (("Settings", comparison.settings), ("Environment", comparison.environment)):
        lines += _bullets(heading, [f"{_cell(key)}: {_cell(printable(value))}" for key, value in content.items()])
    lines += ["", "## Command", "", *(f"    {line}" for line in comparison.command.splitlines())]
    return "\n".join(lines) + "\n"


def reasons(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Contestant, status and reason of each row that has no result though it ran, or beside which a run broke off."""
    return [
        (label(row), "finished, but not every run" if row.status == "finished" else row.status, row.reason or "unknown")
        for row in comparison.rows
        if row.status != "missing" and (row.reason or row.status != "finished")
    ]


def csv_text(comparison: Comparison) -> str:
    """Every field of every row, numbers in full; None is empty, sequences are separated by spaces."""
    names = [field.name for field in fields(Row)]
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for row in comparison.rows:
        values = {name: getattr(row, name) for name in names}
        values["seeds"] = " ".join(map(str, row.seeds))
        values["lr_losses"] = " ".join(f"{lr!r}:{'' if loss is None else repr(loss)}" for lr, loss in row.lr_losses)
        writer.writerow(["" if value is None else value for value in values.values()])
    return text.getvalue()


def table_content(comparison: Comparison) -> dict[str, Any]:
    """What ``table.json`` holds: the rows, and all else but the runs."""
    content: dict[str, Any] = plain({key: value for key, value in asdict(comparison).items() if key != "runs"})
    return {**content, "tokens": full_length(comparison), "headlines": headlines(comparison)}


def write_tables(comparison: Comparison, folder: Path) -> None:
    """Write ``table.md``, ``table.csv`` and ``table.json`` into ``folder``, each atomically."""
    write_text(folder / "table.md", markdown(comparison))
    write_text(folder / "table.csv", csv_text(comparison))
    write_json(folder / "table.json", table_content(comparison))


def rich_table(comparison: Comparison) -> Table:
    """The main columns for the terminal, 80 wide; below it the rows without a result, and why."""
    below = [SPREAD_NOTE, *(f"{who} {how}: {why}" for who, how, why in reasons(comparison)), not_run_yet(comparison)]
    table = Table(
        title=escape(comparison.title),
        title_justify="left",
        caption=escape("\n".join(filter(None, below))),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", overflow="fold", ratio=1)
    for heading in ("final loss", "lr", "state", "step ms", "tok/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in comparison.rows:
        table.add_row(
            escape(label(row)),
            loss_text(row),
            format_lr(row.lr),
            format_size(row.state_bytes),
            format_ms(row.step_ms),
            format_number(row.tokens_per_s, 0),
        )
    table.add_row("bigram model", f"{comparison.bigram_loss:.3f}", "", "", "", "")
    return table
