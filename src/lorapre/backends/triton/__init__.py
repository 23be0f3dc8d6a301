"""LoRA-Pre Adam and Muon as Triton kernels: two passes over the gradients, with no scratch of a matrix's size but
Newton-Schulz's and, above rank 128, the momentum of some matrices at a time.

The defaults of `lorapre.LoRAPreAdamW` and of `lorapre.LoRAPreMuon`, and the paper preset of the first, each with what
differs little from it.

Importing this package needs no triton; `supports` says why a bucket cannot be stepped here, and imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from operator import attrgetter

import torch

from lorapre import factors
from lorapre.backends.batches import Bucket
from lorapre.backends.eager import AdamHyperparameters
from lorapre.backends.eager_muon import Hyperparameters, MuonHyperparameters
from lorapre.backends.opened import Opened
from lorapre.backends.triton import table
from lorapre.backends.triton.layout import Layouts, lines, place_of

__all__ = ["Layouts", "cohorts", "installed", "open_step", "supports", "unsupported_option"]

_dtype, _device = attrgetter("dtype"), attrgetter("device")

_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)

#: Between two numbers of a matrix, a tile beyond its end included.
_LARGEST_OFFSET = 2**31 - 2**24

#: What is kept of a matrix, by the regression.
_STATES = {
    "subspace": (["m_A", "m_B", "v_col", "v_row"], ["exp_avg_sq", "m_A", "m_B"]),
    "newton": (["m_A", "m_B", "v_A", "v_B"],),
}

#: Of the residual: m_B is found again from what took its place, divided by it (`elements.carry`).
_LEAST_GAIN = 1e-3

#: The same of Muon, where that is divided by the residual's weight less Nesterov's look ahead: as a share of what the
#: other terms weigh.
_LEAST_SHARE = 1e-2

#: What is kept of a matrix under Muon.
_MUON_STATES = (["m_A", "m_B"], ["m_A", "m_B", "u_col"], ["m_A", "m_B", "u_row"])


@cache
def installed() -> bool:
    """Whether triton is, on whatever device it may run."""
    return find_spec("triton") is not None


@cache
def unavailable(device_type: str) -> str | None:
    """Why Triton cannot run on this kind of device here, or None."""
    try:
        import triton
        import triton.language as tl
        from triton.runtime.jit import JITFunction
    except ImportError:
        return "triton is not installed"
    from lorapre.backends.triton import elements

    interpreted = not isinstance(elements.fill, JITFunction)
    if interpreted and isinstance(tl.sum, JITFunction):
        return "triton was imported before TRITON_INTERPRET was set"
    if device_type == "cpu":
        return None if interpreted else "the CPU needs Triton's interpreter (TRITON_INTERPRET=1)"
    if interpreted:
        return "Triton's interpreter cannot follow addresses on another device than the CPU"
    try:
        active = triton.runtime.driver.active.get_active_torch_device().type
    except RuntimeError as error:
        return f"triton found no device ({error})"
    return None if device_type == active else f"triton runs on {active}, not on {device_type}"


def supports(bucket: Bucket, hyper: Hyperparameters) -> str | None:
    """None where `open_step` can step this bucket, else the reason in words."""
    if not bucket.params or bucket.params[0].numel() == 0:
        return "the bucket is empty"
    return unsupported_option(bucket, hyper) or _unsupported_tensor(bucket) or unavailable(bucket.params[0].device.type)


def unsupported_option(bucket: Bucket, hyper: Hyperparameters) -> str | None:
    """What the kernels do not have of the options, the rank and the kinds of state, in words; or None."""
    if isinstance(hyper, MuonHyperparameters):
        reason = _unsupported_by_muon(bucket, hyper)
    else:
        reason = _unsupported_by_adam(bucket, hyper)
    if reason is not None:
        return reason
    if max(_ranks(bucket)) > table.MAX_RANK:
        return f"rank {max(_ranks(bucket))}, above {table.MAX_RANK}"
    if bucket.rounding is not None and bucket.params[0].dtype != torch.bfloat16:
        return f"stochastic rounding of {bucket.params[0].dtype}; it is for bfloat16"
    return None


def _unsupported_by_muon(bucket: Bucket, hyper: MuonHyperparameters) -> str | None:
    regression = hyper.regressor.regression
    if regression != "subspace":
        return f"regression={regression!r}; the kernels step Muon with 'subspace' only"
    if sorted(bucket.state) not in _MUON_STATES:
        return f"the state {', '.join(sorted(bucket.state))}; the kernels keep m in factors only"
    if bucket.view.rank > table.KERNEL_RANK:
        return f"rank {bucket.view.rank}, above {table.KERNEL_RANK}, the most that the kernels step of Muon"
    if hyper.ns_dtype == torch.float64:
        return "ns_dtype=torch.float64"
    keep, inside, outside = factors.sum_weights(hyper.mu, hyper.nesterov, hyper.residual_gain)
    if abs(outside - hyper.nesterov) <= _LEAST_SHARE * (abs(inside - outside) + keep):
        return (
            f"residual_gain={hyper.residual_gain}, with which the residual weighs {outside:.3g}; the kernels take back "
            f"what they divide by {'that less 1, with Nesterov' if hyper.nesterov else 'it'}"
        )
    return None


def _unsupported_by_adam(bucket: Bucket, hyper: AdamHyperparameters) -> str | None:
    regression = hyper.regressor.regression
    if regression not in _STATES:
        return f"regression={regression!r}; the kernels follow 'subspace' and 'newton' only"
    if sorted(bucket.state) not in _STATES[regression]:
        kept = "v in rank 1 or in full" if regression == "subspace" else "v as a square of factors"
        return (
            f"the state {', '.join(sorted(bucket.state))}; with regression={regression!r} the kernels keep m in "
            f"factors and {kept} only"
        )
    if regression == "newton" and torch.version.hip is not None:
        return "regression='newton' on an AMD GPU, for which Triton has no products of float64"
    if regression == "newton" and hyper.update_clipping:
        return "update_clipping=True; with regression='newton' the kernels form v once, together with the update"
    if hyper.spectral_clipping is not None and "v_row" not in bucket.state:
        return (
            f"spectral_clipping={hyper.spectral_clipping} without a second moment of rank 1, by whose means the "
            "kernels scale the sketch"
        )
    if regression == "subspace" and hyper.residual_gain < _LEAST_GAIN:
        return f"residual_gain={hyper.residual_gain}; the kernels take back what it divides, from {_LEAST_GAIN} on"
    return None


def _unsupported_tensor(bucket: Bucket) -> str | None:
    """In every step, of every tensor: by sets, which are filled without a line of Python for each."""
    params, grads = bucket.params, bucket.grads
    for what, tensors in (("weights", params), ("gradients", grads), *bucket.state.items()):
        dtype = tensors[0].dtype
        if dtype not in _WEIGHTS:
            return f"{what} of dtype {dtype}"
        if set(map(_dtype, tensors)) != {dtype} or set(map(_device, tensors)) != {params[0].device}:
            return f"{what} of several dtypes or devices"
    if len({tensors[0].dtype for tensors in bucket.state.values()}) > 1:
        return "a state of several dtypes"
    matrices = {"weights": params, "gradients": grads}
    for key, tensors in bucket.state.items():
        if key == "exp_avg_sq":  # it has the weights' strides
            matrices["second moments"] = tensors
        elif not all(map(torch.Tensor.is_contiguous, tensors)):
            return "a state that is not contiguous"
    view = bucket.view
    for what, tensors in matrices.items():
        place = place_of(tensors, view)
        if place is None:
            return f"{what} whose strides differ, or are not those of {view.p} x {view.q} matrices"
        if max(view.p * place.row + view.q * place.col, table.eights(view.p) * lines(view.q)) > _LARGEST_OFFSET:
            return f"{what} of {view.p} x {view.q}, a matrix too large for offsets of 32 bits"
    return None


def _ranks(bucket: Bucket) -> tuple[int, ...]:
    """The rank of m, and that of v where it has one of its own."""
    return (bucket.view.rank, *(tensors[0].shape[-2] for key, tensors in bucket.state.items() if key == "v_A"))


def cohorts(buckets: Sequence[Bucket]) -> list[list[Bucket]]:
    """``buckets`` by all that must be equal within one launch, which is not their shape."""
    found: dict[object, list[Bucket]] = {}
    for bucket in buckets:
        step = None if isinstance(bucket.step, torch.Tensor) else bucket.step
        dtypes = bucket.params[0].dtype, bucket.grads[0].dtype, bucket.state["m_B"][0].dtype
        seed = None if bucket.rounding is None else bucket.rounding.seed
        kept = tuple(sorted(bucket.state.keys() - {"u_row", "u_col"}))  # whose launches are a shape's
        key = (bucket.params[0].device, _ranks(bucket), dtypes, step, bucket.maximize, bucket.sweeps, seed, kept)
        found.setdefault(key, []).append(bucket)
    return list(found.values())


def open_step(
    work: Sequence[tuple[Sequence[Bucket], Hyperparameters]], layouts: Layouts, *, supported: bool = False
) -> Opened:
    """Begin one step of LoRA-Pre Adam or Muon for some buckets, each list of them with its options.

    See `lorapre.backends.triton.opening.open_cohorts`, and `lorapre.backends.triton.adamw.AdamStep`,
    `lorapre.backends.triton.muon.MuonStep` and `lorapre.backends.triton.newton.step_buckets` for what is launched. The
    result of ``proceed`` is that of `lorapre.backends.eager.lorapre_adamw` or
    `lorapre.backends.eager_muon.lorapre_muon` up to float32's rounding, and that of Newton-Schulz's dtype.

    Args:
        work: the matrices.
        layouts: remembers addresses from step to step.
        supported: the caller has asked `supports` of each bucket, which is not asked again.

    Raises:
        ValueError: `supports` gives a reason against one of them. Nothing has been launched then.
    """
    if not supported:
        for buckets, hyper in work:
            for bucket in buckets:
                reason = supports(bucket, hyper)
                if reason is not None:
                    raise ValueError(f"This bucket cannot be stepped by the Triton kernels: {reason}.")
    from lorapre.backends.triton.opening import Cohort, open_cohorts

    found = [Cohort(cohort, hyper) for buckets, hyper in work for cohort in cohorts(buckets)]
    return open_cohorts(found, layouts)
