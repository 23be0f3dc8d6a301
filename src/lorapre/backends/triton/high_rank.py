"""What follows the first pass at high ranks: batched products by torch, few kernels. Imports triton.

Beyond `lorapre.backends.triton.table.KERNEL_RANK` a program's registers hold no (r, r) matrix. Factors are kept as rows
here, (r, p) and (r, q); what is (r, r) is done for all matrices at once, what is larger for a chunk of one shape at a
time, and the momentum X A is formed for a chunk, in scratch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorapre import spectral
from lorapre.backends.batches import Bucket, gather, scatter
from lorapre.backends.triton import elements, products, row_bases, second_pass, table
from lorapre.backends.triton.layout import lines

if TYPE_CHECKING:
    from lorapre.backends.triton.adamw import AdamStep


@dataclass(frozen=True)
class Chunk:
    """Some matrices of a bucket, numbers ``at`` of the step.

    Attributes:
        bucket: its shapes and options.
        at: which matrices of the step.
        B: m_B of each, (p, r).
        A: m_A of each, (r, q).
        G: the gradient of each, (p, q).
        v_row: of each, (p); none where v is in full.
        above: rows of the step's matrices before these.
        U: (n, r, lines of p): G A^T, K and the left basis, one after the other, as rows; zeros in the last columns.
        spare: for X (n, p, r), and then for L (n, r, lines of q).
    """

    bucket: Bucket
    at: slice
    B: list[Tensor]
    A: list[Tensor]
    G: list[Tensor]
    v_row: list[Tensor]
    above: int
    U: Tensor
    spare: Tensor

    @property
    def n(self) -> int:
        return len(self.B)

    @property
    def X(self) -> Tensor:
        view = self.bucket.view
        return self.spare[: self.n * view.p * view.rank].view(self.n, view.p, view.rank)

    @property
    def L(self) -> Tensor:
        r, width = self.bucket.view.rank, lines(self.bucket.view.q)
        return self.spare[: self.n * r * width].view(self.n, r, width)


def proceed(step: AdamStep) -> None:
    """Step all matrices of ``step``, whose ``U`` holds G A^T."""
    chunks = list(_chunks(step))
    enabled = step.coefficients[:, elements.ON.value, None, None] != 0  # (n, 1, 1)
    for chunk in chunks:
        _form_K_and_X(step, chunk)
    W, _ = row_bases.conditioned([chunk.U for chunk in chunks])
    P = row_bases.projector(W)
    del W
    for chunk in chunks:
        _update(step, chunk, enabled[chunk.at])
    # M' = U^T P U M' is B A with the rows of L = U M': B = U^T P S for L = S A.
    E, S = row_bases.last_pass(*row_bases.conditioned([chunk.L for chunk in chunks]))
    PS = products.multiply(P, S, "ieee")
    del P, S
    for chunk in chunks:
        view = chunk.bucket.view
        B = products.multiply(chunk.U.mT, PS[chunk.at], table.PRECISION["bases"])[:, : view.p]
        A = row_bases.corrected(chunk.L, E[chunk.at])[:, :, : view.q]
        _write(chunk.B, B, enabled[chunk.at])
        _write(chunk.A, A, enabled[chunk.at])


def _chunks(step: AdamStep) -> Iterator[Chunk]:
    first = above = left = 0
    for bucket in step.buckets:
        view = bucket.view
        p, q, r = view.p, view.q, view.rank
        B, A = _matrices(bucket, bucket.state["m_B"], p), _matrices(bucket, bucket.state["m_A"], r)
        G = _matrices(bucket, bucket.grads, p)
        v_row = [] if step.full else [v for tensor in bucket.state["v_row"] for v in tensor.view(view.batch, -1)]
        width, size = lines(p), table.high_rank_batch(view)
        for start in range(0, len(B), size):
            some = slice(start, min(start + size, len(B)))
            n = some.stop - start
            U = step.U[left : left + n * r * width].view(n, r, width)
            spare = step.U.new_empty(n * r * max(width, lines(q)))
            at = slice(first, first + n)
            yield Chunk(bucket, at, B[some], A[some], G[some], v_row[some], above, U, spare)
            first, above, left = first + n, above + n * p, left + n * r * width


def _form_K_and_X(step: AdamStep, chunk: Chunk) -> None:
    """K = decay B + gain G A^T in the place of the latter, and X = keep B + cross G A^T."""
    view, beta1 = chunk.bucket.view, step.hyper.beta1
    numbers = step.coefficients[chunk.at, :, None, None]
    B = gather(chunk.B, (chunk.n, view.p, view.rank), torch.float32)
    K = chunk.U[:, :, : view.p].mT  # (n, p, r)
    X = chunk.X
    torch.mul(B, numbers[:, elements.KEEP.value], out=X)
    X.addcmul_(K, numbers[:, elements.CROSS.value])
    K.mul_(1.0 - beta1).add_(B, alpha=beta1)


def _update(step: AdamStep, chunk: Chunk, enabled: Tensor) -> None:
    """The weights and v, from X; and L = U M' in its place.

    ``enabled`` is (n, 1, 1). L has a share of the old basis, in case its own rows leave directions open.
    """
    view, beta1 = chunk.bucket.view, step.hyper.beta1
    p, q, r = view.p, view.q, view.rank
    C = products.multiply(chunk.U, _padded(chunk.B, (lines(p), r)), table.PRECISION["bases"]).mul_(beta1)  # (n, r, r)
    A = _padded(chunk.A, (r, lines(q)))
    if not step.full:
        v_row = gather(chunk.v_row, (chunk.n, p, 1), torch.float32)
        mean_squares = step.row_sums[chunk.above : chunk.above + v_row.numel()].view_as(v_row) / q
        new = v_row + (1.0 - step.hyper.beta2) * (mean_squares - v_row)
        if step.spectral:
            _divide(step, chunk, new)
    M = products.multiply(chunk.X, A, table.PRECISION["momentum"])  # (n, p, lines of q)
    step.update_given(M, chunk.at)
    del M
    if not step.full:
        scatter(torch.where(enabled, new, v_row), chunk.v_row)  # after the update, which reads the old ones
    L = chunk.L
    gain = 1.0 - beta1
    with products.precise(table.PRECISION["left"]):
        torch.bmm(C, A, out=L)
        for G, U, one in zip(map(_operand, chunk.G), chunk.U, L, strict=True):
            # Sides of products that are no multiples of 16 bytes keep the tensor cores from all of it.
            for rows in filter(None, (range(p // 16 * 16), range(p // 16 * 16, p))):
                part = slice(rows.start, rows.stop)
                one[:, : G.shape[1]].addmm_(U[:, part], G[part], alpha=-gain if step.maximize else gain)
    size = torch.linalg.vector_norm(L, dim=(-2, -1), keepdim=True) / r**0.5
    L.addcmul_(A, torch.where(size > 0, size, 1.0) * second_pass.CLOSING.value)


def _divide(step: AdamStep, chunk: Chunk, rows: Tensor) -> None:
    """`lorapre.backends.triton.spectral.divide` of a chunk: what its update is divided by.

    ``rows`` is the new v_row, (n, p, 1)."""
    view, hyper = chunk.bucket.view, step.hyper
    n, p, above = chunk.n, view.p, chunk.above
    numbers = step.coefficients[chunk.at, :, None, None]
    sketch = step.sketches.view(-1, spectral.COLUMNS)[above : above + n * p].view(n, p, -1)
    rights = step.rights.view(step.n, view.rank, -1)[chunk.at]
    with products.precise(table.PRECISION["project"]):
        sketch = torch.baddbmm(sketch * numbers[:, elements.OUTSIDE.value], chunk.X, rights)
        mean_squares = rows * numbers[:, elements.V_SCALE.value]
        sketch.mul_(torch.where(mean_squares > 0, mean_squares.rsqrt(), 0.0))
        largest = spectral.norm_of_products(torch.bmm(sketch.mT, sketch), p, view.q)
    assert hyper.spectral_clipping is not None
    limit = hyper.spectral_clipping * spectral.random_norm(p, view.q)
    needed = (largest / limit).square_().flatten() * (p * view.q)
    known = step.surprises[chunk.at]
    known.copy_(torch.maximum(needed, known) if hyper.update_clipping else needed)


def _write(tensors: list[Tensor], new: Tensor, enabled: Tensor) -> None:
    """``new`` (n, ...) to n ``tensors``, in their dtype, where ``enabled`` (n, ...)."""
    for tensor, one, on in zip(tensors, new.to(tensors[0].dtype), enabled, strict=True):
        torch.where(on, one, tensor, out=tensor)


def _operand(G: Tensor) -> Tensor:
    """A gradient (p, q) as float32, in lines of 16 bytes, or with zeros up to the next ones."""
    if G.dtype == torch.float32 and min(G.stride()) == 1 and G.data_ptr() % 16 == 0:
        along = G.shape[G.stride().index(1)]
        if max(G.stride()) % 4 == 0 and along % 4 == 0:
            return G
    return _padded([G], (len(G), lines(G.shape[1])))[0]


def _padded(matrices: list[Tensor], shape: tuple[int, int]) -> Tensor:
    """Copies of ``matrices`` as float32 (n, *shape), with zeros behind their rows and columns."""
    rows, columns = matrices[0].shape
    out = matrices[0].new_empty((len(matrices), *shape), dtype=torch.float32)
    out[:, rows:].zero_()
    out[:, :, columns:].zero_()
    torch._foreach_copy_([one[:rows, :columns] for one in out.unbind(0)], matrices)
    return out


def _matrices(bucket: Bucket, tensors: list[Tensor], rows: int) -> list[Tensor]:
    """Each matrix of ``tensors``, which have ``rows``, as views."""
    return [matrix for tensor in tensors for matrix in tensor.view(bucket.view.batch, rows, -1)]
