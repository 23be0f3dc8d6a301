"""The tables and figures of the rows, and README's section."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from lorapre.lab.errors import UserError
from lorapre.lab.models import LLAMAS
from lorapre.lab.run_folder import write_text
from step_time.contestants import FOREACH, KINDS, REFERENCE
from step_time.figures import write_figures
from step_time.goals import goals
from step_time.rows import Results, StepRow, TrainingRow

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- step time: begin -->", "<!-- step time: end -->"
#: The model that README shows, where it was measured.
SHOWN = "llama-1b"
#: Fused AdamW, torch's, rivals, ours; who was told a backend has another name.
TITLES = (REFERENCE, *(one.title for one in sorted(KINDS.values(), key=lambda one: one.ours)))

STEP_HEADER = (
    "| model | dtype | optimizer | rank | step, ms | to fused AdamW | to foreach AdamW | must move, GB | of copy rate "
    "| products, TFLOP | of product rate | extra memory, of weights | launches (kernels) | copies |\n"
    "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)
TRAINING_HEADER = (
    "| model | optimizer | rank | batch | step, ms | tokens a second | to fused AdamW |\n"
    "|---|---|---:|---|---:|---:|---:|"
)
NOTES = """\
Step: median; the ratio is to fused AdamW's steps in the same rounds. What a step must move, and its products, are \
counted by the algorithm (`benchmarks/step_time/costs.py`); shares are of a copy's and a large product's rate in the \
same process. Extra memory: peak of a step beyond what is held before it, as a share of the weights' bytes.\
"""


def publish(results: Results) -> None:
    """``table.md`` and figures in the folder of the rows."""
    write_text(results.folder / "table.md", page(results))
    write_figures(results, results.folder)


def page(results: Results) -> str:
    """All rows for people."""
    parts = [step_table(results.steps), NOTES]
    if lines := [f"- {line}" for line in footnotes(results.steps)]:
        parts.append("\n".join(lines))
    if results.training:
        parts += ["Whole training steps (float32 weights, bfloat16 autocast, random tokens):",
                  training_table(results.training)]  # fmt: skip
    if found := goals(results):
        parts.append("\n".join(["Goals:", "", *(f"- {goal.line}" for goal in found)]))
    if results.unmeasured:
        parts.append("\n".join(f"- {one.line}" for one in results.unmeasured))
    parts.append(f"{origin_line(results)}. Made by")
    parts.append("\n".join(["```bash", *results.origin.get("commands", []), "```"]))
    return "\n\n".join(parts) + "\n"


def step_table(rows: Iterable[StepRow]) -> str:
    """One line a row."""
    rows = ordered(rows)
    foreach = {(row.model, row.dtype): row.step_ms for row in rows if row.optimizer == FOREACH}
    lines = [STEP_HEADER]
    for row in rows:
        other, to_foreach = foreach.get((row.model, row.dtype)), row.ratio_to_foreach_adamw
        if to_foreach is None and other is not None:
            to_foreach = row.step_ms / other
        cells = (
            _model(row), row.dtype, row.optimizer + _marks(row), row.rank, _figures(row.step_ms),
            f"{row.ratio_to_fused_adamw:.2f}", to_foreach and f"{to_foreach:.2f}",
            _giga(row.bytes_moved), _percent(row.copy_share, 0),
            f"{row.flops / 1e12:.3g}" if row.flops else None, _percent(row.product_share, 0) if row.flops else None,
            _percent(extra_share(row), 2), row.launches if row.kernels is None else f"{row.launches} ({row.kernels})",
            row.copies,
        )  # fmt: skip
        lines.append(_line(cells))
    return "\n".join(lines)


_Row = TypeVar("_Row", StepRow, TrainingRow)


def ordered(rows: Iterable[_Row]) -> list[_Row]:
    """Whatever order they were made in: by size and dtype; fused AdamW, torch's, rivals, ours by rank."""
    models = list(LLAMAS)

    def place(row: _Row) -> tuple[object, ...]:
        own = TITLES.index(row.optimizer) if row.optimizer in TITLES else len(TITLES)
        dtype = "" if isinstance(row, TrainingRow) else row.dtype
        return models.index(row.model), dtype != "float32", dtype, own, row.optimizer, row.rank or 0

    return sorted(rows, key=place)


def training_table(rows: Iterable[TrainingRow]) -> str:
    """One line a row."""
    lines = [TRAINING_HEADER]
    for row in ordered(rows):
        cells = (row.model, row.optimizer, row.rank, f"{row.batch} x {row.sequence}", f"{row.step_ms:.1f}",
                 f"{row.tokens_per_second:,.0f}", f"{row.ratio_to_fused_adamw:.3f}")  # fmt: skip
        lines.append(_line(cells))
    return "\n".join(lines)


