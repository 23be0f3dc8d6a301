"""The study of the defaults (``benchmarks/study``): what it asks for, what it keeps, and that it trains as the lab.

Only light modules are imported here: the pool's workers import this file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from study.plan import MOST_RATES, Key, Run, search, wanted
from study.pool import Ending, Pool
from study.profiles import DECAYING, PROFILES, Profile
from study.rows import Rows

SMALL = Profile(
    model="small",
    tokens=100,
    rates={"a": (1.0, 2.0), "b": (1.0, 2.0)},
    finalists=("b",),
    seeds=(0, 1, 2),
    long=("a",),
    long_tokens=500,
    larger=("large",),
    confirmed=("b", "a"),
)


def losses(contestant: str, by_rate: Mapping[float, float], **changes: Any) -> dict[Key, float]:
    """Made-up losses of the search."""
    return {Key("small", 100, contestant, rate, 0)._replace(**changes): loss for rate, loss in by_rate.items()}


def asked(runs: list[Run], stage: str) -> list[tuple[str, float]]:
    return [(run.contestant, run.lr) for run in runs if run.stage == stage]


#: Best at 2, with neighbours on both sides.
A = losses("a", {1.0: 3.2, 2.0: 3.0, 4.0: 3.1})
B = losses("b", {0.5: 3.2, 1.0: 3.0, 2.0: 3.1})


def test_a_search_begins_with_the_first_rates_of_all_contestants_in_their_order() -> None:
    assert asked(wanted(SMALL, {}), "rates") == [("a", 1.0), ("a", 2.0), ("b", 1.0), ("b", 2.0)]
    assert len(wanted(SMALL, {})) == 4


@pytest.mark.parametrize(("by_rate", "beyond"), [({1.0: 3.2, 2.0: 3.0}, 4.0), ({1.0: 3.0, 2.0: 3.2}, 0.5)])
def test_a_grid_grows_beyond_the_edge_at_which_its_best_rate_is(by_rate: dict[float, float], beyond: float) -> None:
    found = search(SMALL, "a", losses("a", by_rate))
    assert not found.complete
    assert set(found.rates) - set(by_rate) == {beyond}


def test_a_grid_stops_growing_once_its_best_rate_is_inside() -> None:
    assert search(SMALL, "a", A) == search(SMALL, "a", A | B)
    assert search(SMALL, "a", A).rates == (1.0, 2.0, 4.0)
    assert (search(SMALL, "a", A).complete, search(SMALL, "a", A).best) == (True, 2.0)


def test_a_grid_whose_losses_fall_without_end_stops_at_the_most_rates() -> None:
    known = losses("a", {2.0**power: -float(power) for power in range(MOST_RATES)})
    found = search(SMALL, "a", known)
    assert found.complete
    assert found.best == 2.0 ** (MOST_RATES - 1)
    assert len(found.rates) == MOST_RATES


def test_a_single_first_rate_is_compared_with_a_neighbour_on_either_side() -> None:
    profile = replace(SMALL, rates={"a": (1.0,)}, finalists=(), confirmed=())
    made: dict[Key, float] = {}
    order = []
    while runs := [run for run in wanted(profile, made) if run.stage == "rates"]:
        order += [run.lr for run in runs]
        made |= losses("a", {run.lr: abs(math.log2(run.lr)) for run in runs})
    assert order == [1.0, 0.5, 2.0]


def test_rates_that_diverge_are_worse_than_any_loss_and_the_grid_grows_away_from_them() -> None:
    found = search(SMALL, "a", losses("a", {1.0: 9.0, 2.0: math.inf}))
    assert set(found.rates) == {0.5, 1.0, 2.0}
    found = search(SMALL, "a", losses("a", {1.0: math.inf, 2.0: math.inf}))
    assert set(found.rates) == {0.5, 1.0, 2.0}


def test_a_contestant_that_diverges_at_every_rate_ends_without_a_best_rate_and_without_later_runs() -> None:
    known = losses("a", {2.0 ** (1 - power): math.inf for power in range(MOST_RATES)})
    found = search(SMALL, "a", known)
    assert (found.complete, found.best) == (True, None)
    assert {run.contestant for run in wanted(SMALL, known | B)} == {"b"}


def test_rates_that_were_made_belong_to_the_search_though_the_profile_does_not_name_them() -> None:
    found = search(SMALL, "a", A | losses("a", {8.0: 2.5}))
    assert set(found.rates) == {1.0, 2.0, 4.0, 8.0, 16.0}


def test_losses_of_other_seeds_lengths_and_models_do_not_enter_the_search() -> None:
    strange: dict[Key, float] = {}
    for change in ({"seed": 1}, {"tokens": 500}, {"model": "large"}):
        strange |= losses("a", {64.0: 0.1}, **change)
    assert search(SMALL, "a", A | strange).best == 2.0


def test_later_stages_wait_for_the_whole_search_of_their_contestant_alone() -> None:
    unfinished = losses("b", {1.0: 3.0, 2.0: 3.1})  # its best rate is at the edge
    runs = wanted(SMALL, A | unfinished)
    assert asked(runs, "rates") == [("b", 0.5)]
    assert asked(runs, "seeds") == []
    assert asked(runs, "long") == [("a", 2.0)]
    assert asked(runs, "larger") == [("a", 2.0)]


def test_a_rate_that_is_still_running_keeps_its_search_incomplete() -> None:
    running = {Key("small", 100, "b", 0.5, 0)}
    runs = wanted(SMALL, A | losses("b", {1.0: 3.0, 2.0: 3.1}), running)
    assert [run for run in runs if run.contestant == "b"] == []


def test_finalists_get_the_other_seeds_at_their_best_rate() -> None:
    runs = [run for run in wanted(SMALL, A | B) if run.stage == "seeds"]
    assert [(run.contestant, run.lr, run.seed, run.model, run.tokens) for run in runs] == [
        ("b", 1.0, 1, "small", 100),
        ("b", 1.0, 2, "small", 100),
    ]


def test_long_runs_are_made_at_the_best_rate_and_at_half_of_it_and_larger_models_begin_with_it() -> None:
    runs = wanted(SMALL, A | B)
    told = [(run.stage, run.model, run.tokens, run.contestant, run.lr) for run in runs if run.stage != "seeds"]
    assert told == [
        ("larger", "large", 100, "b", 1.0),
        ("larger", "large", 100, "a", 2.0),
        ("long", "small", 500, "a", 2.0),
        ("half", "small", 500, "a", 1.0),
    ]


def test_a_larger_model_has_a_search_of_its_own_and_then_more_seeds_of_those_that_are_repeated() -> None:
    profile = replace(SMALL, repeated=("a",))

    def told(large: dict[Key, float]) -> list[tuple[str, str, float, int]]:
        runs = wanted(profile, A | B | large, stages=("larger", "larger-seeds"))
        return [(run.stage, run.contestant, run.lr, run.seed) for run in runs]

    at_b = losses("b", {0.5: 3.2, 1.0: 3.0, 2.0: 3.1}, model="large")
    assert told(at_b) == [("larger", "a", 2.0, 0)]  # b is not repeated
    assert told(at_b | losses("a", {2.0: 3.0}, model="large")) == [("larger", "a", 1.0, 0)]  # a wider one's is lower
    assert told(at_b | losses("a", {1.0: 3.1, 2.0: 3.0}, model="large")) == [("larger", "a", 4.0, 0)]
    assert told(losses("b", {1.0: 3.0}, model="large")) == [("larger", "a", 2.0, 0), ("larger", "b", 0.5, 0)]
    started = replace(profile, starts={("large", "a"): (0.5,)})
    assert asked(wanted(started, A | B), "larger") == [("b", 1.0), ("a", 0.5)]
    done = at_b | losses("a", {0.5: 3.2, 1.0: 2.9, 2.0: 3.0, 4.0: 3.1}, model="large")
    assert told(done) == [("larger-seeds", "a", 1.0, 1), ("larger-seeds", "a", 1.0, 2)]


def test_stages_are_made_in_the_order_that_is_given_and_others_not_at_all() -> None:
    runs = wanted(SMALL, A | losses("b", {1.0: 3.0}), stages=("long", "rates"))
    assert [run.stage for run in runs] == ["long", "rates"]


def test_nothing_is_asked_for_twice_until_nothing_is_left() -> None:
    profile = replace(SMALL, finalists=("b", "b"), larger=("large", "small"), long_tokens=100)
    made: dict[Key, float] = {}
    count = 0
    while runs := wanted(profile, made):
        keys = [run.key for run in runs]
        assert len(set(keys)) == len(keys)
        assert not set(keys) & set(made)
        made[keys[0]] = abs(math.log2(runs[0].lr) - 1)
        count += 1
    assert count == len(made)


def test_running_runs_are_not_asked_for() -> None:
    every = wanted(SMALL, A | B)
    assert wanted(SMALL, A | B, {every[0].key, every[3].key}) == [*every[1:3], *every[4:]]


def test_a_failed_rate_is_not_asked_for_again_and_the_search_ends_with_the_others() -> None:
    failed = {Key("small", 100, "a", 4.0, 0)}
    runs = wanted(SMALL, losses("a", {1.0: 3.2, 2.0: 3.0}) | B, failed=failed)
    assert asked(runs, "rates") == []
    assert asked(runs, "long") == [("a", 2.0)]


def test_a_contestant_that_fails_at_every_rate_leaves_the_others_alone() -> None:
    failed = {Key("small", 100, "a", rate, 0) for rate in (1.0, 2.0)}
    assert {run.contestant for run in wanted(SMALL, B, failed=failed)} == {"b"}


def test_rates_that_differ_in_their_last_bits_are_the_same_training() -> None:
    assert Run("rates", "m", 1, "a", 0.1 * 3, 0).key == Run("half", "m", 1, "a", 0.3, 0).key


def test_a_profile_refuses_a_finalist_that_is_not_searched_for() -> None:
    with pytest.raises(ValueError, match="c has no rates"):
        replace(SMALL, finalists=("c",))


def test_every_contestant_of_the_profiles_is_one_that_the_registry_takes() -> None:
    from study.prototypes import PROTOTYPES
    from study.training import parse, prototype_of

    from lorapre.lab.models import resolve_model

    for profile in PROFILES.values():
        model = resolve_model(profile.model).build(0, device="meta")
        told = {
            (parse(contestant, model).key, contestant.endswith(DECAYING), prototype_of(contestant))
            for contestant in profile.rates
        }
        assert len(told) == len(profile.rates)
        assert {prototype for _, _, prototype in told} <= {"", *PROTOTYPES}


def row(lr: float, loss: float | None, **more: Any) -> dict[str, Any]:
    return {"model": "small", "tokens": 100, "contestant": "a", "lr": lr, "seed": 0, "loss": loss} | more


def test_rows_come_back_from_the_disk_and_a_diverged_one_is_infinite(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "folder" / "rows.jsonl")
    rows.add(row(1.0, 3.0, update=math.nan, curve=[(1, 2.0)]))
    rows.add(row(2.0, None))
    again = Rows(rows.path)
    assert again.losses == rows.losses == losses("a", {1.0: 3.0, 2.0: math.inf})
    assert again.all[0]["update"] is None


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_last_line_that_was_cut_short_is_made_again_and_harms_no_other(tmp_path: Path, cut: int) -> None:
    rows = Rows(tmp_path / "rows.jsonl")
    for rate in (1.0, 2.0):
        rows.add(row(rate, 3.0))
    whole = rows.path.read_bytes()
    rows.path.write_bytes(whole[:-cut])
    again = Rows(rows.path)
    kept = losses("a", {1.0: 3.0, 2.0: 3.0} if cut == 1 else {1.0: 3.0})  # 1: only the end of the line is missing
    assert again.losses == kept
    again.add(row(4.0, 2.0))
    assert Rows(rows.path).losses == kept | losses("a", {4.0: 2.0})


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"half": \n' + json.dumps(row(1.0, 3.0)) + "\n")
    with pytest.raises(ValueError, match="line 1"):
        Rows(path)


def test_rows_of_another_protocol_are_refused(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl")
    rows.add(row(1.0, 3.0, **SMALL.protocol))
    rows.check_protocol(SMALL.protocol)
    with pytest.raises(ValueError, match="batch_size 128, and this profile's have 64"):
        rows.check_protocol(replace(SMALL, batch_size=64).protocol)


def test_the_best_rate_is_the_first_seeds_and_its_loss_the_mean_over_all_seeds(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl")
    for lr, seed, loss in ((1.0, 0, 3.0), (2.0, 0, 3.1), (1.0, 1, 3.4), (1.0, 2, None), (2.0, 1, 0.1)):
        rows.add(row(lr, loss, seed=seed))
    best = rows.best("small", 100)["a"]
    assert (best.lr, best.losses, best.diverged) == (1.0, (3.0, 3.4), 1)
    assert best.mean == pytest.approx(3.2)
    assert best.spread == pytest.approx(0.4)
    assert best.by_rate == {1.0: 3.0, 2.0: 3.1}


class Imitation:
    """A trainer in a worker that does what a contestant's name says."""

    def train(self, run: Run) -> dict[str, Any]:
        if run.contestant == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if run.contestant == "fails":
            raise ValueError("wrong shape")
        if run.contestant == "starves":
            raise MemoryError
        if run.contestant == "breaks the device":
            raise RuntimeError("illegal access")
        if run.contestant == "never ends":
            time.sleep(3600)
        return {"pid": os.getpid(), "gpu": os.environ.get("STUDY_TEST")}

    def recover(self) -> bool:
        return False


