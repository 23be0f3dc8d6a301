"""What a training of the study shares with ``lorapre pretrain``: loss, schedule, order of batches, validation text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from lorapre.lab.config import PretrainConfig
from lorapre.lab.data import BlockDataset
from lorapre.lab.training import schedule_arguments

#: Target of a position that does not count.
IGNORED = -100


def next_token_loss(model: nn.Module, blocks: Tensor, targets: Tensor, *, autocast: bool) -> Tensor:
    """Mean cross-entropy of the next token, () for blocks and targets (B, L); targets of -100 do not count."""
    with torch.autocast(blocks.device.type, torch.bfloat16, enabled=autocast):
        logits = model(input_ids=blocks, use_cache=False).logits
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten(), ignore_index=IGNORED
    )


def make_scheduler(optimizer: torch.optim.Optimizer, config: PretrainConfig, lr: float) -> Any:
    """The schedule that ``lorapre pretrain`` gives `transformers.Trainer`; its own, not one like it."""
    asked = schedule_arguments(config, lr)
    return get_scheduler(
        asked["lr_scheduler_type"],
        optimizer,
        num_warmup_steps=asked["warmup_steps"],
        num_training_steps=config.total_steps,
        scheduler_specific_kwargs=asked["lr_scheduler_kwargs"],
    )


def batches(blocks: int, batch_size: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Indices (batch_size,) of each step's blocks, without end: a permutation an epoch, cut to whole batches.

    They are those of ``lorapre pretrain`` in one process, where accelerate seeds each epoch's permutation.
    """
    epoch = 0
    while True:
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed + epoch))
        yield from order[: blocks // batch_size * batch_size].to(device).split(batch_size)
        epoch += 1


def all_blocks(dataset: BlockDataset) -> Tensor:
    """The blocks of ``dataset``, (N, L)."""
    return torch.from_numpy(dataset.tokens.astype("int64")).view(-1, dataset.sequence_length)


def padded(blocks: Tensor, batch_size: int) -> Tensor:
    """``blocks`` (N, L) as inputs and targets in whole batches, (2, batches, batch_size, L).

    What fills the last batch does not count: another shape would be compiled anew.
    """
    missing = -len(blocks) % batch_size
    inputs = torch.cat([blocks, blocks[:1].expand(missing, -1)])
    targets = torch.cat([blocks, torch.full_like(blocks[:1], IGNORED).expand(missing, -1)])
    return torch.stack([inputs, targets]).view(2, -1, batch_size, blocks.shape[1])
