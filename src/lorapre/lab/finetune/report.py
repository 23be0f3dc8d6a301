"""What the terminal shows of a fine-tuning run: before it, and when it has ended."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lorapre.lab.dry_run import TrainingMemory, training_memory
from lorapre.lab.finetune.config import FinetuneConfig
from lorapre.lab.finetune.data import reads_hub
from lorapre.lab.finetune.methods import adapter_kind
from lorapre.lab.finetune.preparation import Plan, load_data, plan_run, planned_recipe
from lorapre.lab.finetune.quiet import keep_quiet
from lorapre.lab.finetune.saving import questions_file
from lorapre.lab.finetune.trainer import steps_of
from lorapre.lab.optimizers.measure import adamw_state_bytes
from lorapre.lab.optimizers.options import written
from lorapre.lab.run_folder import RunFolder
from lorapre.optim.summary import format_bytes


def print_dry_run(config: FinetuneConfig, console: Console) -> None:
    """Print model, memory, tokens and steps. Nothing is loaded but data that is on this machine.

    Raises:
        UserError: the options do not fit together, or such data is wrong.
    """
    keep_quiet()
    plan = plan_run(config, dry=True)
    config = plan.config
    amount, steps, warnings = _amount(plan)
    planned_recipe(plan, steps or 1)
    memory = _memory(plan, steps or 1)
    trained = [param for param in plan.meta.parameters() if param.requires_grad]
    total = sum(param.numel() for param in plan.meta.parameters())
    learned = sum(param.numel() for param in trained)
    kind = adapter_kind(config, plan.method)
    method = [config.method]
    if kind is not None and plan.method.adapter is None:
        method.append(f"on {kind} of rank {config.adapter_rank}")
    if plan.method.adapter is not None or plan.compression is not None:
        method.append(f"rank {config.rank}")
    if plan.compression is not None:
        method.append(f"{plan.compression.compressed} of {plan.compression.matrices} matrices compressed")
    scratch = "not known" if memory.scratch is None else f"at most {format_bytes(memory.scratch)}"
    rows = [
        ("model", f"{config.model}, {total:,} parameters, {learned:,} trained ({learned / total:.1%})"),
        ("data", f"{config.data}{''.join(f' {name}' for name in config.data_files)}, {amount}"),
        ("method", ", ".join([*method, *written(config.options)])),
        (
            "steps",
            f"{'not known' if steps is None else f'{steps:,}'}, of {config.batch_size} sequences in "
            f"{config.accumulation} forward pass(es)",
        ),
        ("weights", format_bytes(memory.weights)),
        ("gradients", format_bytes(memory.gradients)),
        ("optimizer state", f"{format_bytes(memory.state)} (AdamW: {format_bytes(adamw_state_bytes(trained))})"),
        ("step scratch", scratch),
        ("sum", f"{format_bytes(memory.total)}, activations not counted"),
    ]
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(f"[bold]{name}[/]", escape(value))
    console.print(table)
    for warning in (*plan.warnings, *warnings):
        console.print(f"Warning: {warning}", style="yellow", soft_wrap=True, markup=False)


def _amount(plan: Plan) -> tuple[str, int | None, tuple[str, ...]]:
    """How much data, how many steps, and what is to be warned of; an upper bound where the data is on the hub.

    Steps are None where only the data could tell.
    """
    config = plan.config
    if plan.base.tokenizer is not None and not reads_hub(config):
        data = load_data(plan)
        kept, held = len(data.train.rows), len(data.valid.rows)
        passes = data.steps * config.batch_size / data.rows
        text = (
            f"{kept:,} examples and {held:,} held out, {data.train.tokens:,} tokens ({data.train.learned:,} learned) a "
            f"pass, {passes:.2f} passes"
        )
        return text, data.steps, data.warnings
    rows = config.max_examples
    if rows is None and config.steps is None:
        return "not read; give --max-examples or --steps to know how much", None, ()
    steps = config.steps or steps_of(rows or 0, config.batch_size, config.total_epochs)
    most = steps * config.batch_size * config.max_length
    examples = "not read" if rows is None else f"not read, at most {rows:,} examples"
    return f"{examples}, at most {most:,} tokens ({config.max_length:,} each)", steps, ()


def _memory(plan: Plan, steps: int) -> TrainingMemory:
    memory = training_memory(planned_recipe(plan, steps), plan.method.entry, plan.meta)
    return memory if plan.method.state is None else replace(memory, state=plan.method.state(plan.meta))


def print_summary(summary: dict[str, Any], out: Path, console: Console) -> None:
    """Print what the run changed, at what cost, and where its files are."""
    table = Table(title=f"{escape(summary['model'])}, {summary['parameters']:,} parameters", title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_row("held-out loss", f"{summary['valid_loss_before']:.4f}", f"{summary['valid_loss']:.4f}")
    if summary["exact_match"] is not None:
        table.add_row("exact match", f"{summary['exact_match_before']:.1%}", f"{summary['exact_match']:.1%}")
    console.print(table)
    result = "adapter" if summary["adapter"] else "model"
    lines = [
        f"data: {summary['data']}, {summary['steps']:,} steps, {summary['examples_per_second']:,.1f} examples/s",
        f"trained: {summary['trainable_parameters']:,} parameters with {summary['method']}",
        f"optimizer state: {format_bytes(summary['state_bytes'])} (AdamW: {format_bytes(summary['adamw_state_bytes'])} "
        "for the same parameters)",
        f"run folder: {out} (summary.json, metrics.jsonl, {result}/)",
    ]
    questions = questions_file(RunFolder(out))
    if questions.exists() and summary["template"] == "chat":
        lines.append(
            f"ask it the {summary['examples']['valid']:,} that were held out: lorapre evaluate {out / result} --tasks "
            f"gsm8k --data {questions} --chat --prompt question --max-new-tokens 10"
        )
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