def footnotes(rows: Iterable[StepRow]) -> list[str]:
    """What the marks in the table mean, with their figures."""
    found = []
    for row in rows:
        name = f"{row.model} {row.dtype} {row.optimizer}{'' if row.rank is None else f' r = {row.rank}'}"
        if row.rare_ms is not None and row.plain_ms is not None:
            layers = row.layers or 0
            scaled = f", measured on {row.rare_layers} of {layers} layers and multiplied" * (row.rare_layers != layers)
            found.append(
                f"† {name}: {_figures(row.plain_ms)} ms a plain step; every {row.rare_every} steps "
                f"{_figures(row.rare_ms)} ms more{scaled}, here shared out."
            )
        if row.same_bits is not None:
            verdict = "the same bits as launched steps" if row.same_bits else "OTHER BITS than launched steps"
            found.append(f"{name}: replays leave {verdict} in weights and state.")
        if row.note:
            found.append(f"{name}: {row.note}")
    return found


def extra_share(row: StepRow) -> float | None:
    """Extra memory as a share of the weights' bytes."""
    if row.extra_bytes is None or not row.parameter_bytes:
        return None
    return row.extra_bytes / row.parameter_bytes


def origin_line(results: Results) -> str:
    """Hardware, its rates, date and versions."""
    origin = results.origin
    threads = f", {origin['threads']} threads" if origin.get("threads") else ""
    line = f"{origin['hardware']}{threads}"
    if found := origin.get("limits"):
        products = " and ".join(f"{dtype} {rate / 1e12:.3g}" for dtype, rate in found["product_flops"].items())
        line += f" (copy {found['copy_bytes_per_second'] / 1e12:.3g} TB/s, products {products} TFLOP/s)"
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    made = {row.date for row in results.steps} | {row.date for row in results.training}
    dates = sorted(made - {""}) or [origin["date"][:10]]
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{line}, {when}, {versions}, seed {origin['seed']}"


def section(results: Results) -> str:
    """What README says: of `TITLES`, and of rows without a note."""
    shown = SHOWN if any(row.model == SHOWN for row in results.steps) else results.steps[0].model
    own = [row for row in results.steps if row.model == shown and not row.note and row.optimizer in TITLES]
    dtypes = list(dict.fromkeys(row.dtype for row in own))
    heads = "".join(f" {dtype}, ms | to fused AdamW |" for dtype in dtypes)
    lines = [f"| one step on the matrices of {shown} |{heads} launches | extra memory |",
             "|---|" + "---:|---:|" * len(dtypes) + "---:|---:|"]  # fmt: skip
    for name in dict.fromkeys((row.optimizer, row.rank) for row in ordered(own)):
        by_dtype = {row.dtype: row for row in own if (row.optimizer, row.rank) == name}
        cells: list[object] = [name[0] if name[1] is None else f"{name[0]}, r = {name[1]}"]
        for dtype in dtypes:
            row = by_dtype.get(dtype)
            cells += [None, None] if row is None else [_figures(row.step_ms), f"{row.ratio_to_fused_adamw:.2f}"]
        first = next(iter(by_dtype.values()))
        shares = [share for row in by_dtype.values() if (share := extra_share(row)) is not None]
        cells += [first.launches, _percent(max(shares), 2) if shares else None]
        lines.append(_line(cells))
    parts = ["\n".join(lines)]
    if training := [row for row in results.training if not row.note]:
        parts.append(training_table(training))
    folder = f"benchmarks/results/{results.folder.name}"
    if (results.folder / "ratio.png").exists():
        parts.append(f"![Step time in ratios to fused AdamW against the rank]({folder}/ratio.png)")
    parts.append(f"{origin_line(results)}. All rows, with the commands that made them: [table]({folder}/table.md).")
    return "\n\n".join(parts)


def write_readme(results: Results) -> None:
    """Put `section` between the marks of README.md.

    Raises:
        UserError: README.md has no marks, or the rows are not among the repository's results.
    """
    if results.folder.resolve().parent != README.parent / "benchmarks" / "results":
        raise UserError(f"--readme --out {results.folder}: is not in benchmarks/results. README links to files there.")
    text = README.read_text(encoding="utf-8")
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        raise UserError(f"--readme: README.md lacks the lines {BEGIN} and {END}. Put them where the section belongs.")
    write_text(README, f"{before}{BEGIN}\n{section(results)}\n{END}{after}")


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join("–" if cell is None else str(cell) for cell in cells) + " |"


def _model(row: StepRow) -> str:
    whole = LLAMAS[row.model].layers
    return row.model if row.layers in (None, whole) else f"{row.model} ({row.layers} of {whole} layers)"


def _marks(row: StepRow) -> str:
    return "" if row.rare_ms is None else " †"


def _figures(value: float) -> str:
    """Three significant figures, without an exponent."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _giga(value: float | None) -> str | None:
    return None if value is None else f"{value / 1e9:.3g}"


def _percent(share: float | None, digits: int) -> str | None:
    return None if share is None else f"{100 * share:.{digits}f} %"
