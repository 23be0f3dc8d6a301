"""A comparison whose momentum was measured: what page, table and figure show of it, and what it is taken from."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from _comparison import fake_comparison
from _lab import SMALL_COMPARISON, exit_code, make_comparison, options, summary
from matplotlib.axes import Axes

from lorapre.lab.compare import arena, figures, page, tables
from lorapre.lab.compare.diagnostics import HEADING, PANELS, curve_of
from lorapre.lab.compare.results import Comparison, MomentumCurve
from lorapre.lab.compare.style import styles

FIELDS = ("ema_error", "best_error", "outside", "drift", "update_rms")
OURS = ("lorapre-adamw@0.25", "lorapre-muon@0.25")
#: A quarter of the length with two rates, then the better one in full; three shapes of matrices.
MEASURED = options(**{**SMALL_COMPARISON, "optimizers": "lorapre-adamw,lorapre-muon,adamw", "diagnose": 3})


@pytest.fixture(scope="module")
def measured(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished comparison ``MEASURED``."""
    work = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena, "TIMING_STEPS", 9)
        return make_comparison(work, lab / "cache", MEASURED, intermediate_size=80)


def full_run(out: Path, contestant: str) -> Path:
    """The folder of the one run of full length."""
    (found,) = (out / "runs" / contestant).glob("*-seed0-steps12")
    return found


def records(out: Path, contestant: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (full_run(out, contestant) / "diagnostics.jsonl").read_text().splitlines()]


