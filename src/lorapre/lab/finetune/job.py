"""Fine-tuning from configuration to summary: check everything, then train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from lorapre.lab.errors import UserError
from lorapre.lab.finetune.base import keep_tiny
from lorapre.lab.finetune.config import ARITHMETIC, TINY_MODEL, FinetuneConfig, build_finetune_config
from lorapre.lab.finetune.methods import adapter_kind
from lorapre.lab.finetune.preparation import Data, Plan, load_data, plan_run, planned_recipe
from lorapre.lab.finetune.quiet import keep_quiet
from lorapre.lab.finetune.saving import merge_adapter, merged_folder, save_questions
from lorapre.lab.finetune.tokens import fingerprint
from lorapre.lab.finetune.training import tune
from lorapre.lab.preparation import record_data
from lorapre.lab.pretrain import first_process_first, process_state
from lorapre.lab.run_folder import RunFolder, write_text

COMMAND = "finetune"


def run_folder(out: Path) -> RunFolder:
    """The folder ``out`` of a fine-tuning run."""
    return RunFolder(out, COMMAND)


def load_resumable(out: Path) -> FinetuneConfig:
    """The configuration of the run in ``out``, to go on with it.

    Raises:
        UserError: there is no run, or its configuration cannot be read.
    """
    folder = run_folder(out)
    folder.check_resumable()
    return build_finetune_config({}, config_file=folder.config)


def run_finetuning(config: FinetuneConfig, out: Path, console: Console, *, resume: bool = False) -> dict[str, Any]:
    """Fine-tune ``config.model`` on ``config.data``. Returns the content of ``summary.json``.

    Every process of a torchrun job calls this; the first one writes.

    Raises:
        UserError: something does not fit; nothing has been trained then.
    """
    keep_quiet()
    state = process_state()
    folder = run_folder(out)
    plan = plan_run(config, state.num_processes)
    config = plan.config
    if config.merge and adapter_kind(config, plan.method) is None:
        raise UserError(f"--merge: --method {config.method} trains all weights, so there is nothing to merge.")
    created = False

    def begin() -> Data:
        nonlocal created
        if state.is_main_process and not resume:
            folder.create()
            created = True
        return _prepare(plan, folder, console, resume=resume)

    try:
        data = first_process_first(begin)
    except BaseException:
        if created:
            folder.discard()
        raise
    if folder.summary.exists():
        summary: dict[str, Any] = json.loads(folder.summary.read_text(encoding="utf-8"))
    else:
        source = str(_tiny(folder)) if config.model == TINY_MODEL else config.model
        try:
            summary = tune(plan, data, source, folder, console, resume=resume)
        except UserError:  # of weights or an optimizer that cannot be built: no step was taken
            if created:
                folder.discard()
            raise
    if config.merge and state.is_main_process and not merged_folder(folder).exists():
        merge_adapter(folder)
    return summary


def _tiny(folder: RunFolder) -> Path:
    return folder.path / "base"


def _prepare(plan: Plan, folder: RunFolder, console: Console, *, resume: bool) -> Data:
    """The data, its fit to the model and the batch, and the disk."""
    config = plan.config
    data = load_data(plan)
    planned_recipe(plan, data.steps)
    if not process_state().is_main_process:
        return data
    for warning in (*plan.warnings, *data.warnings):
        console.print(f"Warning: {warning}", style="yellow", soft_wrap=True, markup=False)
    folder.check_space(_disk_bytes(plan))
    if config.model == TINY_MODEL:
        keep_tiny(_tiny(folder), config.seed)
    if not resume:
        write_text(folder.config, config.to_yaml())
    facts = {"description": data.examples.description} | fingerprint(data.train, data.valid, plan.base.tokenizer)
    option = f"--resume --out {folder.path}"
    record_data(folder.provenance, facts, "peft", "trl", "datasets", seed=config.seed, option=option)
    if config.data == ARITHMETIC:
        save_questions(folder, data.examples.valid)
    return data


def _disk_bytes(plan: Plan) -> int:
    """Room for the checkpoints that are kept, one that is being written, and what is saved at the end."""
    saved = sum(param.numel() * param.element_size() for param in plan.meta.parameters() if param.requires_grad)
    # Beside the weights, at most two float32 numbers of state a weight.
    trained = sum(param.numel() for param in plan.meta.parameters() if param.requires_grad)
    whole = sum(param.numel() * param.element_size() for param in plan.meta.parameters())
    needed = (plan.config.keep_checkpoints + 1) * (saved + 8 * trained) + saved
    return needed + (whole if plan.config.merge else 0)
