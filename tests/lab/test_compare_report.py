"""What `lorapre compare` writes: tables and the page hold what the comparison found, whole and escaped."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import asdict, fields, replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from _comparison import HOSTILE, broken_run, fake_comparison, unfinished_comparison
from rich.cells import cell_len
from rich.console import Console

from lorapre.lab.compare import facts, page, tables
from lorapre.lab.compare.results import Comparison, Row
from lorapre.lab.compare.style import styles
from lorapre.optim.summary import format_bytes

COMPARISON = fake_comparison()
ROWS = {row.contestant: row for row in COMPARISON.rows}
ADAMW, OURS = ROWS["adamw"], ROWS["lorapre-adamw@0.25"]


def test_json_table_gives_back_every_field_of_every_row(tmp_path: Path) -> None:
    tables.write_tables(COMPARISON, tmp_path)
    content = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert [row["contestant"] for row in content["rows"]] == [row.contestant for row in COMPARISON.rows]
    for written, row in zip(content["rows"], COMPARISON.rows, strict=True):
        expected = asdict(row) | {"seeds": list(row.seeds), "lr_losses": [list(pair) for pair in row.lr_losses]}
        assert written == expected
    assert content["settings"]["parameters"] == COMPARISON.settings["parameters"]
    assert content["environment"] == COMPARISON.environment
    assert content["command"] == COMPARISON.command
    assert content["notes"] == list(COMPARISON.notes)
    assert content["bigram_loss"] == COMPARISON.bigram_loss


def test_csv_table_gives_back_every_number_exactly(tmp_path: Path) -> None:
    tables.write_tables(COMPARISON, tmp_path)
    written = list(csv.DictReader(StringIO((tmp_path / "table.csv").read_text(encoding="utf-8"))))
    for line, row in zip(written, COMPARISON.rows, strict=True):
        assert set(line) == {field.name for field in fields(Row)}
        for name, text in line.items():
            value = getattr(row, name)
            if name == "seeds":
                assert tuple(map(int, text.split())) == value
            elif name == "lr_losses":
                pairs = [pair.split(":") for pair in text.split()]
                assert tuple((float(lr), float(loss) if loss else None) for lr, loss in pairs) == value
            elif value is None:
                assert text == ""
            elif isinstance(value, float):
                assert float(text) == value
            else:
                assert text == str(value)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def markdown_table(comparison: Comparison) -> list[list[str]]:
    return [cells(line) for line in tables.markdown(comparison).splitlines() if line.startswith("|")]


def test_markdown_table_has_as_many_columns_in_each_line_whatever_titles_hold() -> None:
    nasty = replace(ADAMW, title="a | b\\| c `d|e`\nf", rank=3)
    table = markdown_table(replace(COMPARISON, rows=(*COMPARISON.rows, nasty)))
    assert {len(line) for line in table} == {14}
    assert len(table) == len(COMPARISON.rows) + 3
    assert table[-1][0] == r"a \| b\\\| c \`d\|e\` f"


def test_markdown_row_holds_the_numbers_of_its_row() -> None:
    line = next(line for line in markdown_table(COMPARISON) if line[0] == "LoRA-Pre AdamW")
    assert line[1:] == [
        "0.25", "0.0005 (0.00025: 3.365; 0.001: 3.389)", "3.328 ± 0.004", "3.328", "27.9", "3", "6.88 MB", "10.47 MB",
        "405.50 MB", "16.4", "226", "4,523", "–",
    ]  # fmt: skip


def test_markdown_shows_a_row_of_which_nothing_was_measured_as_dashes_and_its_reason_below() -> None:
    line = markdown_table(COMPARISON)[-1]
    assert line == ["Flora", "0.25", "–", "failed", *["–"] * 10]
    text = tables.markdown(COMPARISON)
    assert "- Flora r=0.25 failed: CUDA error: &lt;script>" in text
    assert r"\| out of memory" in text


def test_what_has_not_run_yet_is_said_so_and_is_no_failure() -> None:
    unfinished = unfinished_comparison()
    table = {line[0]: line for line in markdown_table(unfinished)}
    assert table["Sophia"] == ["Sophia", "0.25", "–", "not run yet", *["–"] * 10]
    assert table["Shampoo"] == ["Shampoo", "0.25", "–", "not run yet", *["–"] * 10]
    assert [who for who, _, _ in tables.reasons(unfinished)] == ["LoRA-Pre Adam (paper) r=0.25", "Flora r=0.25"]
    text = tables.markdown(unfinished)
    assert "- Not run yet: Sophia r=0.25; Shampoo r=0.25." in text
    assert not re.search("missing|no run of full length", text)
    console = Console(width=80, file=StringIO(), color_system=None)
    console.print(tables.rich_table(unfinished))
    assert "Not run yet: Sophia r=0.25; Shampoo r=0.25." in console.file.getvalue()  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "get_plotlyjs", lambda: "")
        html = page.render_page(unfinished)
    assert html.count('<td data-sort="" class="none">not run yet</td>') == 2
    assert html.count('<td data-sort="" class="broken">') == 2
    seen = Reader(html).text
    assert "Not run yet: Sophia r=0.25; Shampoo r=0.25." in seen
    assert "missing" not in seen
    assert "no run of full length" not in seen
    assert tables.rate_losses(unfinished, unfinished.rows[-2]) == ["0.0005: 4.100†", "0.001: 4.020†", "0.002: 4.200†"]


def test_a_limitation_is_one_footnote_of_all_rows_that_share_it() -> None:
    text = tables.markdown(COMPARISON)
    assert text.count("Projector recomputed") == 1
    marked = {line[0] for line in markdown_table(COMPARISON) if "¹" in line[0]}
    assert marked == {"Fira¹", "GaLore¹"}


def test_losses_of_shorter_runs_are_marked_and_broken_ones_have_no_number() -> None:
    muon = ROWS["muon"]
    said = tables.rate_losses(COMPARISON, muon)
    assert said == ["0.002: 3.851†", "0.004: 3.278", "0.008: 3.239", "0.016: 3.302", "0.032: broke off"]
    assert tables.rate_losses(COMPARISON, muon, neighbours=True) == ["0.004: 3.278", "0.016: 3.302"]
    lowest = ROWS["lorapre-muon@0.125"]
    assert tables.rate_losses(COMPARISON, lowest, neighbours=True) == ["0.004: 3.362"]


def test_terminal_table_fits_80_columns_and_keeps_brackets() -> None:
    rows = (*COMPARISON.rows, replace(ADAMW, title="[red]Sophia[/red]"))
    console = Console(width=80, file=StringIO(), color_system=None)
    console.print(tables.rich_table(replace(COMPARISON, rows=rows)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(cell_len, text.splitlines())) <= 80
    assert "[red]Sophia[/red]" in text
    for row in COMPARISON.rows:
        assert facts.loss_text(row) in text
        assert "…" not in text
    assert '<script>alert("x")</script>' in text


def test_numbers_that_json_has_no_word_for_become_null() -> None:
    assert tables.plain({"a": (math.nan, math.inf, 1.5), 2: Path("x")}) == {"a": [None, None, 1.5], "2": "x"}


class Reader(HTMLParser):
    """Elements with their attributes, rows of the table of results, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._in: list[str] = []
        self._table = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if tag == "table":
            self._table = found.get("id") or ""
        if self._table == "results" and tag == "tr":
            self.rows.append([])
        if self._table == "results" and "data-sort" in found:
            self.rows[-1].append(found["data-sort"] or "")
        if tag in ("script", "style"):
            self._in.append(tag)
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if self._in and self._in[-1] == tag:
            self._in.pop()

    def handle_data(self, data: str) -> None:
        if self._in:
            self.scripts[-1] += data
        else:
            self.text += data


