"""An evaluation from options to summary: check everything, then load the model and ask it, batch by batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lorapre.lab.errors import UserError
from lorapre.lab.evaluate import second_opinion
from lorapre.lab.evaluate.config import EvaluateConfig
from lorapre.lab.evaluate.folder import EvaluationFolder, Row
from lorapre.lab.evaluate.generation import Decoding, complete, prompt_tokens
from lorapre.lab.evaluate.loading import Source, find_source, fingerprint, load_config, load_model, load_tokenizer
from lorapre.lab.evaluate.prompts import choose_prompt, make_prompts
from lorapre.lab.evaluate.scoring import score
from lorapre.lab.evaluate.summary import summarise
from lorapre.lab.evaluate.tasks import TASKS, Item, Task, read_items
from lorapre.lab.run_folder import write_json


@dataclass(frozen=True)
class Questions:
    """One task as it will be asked."""

    task: Task
    items: list[Item]
    prompts: list[str]
    decoding: Decoding


@dataclass(frozen=True)
class Plan:
    """An evaluation that has been checked as far as possible without the model's weights."""

    config: EvaluateConfig
    source: Source
    tokenizer: Any
    questions: list[Questions]
    fingerprint: Mapping[str, Any]


def plan_evaluation(config: EvaluateConfig) -> Plan:
    """Check model, data, prompts and lengths against each other.

    Raises:
        UserError: they do not fit, or one cannot be had.
    """
    source = find_source(config.model)
    if config.second_opinion:
        second_opinion.check_installed()
    tasks = [TASKS[name] for name in config.tasks]
    for task in tasks:
        choose_prompt(config, task)  # before anything is read
    items = {task.name: read_items(task, config.data.get(task.name), config.limit) for task in tasks}
    tokenizer, model_config = load_tokenizer(source), load_config(source)
    questions = []
    for task in tasks:
        prompts = make_prompts(config, task, items[task.name], tokenizer)
        _, stop = choose_prompt(config, task)
        decoding = Decoding(config.max_new_tokens, config.temperature, config.top_p, stop, not config.chat)
        _check_lengths(config, task, prompts, tokenizer, decoding, model_config)
        questions.append(Questions(task, items[task.name], prompts, decoding))
    data = {f"the data of {task.name}": _digest([item.record for item in items[task.name]]) for task in tasks}
    return Plan(config, source, tokenizer, questions, {**fingerprint(source, model_config), **data})


def _digest(records: list[Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def _check_lengths(
    config: EvaluateConfig, task: Task, prompts: list[str], tokenizer: Any, decoding: Decoding, model_config: Any
) -> None:
    positions = getattr(model_config, "max_position_embeddings", None)
    lengths = prompt_tokens(tokenizer, prompts, special_tokens=decoding.special_tokens)
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if positions is not None and lengths[longest] + config.max_new_tokens > positions:
        raise UserError(
            f"--max-new-tokens {config.max_new_tokens}: with the {lengths[longest]} tokens of the longest prompt (item "
            f"{longest + 1} of {task.name}) that is more than the {positions} positions of MODEL {config.model}. "
            "Give fewer, or a model with more."
        )


def run_evaluation(config: EvaluateConfig, out: Path, console: Console) -> dict[str, Any]:
    """Ask the model every question that ``out`` has no answer to yet, and summarise.

    Returns the content of ``summary.json``, which an interrupted evaluation has the same as an uninterrupted one.

    Raises:
        UserError: something does not fit; no question has been asked then. Or the accelerator's memory is too small.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    plan = plan_evaluation(config)
    folder = EvaluationFolder(out)
    folder.open(config, plan.fingerprint)
    rows = {
        each.task.name: folder.complete_rows(each.task.name, len(each.items), config.batch_size)
        for each in plan.questions
    }
    if any(len(rows[each.task.name]) < len(each.items) for each in plan.questions):
        model = load_model(plan.source, config.dtype)
        for each in plan.questions:
            _ask(plan, each, model, folder, rows[each.task.name], console)
    summary = {"model": config.model, "tasks": {name: summarise(found) for name, found in rows.items()}}
    write_json(folder.summary, summary)
    return summary


def _ask(
    plan: Plan, questions: Questions, model: Any, folder: EvaluationFolder, rows: list[Row], console: Console
) -> None:
    """Add the missing rows of a task to its file and to ``rows``."""
    config, task, total = plan.config, questions.task, len(questions.items)
    judge = second_opinion.judge(task.name) if config.second_opinion else None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(task.name, total=total, completed=len(rows))
        while len(rows) < total:
            chosen = slice(len(rows), len(rows) + config.batch_size)
            items = questions.items[chosen]
            try:
                completions = complete(
                    model,
                    plan.tokenizer,
                    questions.prompts[chosen],
                    [item_seed(config.seed, task.name, item.id) for item in items],
                    questions.decoding,
                )
            except torch.OutOfMemoryError:
                raise UserError(
                    f"--batch-size {config.batch_size}: the device's memory is too small for it. Give less, and "
                    "another --out."
                ) from None
            batch: list[Row] = []
            for item, prompt, completion in zip(items, questions.prompts[chosen], completions, strict=True):
                batch.append(
                    {
                        "index": len(rows) + len(batch),
                        "id": item.id,
                        "labels": dict(item.labels),
                        "prompt": prompt,
                        "completion": completion.text,
                        "tokens": completion.tokens,
                        "finish": completion.finish,
                        "gold": item.gold,
                        **asdict(score(completion.text, item.gold, task.marking)),
                        "second_opinion": None if judge is None else judge(completion.text, item.record),
                    }
                )
            folder.append(task.name, batch)
            rows.extend(batch)
            progress.update(bar, completed=len(rows))
            if not console.is_terminal:
                right = sum(row["correct"] for row in rows)
                console.print(f"{task.name}: {len(rows)}/{total} asked, {right} right", markup=False)


def item_seed(seed: int, task: str, item: str) -> int:
    """The seed of one answer: the same wherever the item stands, and another one for every item."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{task}:{item}".encode()).digest()[:8], "big") >> 1
