"""What a run leaves: a model or an adapter, a merged model on demand, and questions for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lorapre.lab.errors import UserError
from lorapre.lab.finetune.formats import Example
from lorapre.lab.finetune.quiet import keep_quiet
from lorapre.lab.run_folder import RunFolder, write_atomically, write_text


def adapter_folder(folder: RunFolder) -> Path:
    """Where a run's adapter is; its weights on top of ``base_model_name_or_path`` are the result."""
    return folder.path / "adapter"


def merged_folder(folder: RunFolder) -> Path:
    """Where a merged model goes."""
    return folder.path / "merged"


def questions_file(folder: RunFolder) -> Path:
    """Where the sums that ``--data arithmetic`` holds out are, as ``lorapre evaluate`` reads them."""
    return folder.path / "questions.jsonl"


def save_questions(folder: RunFolder, held_out: Sequence[Example]) -> None:
    """Write `questions_file` in GSM8K's format, which is a number after ``####``."""
    records = [{"question": each.messages[0]["content"], "answer": f"#### {each.answer}"} for each in held_out]
    write_text(questions_file(folder), "".join(json.dumps(record) + "\n" for record in records))


def save_result(folder: RunFolder, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write ``adapter/`` of a model with adapters, else ``model/``; with the tokenizer. Returns where."""
    adapted = isinstance(model, PeftModel)
    place = adapter_folder(folder) if adapted else folder.model
    # peft would else ask the hub whether the vocabulary has changed, which it has not.
    options: dict[str, Any] = {"save_embedding_layers": False} if adapted else {}

    def save(path: Path) -> None:
        model.save_pretrained(path, **options)  # type: ignore[operator]
        tokenizer.save_pretrained(path)

    write_atomically(place, save)
    return place


def merge_adapter(folder: RunFolder) -> Path:
    """Write ``merged/``: the base model of a run's adapter with the adapter in its weights, as a plain model.

    It has the dtype of the base model's weights in the run.

    Raises:
        UserError: there is no adapter, it is merged already, or its base is not where it was.
    """
    keep_quiet()
    adapter, merged = adapter_folder(folder), merged_folder(folder)
    if not (adapter / "adapter_config.json").exists():
        raise UserError(
            f"--merge --out {folder.path}: there is no adapter to merge. Give the folder of a finished run with an "
            "adapter; one without has its whole model in model/."
        )
    if merged.exists():
        raise UserError(f"--merge --out {folder.path}: {merged} exists already. Use it, or remove it first.")
    base = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=_dtype(folder))
    except Exception as error:
        raise UserError(
            f"--merge --out {folder.path}: the adapter's base model {base} cannot be loaded "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). Put it back, or correct "
            f"base_model_name_or_path in {adapter / 'adapter_config.json'}."
        ) from error
    whole: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    tokenizer = AutoTokenizer.from_pretrained(str(adapter))

    def save(path: Path) -> None:
        whole.save_pretrained(path)
        tokenizer.save_pretrained(path)

    write_atomically(merged, save)
    return merged


def _dtype(folder: RunFolder) -> torch.dtype:
    from lorapre.lab.finetune.config import build_finetune_config

    found: torch.dtype = getattr(torch, build_finetune_config({}, config_file=folder.config).dtype)
    return found
