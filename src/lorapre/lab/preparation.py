"""What comes before training: a plan that fits together, its data, and a record of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from lorapre.lab.config import PretrainConfig
from lorapre.lab.data import BlockDataset, TextCorpus, check_data_spec, load_corpus
from lorapre.lab.data.encode import id_count
from lorapre.lab.diagnose import diagnosed_every
from lorapre.lab.errors import UserError, in_one_line
from lorapre.lab.models import ModelSpec, resolve_model
from lorapre.lab.optimizers import check_options, check_rank_compresses, find_optimizer
from lorapre.lab.provenance import provenance
from lorapre.lab.run_folder import write_json


@dataclass(frozen=True)
class Plan:
    """A configuration that has been checked as far as possible without reading the data.

    ``diagnose`` is that of each optimizer's run, None for a twin that has no factors.
    """

    config: PretrainConfig
    model: ModelSpec
    tokenizer: str | None
    micro_batch: int
    diagnose: Mapping[str, int | None]


def plan_run(config: PretrainConfig, processes: int = 1) -> Plan:
    """Check model, optimizers, rank, options, diagnostics, data and batch against each other.

    The plan's ``config.options`` are as they are recorded: numbers as numbers, however they were written.

    Raises:
        UserError: they do not fit.
    """
    names = (config.optimizer, *config.compare)
    for name in names:
        find_optimizer(name, "--optimizer" if name == config.optimizer else "--compare")
    diagnose = {name: diagnosed_every(name, config) for name in names}
    kind = check_data_spec(config.data)
    model = resolve_model(config.model).with_sequence(config.sequence_length)
    meta = model.build(config.seed, device="meta")
    check_rank_compresses(meta, config)
    options = check_options(find_optimizer(config.optimizer), meta, config)
    config = config.model_copy(update={"options": options})
    pieces = config.accumulation * processes
    if config.batch_size % pieces:
        raise UserError(
            f"--batch-size {config.batch_size}: cannot be split into --accumulation {config.accumulation} x "
            f"{processes} process(es) equal parts. Give a multiple of {pieces}."
        )
    if config.compile:
        _check_compiler()
    tokenizer = config.tokenizer or model.checkpoint or (model.default_tokenizer if kind != "hub" else None)
    return Plan(config, model, tokenizer, config.batch_size // pieces, diagnose)


def _check_compiler() -> None:
    """Compile a sum on the device that is trained on; where a compiler is missing that shows in the first use only.

    Raises:
        UserError: it cannot be compiled.
    """
    # Not `current_accelerator` alone: without a GPU it still names the one that torch was built for.
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        torch.compile(torch.add)(torch.ones(2, device=device or "cpu"), 1)
    except Exception as error:  # of dynamo, inductor, triton or the compiler itself
        raise UserError(
            f"--compile: torch.compile does not work on this machine ({in_one_line(error)}). Install what is missing, "
            "such as a C++ compiler, or leave it out."
        ) from error


def load_planned_corpus(plan: Plan, console: Console) -> TextCorpus:
    """The data of a plan, from the cache where it is there, fitted to the model and the batch.

    Raises:
        UserError: it cannot be read, has ids that the model lacks, or does not fill one batch.
    """
    config = plan.config
    with _status(console) as status:
        corpus = load_corpus(
            config.data,
            tokenizer=plan.tokenizer,
            sequence_length=config.sequence_length,
            text_field=config.text_field,
            valid_data=config.valid_data,
            valid_fraction=config.valid_fraction,
            max_valid_tokens=config.valid_tokens,
            seed=config.seed,
            status=status,
        )
    plan.model.with_vocabulary(id_count(corpus.tokenizer), corpus.max_token_id, corpus.tokenizer.eos_token_id)
    _check_blocks(corpus, config)
    return corpus


@contextmanager
def _status(console: Console) -> Iterator[Any]:
    if not console.is_terminal:
        yield lambda message: console.print(message, style="dim", markup=False)
        return
    with console.status("preparing the data") as spinner:
        yield lambda message: spinner.update(escape(message))


def _check_blocks(corpus: TextCorpus, config: PretrainConfig) -> None:
    if corpus.train_tokens is None:
        return
    blocks = corpus.train_tokens // config.sequence_length
    if blocks < config.batch_size:
        raise UserError(
            f"--data {' '.join(config.data)}: holds {corpus.train_tokens:,} training tokens, that is {blocks} "
            f"sequences of {config.sequence_length}, fewer than --batch-size {config.batch_size}. Give more text, or a "
            "smaller --batch-size or --sequence-length."
        )


def fingerprint(corpus: TextCorpus) -> dict[str, Any]:
    """What tells one corpus from another: sizes, and hashes of the tokenizer and of all tokens."""
    backend = getattr(corpus.tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(corpus.tokenizer.get_vocab(), sort_keys=True)
    train = corpus.train  # a stream is not read in advance
    return {
        "description": corpus.description,
        "train_tokens": corpus.train_tokens,
        "valid_tokens": corpus.valid_tokens,
        "tokenizer_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "train_sha256": hashlib.sha256(train.tokens.data).hexdigest() if isinstance(train, BlockDataset) else None,
        "valid_sha256": hashlib.sha256(corpus.valid.tokens.data).hexdigest(),
    }


def record_provenance(path: Path, corpus: TextCorpus, *, seed: int, option: str) -> None:
    """`record_data` of ``corpus``.

    Raises:
        UserError: the data has changed.
    """
    record_data(path, fingerprint(corpus), seed=seed, option=option)


def record_data(path: Path, data: Mapping[str, Any], *also: str, seed: int, option: str) -> None:
    """Write ``path``, or, where it is there from an earlier session, make sure that the data has not changed since.

    Args:
        path: of ``provenance.json``.
        data: what tells one data set from another.
        also: further packages whose versions are recorded.
        seed: of the run.
        option: names the run in the message.

    Raises:
        UserError: the data has changed.
    """
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))["data"]
        changed = [key for key, value in data.items() if key in before and before[key] != value]
        if changed:
            key = changed[0]
            raise UserError(
                f"{option}: the data is not what the run began with: {key} was {before[key]}, now "
                f"it is {data[key]}. Restore the data (or the Python that supplied it), or start a new run."
            )
        return
    write_json(path, provenance(*also, seed=seed) | {"data": dict(data)})
