"""trl's SFTTrainer, made to count exactly and to keep quiet."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Subset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from lorapre.lab.finetune.tokens import IGNORED


class FinetuneTrainer(SFTTrainer):
    """Takes rows that are tokenized already, and validates by the mean over the learned tokens of all rows.

    The Trainer's own validation averages batches, whatever they hold.
    """

    def __init__(self, valid: Dataset, padding: int, **kwargs: Any) -> None:
        super().__init__(eval_dataset=valid, **kwargs)
        self._valid = valid
        self._padding = padding

    def _send_telemetry(self) -> None:
        """Nothing: a run tells no one that it was made."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: the run folder has its own records."""

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Cross-entropy of a learned token, in nats, over the validation rows, each by itself."""
        args = self.args
        model = self.accelerator.unwrap_model(self.model).eval()
        mine = Subset(self._valid, range(args.process_index, len(self._valid), args.world_size))
        collate = DataCollatorForLanguageModeling(pad_token_id=self._padding)
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in DataLoader(mine, args.per_device_eval_batch_size, collate_fn=collate):
            batch = self._prepare_inputs(batch)
            with torch.no_grad(), torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
                log_probs = model(**batch, fused_lm_head=True).log_probs
            learned = batch["labels"][:, 1:] != IGNORED
            sums += torch.tensor([-float(log_probs.double().sum()), float(learned.sum())], dtype=torch.float64)
        sums = self.accelerator.gather(sums.to(args.device)[None]).sum(0)
        metrics = {"eval_loss": float(sums[0] / sums[1])}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics


def trainer_arguments(options: dict[str, Any], *, gradient_checkpointing: bool) -> SFTConfig:
    """``options`` of a Trainer, and what SFTTrainer wants to know of rows that are ready."""
    return SFTConfig(
        **{
            **options,
            "dataloader_drop_last": False,  # an epoch's last step takes what is left
            "average_tokens_across_devices": True,
            "gradient_checkpointing": gradient_checkpointing,
            "max_length": None,
            "packing": False,
            "dataset_kwargs": {"skip_prepare_dataset": True},
        }
    )


def steps_of(rows: int, batch_size: int, epochs: float) -> int:
    """Optimizer steps of ``epochs`` passes over ``rows``; the last step of a pass may be on fewer."""
    return max(1, round(epochs * -(-rows // batch_size)))