class Sturdy(Imitation):
    def recover(self) -> bool:
        return True


def no_trainer() -> Imitation:
    raise OSError("no corpus")


def a_run(contestant: str, model: str = "m") -> Run:
    return Run("rates", model, 1, contestant, 1.0, 0)


def one(pool: Pool, run: Run) -> Ending:
    pool.begin(run)
    (ending,) = pool.ended(60)
    assert ending.run == run
    return ending


def test_a_worker_that_dies_costs_its_run_alone_and_is_replaced() -> None:
    with Pool([{"STUDY_TEST": "7"}], Sturdy) as pool:
        first = one(pool, a_run("works"))
        dead = one(pool, a_run("dies"))
        second = one(pool, a_run("works"))
    assert (dead.row, dead.lost) == (None, True)
    assert "signal 9" in dead.error
    assert first.row is not None
    assert second.row is not None
    assert first.row["gpu"] == second.row["gpu"] == "7"
    assert first.row["pid"] != second.row["pid"]
    assert "STUDY_TEST" not in os.environ


def test_an_exception_ends_its_run_and_the_process_goes_on_unless_its_device_is_broken() -> None:
    with Pool([{}], Sturdy) as pool:
        before = one(pool, a_run("works")).row
        failed, starved = one(pool, a_run("fails")), one(pool, a_run("starves"))
        after = one(pool, a_run("works")).row
    assert (failed.error, failed.lost, starved.lost) == ("ValueError: wrong shape", False, True)
    assert before == after
    with Pool([{}], Imitation) as pool:
        before = one(pool, a_run("works")).row
        broken = one(pool, a_run("breaks the device"))
        after = one(pool, a_run("works")).row
    assert (broken.error, broken.lost) == ("RuntimeError: illegal access", False)
    assert before != after


