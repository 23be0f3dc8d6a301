"""What is read out of a comparison: headlines claim no more than was found, and figures draw the runs they should."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from _comparison import (
    BATCH,
    TOKENS,
    broken_run,
    empty_row,
    fake_comparison,
    run,
    small_comparison,
    unfinished_comparison,
)
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from lorapre.lab.compare import facts, figures, page
from lorapre.lab.compare.results import Comparison, Row
from lorapre.lab.compare.style import styles

COMPARISON = fake_comparison()
ROWS = {row.contestant: row for row in COMPARISON.rows}
ADAMW, OURS = ROWS["adamw"], ROWS["lorapre-adamw@0.25"]


def result(row: Row, loss: float, spread: float | None, **changes: Any) -> Row:
    seeds = (0,) if spread is None else (0, 1, 2)
    return replace(row, loss=loss, loss_spread=spread, seeds=seeds, perplexity=math.exp(loss), **changes)


def test_pareto_front_of_worked_examples() -> None:
    assert facts.pareto_front([]) == []
    assert facts.pareto_front([(3, 1), (1, 3), (2, 2), (2, 3), (3, 3)]) == [1, 2, 0]
    assert facts.pareto_front([(1, 1), (2, 0.5), (2, 0.6), (1, 2)]) == [0, 1]
    assert facts.pareto_front([(1, 1), (1, 1), (2, 1)]) == [0, 1]  # equal points stay, equal loss for more state goes


def test_pareto_front_is_what_a_sweep_by_size_finds() -> None:
    draw = random.Random(0)
    for _ in range(50):
        points = [(draw.random(), draw.random()) for _ in range(30)]
        lowest, swept = math.inf, []
        for x, y in sorted(points):
            if y < lowest:
                lowest = y
                swept.append((x, y))
        assert [points[i] for i in facts.pareto_front(points)] == swept


def test_ours_better_than_the_spread_allows_is_said_to_be_below() -> None:
    said = facts.against(result(OURS, 3.25, 0.010), result(ADAMW, 3.28, 0.020))
    assert said == (
        "LoRA-Pre AdamW r=0.25 ended 0.030 below AdamW (3.250 against 3.280), more than the spread over seeds (0.020)."
    )


def test_ours_worse_is_said_to_be_above() -> None:
    said = facts.against(result(OURS, 3.328, 0.010), result(ADAMW, 3.282, 0.004))
    assert "ended 0.046 above AdamW (3.328 against 3.282), more than the spread over seeds (0.010)." in said


@pytest.mark.parametrize(("ours", "adamw"), [(0.001, 0.010), (0.010, 0.001)])
def test_a_difference_within_either_spread_is_no_difference(ours: float, adamw: float) -> None:
    said = facts.against(result(OURS, 3.275, ours), result(ADAMW, 3.28, adamw))
    assert said.endswith("within the spread over seeds (0.010): no difference is shown.")


@pytest.mark.parametrize(("ours", "adamw"), [(None, None), (None, 0.001), (0.001, None)])
def test_a_single_seed_claims_nothing(ours: float | None, adamw: float | None) -> None:
    said = facts.against(result(OURS, 3.0, ours), result(ADAMW, 3.28, adamw))
    assert said.endswith("; with a single seed this may be chance.")
    assert "more than" not in said


def test_losses_that_print_alike_are_level_though_their_spread_is_smaller() -> None:
    said = facts.against(result(OURS, 3.2803, 0.0001), result(ADAMW, 3.28, 0.0001))
    assert said == "LoRA-Pre AdamW r=0.25 ended level with AdamW to three decimals (3.280 against 3.280)."


def test_headlines_name_the_best_and_those_not_told_apart_from_it() -> None:
    best, near, far = result(ROWS["muon"], 3.240, 0.004), result(OURS, 3.243, 0.001), result(ADAMW, 3.28, 0.004)
    found = facts.headlines(small_comparison(best, near, far))
    assert found[0] == (
        "Lowest final loss: Muon, 3.240 ± 0.004 (3 seeds, perplexity 25.5). "
        "Not told apart from it by the spread over seeds: LoRA-Pre AdamW r=0.25."
    )
    alone = facts.headlines(small_comparison(best, far))
    assert "told apart" not in alone[0]
    # one seed has no spread of its own: the widest of all decides
    once_near, once_far = result(OURS, 3.243, None), result(ADAMW, 3.7, None)
    found = facts.headlines(small_comparison(best, once_near, once_far))
    assert found[0].endswith("Not told apart from it by the spread over seeds: LoRA-Pre AdamW r=0.25.")
    single = facts.headlines(small_comparison(result(best, 3.24, None), far))
    assert single[0].endswith("With a single seed the order of close contestants may be chance.")


def test_headlines_give_costs_against_adamw_whether_they_favour_us_or_not() -> None:
    ours = result(
        OURS, 3.3, 0.01, matrix_state_bytes=5_000_000, state_bytes=30_000_000, step_ms=13.0, tokens_per_s=4000.0,
        tokens_to_adamw=None,
    )  # fmt: skip
    adamw = result(
        ADAMW, 3.2, 0.01, matrix_state_bytes=20_000_000, state_bytes=20_000_000, step_ms=5.2, tokens_per_s=5000.0
    )
    said = facts.headlines(small_comparison(adamw, ours))[1]
    assert "5.00 MB against 20.00 MB (4.0 x smaller)" in said
    assert "30.00 MB against 20.00 MB (1.50 x larger)" in said
    assert "13 ms against 5.2 ms (2.5 x longer)" in said
    assert "4,000 against 5,000 tokens a second (1.25 x slower)" in said
    assert "did not reach AdamW's final loss" in said
    reached = facts.headlines(small_comparison(adamw, replace(ours, tokens_to_adamw=512_000)))[1]
    assert "had reached AdamW's final loss after 0.512 M tokens" in reached


def test_headlines_warn_of_edges_of_losses_above_the_bigram_model_and_of_rows_without_a_result() -> None:
    text = "\n".join(facts.headlines(COMPARISON))
    assert "a better one may exist: LoRA-Pre Muon r=0.125." in text
    assert "Not below the bigram model's loss of 3.754: W = BA, both trained r=0.25." in text
    assert "Without a result: LoRA-Pre Adam (paper) r=0.25 (diverged); Flora r=0.25 (failed)." in text


def test_headlines_name_what_has_not_run_yet_apart_from_what_has_no_result() -> None:
    found = facts.headlines(unfinished_comparison())
    assert found[-1] == "Not run yet: Sophia r=0.25; Shampoo r=0.25."
    assert found[-2] == "Without a result: LoRA-Pre Adam (paper) r=0.25 (diverged); Flora r=0.25 (failed)."
    waiting = small_comparison(empty_row("adamw", "AdamW", "missing", "not yet"))
    assert facts.headlines(waiting) == [
        "No contestant has finished yet, so there is nothing to compare.", "Not run yet: AdamW r=0.25.",
    ]  # fmt: skip


def test_nothing_is_said_against_an_adamw_without_a_result() -> None:
    lost = replace(ADAMW, status="failed", loss=None, loss_spread=None, seeds=())
    text = "\n".join(facts.headlines(small_comparison(OURS, lost)))
    assert "nothing is said about ours against it" in text
    assert not re.search("above|below|smaller|larger", text)
    with pytest.raises(ValueError, match="one has no loss"):
        facts.against(OURS, lost)


def test_axes_leave_out_what_lies_far_above_and_keep_all_else() -> None:
    low, high = facts.robust_range([3.2, 3.25, 3.3, 3.35, 3.4, 9.0, math.inf, math.nan])
    assert low < 3.2
    assert 3.4 < high < 3.5
    low, high = facts.robust_range([3.2, 3.25, 3.3, 3.35, 3.6])
    assert low < 3.2 < 3.6 < high


def test_loss_axis_of_the_curves_leaves_out_the_first_fifth_of_a_run_and_a_contestant_far_above() -> None:
    drawn = [curve for curve in facts.curves(COMPARISON) if curve.mean]
    low, high = facts.curve_range(drawn)
    near = [curve for curve in drawn if curve.row.optimizer != "low-rank-weights"]
    assert low < min(min(curve.low) for curve in near)
    shown = [curve.high[i] for curve in near for i in range(21) if curve.tokens[i] > 0.2 * TOKENS]
    assert high == pytest.approx(max(shown), abs=0.1)
    assert high < min(curve.mean[2] for curve in drawn)  # a tenth of the run


def lines(axes: Any, colour: str) -> list[Any]:
    return [line for line in axes.get_lines() if line.get_color() == colour]


def test_curves_are_the_mean_of_the_runs_at_the_chosen_rate_and_nothing_else() -> None:
    axes = figures.loss_figure(COMPARISON, "tokens").axes[0]
    drawn = {" ".join(str(line.get_label()).split()).rstrip("↑"): line for line in axes.get_lines()}
    finished = [row for row in COMPARISON.rows if row.loss is not None]
    for row in finished:
        line = drawn.pop(f"{facts.label(row)} {row.loss:.3f}")
        runs = [r for r in COMPARISON.runs if (r.contestant, r.lr, r.tokens) == (row.contestant, row.lr, TOKENS)]
        assert len(runs) == 3
        expected = [sum(r.points[i].loss for r in runs) / 3 for i in range(21)]
        assert list(line.get_ydata()) == pytest.approx(expected, abs=1e-12)
        assert list(line.get_xdata()) == pytest.approx([30 * i * BATCH / 1e6 for i in range(21)])
    assert [name for name in drawn if not name.startswith("_")] == ["bigram model (3.754)"]
    assert len(axes.collections) == len(finished)  # a band each


def test_time_axis_is_the_runs_own_seconds_unless_they_shared_a_device() -> None:
    own = facts.curves(COMPARISON)
    adamw = next(curve for curve in own if curve.row is ADAMW)
    assert adamw.seconds[-1] == pytest.approx(600 * 215.2 / 1000)
    doubled = [
        replace(r, shared_device=True, points=tuple(replace(p, seconds=p.seconds * 2) for p in r.points))
        for r in COMPARISON.runs
    ]
    shared = replace(COMPARISON, runs=tuple(doubled))
    again = next(curve for curve in facts.curves(shared) if curve.row.contestant == "adamw")
    assert again.seconds == pytest.approx(adamw.seconds)
    assert "steps x measured step time" in figures.loss_figure(shared, "time").axes[0].get_xlabel()
    unknown = replace(shared, rows=(replace(ADAMW, train_ms=None),))
    assert facts.curves(unknown)[0].seconds == ()
    (said,) = figures.loss_figure(unknown, "time").axes[0].texts
    assert said.get_text() == "step times have not been measured yet"
    assert not figures.loss_figure(unknown, "tokens").axes[0].texts


def test_a_seed_that_broke_off_is_not_in_the_mean_but_is_drawn_until_it_ends() -> None:
    name, lr = "adamw", 1e-3
    row = result(ADAMW, 3.3, 0.02)
    late = run(name, lr, 2, 3.4, 5.2)
    late = replace(late, status="diverged", loss=None, points=late.points[:12], reason="gradient is nan")
    runs = (run(name, lr, 0, 3.29, 5.2), run(name, lr, 1, 3.31, 5.2), late, run(name, lr * 2, 0, 3.0, 5.2))
    comparison = replace(COMPARISON, rows=(row,), runs=runs)
    (curve,) = facts.curves(comparison)
    assert curve.mean[-1] == pytest.approx(3.30)
    assert (curve.low[-1], curve.high[-1]) == pytest.approx((3.29, 3.31))
    assert len(curve.mean) == 21  # though the broken run has 12
    assert curve.broken == (late,)
    crossed = [
        line for line in figures.loss_figure(comparison, "tokens").axes[0].get_lines() if line.get_marker() == "x"
    ]
    assert [line.get_ydata()[-1] for line in crossed] == [late.points[-1].loss]


def test_state_figure_has_a_point_for_each_row_with_a_loss_and_the_front_joins_the_right_ones() -> None:
    axes = figures.state_figure(COMPARISON).axes[0]
    low, high = axes.get_ylim()
    look = styles(COMPARISON)
    for row in COMPARISON.rows:
        if row.loss is None:
            continue
        style = look[row.contestant]
        mine = [line for line in lines(axes, style.colour) if line.get_marker() == style.marker]
        (x,), (y,) = mine[0].get_xdata(), mine[0].get_ydata()
        assert x == row.matrix_state_bytes
        assert y == row.loss if row.loss < high else low < y < high
    (front,) = [line for line in axes.get_lines() if "Pareto" in str(line.get_label())]
    names = ("lorapre-muon@0.125", "apollo@0.25", "muon")
    assert list(front.get_xdata()) == [ROWS[name].matrix_state_bytes for name in names]
    assert list(front.get_ydata()) == [ROWS[name].loss for name in names]
    assert axes.get_xscale() == "log"


def test_labels_of_the_state_figure_overlap_neither_each_other_nor_the_frame() -> None:
    figure = figures.state_figure(COMPARISON)
    axes = figure.axes[0]
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    boxes = []
    for text in axes.texts:
        boxes.append((text.get_text(), Text.get_window_extent(text, renderer)))  # without the leader
    assert len(boxes) == 12
    frame = axes.get_window_extent(renderer)
    for name, box in boxes:
        assert frame.x0 <= box.x0, name
        assert box.x1 <= frame.x1, name
    for (one, a), (other, b) in combinations(boxes, 2):
        assert not a.overlaps(b), (one, other)


def by_contestant(comparison: Comparison) -> dict[str, list[facts.RateLine]]:
    found: dict[str, list[facts.RateLine]] = {}
    for line in facts.rate_lines(comparison):
        found.setdefault(line.row.contestant, []).append(line)
    return found


def test_a_line_against_learning_rate_holds_runs_of_one_length_and_the_first_seed() -> None:
    short, full = by_contestant(COMPARISON)["muon"]
    assert (short.tokens, short.full, short.chosen) == (TOKENS // 2, False, None)
    assert [lr for lr, _ in short.losses] == [0.002, 0.004, 0.008, 0.016]
    assert {loss for _, loss in short.losses} == {3.2411 + 0.61}
    assert short.broken == (0.032,)
    assert (full.tokens, full.full, full.broken) == (TOKENS, True, ())
    assert full.losses == ((0.004, 3.2411 + 0.037), (0.008, 3.2411 - 0.0021), (0.016, 3.2411 + 0.061))
    assert full.chosen == (0.008, 3.2411 - 0.0021)
    later = replace(COMPARISON, runs=(*COMPARISON.runs, run("muon", 0.5, 1, 3.0, 41.0)))
    assert by_contestant(later)["muon"] == [short, full]


def test_a_contestant_that_was_only_searched_has_the_line_of_its_search() -> None:
    unfinished = unfinished_comparison()
    (line,) = by_contestant(unfinished)["sophia@0.25"]
    assert line.losses == ((5e-4, 4.10), (1e-3, 4.02), (2e-3, 4.20))
    assert (line.tokens, line.full, line.chosen) == (TOKENS // 2, False, None)
    assert "shampoo@0.25" not in by_contestant(unfinished)
    early = replace(  # nobody has a run of full length, so that the longest are not it
        unfinished, rows=(line.row,), runs=tuple(r for r in unfinished.runs if r.contestant == "sophia@0.25")
    )
    assert [each.full for each in facts.rate_lines(early)] == [False]
    assert facts.short_rates(early, line.row) == {5e-4, 1e-3, 2e-3}


def test_runs_that_all_have_full_length_make_one_line_a_contestant() -> None:
    grid = replace(COMPARISON, runs=tuple(r for r in COMPARISON.runs if r.tokens == TOKENS))
    assert {len(each) for each in by_contestant(grid).values()} == {1}
    assert all(line.full for line in facts.rate_lines(grid))
    axes = figures.rates_figure(grid).axes[0]
    assert all(
        to_hex(line.get_markerfacecolor()) != "#ffffff" for line in axes.get_lines() if len(line.get_xdata()) > 1
    )


def test_range_of_losses_against_rates_shows_searches_and_full_runs_but_not_what_is_far_above() -> None:
    low, high = facts.rates_range(facts.rate_lines(COMPARISON))
    near = [
        line
        for line in facts.rate_lines(COMPARISON)
        if line.row.optimizer not in ("low-rank-weights", "lorapre-adamw-paper")
    ]
    assert {line.full for line in near if line.losses} == {True, False}
    for line in near:
        best = min((loss for _, loss in line.losses), default=low)
        assert low <= best < high
    # One search line of many rates that end ever higher: two beyond its best count, the others do not stretch the axis.
    losses = [3.3, 3.2, 3.25, 3.3, 4.5, 6.0, 9.0]
    rates = [1e-4 * 2**i for i in range(len(losses))]
    runs = [run("adamw", lr, 0, loss, 5.2, tokens=TOKENS // 2) for lr, loss in zip(rates, losses, strict=True)]
    full = run("adamw", rates[1], 0, 2.1, 5.2)
    comparison = replace(COMPARISON, rows=(replace(ADAMW, lr=rates[1]),), runs=(*runs, full))
    low, high = facts.rates_range(facts.rate_lines(comparison))
    assert 2.0 < low < 2.1
    assert 3.3 < high < 3.4
    axes = figures.rates_figure(comparison).axes[0]
    arrows = [line for line in axes.get_lines() if line.get_marker() == figures.ABOVE]
    assert [line.get_xdata()[0] for line in arrows] == rates[4:]
    assert all(line.get_ydata()[0] > high for line in arrows)


@pytest.mark.parametrize("comparison", [COMPARISON, unfinished_comparison()])
def test_rates_figure_draws_each_length_of_run_apart_and_a_cross_for_every_broken_one(comparison: Comparison) -> None:
    axes = figures.rates_figure(comparison).axes[0]
    look = styles(comparison)
    _, high = facts.rates_range(facts.rate_lines(comparison))
    marks = [line for line in axes.get_lines() if line.get_linestyle() == "None"]
    drawn = [line for line in axes.get_lines() if line.get_marker() not in (None, "None") and line not in marks]
    expected = [line for line in facts.rate_lines(comparison) if line.losses]
    assert len(drawn) == len(expected)
    for curve, line in zip(drawn, expected, strict=True):
        style = look[line.row.contestant]
        assert tuple(zip(curve.get_xdata(), curve.get_ydata(), strict=True)) == line.losses
        assert (curve.get_color(), curve.get_marker()) == (style.colour, style.marker)
        assert (to_hex(curve.get_markerfacecolor()) == "#ffffff") is not line.full
        assert curve.get_linewidth() == pytest.approx(style.width * (1 if line.full else 0.6))
    crosses = sorted((line.get_xdata()[0], line.get_color()) for line in marks if line.get_marker() == "x")
    broken = [(lr, look[line.row.contestant].colour) for line in facts.rate_lines(comparison) for lr in line.broken]
    assert crosses == sorted(broken)
    places = [(line.get_xdata()[0], line.get_ydata()[0]) for line in marks if line.get_marker() in ("x", figures.ABOVE)]
    assert len(set(places)) == len(places)
    assert all(high < y < axes.get_ylim()[1] for _, y in places)
    assert axes.get_yticks().max() <= high
    rings = sorted(line.get_xdata()[0] for line in marks if line.get_markersize() == 12)
    assert rings == sorted(row.lr for row in comparison.rows if row.loss is not None and row.lr is not None)


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text().replace("\n", " ") for text in figure.legends[0].get_texts()]


def test_legends_name_those_that_have_something_to_show_and_no_others() -> None:
    unfinished = unfinished_comparison()
    rates = legend_of(figures.rates_figure(unfinished))
    assert {"Sophia r=0.25", "AdamW", "full length: 0.614 M tokens", "search: 0.307 M tokens"} <= set(rates)
    assert not any("Shampoo" in name for name in rates)
    for against in ("tokens", "time"):
        names = legend_of(figures.loss_figure(unfinished, against))
        assert not any("Shampoo" in name or "Sophia" in name for name in names)
    shown = page.page_data(unfinished)["figures"]["styles"]
    assert [row.contestant for row in unfinished.rows if row.contestant not in shown] == ["shampoo@0.25"]


@pytest.mark.parametrize("title", ["a title of very many words, " * 12, "x" * 300, "costs $5 or $6_a"])
def test_titles_stay_within_the_axes_and_clear_of_the_legend(title: str) -> None:
    for name, figure in figures.all_figures(replace(COMPARISON, title=title)).items():
        figure.draw_without_rendering()
        renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
        axes = figure.axes[0]
        frame = axes.get_window_extent(renderer)
        (subtitle,) = figure.texts
        heading = axes.get_title(loc="left")
        assert title not in heading
        (head,) = [text for text in axes.get_children() if isinstance(text, Text) and text.get_text() == heading]
        legend = figure.legends[0].get_window_extent(renderer)
        boxes = [text.get_window_extent(renderer) for text in (head, subtitle)]
        assert boxes[1].y1 <= boxes[0].y0, name
        assert boxes[1].y0 >= frame.y1, name
        for box in boxes:
            assert box.x1 <= frame.x1 + 1, name
            assert not box.overlaps(legend), name
        shown = subtitle.get_text()
        assert not subtitle.get_parse_math(), "dollars are no formulas"
        assert shown == title if len(title) < 30 else title.startswith(shown.removesuffix("…")) and shown.endswith("…")
        assert boxes[1].width > 0.7 * frame.width or shown == title, name


@pytest.mark.parametrize("highest", [1e-3, 2e-3, 0.3, 1e3])
def test_ticks_of_the_learning_rate_do_not_touch(highest: float) -> None:
    runs = tuple(run("adamw", lr, 0, 3.3, 5.2) for lr in (3e-5, 1e-4, highest))
    figure = figures.rates_figure(replace(COMPARISON, rows=(replace(ADAMW, lr=3e-5),), runs=runs))
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    low, high = figure.axes[0].get_xlim()
    ticks = zip(figure.axes[0].get_xticks(), figure.axes[0].get_xticklabels(), strict=True)
    boxes = [text.get_window_extent(renderer) for at, text in ticks if low <= at <= high and text.get_text()]
    assert len(boxes) >= 4
    assert all(b.x0 - a.x1 > 4 for a, b in pairwise(boxes))


def test_thirty_contestants_have_thirty_styles_and_ours_share_no_colour_with_others() -> None:
    many = tuple(
        replace(ADAMW, contestant=f"{kind}{i}", optimizer=f"{kind}{i}")
        for kind in ("lorapre-", "peer-")
        for i in range(15)
    )
    look = styles(replace(COMPARISON, rows=(*many, ADAMW)))
    assert len({(s.colour, s.dash, s.symbol) for s in look.values()}) == 31
    ours = {style.colour for name, style in look.items() if name.startswith("lorapre")}
    assert not ours & {style.colour for name, style in look.items() if not name.startswith("lorapre")}
    assert look["adamw"].colour == "#000000"
    assert [name for name, style in look.items() if style.dash == "dash"] == ["adamw"]


def test_figures_of_a_comparison_in_which_nothing_finished_say_so(tmp_path: Path) -> None:
    row = empty_row("adamw", "A $dollar$ title", "failed", "no")
    comparison = replace(COMPARISON, rows=(row,), runs=(broken_run(row.contestant, 1e-3, 0, "failed", "no"),))
    drawn = figures.all_figures(comparison)
    for name in ("loss-tokens.png", "loss-time.png", "loss-state.png"):
        assert [text.get_text() for text in drawn[name].axes[0].texts] == ["nothing to show"]
    (cross,) = [line for line in drawn["learning-rates.png"].axes[0].get_lines() if line.get_marker() == "x"]
    assert cross.get_xdata() == [1e-3]
    empty = figures.rates_figure(replace(comparison, runs=()))
    assert [text.get_text() for text in empty.axes[0].texts] == ["nothing to show"]
    assert [path.name for path in figures.write_figures(comparison, tmp_path)] == sorted(
        (path.name for path in tmp_path.iterdir()), key=list(drawn).index
    )
    assert "No contestant finished" in page.render_page(comparison)
