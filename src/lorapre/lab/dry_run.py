"""``lorapre pretrain --dry-run``: what a run would be, without reading its data or building its model."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lorapre import estimate_memory, param_groups
from lorapre.lab.config import PretrainConfig
from lorapre.lab.data.tokenizer import bpe_vocabulary
from lorapre.lab.models import PUBLISHED_VOCABULARY
from lorapre.lab.optimizers import OPTIMIZERS
from lorapre.lab.preparation import Plan, plan_run
from lorapre.optim.summary import format_bytes


def print_dry_run(config: PretrainConfig, console: Console) -> None:
    """Print model, memory, tokens and steps.

    Raises:
        UserError: the options do not fit together.
    """
    plan = plan_run(config)
    vocabulary = _vocabulary(plan)
    if plan.model.resizable:
        plan.model.with_vocabulary(vocabulary, vocabulary - 1)
    model = plan.model.build(config.seed, device="meta")
    entry = OPTIMIZERS[config.optimizer]
    memory = estimate_memory(param_groups(model, rank=config.rank))
    state = memory.state if entry.ranked else memory.adamw_state
    scratch = memory.scratch if entry.ranked else 0
    parameters = sum(param.numel() for param in model.parameters())

    table = Table.grid(padding=(0, 2))
    rows = [
        ("model", f"{config.model}, {parameters:,} parameters, vocabulary of {model.config.vocab_size:,}"),
        ("data", ", ".join(config.data)),
        ("optimizer", config.optimizer + (f", rank {config.rank}" if entry.ranked else "")),
        ("steps", f"{config.total_steps:,}"),
        (
            "tokens",
            f"{config.total_steps * config.tokens_per_step:,} ({config.batch_size} x {config.sequence_length} a step, "
            f"in {config.accumulation} forward pass(es))",
        ),
        ("weights", format_bytes(memory.weights)),
        ("gradients", format_bytes(memory.gradients)),
        ("optimizer state", f"{format_bytes(state)} (AdamW: {format_bytes(memory.adamw_state)})"),
        ("step scratch", f"at most {format_bytes(scratch)}" if entry.ranked else "none"),
        ("sum", f"{format_bytes(memory.weights + memory.gradients + state + scratch)}, activations not counted"),
    ]
    for name, value in rows:
        table.add_row(f"[bold]{name}[/]", escape(value))
    console.print(table)


def _vocabulary(plan: Plan) -> int:
    """The tokenizer's size, as far as it can be told without training or downloading one."""
    spec = plan.tokenizer
    if spec is None:
        return PUBLISHED_VOCABULARY
    trained = bpe_vocabulary(spec)
    if trained is not None:
        return trained
    path = Path(spec)
    if path.is_file():
        return len(PreTrainedTokenizerFast(tokenizer_file=str(path)))
    return len(AutoTokenizer.from_pretrained(spec)) if path.is_dir() else PUBLISHED_VOCABULARY
