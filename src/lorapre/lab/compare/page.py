"""The page of a comparison: one HTML file with table and interactive figures, which needs no network."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from lorapre.lab.compare.diagnostics import HEADING, LAST_COLUMNS, PANELS, explanation, last_figures
from lorapre.lab.compare.facts import (
    adamw_row,
    curve_range,
    curves,
    headline_parts,
    is_ours,
    label,
    loss_text,
    pareto_front,
    point_seconds,
    rate_lines,
    rates_range,
    robust_range,
    state_points,
    time_is_estimated,
)
from lorapre.lab.compare.results import Comparison, Row, Run
from lorapre.lab.compare.style import styles
from lorapre.lab.compare.tables import (
    DASH,
    SHORT_NOTE,
    SPREAD_NOTE,
    footnotes,
    format_lr,
    format_ms,
    format_number,
    format_size,
    format_tokens,
    plain,
    printable,
    rate_losses,
    reasons,
)
from lorapre.lab.run_folder import write_text

SCRIPTS = ("page_momentum.js", "page_figures.js", "page.js")

#: Heading, what a sort compares, what is shown.
Column = tuple[str, Callable[[Row], float | str | None], Callable[[Row], str]]

COLUMNS: tuple[Column, ...] = (
    ("rank", lambda row: row.rank, lambda row: DASH if row.rank is None else f"{row.rank:g}"),
    ("final loss", lambda row: row.loss, loss_text),
    ("perplexity", lambda row: row.perplexity, lambda row: format_number(row.perplexity, 1)),
    ("learning rate", lambda row: row.lr, lambda row: format_lr(row.lr) + (" (edge)" if row.lr_at_edge else "")),
    ("state, matrices", lambda row: row.matrix_state_bytes, lambda row: format_size(row.matrix_state_bytes)),
    ("state, all", lambda row: row.state_bytes, lambda row: format_size(row.state_bytes)),
    ("peak memory", lambda row: row.peak_bytes, lambda row: format_size(row.peak_bytes)),
    ("optimizer step, ms", lambda row: row.step_ms, lambda row: format_ms(row.step_ms)),
    ("training step, ms", lambda row: row.train_ms, lambda row: format_ms(row.train_ms)),
    ("tokens/s", lambda row: row.tokens_per_s, lambda row: format_number(row.tokens_per_s, 0)),
    ("tokens to AdamW's loss", lambda row: row.tokens_to_adamw, lambda row: format_tokens(row.tokens_to_adamw)),
    ("best on the way", lambda row: row.best_loss, lambda row: format_number(row.best_loss, 3)),
    ("seeds", lambda row: len(row.seeds) or None, lambda row: str(len(row.seeds)) if row.seeds else DASH),
    ("state, matrices, by formula", lambda row: row.formula_bytes, lambda row: format_size(row.formula_bytes)),
)


def _run_series(run: Run, row: Row, estimated: bool) -> dict[str, Any]:
    return {
        "seed": run.seed,
        "tokens": [point.tokens for point in run.points],
        "seconds": [point_seconds(point, row, estimated) for point in run.points],
        "loss": [point.loss for point in run.points],
        "reason": run.reason,
    }


def page_data(comparison: Comparison) -> dict[str, Any]:
    """What the page's script draws: the comparison as it is, and what the figures derive from it, as JSON can hold it.

    ``figures`` holds ``styles`` of the contestants that a figure shows, ``curves`` (mean over seeds, and each run),
    ``state`` (points and the names on the Pareto front), ``rates`` (a line for each contestant and length of run),
    ``ranges`` of the loss axes, and ``momentum`` (panels for the comparison's ``momentum``); losses are in nats.
    """
    estimated = time_is_estimated(comparison)
    drawn = curves(comparison)
    points = state_points(comparison)
    lines = rate_lines(comparison)
    front = pareto_front([(size, loss) for _, size, loss in points])
    shown = {curve.row.contestant for curve in drawn} | {line.row.contestant for line in lines}
    shown |= {row.contestant for row, _, _ in points}
    look = {
        row.contestant: {
            "label": label(row),
            "ours": style.ours,
            "adamw": row.optimizer == "adamw",
            "light": style.colour,
            "dark": style.dark,
            "dash": style.dash,
            "symbol": style.symbol,
            "width": style.width,
        }
        for row in comparison.rows
        if (style := styles(comparison)[row.contestant]) and row.contestant in shown
    }
    figures = {
        "estimated": estimated,
        "styles": look,
        "curves": [
            {
                "contestant": curve.row.contestant,
                "lr": curve.row.lr,
                "tokens": curve.tokens,
                "seconds": curve.seconds,
                "mean": curve.mean,
                "runs": [_run_series(run, curve.row, estimated) for run in curve.runs],
                "broken": [_run_series(run, curve.row, estimated) for run in curve.broken],
            }
            for curve in drawn
        ],
        "state": {
            "points": [{"contestant": row.contestant, "bytes": size, "loss": loss} for row, size, loss in points],
            "front": [points[i][0].contestant for i in front],
        },
        "rates": [
            {
                "contestant": line.row.contestant,
                "tokens": line.tokens,
                "full": line.full,
                "losses": line.losses,
                "broken": line.broken,
                "chosen": line.chosen,
            }
            for line in lines
        ],
        "ranges": {
            "curves": curve_range([curve for curve in drawn if curve.mean]),
            "state": robust_range((loss for _, _, loss in points), margin=0.12),
            "rates": rates_range(lines),
        },
        "momentum": [
            {"title": panel.title, "fields": [name for name, _ in panel.lines], "floor": panel.floor}
            for panel in PANELS
        ],
    }
    return {"comparison": plain(asdict(comparison)), "figures": plain(figures)}


def _embedded(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _list(items: Iterable[str], tag: str = "ul") -> str:
    return f"<{tag}>" + "".join(f"<li>{item}</li>" for item in items) + f"</{tag}>"


def _section(identity: str, heading: str, content: str) -> str:
    if not content:
        return ""
    return f'<section aria-labelledby="{identity}"><h2 id="{identity}">{heading}</h2>{content}</section>'


def _facts_of(content: Mapping[str, Any]) -> str:
    pairs = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(printable(v))}</dd>" for k, v in content.items())
    return f"<dl>{pairs}</dl>" if pairs else ""


def _scrolling(table: str, name: str) -> str:
    return f'<div class="scroll" role="region" aria-label="{name}" tabindex="0">{table}</div>'


def _header(heading: str, kind: str, sorted_by: str) -> str:
    order = ' aria-sort="ascending"' if heading == sorted_by else ""
    return f'<th scope="col" data-kind="{kind}"{order}><button type="button">{escape(heading)}</button></th>'


def _results(comparison: Comparison) -> str:
    notes = footnotes(comparison)
    head = _header("contestant", "text", "final loss")
    head += "".join(_header(heading, "number", "final loss") for heading, _, _ in COLUMNS)
    body = []
    for row in comparison.rows:
        kind = "ours" if is_ours(row) else "reference" if row is adamw_row(comparison) else ""
        number = notes.get(row.limitations)
        name = escape(row.title) + (f'<sup><a href="#limitation-{number}">{number}</a></sup>' if number else "")
        cells = [f'<th scope="row" data-sort="{escape(label(row).lower())}">{name}</th>']
        for heading, value, text in COLUMNS:
            raw = value(row)
            key = "" if raw is None else repr(raw)
            missing = ' class="none"' if raw is None else ""
            if heading == "final loss" and row.status in ("diverged", "failed"):
                missing = ' class="broken"'
            cells.append(f'<td data-sort="{key}"{missing}>{escape(text(row))}</td>')
        body.append(f'<tr class="{kind}">{"".join(cells)}</tr>')
    return _scrolling(
        f'<table id="results"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>', "results"
    )


def _rates(comparison: Comparison) -> str:
    rows = []
    for row in comparison.rows:
        if not row.lr_losses:
            continue
        tried = [
            f"<b>{escape(text)}</b>" if lr == row.lr else escape(text)
            for (lr, _), text in zip(row.lr_losses, rate_losses(comparison, row), strict=True)
        ]
        edge = "yes" if row.lr_at_edge else "no"
        cells = "".join(f"<li>{text}</li>" for text in tried)
        name = escape(label(row))
        rows.append(f'<tr><th scope="row">{name}</th><td><ul class="rates">{cells}</ul></td><td>{edge}</td></tr>')
    if not rows:
        return ""
    heads = "".join(
        f'<th scope="col">{text}</th>' for text in ("contestant", "rate: final loss of the first seed", "at edge")
    )
    return _scrolling(f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>", "learning rates")


def _momentum(comparison: Comparison) -> str:
    """The figure of the momentum and its last values; empty where nothing was measured."""
    if not comparison.momentum:
        return ""
    heads = "".join(f'<th scope="col">{escape(text)}</th>' for text in ("contestant", *LAST_COLUMNS))
    lines = [
        f'<tr><th scope="row">{escape(label(row))}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for row, cells in last_figures(comparison)
    ]
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    name = "Figures of the momentum against steps, a line for each contestant; the last values are in the table below"
    return (
        f'<section aria-labelledby="momentum-heading"><figure><h3 id="momentum-heading">{HEADING}</h3>'
        f'<div class="plot tall" id="plot-momentum" role="img" aria-label="{name}"></div>'
        f"<figcaption>{escape(explanation(comparison))}</figcaption>"
        f"{_scrolling(table, 'the momentum at the last measured step')}</figure></section>"
    )


def _broken(comparison: Comparison) -> str:
    rows = [f"<b>{escape(who)}</b> {escape(how)}: {escape(why)}" for who, how, why in reasons(comparison)]
    names = {row.contestant: label(row) for row in comparison.rows}
    lines = []
    for run in comparison.runs:
        if run.status not in ("diverged", "failed"):
            continue
        last = f"{run.points[-1].step:,}" if run.points else DASH
        cells = (format_lr(run.lr), str(run.seed), format_tokens(run.tokens), last, run.status, run.reason)
        name = escape(names.get(run.contestant, run.contestant))
        lines.append(f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>")
    table = ""
    if lines:
        titles = ("contestant", "rate", "seed", "tokens planned", "last validated step", "status", "reason")
        heads = "".join(f'<th scope="col">{title}</th>' for title in titles)
        table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
        count = f"{len(lines)} run{'s' if len(lines) > 1 else ''} broke off"
        table = f"<details><summary>{count}</summary>{_scrolling(table, 'runs that broke off')}</details>"
    return (_list(rows) if rows else "") + table


def render_page(comparison: Comparison) -> str:
    """The page as one string. All text of ``comparison`` is escaped."""
    template = resources.files("lorapre.lab.compare")
    limitations = [
        f'<span id="limitation-{number}">{escape(text)}</span>' for text, number in footnotes(comparison).items()
    ]
    found = [f"<b>{escape(lead)}</b> {escape(rest)}" for lead, rest in headline_parts(comparison)]
    subtitle = [printable(comparison.environment[key]) for key in ("hardware", "date") if key in comparison.environment]
    parts = {
        "title": escape(comparison.title),
        "subtitle": escape(", ".join(subtitle)),
        "headlines": _list(found),
        "results": _results(comparison),
        "bigram": f"{comparison.bigram_loss:.3f}",
        "spread_note": escape(SPREAD_NOTE),
        "short_note": escape(SHORT_NOTE),
        "rates": _rates(comparison),
        "momentum": _momentum(comparison),
        "broken": _section("broken-heading", "Did not finish", _broken(comparison)),
        "limitations": _section("limitations-heading", "Limitations", _list(limitations, "ol") if limitations else ""),
        "notes": _section("notes-heading", "Notes", _list(map(escape, comparison.notes)) if comparison.notes else ""),
        "settings": _section("settings-heading", "Settings", _facts_of(comparison.settings)),
        "environment": _section("environment-heading", "Environment", _facts_of(comparison.environment)),
        "command": escape(comparison.command),
        "css": template.joinpath("page.css").read_text(encoding="utf-8"),
        "js": "".join(template.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS),
        "plotly": get_plotlyjs(),
        "data": _embedded(page_data(comparison)),
    }
    html = template.joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], html)  # one pass: data are no template


def write_page(comparison: Comparison, path: Path) -> None:
    """Write the page to ``path``, atomically."""
    write_text(path, render_page(comparison))
