"""Rows from runs: means, spreads, costs, tokens to AdamW's loss; and the names of contestants; options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorapre.lab.compare.config import CompareConfig, build_compare_config, parse_duration, parse_grid
from lorapre.lab.compare.contestants import Contestant, parse_contestants
from lorapre.lab.compare.plan import SEARCHES, Job, Planner
from lorapre.lab.compare.results import Status
from lorapre.lab.compare.rows import build_rows, mean_curve, tokens_to_reach
from lorapre.lab.compare.runs import Outcome
from lorapre.lab.config import parse_rank
from lorapre.lab.errors import UserError
from lorapre.lab.optimizers import OPTIMIZERS, matrix_state_bytes

TOKENS = 100  # a step


def outcome(
    contestant: str,
    lr: float,
    losses: list[float],
    *,
    seed: int = 0,
    steps: int = 40,
    status: Status = "finished",
    shared: bool = False,
    **facts: Any,
) -> Outcome:
    """A run with validations at equal distances."""
    distance = steps // len(losses)
    metrics = tuple(
        {
            "step": distance * (number + 1),
            "tokens": distance * (number + 1) * TOKENS,
            "seconds": 7.0,
            "valid_loss": loss,
        }
        for number, loss in enumerate(losses)
    )
    summary = {
        "valid_loss": losses[-1],
        "best_valid_loss": min(losses),
        "state_bytes": 1000,
        "matrix_state_bytes": 600,
        "formula_bytes": 600,
        "peak_bytes": 5000,
        "optimizer_ms": 2.0,
        "training_ms": 20.0,
        **facts,
    }
    job = Job(contestant, lr, seed, steps)
    finished = status == "finished"
    return Outcome(job, status, "" if finished else "why", summary if finished else {}, metrics, TOKENS, shared)


def rows(outcomes: list[Outcome], timings: list[Outcome] | None = None, seeds: int = 2) -> dict[str, Any]:
    names = list(dict.fromkeys(found.job.contestant for found in outcomes))
    contestants = [Contestant(name.partition("@")[0], 0.25 if "@" in name else None) for name in names]
    grid = (1e-3, 2e-3)
    planners = {n: Planner(n, grid, False, tuple(range(seeds)), 40, SEARCHES["quick"]) for n in names}
    found = {one.job: one for one in outcomes}
    return {
        row.contestant: row for row in build_rows(contestants, planners, found, {one.job: one for one in timings or []})
    }


def test_a_row_averages_the_seeds_at_the_chosen_rate() -> None:
    row = rows(
        [
            outcome("adamw", 1e-3, [9.0], steps=10),
            outcome("adamw", 2e-3, [5.0], steps=10),
            outcome("adamw", 2e-3, [4.0, 2.9, 3.0], seed=0, steps=39 + 1, peak_bytes=6000),
            outcome("adamw", 2e-3, [4.2, 3.3, 3.2], seed=1, optimizer_ms=4.0, training_ms=30.0),
        ]
    )["adamw"]
    assert (row.loss, row.loss_spread, row.best_loss) == pytest.approx((3.1, 0.2, (2.9 + 3.2) / 2))
    assert row.perplexity == pytest.approx(math.exp(3.1))
    assert (row.lr, row.seeds, row.status) == (2e-3, (0, 1), "finished")
    assert row.lr_losses == ((1e-3, 9.0), (2e-3, 3.0))
    assert (row.step_ms, row.train_ms, row.peak_bytes) == (3.0, 25.0, 6000)
    assert row.tokens_per_s == pytest.approx(TOKENS / 25e-3)
    assert row.state_bytes == 1000
    assert row.matrix_state_bytes == row.formula_bytes == 600


def test_a_seed_that_broke_off_at_the_chosen_rate_is_told() -> None:
    row = rows(
        [
            outcome("adamw", 2e-3, [9.0], steps=40, status="diverged"),
            outcome("adamw", 1e-3, [3.0]),
            outcome("adamw", 1e-3, [math.nan], seed=1, status="diverged"),
        ]
    )["adamw"]
    assert (row.status, row.seeds, row.loss) == ("finished", (0,), 3.0)
    assert row.reason == "seed 1 diverged: why"


def test_one_seed_has_no_spread() -> None:
    assert rows([outcome("adamw", 1e-3, [3.0])])["adamw"].loss_spread is None


def test_the_best_is_first_and_the_broken_last() -> None:
    found = rows(
        [
            outcome("muon", 1e-3, [math.nan], status="diverged"),
            outcome("adamw", 1e-3, [3.0]),
            outcome("galore@0.25", 1e-3, [2.0]),
        ]
    )
    assert list(found) == ["galore@0.25", "adamw", "muon"]
    assert found["muon"].loss is None
    assert (found["muon"].status, found["muon"].reason) == ("diverged", "why")
    assert found["galore@0.25"].rank == 0.25


def test_times_of_shared_devices_are_not_reported_unless_they_were_measured_alone() -> None:
    shared = [outcome("adamw", 1e-3, [3.0], shared=True)]
    row = rows(shared)["adamw"]
    assert (row.step_ms, row.train_ms, row.tokens_per_s, row.peak_bytes) == (None, None, None, None)
    alone = outcome("adamw", 1e-3, [6.0], steps=220, optimizer_ms=1.5, training_ms=10.0, peak_bytes=77)
    row = rows(shared, [alone])["adamw"]
    assert (row.step_ms, row.train_ms, row.tokens_per_s, row.peak_bytes) == (1.5, 10.0, TOKENS / 10e-3, 77)
    assert row.loss == 3.0


def test_tokens_to_adamws_loss_are_read_off_the_mean_curve() -> None:
    found = rows(
        [
            outcome("adamw", 1e-3, [5.0, 4.0, 3.5, 3.0]),
            outcome("muon", 1e-3, [5.0, 3.2, 2.6, 2.4], seed=0),
            outcome("muon", 1e-3, [5.0, 3.6, 2.8, 2.6], seed=1),
            outcome("sgd", 1e-3, [5.0, 4.9, 4.8, 4.7]),
        ]
    )
    # The mean of Muon's seeds is 3.4 after 2,000 tokens and 2.7 after 3,000: 3.0 lies 4/7 of the way.
    assert found["muon"].tokens_to_adamw == round(2000 + 1000 * 4 / 7)
    assert found["adamw"].tokens_to_adamw == 4000
    assert found["sgd"].tokens_to_adamw is None


def test_without_adamw_nothing_is_said_of_its_loss() -> None:
    assert rows([outcome("muon", 1e-3, [3.0])])["muon"].tokens_to_adamw is None


@pytest.mark.parametrize(
    ("loss", "tokens"), [(5.0, 10), (6.0, 10), (4.5, 15), (4.0, 20), (3.0, 40), (2.9, None), (None, None)]
)
def test_tokens_to_reach(loss: float | None, tokens: int | None) -> None:
    # The curve rises in between: the first crossing counts.
    assert tokens_to_reach(loss, [(10, 5.0), (20, 4.0), (30, 4.5), (40, 3.0)]) == tokens


def test_the_mean_curve_has_the_steps_that_all_seeds_share() -> None:
    one, other = outcome("adamw", 1e-3, [5.0, 3.0]), outcome("adamw", 1e-3, [4.0, 3.5, 2.5, 1.0], seed=1)
    assert mean_curve([one, other]) == [(2000, (5.0 + 3.5) / 2), (4000, 2.0)]
    assert mean_curve([]) == []


def test_points_take_the_time_of_steady_steps() -> None:
    run = outcome("adamw", 1e-3, [5.0, 3.0], training_ms=20.0).to_run()
    assert [point.seconds for point in run.points] == pytest.approx([20 * 0.02, 40 * 0.02])
    run = outcome("adamw", 1e-3, [5.0, 3.0], training_ms=None).to_run()
    assert [point.seconds for point in run.points] == [7.0, 7.0]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=100,
                hidden_size=64,
                intermediate_size=160,
                num_hidden_layers=2,
                num_attention_heads=2,
            )
        )


def test_contestants_take_their_rank_from_the_name_else_from_the_option(model: LlamaForCausalLM) -> None:
    found = parse_contestants(["galore-ours", "adamw", "galore-ours@8", "fira-ours@1/32"], 0.25, model)
    assert [contestant.key for contestant in found] == [
        "galore-ours@0.25",
        "adamw",
        "galore-ours@8",
        "fira-ours@0.03125",
    ]


@pytest.mark.parametrize("other", ["lorapre-adamw@8", "lorapre-adamw", "muon"])
def test_matched_bytes_are_the_most_that_fit(model: LlamaForCausalLM, other: str) -> None:
    (contestant,) = parse_contestants([f"galore-ours@={other}"], 0.25, model)
    name, _, rank = other.partition("@")
    allowed = matrix_state_bytes(OPTIMIZERS[name], model, int(rank) if rank else 0.25)
    assert allowed is not None
    assert isinstance(contestant.rank, int)
    entry = OPTIMIZERS["galore-ours"]
    at, above = (matrix_state_bytes(entry, model, contestant.rank + more) for more in (0, 1))
    assert at is not None
    assert above is not None
    assert at <= allowed < above


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["adam"], "there is no such optimizer"),
        (["adamw", "adamw"], "adamw occurs twice"),
        (["galore-ours", "galore-ours@0.25"], "galore-ours@0.25 occurs twice"),
        (["adamw@8"], "adamw has no rank. Write adamw"),
        (["galore-ours@0"], "'0' is no rank"),
        (["galore-ours@1.5"], "'1.5' is no rank"),
        (["galore-ours@x"], "'x' is no rank"),
        (["galore-ours@1/0"], "'1/0' is no rank"),
        (["galore-ours@=adafactor"], "even at rank 1 galore-ours holds more"),
        (["galore-ours@=nothing"], "nothing: there is no such optimizer"),
        (["galore-ours@="], "--optimizers galore-ours@=: names nobody to match. Write galore-ours@=adamw"),
    ],
)
def test_impossible_contestants_are_refused(model: LlamaForCausalLM, specs: list[str], message: str) -> None:
    with pytest.raises(UserError, match=r"^--optimizers") as refused:
        parse_contestants(specs, 0.25, model)
    assert message in str(refused.value)


def test_ranks_are_integers_or_fractions() -> None:
    assert [parse_rank(text, "--x") for text in ("16", "0.25", "1/32", "1e-1")] == [16, 0.25, 0.03125, 0.1]
    assert isinstance(parse_rank("16", "--x"), int)


@pytest.mark.parametrize(
    ("text", "seconds"), [("20m", 1200), ("90s", 90), ("1.5h", 5400), ("1h30m", 5400), ("1h1m1s", 3661), (" 2m ", 120)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "20", "m", "0s", "-5m", "1.2.3m", "5m1h", "soon"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no length of time"):
        parse_duration(text)
    with pytest.raises(UserError, match=r"--budget"):
        build_compare_config({}, {"budget": text}, preset=None, config_file=None)


def test_grids_are_automatic_rates_or_multiples() -> None:
    entry = OPTIMIZERS["adamw"]

    def grid(text: str) -> tuple[float, ...]:
        return build_compare_config({}, {"lr_grid": text}, preset=None, config_file=None).grid(entry)

    assert grid("auto") == entry.lr_grid
    assert grid("2e-3, 1e-3") == (1e-3, 2e-3)
    assert grid("x2,x0.5") == pytest.approx((entry.default_lr / 2, entry.default_lr * 2))


def test_a_multiple_and_the_rate_that_it_is_are_one_run() -> None:
    entry = OPTIMIZERS["lorapre-lion"]
    assert 3 * entry.default_lr != 6e-4  # by one bit: the run would be made twice, in one folder
    for text in ("x3", "6e-4"):
        assert build_compare_config({}, {"lr_grid": text}, preset=None, config_file=None).grid(entry) == (6e-4,)


@pytest.mark.parametrize(
    "text", ["", "1e-3,", "fast", "x1,2e-3", "0", "-1", "1e-3,1e-3", "1e-3,1.0000001e-3", "nan", "xinf"]
)
def test_what_is_no_grid_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no grid"):
        parse_grid(text)


def test_the_registrys_grids_hold_the_default_and_can_grow() -> None:
    for entry in OPTIMIZERS.values():
        assert entry.default_lr in entry.lr_grid
        factors = {round(b / a, 6) for a, b in zip(entry.lr_grid, entry.lr_grid[1:], strict=False)}
        assert factors == {2.0}


def test_a_comparison_keeps_its_own_defaults_only_where_nothing_else_is_given(tmp_path: Any) -> None:
    assert build_compare_config({}, {}, preset=None, config_file=None).training.total_steps == 160
    assert build_compare_config({"tokens": 1024 * 7}, {}, preset=None, config_file=None).training.total_steps == 7
    preset = build_compare_config({}, {}, preset="galore-60m", config_file=None).training
    assert (preset.total_steps, preset.lr) == (1_100_000_000 // (512 * 256), None)
    file = tmp_path / "run.yaml"
    file.write_text("steps: 33\nlr: 0.5\noptimizer: adamw\nsave_every: 5\nseed: 4\ndiagnose: 3\n")
    config = build_compare_config({"batch_size": 4}, {"seeds": 2}, preset=None, config_file=file)
    assert config.training.diagnose == 3
    assert (config.training.total_steps, config.training.batch_size, config.training.lr) == (33, 4, None)
    assert config.seed_list() == (4, 5)


def test_without_any_option_every_rate_is_tried_at_full_length() -> None:
    plain = build_compare_config({}, {"seeds": 2}, preset=None, config_file=None)
    assert (plain.search, plain.grid_grows) == ("grid", False)
    other = build_compare_config({"rank": 8}, {}, preset=None, config_file=None)
    assert (other.search, other.lr_grid) == (None, "auto")


def test_a_comparisons_own_file_gives_it_back(tmp_path: Any) -> None:
    config = build_compare_config({"steps": 9}, {"seeds": 3, "lr_grid": "x1"}, preset=None, config_file=None)
    file = tmp_path / "comparison.yaml"
    file.write_text(config.to_yaml())
    assert build_compare_config({}, {}, preset=None, config_file=file) == config
    again = build_compare_config({"steps": 10}, {"seeds": 1}, preset=None, config_file=file)
    assert (again.training.total_steps, again.seeds, again.lr_grid) == (10, 1, "x1")


@pytest.mark.parametrize(
    ("content", "message"),
    [("seeds: 0\ntraining: {}\n", "--seeds 0: must be"), ("colour: red\n", "there is no option 'colour'")],
)
def test_a_bad_file_is_refused_with_its_name(tmp_path: Any, content: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as refused:
        build_compare_config({}, {}, preset=None, config_file=file)
    assert message in str(refused.value)


def test_defaults_name_optimizers_that_need_no_package() -> None:
    assert all(OPTIMIZERS[name].package is None for name in CompareConfig.model_fields["optimizers"].default)
