"""A bigram model: what can be predicted from the last token alone, a line that a trained model must pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.integer]
_CHUNK = 1 << 22


@dataclass(frozen=True)
class BigramModel:
    """Interpolated Kneser-Ney over pairs of neighbouring tokens, u then v, with V ids.

        P(v | u) = max(c(u, v) - D, 0) / c(u) + D * N(u, .) / c(u) * Q(v)
        Q(v)     = max(N(., v) - E, 0) / N(., .) + E * |{w : N(., w) > 0}| / N(., .) / V

    c counts pairs, N counts different pairs. D = n1 / (n1 + 2 n2), where n1 and n2 are the numbers of pairs seen
    once and twice; E is the same for the counts N(., v). Where nothing is seen once that formula gives 0, which
    would leave unseen pairs without probability: 1/2 is used then. For u never seen, P(v | u) = Q(v).
    Every probability is above zero and they sum to 1 over v.

    codes: different pairs as u * V + v, sorted, shape (pairs,); weights: max(c - D, 0) / c(u), same shape.
    backoff: factor of Q(v), for each u, shape (V,). continuation: Q, shape (V,).
    """

    vocab_size: int
    codes: IntArray
    weights: npt.NDArray[np.float64]
    backoff: npt.NDArray[np.float64]
    continuation: npt.NDArray[np.float64]

    @classmethod
    def fit(cls, tokens: Tokens, vocab_size: int) -> BigramModel:
        """Count the neighbours in `tokens`, shape (n,), all ids below `vocab_size`.

        Raises ValueError if n < 2 or an id is not below.
        """
        if tokens.ndim != 1 or len(tokens) < 2:
            raise ValueError(f"tokens has shape {tokens.shape}; a flat array of at least two is needed")
        codes, counts = _count_pairs(tokens, vocab_size)
        first, second = np.divmod(codes, vocab_size)
        discount = _discount(counts)
        context = np.bincount(first, weights=counts, minlength=vocab_size)
        followers = np.bincount(first, minlength=vocab_size)
        seen = context > 0
        backoff = np.ones(vocab_size)
        backoff[seen] = discount * followers[seen] / context[seen]

        preceding = np.bincount(second, minlength=vocab_size)
        lower = _discount(preceding[preceding > 0])
        spread = lower * np.count_nonzero(preceding) / len(codes) / vocab_size
        continuation = np.maximum(preceding - lower, 0) / len(codes) + spread
        return cls(vocab_size, codes, (counts - discount) / context[first], backoff, continuation)

    def probabilities(self, first: IntArray, second: IntArray) -> npt.NDArray[np.float64]:
        """P(second | first), element by element; ids below `vocab_size`."""
        wanted = first.astype(np.int64) * self.vocab_size + second
        place = np.minimum(np.searchsorted(self.codes, wanted), len(self.codes) - 1)
        direct = np.where(self.codes[place] == wanted, self.weights[place], 0.0)
        total: npt.NDArray[np.float64] = direct + self.backoff[first] * self.continuation[second]
        return total

    def cross_entropy(self, tokens: Tokens, sequence_length: int) -> float:
        """Mean of -ln P over the positions that a causal model predicts in blocks of `sequence_length`, in nats.

        Those are positions 1 to L - 1 of each whole block: the first of a block has nothing before it to be
        predicted from. ValueError if there is no such position.
        """
        blocks = len(tokens) // sequence_length
        if blocks == 0 or sequence_length < 2:
            raise ValueError(f"{len(tokens)} tokens hold nothing to predict in blocks of {sequence_length}")
        grid = tokens[: blocks * sequence_length].reshape(blocks, sequence_length)
        rows = max(1, _CHUNK // sequence_length)
        total = 0.0
        for start in range(0, blocks, rows):
            chunk = _checked(grid[start : start + rows], self.vocab_size)
            total -= float(np.log(self.probabilities(chunk[:, :-1].ravel(), chunk[:, 1:].ravel())).sum())
        return total / (blocks * (sequence_length - 1))


def _discount(counts: IntArray) -> float:
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    return once / (once + 2 * twice) if once else 0.5


def _checked(tokens: Tokens, vocab_size: int) -> IntArray:
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(f"ids from {tokens.min()} to {tokens.max()} in a vocabulary of {vocab_size}")
    return tokens.astype(np.int64)


def _pair_codes(tokens: Tokens, vocab_size: int) -> Iterator[tuple[IntArray, IntArray]]:
    for start in range(0, len(tokens) - 1, _CHUNK):
        chunk = _checked(tokens[start : start + _CHUNK + 1], vocab_size)  # one over: pairs across chunks count
        yield np.unique(chunk[:-1] * vocab_size + chunk[1:], return_counts=True)


def _count_pairs(tokens: Tokens, vocab_size: int) -> tuple[IntArray, IntArray]:
    """Sorted different pair codes and how often each occurs. Memory: the different pairs and a few chunks."""
    merged: list[tuple[IntArray, IntArray]] = []
    for counted in _pair_codes(tokens, vocab_size):
        merged.append(counted)
        # Merging only neighbours of like size keeps the work at n log n.
        while len(merged) > 1 and len(merged[-2][0]) <= 2 * len(merged[-1][0]):
            merged[-2:] = [_merge(merged[-2:])]
    return _merge(merged)


def _merge(counted: list[tuple[IntArray, IntArray]]) -> tuple[IntArray, IntArray]:
    codes = np.concatenate([pair[0] for pair in counted])
    counts = np.concatenate([pair[1] for pair in counted])
    order = np.argsort(codes, kind="stable")
    codes, counts = codes[order], counts[order]
    starts = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]]))
    return codes[starts], np.add.reduceat(counts, starts)