def test_the_others_go_on_while_one_never_ends_and_a_run_goes_where_its_model_is() -> None:
    with Pool([{}, {}], Sturdy) as pool:
        pool.begin(a_run("works", "m"))
        (first,) = pool.ended(60)
        pool.begin(a_run("works", "n"))
        (other,) = pool.ended(60)
        pool.begin(a_run("works", "m"))
        (second,) = pool.ended(60)
        pool.begin(a_run("never ends", "m"))
        last = one(pool, a_run("works", "m"))
        assert pool.ended(0.01) == []
        assert [run.contestant for run in pool.running] == ["never ends"]
    rows = [ending.row["pid"] for ending in (first, second, other, last) if ending.row is not None]
    assert rows[0] == rows[1] != rows[2] == rows[3]


def test_processes_that_only_die_end_the_study_with_an_error() -> None:
    with Pool([{}], no_trainer) as pool:
        assert [one(pool, a_run("works")).error for _ in range(2)] == ["OSError: no corpus"] * 2
        with pytest.raises(RuntimeError, match="3 processes have died"):
            one(pool, a_run("works"))


@pytest.mark.parametrize("contestant", ["adamw", "lorapre-muon+residual_gain=1.0@0.25"])
def test_a_run_ends_with_the_loss_and_curve_of_lorapre_pretrain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contestant: str
) -> None:
    import torch
    from _lab import sentences, write_model, write_text
    from rich.console import Console
    from study.training import Trainer

    from lorapre.lab.config import PretrainConfig
    from lorapre.lab.data import load_corpus
    from lorapre.lab.pretrain import run_pretraining

    monkeypatch.setenv("LORAPRE_CACHE", str(tmp_path / "cache"))
    model = str(write_model(tmp_path / "model.json", attention_dropout=0.0))
    text = str(write_text(tmp_path / "text.txt", sentences(60)))
    valid = str(write_text(tmp_path / "valid.txt", sentences(4, seed=1)))
    config = PretrainConfig(
        model=model, data=[text], valid_data=[valid], valid_tokens=None, tokenizer="bpe:300", lr=1e-2, dense_lr=2e-3,
        optimizer=contestant.partition("+")[0], options={"residual_gain": 1.0} if "gain" in contestant else {},
        batch_size=8, sequence_length=16, tokens=70 * 128 + 5, seed=3, eval_every=10,
    )  # fmt: skip
    corpus = load_corpus([text], tokenizer="bpe:300", sequence_length=16, valid_data=[valid])
    assert len(corpus.train) < 70 * 8  # more than an epoch
    assert len(corpus.train) % 8 == 0 or len(corpus.valid) % 8 != 0  # the last batch of validation is not full
    summary = run_pretraining(config, tmp_path / "run", Console(quiet=True))
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    profile = Profile(
        model=model, tokens=70 * 128 + 5, rates={contestant: (1e-2,)}, batch_size=8, sequence_length=16, dense_lr=2e-3,
        validations=7,
    )  # fmt: skip
    trainer = Trainer(corpus, profile, torch.device("cpu"))
    run = Run("rates", model, profile.tokens, contestant, 1e-2, 3)
    trainer.train(replace(run, seed=1, lr=3e-2))  # leaves nothing behind
    made = trainer.train(run)
    assert made["loss"] == pytest.approx(summary["valid_loss"], abs=1e-5)
    assert made["state_bytes"] == summary["matrix_state_bytes"]
    curve = [(record["tokens"], record["valid_loss"]) for record in metrics if "valid_loss" in record]
    assert [tokens for tokens, _ in made["curve"]] == [tokens for tokens, _ in curve]
    assert [loss for _, loss in made["curve"]] == pytest.approx([loss for _, loss in curve], abs=1e-4)


