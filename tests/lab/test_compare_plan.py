"""The plan of a comparison: searches, growing grids, seeds, budgets, and that it restarts where it was."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from lorapre.lab.compare.plan import MAX_EXTENSIONS, SEARCHES, Job, Planner, SearchName, choose_search

GRID = (1e-3, 2e-3, 4e-3)


def planner(search: SearchName = "quick", *, extend: bool = False, seeds: int = 1, steps: int = 40) -> Planner:
    return Planner("x", GRID, extend, tuple(range(seeds)), steps, SEARCHES[search])


def valley(best: float) -> Callable[[Job], float]:
    """A loss with one minimum over the learning rate; longer runs are better."""
    return lambda job: abs(math.log(job.lr / best)) + 100 / job.steps + job.seed / 1000


def play(
    plan: Planner, loss: Callable[[Job], float | None], *, shuffle: random.Random | None = None
) -> dict[Job, float | None]:
    """Make what is asked for, one job at a time, until nothing is."""
    losses: dict[Job, float | None] = {}
    while asks := plan.asks(losses):
        ask = shuffle.choice(asks) if shuffle else asks[0]
        assert ask.job not in losses
        losses[ask.job] = loss(ask.job)
    return losses


def made(losses: dict[Job, float | None]) -> set[tuple[float, int, int]]:
    return {(job.lr, job.seed, job.steps) for job in losses}


def test_quick_runs_all_rates_at_a_quarter_and_the_best_one_in_full_over_the_seeds() -> None:
    losses = play(planner(seeds=3), valley(2e-3))
    assert made(losses) == {(lr, 0, 10) for lr in GRID} | {(2e-3, seed, 40) for seed in range(3)}


def test_halving_runs_the_best_two_in_full_and_seeds_the_better() -> None:
    # At a quarter of the length 4e-3 and 2e-3 lead; in full 2e-3 wins.
    def loss(job: Job) -> float:
        return {1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.0}[job.lr] if job.steps == 10 else valley(2e-3)(job)

    losses = play(planner("halving", seeds=2), loss)
    assert made(losses) == {(lr, 0, 10) for lr in GRID} | {(2e-3, 0, 40), (4e-3, 0, 40), (2e-3, 1, 40)}
    assert planner("halving").choice(losses).lr == 2e-3


def test_halving_goes_on_at_full_length_while_the_best_lies_at_the_edge() -> None:
    # Short runs want a low rate, as Adam's do; long ones a rate beyond all that were short-listed.
    def loss(job: Job) -> float:
        return valley(2e-3)(job) if job.steps == 10 else valley(1.6e-2)(job)

    plan = planner("halving", extend=True, seeds=2)
    losses = play(plan, loss)
    in_full = {(lr, seed) for lr, seed, steps in made(losses) if steps == 40}
    assert in_full >= {(4e-3, 0), (8e-3, 0), (1.6e-2, 0), (1.6e-2, 1)}
    assert plan.choice(losses).lr == 1.6e-2
    quick = planner("quick", extend=True)
    assert quick.choice(play(quick, loss)).lr == 2e-3


def test_grid_runs_every_rate_in_full() -> None:
    assert made(play(planner("grid"), valley(1e-3))) == {(lr, 0, 40) for lr in GRID}


@pytest.mark.parametrize(
    ("best", "added"), [(8e-3, {8e-3, 16e-3}), (0.5e-3, {0.5e-3, 0.25e-3}), (2e-3, set()), (4e-3, {8e-3})]
)
def test_an_automatic_grid_grows_until_the_best_rate_is_inside(best: float, added: set[float]) -> None:
    rates = {job.lr for job in play(planner(extend=True), valley(best))}
    assert sorted(rates) == pytest.approx(sorted(set(GRID) | added))


def test_growth_ends_and_says_that_the_best_rate_is_at_the_edge() -> None:
    plan = planner(extend=True)
    losses = play(plan, valley(1e3))
    assert len({job.lr for job in losses}) == len(GRID) + MAX_EXTENSIONS
    choice = plan.choice(losses)
    assert choice.at_edge
    assert choice.lr == pytest.approx(4e-3 * 2**MAX_EXTENSIONS)


def test_a_grid_that_the_user_gave_does_not_grow_but_its_edge_is_told() -> None:
    plan = planner(extend=False)
    losses = play(plan, valley(1e3))
    assert {job.lr for job in losses} == set(GRID)
    assert plan.choice(losses).at_edge


def test_one_rate_has_no_edge() -> None:
    plan = Planner("x", (1e-3,), True, (0,), 40, SEARCHES["quick"])
    losses = play(plan, valley(1.0))
    assert not plan.choice(losses).at_edge


def test_diverged_rates_lose_and_are_not_taken_further() -> None:
    plan = planner("halving")
    losses = play(plan, lambda job: None if job.lr > 1e-3 else 2.0)
    assert made(losses) == {(lr, 0, 10) for lr in GRID} | {(1e-3, 0, 40)}
    choice = plan.choice(losses)
    assert choice.lr == 1e-3
    assert choice.losses == ((1e-3, 2.0), (2e-3, None), (4e-3, None))


def test_a_contestant_whose_every_run_breaks_is_done_after_the_first_round() -> None:
    plan = planner(seeds=5)
    losses = play(plan, lambda job: None)
    assert made(losses) == {(lr, 0, 10) for lr in GRID}
    assert plan.choice(losses).lr is None


def test_the_choice_is_by_full_length_and_keeps_the_longest_loss_of_each_rate() -> None:
    plan = planner("quick")
    losses = {Job("x", lr, 0, 10): loss for lr, loss in zip(GRID, (3.0, 2.0, 4.0), strict=True)}
    assert plan.choice(losses).lr is None  # nothing of full length yet
    losses[Job("x", 2e-3, 0, 40)] = 1.5
    losses[Job("x", 1e-3, 1, 40)] = 0.1  # another seed does not choose
    losses[Job("other", 4e-3, 0, 40)] = 0.1
    choice = plan.choice(losses)
    assert (choice.lr, choice.at_edge) == (2e-3, False)
    assert choice.losses == ((1e-3, 3.0), (2e-3, 1.5), (4e-3, 4.0))


@pytest.mark.parametrize("search", SEARCHES)
def test_the_runs_do_not_depend_on_the_order_in_which_they_end(search: SearchName) -> None:
    plan = planner(search, extend=True, seeds=2)
    expected = made(play(plan, valley(8e-3)))
    for number in range(20):
        assert made(play(plan, valley(8e-3), shuffle=random.Random(number))) == expected


def test_seeds_go_to_the_best_rate_of_an_earlier_sessions_grid_too() -> None:
    # The table shows the best of all rates that were tried in full: its seeds are the ones that are wanted.
    losses: dict[Job, float | None] = {Job("x", 5e-4, 0, 40): 1.0}
    losses |= {Job("x", lr, 0, 40): valley(2e-3)(Job("x", lr, 0, 40)) for lr in GRID}
    plan = planner("grid", seeds=2)
    assert [ask.job for ask in plan.asks(losses)] == [Job("x", 5e-4, 1, 40)]
    assert plan.choice(losses).lr == 5e-4


def test_of_two_rates_that_end_alike_the_lower_is_chosen_whatever_their_order() -> None:
    losses: dict[Job, float | None] = {Job("x", lr, 0, 40): 2.0 for lr in GRID}
    for found in (losses, dict(reversed(losses.items()))):
        assert planner("grid").choice(found).lr == 1e-3


def test_searches_are_more_urgent_than_seeds_and_seeds_come_in_order() -> None:
    plan = planner(seeds=3)
    losses: dict[Job, float | None] = {}
    seen = []
    while asks := plan.asks(losses):
        assert [ask.urgency for ask in asks] == sorted(ask.urgency for ask in asks)
        seen.append(asks[0].urgency)
        losses[asks[0].job] = valley(2e-3)(asks[0].job)
    assert seen == [0, 0, 0, 1, 3, 4]


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("seeds", [1, 3])
def test_the_totals_are_those_of_the_runs(search: SearchName, seeds: int) -> None:
    plan = planner(search, seeds=seeds)
    losses = play(plan, valley(2e-3))
    assert plan.total_runs() == len(losses)
    assert plan.total_steps() == sum(job.steps for job in losses)


def test_a_budget_takes_the_most_thorough_search_that_fits() -> None:
    plans = [planner("grid"), Planner("y", GRID, False, (0,), 40, SEARCHES["grid"])]
    speeds = {"x": 1.0, "y": 2.0}
    # grid: 3 runs of 40 steps each: 120 x 1 + 120 x 2 = 360 s, and 6 starts of 5 s, on 2 devices.
    assert choose_search(plans, speeds, 5.0, 2, 195.0) == (SEARCHES["grid"], 195.0)
    # halving: (30 + 80) x 3 = 330 s and 10 starts; quick: (30 + 40) x 3 = 210 s and 8 starts.
    assert choose_search(plans, speeds, 5.0, 2, 194.0) == (SEARCHES["halving"], 190.0)
    assert choose_search(plans, speeds, 5.0, 2, 150.0) == (SEARCHES["quick"], 125.0)
    assert choose_search(plans, speeds, 5.0, 2, 1.0) == (SEARCHES["quick"], 125.0)
