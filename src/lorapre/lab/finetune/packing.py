"""Several short examples in one row, none of which sees another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl.data_utils import pack_dataset

from lorapre.lab.finetune.tokens import IGNORED


def pack(rows: Dataset, max_length: int) -> Dataset:
    """Rows joined to at most ``max_length`` tokens, none of them cut; ``seq_lengths`` tells where each begins."""
    packed: Dataset = pack_dataset(rows, max_length, "bfd")
    return packed


@dataclass(frozen=True)
class PackedCollator:
    """A batch of packed rows, (batch, longest row), whose positions begin anew with every example.

    There is no attention mask: transformers reads the borders off the positions, and lets no token see beyond its own
    example's. trl's own collator makes one row of the whole batch, for which attention without flash kernels takes
    memory that grows with the square of the batch.
    """

    padding: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        shape = len(rows), max(len(row["input_ids"]) for row in rows)
        ids = torch.full(shape, self.padding)
        labels = torch.full(shape, IGNORED)
        positions = torch.zeros(shape, dtype=torch.long)  # a padding token is an example by itself
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[index, :length] = torch.tensor(row["input_ids"])
            labels[index, :length] = torch.tensor(row["labels"])
            positions[index, :length] = torch.cat([torch.arange(count) for count in row["seq_lengths"]])
        # Nothing comes before an example's first token, least of all the end of another one.
        labels[positions == 0] = IGNORED
        return {"input_ids": ids, "labels": labels, "position_ids": positions}
