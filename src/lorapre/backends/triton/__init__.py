"""LoRA-Pre Adam as two Triton kernels over the gradients, with no scratch of a matrix's size.

Importing this package needs no triton; `supports` says why a bucket cannot be stepped here, and imports it.
"""

from __future__ import annotations

from functools import cache

import torch

from lorapre.backends.batches import Bucket
from lorapre.backends.eager import AdamHyperparameters
from lorapre.backends.triton import table
from lorapre.backends.triton.pointers import Pointers, place_of

__all__ = ["Pointers", "lorapre_adamw", "supports"]

_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)


@cache
def unavailable(device_type: str) -> str | None:
    """Why Triton cannot run on this kind of device here, or None."""
    try:
        import triton
        import triton.language as tl
        from triton.runtime.jit import JITFunction
    except ImportError:
        return "triton is not installed"
    from lorapre.backends.triton import kernels

    interpreted = not isinstance(kernels.project, JITFunction)
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


def supports(bucket: Bucket, hyper: AdamHyperparameters, *, stochastic_rounding: bool = False) -> str | None:
    """None where `lorapre_adamw` can step this bucket, else the reason in words."""
    if not bucket.params or bucket.params[0].numel() == 0:
        return "the bucket is empty"
    return (
        _unsupported_option(bucket, hyper, stochastic_rounding)
        or _unsupported_tensor(bucket)
        or unavailable(bucket.params[0].device.type)
    )


def _unsupported_option(bucket: Bucket, hyper: AdamHyperparameters, stochastic_rounding: bool) -> str | None:
    if hyper.regressor.regression != "subspace":
        return f"regression={hyper.regressor.regression!r}; the kernels follow 'subspace' only"
    if sorted(bucket.state) != ["m_A", "m_B", "v_col", "v_row"]:
        return f"the state {', '.join(sorted(bucket.state))}; the kernels keep m in factors and v in rank 1 only"
    if hyper.update_clipping:
        return "update_clipping=True; the kernels do not clip"
    if bucket.view.rank > table.MAX_RANK:
        return f"rank {bucket.view.rank}, above {table.MAX_RANK}"
    if stochastic_rounding and bucket.params[0].dtype != torch.bfloat16:
        return f"stochastic rounding of {bucket.params[0].dtype}; it is for bfloat16"
    return None


def _unsupported_tensor(bucket: Bucket) -> str | None:
    params, grads = bucket.params, bucket.grads
    for what, tensors in (("weights", params), ("gradients", grads), *bucket.state.items()):
        dtype = tensors[0].dtype
        if dtype not in _WEIGHTS:
            return f"{what} of dtype {dtype}"
        if any(tensor.dtype != dtype or tensor.device != params[0].device for tensor in tensors):
            return f"{what} of several dtypes or devices"
    if len({tensors[0].dtype for tensors in bucket.state.values()}) > 1:
        return "a state of several dtypes"
    if any(not tensor.is_contiguous() for tensors in bucket.state.values() for tensor in tensors):
        return "a state that is not contiguous"
    for what, tensors in (("weights", params), ("gradients", grads)):
        if place_of(tensors, bucket.view) is None:
            return f"{what} whose strides differ, or are not those of {bucket.view.p} x {bucket.view.q} matrices"
    return None


def lorapre_adamw(
    bucket: Bucket,
    hyper: AdamHyperparameters,
    pointers: Pointers,
    *,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> None:
    """One step of LoRA-Pre Adam for a bucket of matrices, in place; see `lorapre.backends.triton.adamw.step_bucket`.

    The result is that of `lorapre.backends.eager.lorapre_adamw` up to float32's rounding.

    Raises:
        ValueError: `supports` gives a reason against it.
    """
    reason = supports(bucket, hyper, stochastic_rounding=stochastic_rounding)
    if reason is not None:
        raise ValueError(f"This bucket cannot be stepped by the Triton kernels: {reason}.")
    from lorapre.backends.triton.adamw import step_bucket

    step_bucket(bucket, hyper, pointers, seed=seed if stochastic_rounding else None)
