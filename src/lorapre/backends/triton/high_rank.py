"""What follows the first pass at high ranks: bases and products by torch, the weights by a kernel. Imports triton.

Beyond `lorapre.backends.triton.table.KERNEL_RANK` a program's registers hold no (r, r) matrix. Torch takes one shape at
a time, in turns; the momentum X A is formed in full, in scratch. On an H100 this takes half to two thirds more time
than batched torch alone (benchmarks/step_time), for a fifth of its scratch and less, and "auto" leaves it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorapre import spectral, subspace
from lorapre.backends.batches import Bucket
from lorapre.backends.triton import elements, second_pass, table
from lorapre.backends.triton.layout import lines

if TYPE_CHECKING:
    from lorapre.backends.triton.adamw import AdamStep


def proceed(step: AdamStep) -> None:
    """Step all matrices of ``step``, whose ``U`` holds G A^T."""
    first = left = 0
    for bucket in step.buckets:
        view = bucket.view
        n, lines_of_left = len(bucket.params) * view.batch, view.rank * lines(view.p)
        GA = step.U[left : left + n * lines_of_left].view(n, view.rank, -1)[:, :, : view.p].mT
        _proceed(step, bucket, first, GA)
        first, left = first + n, left + n * lines_of_left


def _proceed(step: AdamStep, bucket: Bucket, first: int, GA: Tensor) -> None:
    """Of one bucket, whose matrices are those from ``first`` on; ``GA`` is (n, p, r)."""
    hyper, view = step.hyper, bucket.view
    n, decay, gain = len(GA), hyper.beta1, 1.0 - hyper.beta1
    old_B = _matrices(bucket, bucket.state["m_B"], view.p)
    old_A = _matrices(bucket, bucket.state["m_A"], view.rank)
    numbers = step.coefficients[first : first + n, :, None, None]
    keep, cross, on = (numbers[:, column.value] for column in (elements.KEEP, elements.CROSS, elements.ON))
    enabled = on != 0  # (n, 1, 1)
    B = torch.stack(old_B).float()  # (n, p, r)
    with products(table.PRECISION["bases"]):
        U, _ = orthonormalize(B * decay + GA * gain)
        C = torch.bmm(U.mT, B) * decay  # (n, r, r)
    X = B.mul_(keep).addcmul_(GA, cross)  # (n, p, r)
    rows = None if step.full else _row_means(step, bucket, first)
    if step.spectral:
        assert rows is not None
        _divide(step, bucket, first, X, rows)
    A = [one.float() for one in old_A]
    M = torch.empty((n, view.p, view.q), dtype=torch.float32, device=step.device)
    with products(table.PRECISION["momentum"]):
        for k in range(n):
            torch.mm(X[k], A[k], out=M[k])
    del B, X
    L = torch.empty((n, view.q, view.rank), dtype=torch.float32, device=step.device)
    sign = -1.0 if step.maximize else 1.0
    with products(table.PRECISION["left"]):
        for k, G in enumerate(_matrices(bucket, bucket.grads, view.p)):
            torch.mm(A[k].mT, C[k].mT, out=L[k])
            L[k].addmm_(G.mT.float(), U[k], alpha=sign * gain)
    step.update_given(M, first)
    del M
    size = torch.linalg.vector_norm(L, dim=(-2, -1), keepdim=True) / view.rank**0.5
    share = torch.where(size > 0, size, 1.0) * second_pass.CLOSING.value
    for k in range(n):
        L[k].addcmul_(A[k].mT, share[k])
    with products(table.PRECISION["bases"]):
        basis, triangle = orthonormalize(L)  # (n, q, r), (n, r, r)
        new_B = torch.bmm(U, triangle.mT)
    for k in range(n):
        old_B[k].copy_(torch.where(enabled[k], new_B[k], old_B[k]))
        old_A[k].copy_(torch.where(enabled[k], basis[k].mT, old_A[k]))
    if rows is not None:
        for k, row in enumerate(_lines(bucket, bucket.state["v_row"])):
            row.copy_(torch.where(enabled[k, 0], rows[k, :, 0], row))


def _row_means(step: AdamStep, bucket: Bucket, first: int) -> Tensor:
    """v_row one step on, (n, p, 1)."""
    old = torch.stack(_lines(bucket, bucket.state["v_row"])).float()[:, :, None]
    above = sum(step.matrices.p[:first])
    now = step.row_sums[above : above + old.numel()].view_as(old) / bucket.view.q
    return old + (1.0 - step.hyper.beta2) * (now - old)


def _divide(step: AdamStep, bucket: Bucket, first: int, X: Tensor, rows: Tensor) -> None:
    """`lorapre.backends.triton.spectral.divide` of a bucket: what its update is divided by.

    ``X`` is (n, p, r), ``rows`` from `_row_means`.
    """
    view, hyper = bucket.view, step.hyper
    n, p = len(X), view.p
    above = sum(step.matrices.p[:first])
    numbers = step.coefficients[first : first + n, :, None, None]
    sketch = step.sketches.view(-1, spectral.COLUMNS)[above : above + n * p].view(n, p, -1)
    rights = step.rights.view(step.n, view.rank, -1)[first : first + n]
    with products(table.PRECISION["project"]):
        sketch = torch.baddbmm(sketch * numbers[:, elements.OUTSIDE.value], X, rights)
        mean_squares = rows * numbers[:, elements.V_SCALE.value]
        sketch.mul_(torch.where(mean_squares > 0, mean_squares.rsqrt(), 0.0))
        largest = spectral.norm_of_products(torch.bmm(sketch.mT, sketch), p, view.q)
    assert hyper.spectral_clipping is not None
    limit = hyper.spectral_clipping * spectral.random_norm(p, view.q)
    needed = (largest / limit).square_().flatten() * (p * view.q)
    known = step.surprises[first : first + n]
    known.copy_(torch.maximum(needed, known) if hyper.update_clipping else needed)


def orthonormalize(X: Tensor) -> tuple[Tensor, Tensor]:
    """`lorapre.subspace.orthonormalize` of ``X`` (n, p, r) and the triangles (n, r, r) of X = Q R.

    Where Gram matrices are float64, rows are widened some at a time: all of them would be twice the factor itself.
    """
    passes, gram_dtype = table.GRAM_PASSES, table.GRAM_DTYPE
    r = X.shape[-1]
    identity = torch.eye(r, dtype=gram_dtype, device=X.device)
    tiny = torch.finfo(X.dtype).tiny ** 0.5
    size = X.abs().amax(dim=(-2, -1), keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    Q, triangle = X / size, identity * size.to(gram_dtype)
    for number in range(passes):
        last = number == passes - 1
        if gram_dtype == X.dtype:
            gram = torch.bmm(Q.mT, Q)
        else:
            gram = torch.zeros_like(triangle)
            for rows in Q.split(table.CHUNK, dim=1):
                wide = rows.to(gram_dtype)
                gram.baddbmm_(wide.mT, wide)
        length = gram.diagonal(dim1=-2, dim2=-1).sqrt()[:, None, :]  # (n, 1, r)
        there = length > tiny
        inverse_length = torch.where(there, length.reciprocal(), 0.0)
        gram = gram * inverse_length * inverse_length.mT
        shift = subspace.diagonal_shift(r, X.dtype, gram_dtype, last=last)
        lower, info = torch.linalg.cholesky_ex(gram + shift * identity)
        inverse = torch.linalg.solve_triangular(lower, identity.expand_as(gram), upper=False)
        polished = torch.bmm(Q, (inverse_length.mT * inverse.mT).to(X.dtype))
        turned = torch.bmm(lower.mT * torch.where(there, length, 0.0), triangle)
        if last and number > 0:  # as there, what has no decomposition stays as it is
            works = (info == 0)[:, None, None]
            polished, turned = torch.where(works, polished, Q), torch.where(works, turned, triangle)
        Q, triangle = polished, turned
    return Q, triangle.to(X.dtype).triu()


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Torch's float32 products on a GPU at a precision of the kernels: three products of TF32 are its own."""
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before


def _matrices(bucket: Bucket, tensors: list[Tensor], rows: int) -> list[Tensor]:
    """Each matrix of ``tensors``, which have ``rows``, as views."""
    return [matrix for tensor in tensors for matrix in tensor.view(bucket.view.batch, rows, -1)]


def _lines(bucket: Bucket, tensors: list[Tensor]) -> list[Tensor]:
    """The same of vectors."""
    return [line for tensor in tensors for line in tensor.view(bucket.view.batch, -1)]