@pytest.fixture(scope="module")
def rendered() -> str:
    with pytest.MonkeyPatch.context() as patch:  # plotly.js has 5 MB, which these tests need not read
        patch.setattr(page, "get_plotlyjs", lambda: "/* plotly */")
        return page.render_page(COMPARISON)


def test_page_embeds_the_comparison_as_it_is(rendered: str) -> None:
    reader = Reader(rendered)
    embedded = json.loads(next(text for text in reader.scripts if text.startswith("{")))
    assert embedded == page.page_data(COMPARISON)
    found = embedded["comparison"]
    assert [row["loss"] for row in found["rows"]] == [row.loss for row in COMPARISON.rows]
    for written, original in zip(found["runs"], COMPARISON.runs, strict=True):
        losses = [point.loss if math.isfinite(point.loss) else None for point in original.points]
        assert [point["loss"] for point in written["points"]] == losses
        assert (written["lr"], written["seed"], written["status"]) == (original.lr, original.seed, original.status)
    assert found["rows"][-1]["reason"] == HOSTILE


def test_page_draws_the_same_curves_and_front_as_the_static_figures(rendered: str) -> None:
    drawn = page.page_data(COMPARISON)["figures"]
    for written, curve in zip(drawn["curves"], facts.curves(COMPARISON), strict=True):
        assert written["mean"] == list(curve.mean)
        assert [run["seed"] for run in written["runs"]] == [run.seed for run in curve.runs]
    assert len(drawn["rates"]) == len(facts.rate_lines(COMPARISON)) > len(COMPARISON.rows)
    for written, line in zip(drawn["rates"], facts.rate_lines(COMPARISON), strict=True):
        assert written["losses"] == [list(pair) for pair in line.losses]
        assert (written["tokens"], written["full"], written["broken"]) == (line.tokens, line.full, list(line.broken))
        assert written["chosen"] == (line.chosen and list(line.chosen))
    assert drawn["ranges"]["rates"] == list(facts.rates_range(facts.rate_lines(COMPARISON)))
    assert drawn["state"]["front"] == ["lorapre-muon@0.125", "apollo@0.25", "muon"]
    look = drawn["styles"]
    assert {name: style["light"] for name, style in look.items()} == {
        n: s.colour for n, s in styles(COMPARISON).items()
    }


