"""The fine-tuning tables (``benchmarks/finetune``): which runs they ask for, their data, what is made of the rows."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from finetune.accuracy import Z, accuracy, difference, standard_error
from finetune.material import SEED_DISTANCE, SIZES, chain_sums, make_data
from finetune.plan import MOST_RATES, Key, Run, forecast, search, wanted
from finetune.profiles import PROFILES, Contestant, Profile, Task, tiny
from finetune.report import results, write_tables
from finetune.rows import Rows, packed, unpacked

from lorapre.lab.evaluate.intervals import wilson_interval

A, B, LARGER = Contestant("lorapre-adamw"), Contestant("lora"), Contestant("lorapre-adamw", 32)
TASK = Task("sums", "train.jsonl", None, None, "test.jsonl", ("prompt", "response"), 8, 4, 100, 10.0, 4)
SMALL = Profile(TASK, {A: 2.0, B: 1.0}, {LARGER: A}, seeds=(0, 1, 2))


def losses(contestant: Contestant, by_rate: Mapping[float, float], **changes: Any) -> dict[Key, float]:
    """Made-up losses of the search."""
    return {Key("search", str(contestant), rate, 0)._replace(**changes): loss for rate, loss in by_rate.items()}


def state(by_rate: Mapping[float, float], failed: tuple[float, ...] = ()) -> Any:
    known = losses(A, by_rate)
    return search(str(A), 2.0, 0, known, {Key("search", str(A), rate, 0) for rate in failed})


#: Best at 2 and at 1, with neighbours on both sides.
OF_A = losses(A, {1.0: 3.2, 2.0: 3.0, 4.0: 3.1})
OF_B = losses(B, {0.5: 3.2, 1.0: 3.0, 2.0: 3.1})


def told(runs: list[Run], stage: str) -> list[tuple[str, str, float, int]]:
    return [(run.kind, run.contestant, run.lr, run.seed) for run in runs if run.stage == stage]


def test_a_search_begins_with_the_first_rate_of_each_method_and_goes_on_with_both_its_neighbours() -> None:
    assert told(wanted(SMALL, {}), "search") == [("search", str(A), 2.0, 0), ("search", str(B), 1.0, 0)]
    assert len(wanted(SMALL, {})) == 2
    assert set(state({2.0: 3.0}).rates) == {1.0, 2.0, 4.0}


@pytest.mark.parametrize(
    ("by_rate", "beyond"),
    [({1.0: 3.2, 2.0: 3.1, 4.0: 3.0}, 8.0), ({1.0: 3.0, 2.0: 3.1, 4.0: 3.2}, 0.5), ({2.0: math.inf}, 1.0)],
)
def test_a_grid_grows_beyond_the_edge_at_which_its_best_rate_is(by_rate: dict[float, float], beyond: float) -> None:
    found = state(by_rate)
    assert not found.complete
    assert set(found.rates) - set(by_rate) == {beyond}


def test_a_search_is_complete_once_its_best_rate_has_a_neighbour_on_either_side() -> None:
    found = state({1.0: 3.2, 2.0: 3.0, 4.0: 3.1})
    assert (found.complete, found.best, found.rates) == (True, 2.0, (1.0, 2.0, 4.0))
    diverged_above = state({1.0: 3.2, 2.0: 3.0, 4.0: math.inf})
    assert (diverged_above.complete, diverged_above.best) == (True, 2.0)


def test_a_grid_whose_losses_fall_without_end_stops_at_the_most_rates() -> None:
    found = state({2.0**power: -float(power) for power in range(MOST_RATES)})
    assert (found.complete, found.best) == (True, 2.0 ** (MOST_RATES - 1))


def test_a_method_that_diverges_at_every_rate_has_no_best_rate_and_no_later_runs() -> None:
    known = losses(A, {2.0 ** (1 - power): math.inf for power in range(MOST_RATES)})
    assert {run.contestant for run in wanted(SMALL, known | OF_B)} == {str(B)}


def test_a_rate_that_fails_ends_its_side_of_the_grid() -> None:
    found = state({1.0: 3.2, 2.0: 3.0}, failed=(4.0,))
    assert (found.complete, found.best) == (True, 2.0)
    assert not state({1.0: 3.0, 2.0: 3.1}, failed=(4.0,)).complete


def test_losses_of_tests_and_of_other_seeds_do_not_enter_the_search() -> None:
    strange = losses(A, {4.0: 0.1}, kind="test") | losses(A, {4.0: 0.1}, seed=1) | losses(A, {4.0: 0.1}, kind="speed")
    assert search(str(A), 2.0, 0, OF_A | strange).best == 2.0


def test_the_best_rate_is_tested_with_every_seed_but_the_one_that_chose_it_seed_by_seed() -> None:
    assert told(wanted(SMALL, OF_A | OF_B), "seeds") == [
        ("test", str(A), 2.0, 1),
        ("test", str(B), 1.0, 1),
        ("test", str(A), 2.0, 2),
        ("test", str(B), 1.0, 2),
    ]


def test_tests_wait_for_the_search_of_their_own_method_alone() -> None:
    unfinished = losses(B, {0.5: 3.0, 1.0: 3.1, 2.0: 3.2})
    runs = wanted(SMALL, OF_A | unfinished)
    assert {run.contestant for run in runs if run.kind == "test"} == {str(A)}
    assert told(runs, "search") == [("search", str(B), 0.25, 0)]


def test_another_rank_begins_with_the_best_rate_of_its_base_and_is_searched_and_tested_like_it() -> None:
    assert told(wanted(SMALL, losses(A, {2.0: 3.0})), "ranks") == []
    assert told(wanted(SMALL, OF_A), "ranks") == [("search", str(LARGER), 2.0, 0)]
    known = OF_A | losses(LARGER, {1.0: 2.9, 2.0: 3.0, 4.0: 3.1, 0.5: 3.0})
    assert told(wanted(SMALL, known), "ranks") == [("test", str(LARGER), 1.0, 1), ("test", str(LARGER), 1.0, 2)]


def test_speed_is_measured_once_for_each_method_at_its_best_rate_with_the_seed_of_the_search() -> None:
    assert told(wanted(SMALL, OF_A | OF_B), "speed") == [("speed", str(A), 2.0, 0), ("speed", str(B), 1.0, 0)]


def test_stages_are_made_in_the_order_that_is_given_and_others_not_at_all() -> None:
    runs = wanted(SMALL, OF_A | losses(B, {1.0: 3.0}), stages=("speed", "search"))
    assert [run.stage for run in runs] == ["speed", "search", "search"]


def test_running_and_failed_runs_are_not_asked_for() -> None:
    every = wanted(SMALL, OF_A | OF_B)
    left = wanted(SMALL, OF_A | OF_B, running={every[0].key}, failed={every[3].key})
    assert left == [*every[1:3], *every[4:]]


def play(profile: Profile, made: dict[Key, float]) -> Counter[tuple[str, str]]:
    """Make one run after the other, first rates being the best; how many there were."""
    counts: Counter[tuple[str, str]] = Counter()
    while runs := wanted(profile, made):
        run = runs[0]
        assert run.key not in made
        first = 2.0 if run.contestant != str(B) else 1.0
        made[run.key] = abs(math.log2(run.lr / first))
        counts[run.stage, run.kind] += 1
    return counts


def test_the_forecast_is_what_is_made_when_every_first_rate_is_the_best() -> None:
    def counted(known: dict[Key, float]) -> Counter[tuple[str, str]]:
        return Counter((run.stage, run.kind) for run in forecast(SMALL, known))

    assert counted({}) == play(SMALL, {})
    assert counted({}) == {
        ("search", "search"): 6, ("seeds", "test"): 4, ("ranks", "search"): 3, ("ranks", "test"): 2,
        ("speed", "speed"): 2,
    }  # fmt: skip
    assert counted(OF_A) == play(SMALL, dict(OF_A))
    assert Counter(run.stage for run in forecast(SMALL, {}, ("seeds",))) == {"seeds": 4}


def test_the_profiles_compare_lorapre_with_every_rival_at_rank_8_and_sweep_its_ranks_and_moments() -> None:
    for profile in PROFILES.values():
        methods = {one.method: one.rank for one in profile.rates}
        rivals = {"lora", "rslora", "lora+", "dora", "lora-pro", "loft", "galore", "fira", "apollo"}
        assert methods == {**dict.fromkeys({"lorapre-adamw", "lorapre-muon"} | rivals, 8), "full-adamw": None}
        ranks = {(one.method, one.rank) for one in profile.ranks if not one.options}
        assert ranks == set(itertools.product(("lorapre-adamw", "lorapre-muon"), (1, 4, 32)))
        assert [dict(one.options) for one in profile.ranks if one.options] == [
            {"second_moment": "full"},
            {"sweep_interval": 4},
        ]
        assert len(profile.seeds) == 4


def test_every_contestant_of_the_profiles_is_one_that_lorapre_finetune_takes() -> None:
    from finetune.training import run_config

    from lorapre.lab.finetune.methods import find_method
    from lorapre.lab.optimizers import read_options

    for profile in (*PROFILES.values(), *map(tiny, PROFILES.values())):
        for name, contestant in profile.contestants.items():
            config = run_config(profile, Path("material"), contestant, Run("search", "search", "x", name, 1e-3, 5))
            method = find_method(config)
            read_options(method.entry, config.options)
            assert (config.method, config.lr, config.seed) == (contestant.method, 1e-3, 5)
            assert config.dense_lr == (None if method.adapter else profile.dense_lr)
            assert contestant.rank in (None, config.rank)


def test_a_profile_refuses_a_rank_whose_base_is_not_searched_for_and_a_contestant_that_occurs_twice() -> None:
    with pytest.raises(ValueError, match="galore@8 has no rates"):
        replace(SMALL, ranks={LARGER: Contestant("galore")})
    with pytest.raises(ValueError, match="occurs twice"):
        replace(SMALL, ranks={A: B})


# Accuracy.


def test_the_standard_error_over_seeds_and_questions_is_that_of_the_mean_squares() -> None:
    verdicts = [[1, 0, 1, 1, 0, 1, 0], [1, 0, 0, 1, 0, 1, 1], [0, 0, 1, 1, 0, 1, 1]]
    S, n = 3, 7
    grand = sum(map(sum, verdicts)) / (S * n)
    rows = [sum(line) / n for line in verdicts]
    columns = [sum(line[i] for line in verdicts) / S for i in range(n)]
    ms_rows = n * sum((mean - grand) ** 2 for mean in rows) / (S - 1)
    ms_columns = S * sum((mean - grand) ** 2 for mean in columns) / (n - 1)
    ms_rest = sum(
        (verdicts[s][i] - rows[s] - columns[i] + grand) ** 2 for s in range(S) for i in range(n)
    ) / ((S - 1) * (n - 1))  # fmt: skip
    expected = math.sqrt(max(ms_rows + ms_columns - ms_rest, ms_rows, ms_columns) / (S * n))
    assert standard_error(np.array(verdicts, dtype=float)) == pytest.approx(expected, rel=1e-12)
    known = accuracy([[value == 1 for value in line] for line in verdicts])
    assert known.mean == pytest.approx(grand)
    assert (known.low, known.high) == pytest.approx((grand - Z * expected, min(1, grand + Z * expected)))


def test_the_standard_error_is_right_on_average_where_seeds_and_questions_vary() -> None:
    draw = np.random.default_rng(0)
    S, n, tables = 4, 60, 3000
    of_seed, of_question, rest = 0.05, 0.4, 0.3
    means, squares = [], []
    for _ in range(tables):
        table = (
            of_seed * draw.standard_normal((S, 1))
            + of_question * draw.standard_normal((1, n))
            + rest * draw.standard_normal((S, n))
        )
        means.append(table.mean())
        squares.append(standard_error(table) ** 2)
    assert np.mean(squares) == pytest.approx(np.var(means), rel=0.08)


def test_of_one_seed_the_interval_is_wilsons() -> None:
    known = accuracy([[True] * 3 + [False] * 9])
    assert (known.low, known.high) == wilson_interval(3, 12)


def test_an_interval_does_not_leave_the_shares_that_there_are() -> None:
    known = accuracy([[True] * 9 + [False], [True] * 10])
    assert known.high == 1.0
    assert known.low < known.mean == pytest.approx(0.95)


def test_the_difference_of_two_methods_is_taken_on_the_same_questions() -> None:
    hard = [i % 2 == 0 for i in range(40)]
    better = [value or i < 4 for i, value in enumerate(hard)]  # two questions more
    apart = difference([better, better], [hard, hard])
    assert apart.mean == pytest.approx(2 / 40)
    gained = np.array([1.0] * 2 + [0.0] * 38)
    half = Z * math.sqrt(gained.var(ddof=1) / 40)
    assert (apart.low, apart.high) == pytest.approx((2 / 40 - half, 2 / 40 + half))
    assert half < Z * math.sqrt(2 * 0.25 / 40) / 2  # much less than of separate questions
    same = difference([hard, hard], [hard, hard])
    assert (same.low, same.mean, same.high) == (0, 0, 0)


@pytest.mark.parametrize("verdicts", [[], [[]], [[True], [True, False]]])
def test_verdicts_that_are_no_table_are_refused(verdicts: list[list[bool]]) -> None:
    with pytest.raises(ValueError, match="no table"):
        accuracy(verdicts)


# Data.


def draws(seed: int) -> Iterator[Mapping[str, Any]]:
    """Sums of few different numbers, from a point that ``seed`` decides: many occur again."""
    for i in itertools.count(seed // SEED_DISTANCE * 5):
        yield {"question": f"{i % 30} + {i % 7}", "answer": str(i % 30 + i % 7), "metadata": {}}


def test_no_example_of_chain_sum_occurs_twice_on_one_side_or_on_two() -> None:
    sides = chain_sums(draws, {"test": 20, "valid": 10, "train": 100})
    assert {side: len(records) for side, records in sides.items()} == {"test": 20, "valid": 10, "train": 100}
    every = [record["prompt"] for records in sides.values() for record in records]
    assert len(set(every)) == len(every) == 130
    assert all(eval(record["prompt"]) == int(record["response"]) for records in sides.values() for record in records)
    assert sides == chain_sums(draws, {"test": 20, "valid": 10, "train": 100})


def test_the_sides_are_drawn_from_seeds_that_are_further_apart_than_items() -> None:
    asked: list[int] = []

    def noted(seed: int) -> Iterator[Mapping[str, Any]]:
        asked.append(seed)
        for i in itertools.count():
            yield {"question": f"{seed + i}", "answer": "1"}

    chain_sums(noted, SIZES)
    assert np.diff(asked).tolist() == [SEED_DISTANCE] * 2
    assert sum(SIZES.values()) < SEED_DISTANCE


def test_chain_sum_of_reasoning_gym_has_right_answers_and_its_scorer_agrees_with_that_of_evaluate() -> None:
    gym = pytest.importorskip("reasoning_gym")
    from finetune.material import CHAIN_SUM, _reasoning_gym

    from lorapre.lab.evaluate.scoring import score

    sides = chain_sums(_reasoning_gym, {"test": 50, "train": 100})
    assert sides == chain_sums(_reasoning_gym, {"test": 50, "train": 100})
    judge = gym.create_dataset("chain_sum", seed=0, size=1, **CHAIN_SUM)
    for record in sides["test"]:
        expression = re.fullmatch(r".*: ([0-9 +-]+) =", record["prompt"])
        assert expression is not None
        right = int(record["response"])
        assert eval(expression[1]) == right
        for answer in (right, -right, right + 1, right * 10, f"{right}\n"):
            ours = score(str(answer), str(right), "hashes").correct
            theirs = judge.score_answer(str(answer).strip(), {"answer": record["response"]}) == 1.0
            assert ours == theirs == (int(answer) == right)


def test_gsm8k_is_copied_as_it_is_and_a_missing_file_is_named(tmp_path: Path) -> None:
    source = tmp_path / "gsm8k"
    source.mkdir()
    (source / "train.jsonl").write_text('{"question": "q"}\n')
    with pytest.raises(ValueError, match=re.escape("has no test.jsonl")):
        make_data(source, tmp_path / "material", draws)
    (source / "test.jsonl").write_text("x\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.material.SIZES", {"test": 2, "train": 3})
        make_data(source, tmp_path / "material", draws)
    made = {path.name: path.read_text() for path in (tmp_path / "material").iterdir()}
    assert made["gsm8k-train.jsonl"] == '{"question": "q"}\n'
    assert json.loads(made["chain-sum-train.jsonl"].splitlines()[0]).keys() == {"prompt", "response"}
    assert sorted(made) == ["chain-sum-test.jsonl", "chain-sum-train.jsonl", "gsm8k-test.jsonl", "gsm8k-train.jsonl"]


# From rows to the table.


def row(contestant: Contestant, kind: str, lr: float, seed: int, loss: float | None, **more: Any) -> dict[str, Any]:
    return {
        "stage": "x", "kind": kind, "task": "sums", "contestant": str(contestant), "method": contestant.method,
        "rank": contestant.rank, "options": {}, "lr": lr, "seed": seed, "loss": loss, **SMALL.protocol,
        "train_size": 100, "train_tokens": 1000, "learned_tokens": 300, "steps": 10, "loss_before": 4.0,
        "state_bytes": 2000, "matrix_state_bytes": 500, "peak_bytes": None, "examples_per_s": 1.0,
        "curve": [(5, 3.5), (10, 3.0)], "hardware": "a machine", "date": "2026-01-01", "versions": {"torch": "2"},
        "seconds": 9.0, "tested": 4.0,
    } | more  # fmt: skip


def answered(text: str) -> dict[str, Any]:
    return {"right": text, "correct": text.count("1"), "asked": len(text)}


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    made = Rows(tmp_path / "rows.jsonl")
    for lr, loss in ((1.0, 3.2), (2.0, 3.0), (4.0, None)):
        made.add(row(A, "search", lr, 0, loss))
    made.add(row(A, "test", 2.0, 1, 3.1, **answered("1101")))
    made.add(row(A, "test", 2.0, 2, 2.7, **answered("1100")))
    made.add(row(A, "test", 1.0, 1, 9.0, **answered("0000")))  # of a rate that was the best once
    made.add(row(A, "speed", 2.0, 0, 3.0, examples_per_s=77.0))
    made.add(row(B, "search", 1.0, 0, 3.3))
    made.add(row(B, "test", 1.0, 1, None))
    return made


def test_the_table_has_each_method_at_the_rate_that_held_out_loss_chose(rows: Rows, tmp_path: Path) -> None:
    write_tables(Rows(rows.path), SMALL, tmp_path)
    ours, theirs = json.loads((tmp_path / "table.json").read_text())
    known = accuracy([[True, True, False, True], [True, True, False, False]])
    assert ours == {
        "method": "lorapre-adamw", "rank": 8, "options": {}, "lr": 2.0, "seeds": [1, 2], "accuracy": 5 / 8,
        "interval": [known.low, known.high], "loss": pytest.approx(2.9), "state_bytes": 2000,
        "matrix_state_bytes": 500, "peak_bytes": None, "examples_per_s": 77.0, "diverged_seeds": [],
        "rates": [[1.0, 3.2], [2.0, 3.0], [4.0, None]], "rate_at_edge": False,
    }  # fmt: skip
    assert (theirs["seeds"], theirs["diverged_seeds"], theirs["accuracy"]) == ([1], [1], None)
    assert (theirs["examples_per_s"], theirs["rate_at_edge"], theirs["loss"]) == (None, True, 3.3)


def test_the_page_names_best_rates_at_an_edge_and_differences_with_their_intervals(rows: Rows, tmp_path: Path) -> None:
    rows.add(row(B, "test", 1.0, 1, 3.4, **answered("0101")))
    rows.add(row(B, "test", 1.0, 2, 3.4, **answered("0100")))
    write_tables(rows, SMALL, tmp_path)
    page = (tmp_path / "table.md").read_text()
    assert "| `lora` | 8 | 1† |" in page
    assert "| `lorapre-adamw` | 8 | 2 (1: 3.200, 4: diverged) | 62.5 % [" in page
    apart = difference([unpacked("1101"), unpacked("1100")], [unpacked("0101"), unpacked("0100")])
    assert apart.mean == pytest.approx(0.25)
    assert f"| `lora` | +25.0 [{100 * apart.low:+.1f}, {100 * apart.high:+.1f}] |" in page
    assert page.index("`lorapre-adamw`") < page.index("| `lora` | 8")  # the better one first


def test_the_differences_tell_methods_of_the_same_name_apart_by_their_options(rows: Rows, tmp_path: Path) -> None:
    other = Contestant("lora", 8, (("update_proj_gap", 25),))
    for one in (B, other):
        rows.add(row(one, "search", 2.0, 0, 3.1))
        rows.add(row(one, "test", 2.0, 1, 3.4, **answered("0101")))
    write_tables(rows, replace(SMALL, rates={**SMALL.rates, other: 1.0}), tmp_path)
    page = (tmp_path / "table.md").read_text().partition("minus others'")[2]
    assert ("| `lora` | +" in page, "| `lora`, update_proj_gap=25 | +" in page) == (True, True)


def test_figures_are_made_of_whatever_rows_there_are(rows: Rows, tmp_path: Path) -> None:
    from finetune.figures import write_figures

    write_figures(rows, SMALL, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"accuracy.png", "rates.png", "curves.png"}
    for lr, loss in ((1.0, 3.2), (2.0, 2.8), (4.0, 3.0)):
        rows.add(row(LARGER, "search", lr, 0, loss))
    write_figures(rows, SMALL, tmp_path)
    assert (tmp_path / "ranks.png").stat().st_size > 10_000


def test_verdicts_come_back_from_the_disk(rows: Rows) -> None:
    again = results(Rows(rows.path), SMALL)[A]
    assert again.verdicts == [[True, True, False, True], [True, True, False, False]]
    assert unpacked(packed([True, False])) == [True, False]


def test_a_run_that_is_on_the_disk_is_not_made_again(rows: Rows) -> None:
    before = wanted(SMALL, Rows(rows.path).losses)
    rows.add(row(B, "search", 2.0, 0, 3.4))
    after = wanted(SMALL, Rows(rows.path).losses)
    assert [str(run) for run in before if run not in after] == ["search sums lora@8 lr 2 seed 0"]
    assert set(after) < set(before)
