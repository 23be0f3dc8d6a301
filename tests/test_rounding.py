"""Stochastic rounding of bfloat16 weights: the generator, the two neighbours, what draws differ by, the option."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from _contract import DEFAULTS, Kind, each_class, params_of
from _support import Shape, assert_same_bits, make_params, random_grads, set_grads, snapshot, train
from lorapre.backends import batches, rounding
from lorapre.backends.rounding import draw, round_

BF16 = torch.bfloat16
WORD = 2**32


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> int:
    """The first word of Philox-4x32-7, in Python's own integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(7):
        p0, p2 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p2 // WORD) ^ c1 ^ k0, p2 % WORD, (p0 // WORD) ^ c3 ^ k1, p0 % WORD
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return c0


def neighbours(exact: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 numbers around float32 ones, towards zero and away from it, in float64."""
    inner = exact.view(torch.int32) & -0x10000
    return inner.view(torch.float32).double(), (inner + 0x10000).view(torch.float32).double()


# The generator.


@pytest.mark.parametrize(
    ("counter", "key", "first"),
    [
        # Random123's known answers
        ((0, 0, 0, 0), (0, 0), 0x5F6FB709),
        ((WORD - 1,) * 4, (WORD - 1, WORD - 1), 0x5207DDC2),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), 0x4DFCCABA),
    ],
)
def test_the_generator_gives_the_published_numbers(
    counter: tuple[int, ...], key: tuple[int, int], first: int, device: torch.device
) -> None:
    assert philox(counter, key) == first
    element = torch.tensor([counter[0]], device=device)
    seed = key[0] + key[1] * WORD
    assert draw(element, *counter[1:], seed).tolist() == [first]
    on_device = [torch.tensor(word, device=device) for word in counter[1:]]
    assert draw(element, *on_device, seed).tolist() == [first]


def test_every_number_of_every_matrix_has_the_draw_that_its_place_says(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(1)) - 0.5
    seed, stream, step = 2**63 - 5, 2**31 + 9, 7
    expected = []
    for index, value in enumerate(values.view(-1).tolist()):
        noise = philox((index % 35, index // 35, step, stream), (seed % WORD, seed // WORD)) >> 16
        bits = torch.tensor(value).view(torch.int32).item()
        expected.append((bits + noise) // 0x10000 * 0x10000)
    for size in (4, 2**20):
        monkeypatch.setattr(rounding, "NUMEL", size)
        monkeypatch.setattr(rounding, "CACHED_NUMEL", size)
        for when in (float(step), torch.tensor(float(step), device=device)):
            for dtype in (torch.float32, torch.float64):
                found = values.to(device, dtype)
                round_(found, seed=seed, stream=stream, step=when, numel=35)
                assert found.cpu().float().view(torch.int32).view(-1).tolist() == expected


def test_what_is_not_finite_and_what_bfloat16_holds_stays(device: torch.device) -> None:
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1.5, -(2.0**-130)], device=device)
    found = values.clone()
    for step in range(20):
        round_(found, seed=3, stream=0, step=float(step), numel=7)
    assert_same_bits(found, values)
    assert torch.signbit(found[4])


def test_the_mean_over_seeds_is_the_exact_value_and_each_result_a_neighbour(device: torch.device) -> None:
    exact = torch.randn(64, generator=torch.Generator().manual_seed(2)) * torch.logspace(-30, 30, 64)
    exact[:2] = torch.tensor([2.0 - 2.0**-12, 2.0**-127])  # across an exponent, and subnormal
    inner, outer = neighbours(exact)
    count = 2000
    draws = []
    for seed in range(count):
        values = exact.to(device, copy=True)
        round_(values, seed=seed, stream=1, step=1.0, numel=64)
        draws.append(values.cpu().double())
    drawn = torch.stack(draws)
    assert ((drawn == inner) | (drawn == outer)).all()
    share = (exact.double() - inner) / (outer - inner)
    deviation = (drawn.mean(0) - exact.double()) / (outer - inner).abs() * count**0.5
    assert (deviation.abs() <= 4 * (share * (1 - share)).sqrt()).all()


# In the optimizers.


def decaying(kind: Kind, params: list[Any], **options: Any) -> Any:
    """Without gradients a step takes weights to nine tenths of them, and nothing else."""
    optimizer = kind(params, **{"rank": 3, "lr": 0.1, "weight_decay": 1.0, "stochastic_rounding": True, **options})
    for param in params_of(optimizer):
        param.grad = torch.zeros_like(param)
    return optimizer


def equal_params(shapes: tuple[Shape, ...], device: torch.device) -> list[nn.Parameter]:
    """Each filled with one number whose nine tenths lie between two of bfloat16."""
    return [nn.Parameter(torch.full(shape, 1.5, dtype=BF16, device=device)) for shape in shapes]


def shares_that_differ(tensors: list[Tensor]) -> list[float]:
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    return [(one != other).float().mean().item() for place, one in enumerate(flat) for other in flat[place + 1 :]]


@each_class
@pytest.mark.parametrize("capturable", [False, True])
def test_draws_differ_by_parameter_matrix_step_and_seed_and_are_the_same_again(
    kind: Kind, capturable: bool, device: torch.device
) -> None:
    shapes: tuple[Shape, ...] = ((20, 30), (2, 20, 30), (600,), (20, 30))

    def stepped(seed: int, before: int = 0) -> list[Tensor]:
        first, *rest = equal_params(shapes, device)
        optimizer = decaying(kind, [first], seed=seed, capturable=capturable)
        optimizer.add_param_group({"params": rest})  # a group of its own has streams of its own
        set_grads(rest, [torch.zeros_like(param) for param in rest])
        for param in (first, *rest):
            optimizer.state[param]["step"].fill_(before)
        optimizer.step()
        return [matrix for param in (first, *rest) for matrix in param.detach().reshape(-1, 600)]

    draws = stepped(5)
    assert len(draws) == 5
    exact = 0.9 * 1.5  # between 1.34375 and 1.3515625, at four fifths
    for drawn in draws:
        assert drawn.unique().tolist() == [1.34375, 1.3515625]
        assert abs((drawn == 1.3515625).float().mean().item() - (exact - 1.34375) * 128) < 4 * (0.16 / 600) ** 0.5
    # 2 * 0.8 * 0.2 = 0.32 of independent draws differ
    variants = [*draws, stepped(6)[0], stepped(-1)[0], stepped(5, before=1)[0]]
    assert all(abs(share - 0.32) < 4 * (0.22 / 600) ** 0.5 for share in shares_that_differ(variants))
    # neighbours along a row and along a column, too
    for axis in (0, 1):
        matrix = draws[0].view(20, 30)
        share = (matrix != matrix.roll(1, axis)).float().mean().item()
        assert abs(share - 0.32) < 4 * (0.22 / 600) ** 0.5
    assert_same_bits(stepped(5), draws)


@pytest.mark.parametrize("kind", DEFAULTS, ids=str)
def test_how_a_bucket_is_cut_and_who_is_missing_change_no_draw(
    kind: Kind, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stepped(size: int | None, missing: int | None = None) -> list[Tensor]:
        with monkeypatch.context() as patched:
            if size is not None:
                patched.setattr(batches, "MAX_SCRATCH_NUMEL", size)
                patched.setattr(rounding, "CACHED_NUMEL", size)
                patched.setattr(rounding, "NUMEL", size)
            params = equal_params(((2, 8, 10),) * 3, device)
            optimizer = decaying(kind, params)
            if missing is not None:
                params[missing].grad = None
            optimizer.step()
            return [param.detach().clone() for param in params]

    whole = stepped(None)
    assert_same_bits(stepped(1), whole)
    assert_same_bits(stepped(330), whole)
    assert_same_bits(stepped(None, missing=0)[1:], whole[1:])


@each_class
@pytest.mark.parametrize("compress", [True, False])
def test_the_order_of_the_numbers_in_memory_changes_no_draw(kind: Kind, compress: bool, device: torch.device) -> None:
    plain, other = equal_params(((12, 30), (5, 5)), device), equal_params(((30, 12), (5, 5)), device)
    other[0].data = other[0].data.mT
    for params in (plain, other):
        decaying(kind, [{"params": params[:1], "compress": compress}, {"params": params[1:]}]).step()
    assert other[0].stride() == (1, 12)
    assert_same_bits([param.detach().contiguous() for param in other], [param.detach() for param in plain])


@each_class
def test_a_weight_moves_in_the_mean_where_rounding_to_nearest_stands_still(kind: Kind, device: torch.device) -> None:
    # 1 - 2^-12: an eighth of the way to the next number below
    def after_64_steps(by_chance: bool) -> list[Tensor]:
        params = [nn.Parameter(torch.ones(shape, dtype=BF16, device=device)) for shape in ((64, 64), (4096,))]
        optimizer = decaying(kind, params, lr=2.0**-12, stochastic_rounding=by_chance)
        for _ in range(64):
            optimizer.step()
        return [param.detach().double().cpu() for param in params]

    for weight in after_64_steps(False):
        assert (weight == 1.0).all()
    for weight in after_64_steps(True):
        expected = (1 - 2.0**-12) ** 64
        assert abs(weight.mean().item() - expected) < 4 * weight.std().item() / 64
        assert 1.0 - weight.mean().item() > 0.9 * (1.0 - expected)


@each_class
def test_training_is_that_of_wide_weights_rounded_at_every_step(kind: Kind, device: torch.device) -> None:
    shapes: tuple[Shape, ...] = ((12, 20), (20, 12), (2, 8, 10), (7,))
    narrow = [nn.Parameter(param.detach()) for param in make_params(shapes, BF16, device)]
    wide = [nn.Parameter(param.detach().float()) for param in narrow]
    ours = kind(narrow, rank=3, lr=1e-2, weight_decay=0.1, stochastic_rounding=True, seed=4)
    theirs = kind(wide, rank=3, lr=1e-2, weight_decay=0.1, seed=4)
    for step in range(3):
        grads = [grad.bfloat16() for grad in random_grads(narrow, step)]
        with torch.no_grad():
            for param, source in zip(wide, narrow, strict=True):
                param.copy_(source)
        set_grads(narrow, grads)
        set_grads(wide, grads)
        ours.step()
        theirs.step()
        for place, (param, exact) in enumerate(zip(narrow, wide, strict=True)):
            expected = exact.detach().clone()
            numel = param[0].numel() if param.ndim == 3 else param.numel()
            round_(expected, seed=4, stream=place, step=step + 1.0, numel=numel)
            assert_same_bits(param.detach().float(), expected)
            assert all(value.dtype == torch.float32 for value in ours.state[param].values())


@each_class
@pytest.mark.parametrize("capturable", [False, True])
def test_resuming_from_a_checkpoint_draws_the_same(
    kind: Kind, capturable: bool, device: torch.device, tmp_path: Path
) -> None:
    shapes: tuple[Shape, ...] = ((12, 20), (2, 8, 10), (7,))

    def fresh() -> Any:
        options = {"rank": 3, "stochastic_rounding": True, "seed": 11, "capturable": capturable}
        return kind(make_params(shapes, BF16, device), **options)

    original = fresh()
    train(original, 3)
    weights = [param.detach().clone() for param in params_of(original)]
    torch.save(original.state_dict(), tmp_path / "checkpoint.pt")
    train(original, 3, seed=1)
    resumed = fresh()
    with torch.no_grad():
        for param, weight in zip(params_of(resumed), weights, strict=True):
            param.copy_(weight)
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    train(resumed, 3, seed=1)
    assert_same_bits(snapshot(resumed), snapshot(original))


@each_class
def test_counters_on_the_device_draw_the_same_and_a_skipped_step_changes_nothing(
    kind: Kind, device: torch.device
) -> None:
    shapes: tuple[Shape, ...] = ((20, 30), (2, 20, 30), (600,))
    results = []
    for capturable in (False, True):
        params = equal_params(shapes, device)
        optimizer = decaying(kind, params, capturable=capturable)
        for _ in range(2):
            optimizer.step()
        results.append([param.detach().clone() for param in params])
        if capturable:
            before = snapshot(optimizer)
            params[0].grad = torch.full_like(params[0], float("nan"))
            optimizer.step()
            assert_same_bits(snapshot(optimizer), before)
    assert_same_bits(*results)


# The option.


@each_class
def test_weights_of_other_dtypes_beside_bfloat16_stay_exact(kind: Kind, device: torch.device) -> None:
    def trained(on: bool, dtypes: tuple[torch.dtype, ...]) -> list[Tensor]:
        params = [param for dtype in dtypes for param in make_params(((12, 20), (7,)), dtype, device)]
        train(kind(params, rank=3, stochastic_rounding=on), 2)
        return [param.detach() for param in params]

    dtypes = (torch.float32, torch.float16, torch.float64, BF16)
    by_chance, nearest = trained(True, dtypes), trained(False, dtypes)
    assert_same_bits(by_chance[:6], nearest[:6])
    assert not torch.equal(by_chance[6], nearest[6])


@each_class
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float16, torch.float32)], ids=str)
def test_the_option_without_any_bfloat16_weight_is_refused_with_the_remedy(
    kind: Kind, dtypes: tuple[torch.dtype, ...]
) -> None:
    groups = [{"params": make_params(((9, 9),), dtype, torch.device("cpu"))} for dtype in dtypes]
    found = ", ".join(map(str, dtypes))
    with pytest.raises(ValueError, match=rf"stochastic_rounding=True .* of {found}\. .*model\.to\(torch\.bfloat16\)"):
        kind([dict(group) for group in groups], rank=2, stochastic_rounding=True)
    groups[0]["stochastic_rounding"] = True  # on for this group alone
    with pytest.raises(ValueError, match=rf"stochastic_rounding=True .* of {dtypes[0]}\."):
        kind([*groups, {"params": make_params(((9, 9),), BF16, torch.device("cpu"))}], rank=2)


@each_class
def test_what_was_saved_before_the_option_existed_loads(kind: Kind) -> None:
    def without(state: dict[str, Any]) -> dict[str, Any]:
        for options in (*state["param_groups"], state.get("defaults", {})):
            for name in kind.cls._added:
                options.pop(name, None)
        return state

    def fresh(**options: Any) -> Any:
        return kind(make_params(((9, 9), (5,)), BF16, torch.device("cpu")), rank=2, **options)

    old = fresh()
    train(old, 2)
    for on in (False, True):
        loaded = fresh(stochastic_rounding=on)
        loaded.load_state_dict(without(old.state_dict()))
        assert loaded.param_groups[0]["stochastic_rounding"] is on
        train(loaded, 1)
    pickled = fresh()
    pickled.__setstate__(without(pickle.loads(pickle.dumps(old.__getstate__()))))
    group = pickled.param_groups[0]
    assert {name: group[name] for name in kind.cls._added} == kind.cls._added
    assert group.get("spectral_clipping") is None
    del old.param_groups[0]["stochastic_rounding"], old.defaults["stochastic_rounding"]
    again = pickle.loads(pickle.dumps(old))
    train(again, 1)
    again.add_param_group({"params": make_params(((9, 9),), BF16, torch.device("cpu"))})
    train(again, 1)