def test_table_of_the_page_sorts_by_the_raw_numbers(rendered: str) -> None:
    rows = [row for row in Reader(rendered).rows if row]
    headings = ["contestant", *(heading for heading, _, _ in page.COLUMNS)]
    fields_of = {
        "rank": "rank", "final loss": "loss", "best on the way": "best_loss", "perplexity": "perplexity",
        "learning rate": "lr", "state, matrices": "matrix_state_bytes", "state, all": "state_bytes",
        "state, matrices, by formula": "formula_bytes", "peak memory": "peak_bytes", "optimizer step, ms": "step_ms",
        "training step, ms": "train_ms", "tokens/s": "tokens_per_s", "tokens to AdamW's loss": "tokens_to_adamw",
    }  # fmt: skip
    assert len(rows) == len(COMPARISON.rows)
    for keys, row in zip(rows, COMPARISON.rows, strict=True):
        by_heading = dict(zip(headings, keys, strict=True))
        for heading, name in fields_of.items():
            value = getattr(row, name)
            assert by_heading[heading] == "" if value is None else float(by_heading[heading]) == value
    assert set(fields_of) | {"contestant", "seeds"} == set(headings)


def test_page_escapes_all_that_comes_from_data() -> None:
    evil = '</script><script>alert(1)</script><img src=x onerror="alert(2)">{{css}}'
    row = replace(
        OURS, title=evil, contestant=evil, limitations=evil, reason=evil, matrix_state_bytes=1000, lr_at_edge=True
    )
    runs = (broken_run(evil, 1e-3, 0, "failed", evil), *COMPARISON.runs)
    comparison = Comparison(evil, evil, {evil: evil}, {"hardware": evil}, 3.7, (row, ADAMW), runs, (evil,))
    harmless = replace(
        comparison, title="t", command="c", settings={"s": 1}, environment={"hardware": "h"}, notes=("n",)
    )
    harmless = replace(
        harmless,
        rows=(replace(row, title="t", contestant="k", limitations="l", reason="r"), ADAMW),
        runs=(broken_run("k", 1e-3, 0, "failed", "r"), *COMPARISON.runs),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "get_plotlyjs", lambda: "")
        seen, plain = Reader(page.render_page(comparison)), Reader(page.render_page(harmless))
    assert [tag for tag, _ in seen.elements] == [tag for tag, _ in plain.elements]
    assert not any(name.startswith("on") for _, attributes in seen.elements for name in attributes)
    assert seen.text.count(evil) >= 8
    assert json.loads(next(text for text in seen.scripts if text.startswith("{")))["comparison"]["title"] == evil


def test_page_names_no_outside_resource_and_forbids_them(rendered: str) -> None:
    reader = Reader(rendered)
    for tag, attributes in reader.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    policy = next(a["content"] for tag, a in reader.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
    addresses = set(re.findall(r"https?://[^\s\"'`]+", rendered))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # the name of SVG's elements, not an address to load
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", rendered)
    assert "showSendToCloud: false" in rendered  # plotly's button that uploads the chart
    assert page.get_plotlyjs().count("</script") == 0


def test_every_anchor_and_label_of_the_page_has_its_element_once(rendered: str) -> None:
    elements = Reader(rendered).elements
    identities = [a["id"] for _, a in elements if "id" in a]
    assert len(identities) == len(set(identities))
    wanted = {(a.get("href") or "")[1:] for tag, a in elements if tag == "a"}
    wanted |= {a["aria-labelledby"] or "" for _, a in elements if "aria-labelledby" in a}
    assert wanted <= set(identities)
    script = "".join(Reader(rendered).scripts)
    assert set(re.findall(r'getElementById\("([\w-]+)"\)', script)) <= set(identities)
    drawn = {f"plot-{name}" for name in ("tokens", "time", "state", "rates")}
    assert drawn == {name for name in identities if name and name.startswith("plot-")}
    assert all(a.get("scope") for tag, a in elements if tag == "th")
    assert {a.get("lang") for tag, a in elements if tag == "html"} == {"en"}


def test_page_says_the_headlines_reasons_settings_and_command(rendered: str) -> None:
    text = Reader(rendered).text
    for lead, rest in facts.headline_parts(COMPARISON):
        assert f"{lead} {rest}" in text
    for said in (HOSTILE, COMPARISON.command, *COMPARISON.notes, "2,807,360", "AMD EPYC, 2 cores", "torch 2.13.0+cpu"):
        assert said in text
    assert format_bytes(18_870_000) in text


def test_written_page_holds_plotly_once(tmp_path: Path) -> None:
    page.write_page(COMPARISON, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("* plotly.js v") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
