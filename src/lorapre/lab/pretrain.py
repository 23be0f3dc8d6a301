"""Pre-training from configuration to summary: check everything, then train, once for each optimizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from rich.console import Console

from lorapre.lab.config import PretrainConfig, build_config
from lorapre.lab.data import TextCorpus
from lorapre.lab.diagnose import momenta_bytes
from lorapre.lab.errors import UserError
from lorapre.lab.plots import plot_loss
from lorapre.lab.preparation import Plan, load_planned_corpus, plan_run, record_provenance
from lorapre.lab.run_folder import RunFolder, write_json, write_text
from lorapre.lab.training import train

_Result = TypeVar("_Result")


def process_state() -> PartialState:
    """This process among those of a torchrun job; without a GPU they talk through gloo, if accelerate is told so."""
    return PartialState(cpu=not torch.accelerator.is_available())


def default_out(kind: str) -> Path:
    """``runs/<kind>-<date>-<time>``, the same on every process."""
    state = process_state()
    name = [f"{kind}-{datetime.now():%Y%m%d-%H%M%S}"]
    if state.num_processes > 1:
        torch.distributed.broadcast_object_list(name, src=0)
    return Path("runs") / name[0]


def load_resumable(out: Path) -> PretrainConfig:
    """The configuration of the run in ``out``, to go on with it.

    Raises:
        UserError: there is no run, or its configuration cannot be read.
    """
    folder = RunFolder(out)
    folder.check_resumable()
    return build_config({}, config_file=folder.config)


def run_pretraining(config: PretrainConfig, out: Path, console: Console, *, resume: bool = False) -> dict[str, Any]:
    """Train ``config.model`` with ``config.optimizer`` and with each of ``config.compare`` from the same start.

    Returns the content of ``summary.json``. Every process of a torchrun job calls this; the first one writes.

    Raises:
        UserError: something does not fit; nothing has been trained then.
    """
    state = process_state()
    plan = plan_run(config, state.num_processes)
    config = plan.config
    folder = RunFolder(out)
    created = False

    def begin() -> tuple[TextCorpus, float]:
        nonlocal created
        if state.is_main_process and not resume:
            folder.create()
            created = True
        return _prepare(plan, folder, console, resume=resume)

    try:
        corpus, bigram = first_process_first(begin)
        # Before anything is trained, since a checkpoint may turn out to be damaged.
        built = {} if folder.summary.exists() else {config.optimizer: plan.model.build(config.seed)}
    except BaseException:
        if created:
            folder.discard()
        raise
    runs = {config.optimizer: folder} | {name: folder.twin(name) for name in config.compare}
    summaries: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        if run.summary.exists():
            summaries[name] = json.loads(run.summary.read_text(encoding="utf-8"))
            continue
        options = config.options if name == config.optimizer else {}  # a twin's are its own defaults
        single = config.model_copy(
            update={"optimizer": name, "options": options, "compare": [], "diagnose": plan.diagnose[name]}
        )
        if state.is_main_process and run is not folder:
            run.path.mkdir(exist_ok=True)
            write_text(run.config, single.to_yaml())
            write_json(run.provenance, json.loads(folder.provenance.read_text(encoding="utf-8")))
        summaries[name] = train(
            single,
            built.pop(name) if name in built else plan.model.build(config.seed),
            corpus,
            run,
            console,
            micro_batch=plan.micro_batch,
            bigram=bigram,
            resume=resume,
        )
    summary = {**summaries[config.optimizer], "compare": {name: summaries[name] for name in config.compare}}
    if state.is_main_process and config.compare:
        plot_loss(
            folder.plot,
            {name: run.read_metrics() for name, run in runs.items()},
            bigram=bigram,
            title=f"{config.model} on {corpus.description}",
        )
        write_json(folder.summary, summary)
    return summary


def first_process_first(action: Callable[[], _Result]) -> _Result:
    """Let process 0 run ``action`` (and fill caches), then the others; what it refuses, all refuse.

    Raises:
        UserError: process 0's; without it the others would wait for a process that has gone.
    """
    state = process_state()
    refusal: list[str | None] = [None]
    if state.is_main_process:
        try:
            result = action()
        except UserError as error:
            if state.num_processes == 1:
                raise
            refusal[0] = str(error)
    if state.num_processes > 1:
        torch.distributed.broadcast_object_list(refusal, src=0)
    if refusal[0] is not None:
        raise UserError(refusal[0])
    return result if state.is_main_process else action()


def _prepare(plan: Plan, folder: RunFolder, console: Console, *, resume: bool) -> tuple[TextCorpus, float]:
    """All that can still go wrong before training: the data, its fit to the model and the batch, the disk."""
    config = plan.config
    corpus = load_planned_corpus(plan, console)
    bigram = float("nan")
    if process_state().is_main_process:
        bigram = corpus.bigram_cross_entropy()
        folder.check_space(_disk_bytes(plan))
        if not resume:
            write_text(folder.config, config.to_yaml())  # first: --resume takes a folder that has it
        option = f"--resume --out {folder.path}"
        record_provenance(folder.provenance, corpus, seed=config.seed, option=option)
    return corpus, bigram


def _disk_bytes(plan: Plan) -> int:
    """Room for the checkpoints that are kept, one that is being written, and the final model, in float32."""
    model = plan.model.build(0, device="meta")
    parameters = sum(param.numel() for param in model.parameters())
    momenta = momenta_bytes(model, plan.config.rank)
    needed = 0
    for diagnose in plan.diagnose.values():
        # Weights, and at most two numbers of state a weight.
        checkpoint = 3 * 4 * parameters + (momenta if diagnose else 0)
        needed += (plan.config.keep_checkpoints + 1) * checkpoint + 4 * parameters
    return needed