def test_a_run_that_diverges_ends_early_with_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from _lab import sentences, write_model, write_text
    from study.training import Trainer

    from lorapre.lab.data import load_corpus

    monkeypatch.setenv("LORAPRE_CACHE", str(tmp_path / "cache"))
    model = str(write_model(tmp_path / "model.json", attention_dropout=0.0))
    text, valid = (str(write_text(tmp_path / f"{n}.txt", sentences(40, seed=n))) for n in range(2))
    corpus = load_corpus([text], tokenizer="bpe:300", sequence_length=16, valid_data=[valid])
    names = ("adamw", "lorapre-adamw@0.25")  # the second one refuses such gradients
    rates = dict.fromkeys(names, (1.0,))
    profile = Profile(model=model, tokens=40 * 128, rates=rates, batch_size=8, sequence_length=16)
    trainer = Trainer(corpus, profile, torch.device("cpu"))
    for name in names:
        row = trainer.train(Run("rates", model, profile.tokens, name, 1e30, 0))
        assert row["loss"] is None
        assert len(row["curve"]) < profile.validations
        assert all(math.isfinite(loss) for _, loss in row["curve"])
    assert trainer.train(Run("rates", model, profile.tokens, "adamw", 1e-3, 0))["loss"] < 6


def test_the_schedule_gives_each_step_the_rate_of_a_linear_warm_up_and_a_cosine_to_a_tenth() -> None:
    import torch
    from study.protocol import make_scheduler

    from lorapre.lab.config import PretrainConfig

    config = PretrainConfig(tokens=200 * 1024, batch_size=8, sequence_length=128)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 2.0}], lr=1.0)
    scheduler = make_scheduler(optimizer, config, 2.0)
    for step in range(200):
        rise, fall = step / 20, 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 20) / 180)) / 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2.0 * (rise if step < 20 else fall), rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_the_estimate_of_a_model_that_never_ran_grows_with_its_operations(tmp_path: Path) -> None:
    from study.session import Session, operations

    rows = Rows(tmp_path / "rows.jsonl")
    profile = PROFILES["main"]
    session = Session(profile, rows, ("rates",), math.inf)
    run = Run("rates", "llama-20m", 1000, "adamw", 1.0, 0)
    assert session.estimate(run) == 0
    told = {"model": "llama-20m", "tokens": 100, "loss": 3.0, **profile.protocol}
    rows.add(row(1.0, 3.0) | told | {"contestant": "adamw", "seconds": 5.0})
    rows.add(row(1.0, 3.0) | told | {"contestant": "slow", "seconds": 8.0})
    assert session.estimate(run) == pytest.approx(50)
    assert session.estimate(replace(run, contestant="new")) == pytest.approx(65)
    # Layers of 4 d^2 + 3 d m weights and two norms of d, a last norm, and the head of 32,000 d.
    weights = {"llama-20m": (6, 256, 688), "llama-60m": (8, 512, 1376)}
    count = {name: n * (4 * d * d + 3 * d * m + 2 * d) + d + 32_000 * d for name, (n, d, m) in weights.items()}
    assert {name: operations(name) for name in count} == count
    larger = session.estimate(replace(run, model="llama-60m"))
    assert larger == pytest.approx(50 * count["llama-60m"] / count["llama-20m"])
    unknown = session.estimate(replace(run, model="llama-60m", contestant="new"))
    assert unknown == pytest.approx(65 * count["llama-60m"] / count["llama-20m"])


def test_of_the_wanted_runs_only_those_that_are_named_are_made(tmp_path: Path) -> None:
    from study.command import pattern
    from study.session import Session

    rows, profile = Rows(tmp_path / "rows.jsonl"), PROFILES["main"]
    everything = Session(profile, rows, ("rates",), math.inf).wanted()
    some = Session(profile, rows, ("rates",), math.inf, pattern(r"50m adamw|galore@1/4 lr 0\.02")).wanted()
    assert [str(run) for run in some] == [
        "rates llama-20m 50m adamw lr 0.001 seed 0",
        "rates llama-20m 50m adamw lr 0.002 seed 0",
        "rates llama-20m 50m galore@1/4 lr 0.02 seed 0",
    ]
    assert set(some) < set(everything)
    with pytest.raises(argparse.ArgumentTypeError, match="no regular expression"):
        pattern("(")
