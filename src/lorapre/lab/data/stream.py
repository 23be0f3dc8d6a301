"""Blocks of tokens from a stream of documents that has no end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from lorapre.lab.data.encode import Encoder
from lorapre.lab.data.hub import DocumentStream, usable
from lorapre.lab.errors import UserError

SHUFFLE_BUFFER = 10_000
_DOCUMENTS_AT_ONCE = 64


class StreamBlockDataset(IterableDataset[dict[str, torch.Tensor]]):
    """Documents of a stream, tokenized as they come and packed into blocks of L tokens, without end.

    Items are `{"input_ids": int64 (L,), "labels": int64 (L,)}`, equal in value. Documents follow one another,
    each with its end of text; blocks run on across documents and across passes, nothing is dropped.
    The order depends on `seed` alone. When the stream ends it starts again, shuffled with seed + 1, and so on.
    DataLoader workers share the documents out among themselves. Ranks do not: accelerate's dispatcher or its
    IterableDatasetShard does that.

    shuffle: whether documents pass through a shuffle buffer of SHUFFLE_BUFFER of them.
    """

    def __init__(
        self,
        stream: DocumentStream,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        *,
        seed: int,
        shuffle: bool,
    ) -> None:
        self.stream = stream
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.seed = seed
        self.shuffle = shuffle

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        length = self.sequence_length
        encoder = Encoder(self.tokenizer)
        rest = np.empty(0, dtype=encoder.dtype)
        documents = self._endless()
        while texts := list(islice(documents, _DOCUMENTS_AT_ONCE)):
            rest = np.concatenate([rest, *encoder.encode(texts)])
            whole = len(rest) // length * length
            for row in rest[:whole].astype(np.int64).reshape(-1, length):
                block = torch.from_numpy(row.copy())
                yield {"input_ids": block, "labels": block.clone()}
            rest = rest[whole:]

    def _endless(self) -> Iterator[str]:
        worker = get_worker_info()
        index, count = (worker.id, worker.num_workers) if worker else (0, 1)
        if worker:
            # The tokenizer's threads do not survive the fork that made this worker process.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        epoch = 0
        while True:
            found = False
            for text in self._one_pass(self.seed + epoch, index, count):
                found = True
                yield text
            if not found:
                raise UserError(
                    f"{self.stream.where} has fewer documents with text than there are DataLoader workers "
                    f"({count}), or none at all; use fewer workers (dataloader_num_workers) or give more text."
                )
            epoch += 1

    def _one_pass(self, seed: int, index: int, count: int) -> Iterator[str]:
        """The documents of worker `index` of `count`."""
        dataset, step, offset = self.stream.dataset, count, index
        if count > 1 and self.stream.skip == 0 and dataset.num_shards >= count:
            # Whole files: no worker downloads what another one uses. After skip() the files cannot be dealt
            # out, since each would then lack its own first documents.
            dataset, step, offset = dataset.shard(num_shards=count, index=index), 1, 0
        if self.stream.skip:
            dataset = dataset.skip(self.stream.skip)
        if self.shuffle:
            dataset = dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        return filter(usable, islice(self.stream.records(dataset), offset, None, step))