def embedded(out: Path) -> dict[str, Any]:
    """What the page's script draws."""
    html = (out / "report.html").read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def middle(values: list[float]) -> float:
    """The median of an odd number of values."""
    assert len(values) % 2 == 1
    return sorted(values)[len(values) // 2]


def test_the_figure_of_the_page_holds_the_medians_of_the_best_runs_rows(measured: Path) -> None:
    lines = {line["contestant"]: line for line in embedded(measured)["comparison"]["momentum"]}
    for contestant in OURS:
        rows, line = records(measured, contestant), lines[contestant]
        assert line["steps"] == [3, 6, 9, 12]
        assert line["matrices"] == 3
        for position, step in enumerate(line["steps"]):
            at = [row for row in rows if row["step"] == step]
            assert len(at) == 3
            for field in FIELDS:
                assert line[field][position] == middle([row[field] for row in at]), (contestant, field, step)
            assert line["update_max"][position] == max(row["update_max"] for row in at)
    drawn = [field for panel in embedded(measured)["figures"]["momentum"] for field in panel["fields"]]
    assert sorted(drawn) == sorted([*FIELDS, "update_max"])


def test_contestants_without_factors_have_no_line_and_are_not_measured(measured: Path) -> None:
    data = embedded(measured)
    assert {row["contestant"] for row in data["comparison"]["rows"]} == {"adamw", *OURS}
    assert sorted(line["contestant"] for line in data["comparison"]["momentum"]) == list(OURS)
    assert not list((measured / "runs" / "adamw").rglob("diagnostics*"))
    # Of ours the first seed at full length alone: runs of the search would be slowed down for nothing.
    found = {path.parent for path in (measured / "runs").rglob("diagnostics.jsonl")}
    assert found == {full_run(measured, contestant) for contestant in OURS}
    every = {
        path.parent: yaml.safe_load(path.read_text())["diagnose"] for path in measured.rglob("runs/**/config.yaml")
    }
    assert len(every) == 9
    assert {path for path, diagnose in every.items() if diagnose == 3} == found


def test_times_are_those_of_runs_that_nobody_measured(measured: Path) -> None:
    rows = {row["contestant"]: row for row in json.loads((measured / "table.json").read_text())["rows"]}
    for contestant in OURS:
        (alone,) = (measured / "timings" / contestant).rglob("summary.json")
        assert yaml.safe_load((alone.parent / "config.yaml").read_text())["diagnose"] is None
        assert rows[contestant]["step_ms"] == summary(alone.parent)["optimizer_ms"]
        assert rows[contestant]["peak_bytes"] == summary(alone.parent)["peak_bytes"]
    assert not (measured / "timings" / "adamw").exists()
    assert rows["adamw"]["step_ms"] == summary(full_run(measured, "adamw"))["optimizer_ms"]


def test_where_another_seed_was_left_alone_it_gives_the_times(
    measured: Path, lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(measured, out)
    shutil.rmtree(out / "timings")
    monkeypatch.chdir(measured.parent)
    monkeypatch.setenv("LORAPRE_CACHE", str(lab / "cache"))
    assert exit_code("compare", *MEASURED, "--seeds", "2", "--out", str(out)) == 0
    assert not (out / "timings").exists()
    rows = {row["contestant"]: row for row in json.loads((out / "table.json").read_text())["rows"]}
    for contestant in OURS:
        (other,) = (out / "runs" / contestant).glob("*-seed1-steps12")
        assert not (other / "diagnostics.jsonl").exists()
        assert rows[contestant]["step_ms"] == summary(other)["optimizer_ms"]


def test_a_last_row_that_was_cut_short_costs_its_step_alone(measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(measured, out)
    (out / "report.html").unlink()
    cut = full_run(out, OURS[0]) / "diagnostics.jsonl"
    cut.write_text(cut.read_text()[:-40])
    assert exit_code("compare", "--render", "--out", str(out)) == 0
    before = {line["contestant"]: line for line in embedded(measured)["comparison"]["momentum"]}
    after = {line["contestant"]: line for line in embedded(out)["comparison"]["momentum"]}
    assert after[OURS[1]] == before[OURS[1]]
    assert after[OURS[0]]["steps"] == [3, 6, 9]
    for field in (*FIELDS, "update_max"):
        assert after[OURS[0]][field] == before[OURS[0]][field][:-1]


def test_a_run_whose_rows_are_gone_has_no_line(measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(measured, out)
    (full_run(out, OURS[0]) / "diagnostics.jsonl").unlink()
    (full_run(out, OURS[1]) / "diagnostics.jsonl").write_text('{"step": 3, "na')
    assert exit_code("compare", "--render", "--out", str(out)) == 0
    assert embedded(out)["comparison"]["momentum"] == []
    assert HEADING not in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("given", [["--diagnose", "3"], ["--config", "run.yaml"]])
def test_measuring_is_refused_where_no_contestant_has_factors(
    lab: Path, here: Path, capfd: pytest.CaptureFixture[str], given: list[str]
) -> None:
    (here / "run.yaml").write_text("diagnose: 3\n")
    without = MEASURED[: MEASURED.index("--diagnose")]
    assert exit_code("compare", *without, "--optimizers", "adamw,galore-ours", *given, "--out", "out") == 2
    printed = " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert (
        "--diagnose 3: measures momentum that is kept as factors, which none of --optimizers adamw,galore-ours has"
        in (printed)
    )
    assert not (here / "out").exists()


def row(step: int, name: str, **values: float | None) -> Mapping[str, Any]:
    return {"step": step, "name": name, **dict.fromkeys((*FIELDS, "update_max"), 1.0), **values}


def test_what_is_not_defined_is_left_out_and_nothing_stands_for_a_step_without_any() -> None:
    curve = curve_of(
        "x",
        [
            row(2, "a", outside=0.5, update_max=7.0, drift=None),
            row(2, "b", outside=None, update_max=9.0, drift=None),
            row(2, "c", outside=0.1, update_max=None, drift=None),
            row(4, "a", outside=0.2),
            row(4, "b", outside=0.9),
            row(4, "c", outside=0.3),
        ],
    )
    assert curve.outside == (0.3, 0.3)
    assert curve.drift == (None, 1.0)
    assert curve.update_max == (9.0, 1.0)


def with_momentum(**values: tuple[float | None, ...]) -> Comparison:
    """The made-up comparison, of which two contestants were measured."""
    fields = {**dict.fromkeys((*FIELDS, "update_max"), (0.5, 0.25, 0.125)), **values}
    names = ("lorapre-adamw@0.25", "lorapre-muon@0.125")
    curves = tuple(MomentumCurve(contestant=name, matrices=3, steps=(10, 20, 30), **fields) for name in names)  # type: ignore[arg-type]
    return replace(fake_comparison(), momentum=curves)


def test_page_table_and_figures_say_nothing_of_it_where_nothing_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "get_plotlyjs", lambda: "")
    said = [page.render_page(each) for each in (fake_comparison(), with_momentum())]
    assert [HEADING in html for html in said] == [False, True]
    assert [html.count('id="plot-momentum"') for html in said] == [0, 1]
    assert [HEADING in tables.markdown(each) for each in (fake_comparison(), with_momentum())] == [False, True]
    drawn = [set(figures.all_figures(each)) for each in (fake_comparison(), with_momentum())]
    assert drawn[1] - drawn[0] == {"diagnostics.png"}


def test_names_are_escaped_and_the_last_values_stand_in_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "get_plotlyjs", lambda: "")
    evil = "<img src=x>|"
    comparison = with_momentum(drift=(0.5, 0.25, 0.0012345), outside=(0.5, 0.25, None))
    rows = tuple(replace(r, title=evil) if r.optimizer == "lorapre-muon" else r for r in comparison.rows)
    comparison = replace(comparison, rows=rows)
    html = page.render_page(comparison)
    section = html[html.index('id="momentum-heading"') : html.index('id="rates-heading"')]
    assert "<img" not in section
    assert section.count("&lt;img src=x&gt;|") == 1
    assert section.count("<td>0.00123</td>") == section.count("<td>–</td>") == 2
    lines = [line for line in tables.markdown(comparison).splitlines() if "0.00123" in line]
    assert [line.startswith(r"| &lt;img src=x>\| r=0.125 | 30 | 0.125 |") for line in lines] == [False, True]


def test_the_static_figure_draws_each_contestant_in_its_colour_with_gaps_where_there_is_no_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    comparison = with_momentum(drift=(0.5, 1e-16, 0.25), update_rms=(None, 2.0, 3.0))
    drawn: list[tuple[str, list[float]]] = []
    draw = Axes.plot

    def record(self: Axes, steps: Any, values: Any, **kwargs: Any) -> Any:
        assert tuple(steps) == (10, 20, 30)
        drawn.append((kwargs["color"], list(values)))
        return draw(self, steps, values, **kwargs)

    monkeypatch.setattr(Axes, "plot", record)
    figure = figures.momentum_figure(comparison)
    assert len(figure.axes) == len(PANELS)
    look = styles(comparison)
    colours = [look[curve.contestant].colour for curve in comparison.momentum]
    assert len(set(colours)) == 2
    assert sorted({colour for colour, _ in drawn}) == sorted(colours)
    for colour in colours:
        lines = [values for own, values in drawn if own == colour]
        assert len(lines) == 6
        gaps = [[math.isnan(value) for value in values] for values in lines if any(map(math.isnan, values))]
        assert gaps == [[False, True, False], [True, False, False]]
