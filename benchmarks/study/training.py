"""One process's training: models compiled once, then run after run."""

from __future__ import annotations

import lorapre.lab.quiet  # noqa: F401  # isort: skip  (first: it keeps packages from printing when imported)

import gc
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorapre import NonFiniteGradientError
from lorapre.lab.compare.contestants import Contestant, parse_contestants
from lorapre.lab.config import PretrainConfig
from lorapre.lab.data import BlockDataset, TextCorpus, load_corpus
from lorapre.lab.models import ModelSpec, resolve_model
from lorapre.lab.optimizers import find_optimizer, matrix_parameters
from lorapre.lab.optimizers.measure import state_bytes
from lorapre.lab.optimizers.options import defaults
from study.plan import Run
from study.profiles import AS, BEGUN, DECAYING, Profile
from study.protocol import all_blocks, batches, make_scheduler, next_token_loss, padded
from study.prototypes import PROTOTYPES

#: Whose update is measured, when factors and moments are young.
EARLY_STEP = 5


@dataclass
class _Model:
    """A model on the device and on none, its compiled loss, and the weights that it begins with by seed."""

    spec: ModelSpec
    meta: PreTrainedModel
    module: PreTrainedModel
    loss: Callable[[Tensor, Tensor], Tensor]
    starts: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def begin(self, seed: int) -> None:
        """Set the weights to those that ``lorapre pretrain --seed`` starts with."""
        weights = self.module.state_dict()
        if seed not in self.starts:
            device = next(self.module.parameters()).device
            self.starts[seed] = {key: value.to(device) for key, value in self.spec.build(seed).state_dict().items()}
        with torch.no_grad():
            for key, value in weights.items():
                value.copy_(self.starts[seed][key])


class Trainer:
    """Trains one run after the other on one device."""

    def __init__(self, corpus: TextCorpus, profile: Profile, device: torch.device) -> None:
        if not isinstance(corpus.train, BlockDataset):
            raise TypeError("The study needs a corpus whose length is known, not a stream.")
        if len(corpus.train) < profile.batch_size:
            raise ValueError(f"The corpus has {len(corpus.train)} sequences, and a batch {profile.batch_size}.")
        self._profile, self._device, self._corpus = profile, device, corpus
        self._train = all_blocks(corpus.train).to(device)
        self._valid = padded(all_blocks(corpus.valid), profile.batch_size).to(device)
        self._models: dict[str, _Model] = {}

    def train(self, run: Run) -> dict[str, Any]:
        """Make ``run``; its row. A run whose loss or gradients are no longer finite ends early, with the loss None."""
        began = time.monotonic()
        model = self._model(run.model)
        model.begin(run.seed)
        transformers.set_seed(run.seed)
        contestant = parse(run.contestant, model.meta)
        config = self._config(run, contestant)
        entry = find_optimizer(contestant.optimizer)
        if entry.prepare is not None:
            raise ValueError(f"{entry.name} changes the model, which is compiled once for all here.")
        kind, keywords = entry.build(model.module, config, run.lr, self._profile.dense_lr)
        prototype = prototype_of(run.contestant)
        optimizer = (PROTOTYPES[prototype] if prototype else kind)(**keywords)
        prepared = time.monotonic()
        decaying = run.contestant.endswith(DECAYING)
        result = self._steps(model, optimizer, config, run.lr, decaying=decaying)
        options = dict(contestant.options) | ({"residual_gain_follows": "lr"} if decaying else {})
        options |= {"prototype": prototype} if prototype else {}
        return {
            **asdict(run),
            "optimizer": contestant.optimizer,
            "options": options,
            "settings": {**defaults(entry.options), **BEGUN.get(contestant.optimizer, {}), **options},
            "rank": contestant.rank,
            "d": model.module.config.hidden_size,
            **self._profile.protocol,
            **result,
            "state_bytes": state_bytes(optimizer, matrix_parameters(model.module)),
            "prepared": round(prepared - began, 1),
            "seconds": round(time.monotonic() - prepared, 1),
        }

    def _config(self, run: Run, contestant: Contestant) -> PretrainConfig:
        profile = self._profile
        return PretrainConfig(
            model=run.model,
            optimizer=contestant.optimizer,
            rank=0.25 if contestant.rank is None else contestant.rank,
            options={**BEGUN.get(contestant.optimizer, {}), **contestant.options},
            batch_size=profile.batch_size,
            sequence_length=profile.sequence_length,
            tokens=run.tokens,
            seed=run.seed,
        )

    def _steps(
        self, model: _Model, optimizer: torch.optim.Optimizer, config: PretrainConfig, lr: float, *, decaying: bool
    ) -> Any:
        steps, parameters = config.total_steps, list(model.module.parameters())
        scheduler = make_scheduler(optimizer, config, lr)
        share = scheduler.lr_lambdas[0]
        gains = [group["residual_gain"] for group in optimizer.param_groups] if decaying else []
        matrices = matrix_parameters(model.module)
        losses = torch.zeros(steps, device=self._device)
        interval = max(1, steps // self._profile.validations)
        curve: list[tuple[int, float]] = []
        update: Tensor | None = None
        final: float | None = None
        order = batches(len(self._train), config.batch_size, config.seed, self._device)
        for step, batch in zip(range(steps), order, strict=False):
            blocks = self._train[batch]
            loss = model.loss(blocks, blocks.clone())  # one tensor as both would be another program
            loss.backward()
            losses[step] = loss.detach()
            nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            before = [weight.detach().clone() for weight in matrices] if step + 1 == EARLY_STEP else None
            if gains and share(step) < share(step - 1):  # never in the warm-up
                for group, gain in zip(optimizer.param_groups, gains, strict=True):
                    group["residual_gain"] = gain * share(step)
            try:
                optimizer.step()
            except NonFiniteGradientError:
                break
            if before is not None:
                update = update_size(before, matrices, lr * share(step))
            scheduler.step()
            _forget_gradients(parameters)
            last = step + 1 == steps
            if last or (step + 1) % interval == 0:
                loss_now = self._validate(model)
                if not math.isfinite(loss_now):
                    break
                curve.append(((step + 1) * config.tokens_per_step, loss_now))
                final = loss_now if last else None
        _forget_gradients(parameters)
        rise, rise_step = (None, None) if final is None else largest_rise(losses.cpu())
        return {
            "loss": final,
            "curve": curve,
            "update_rms_5": None if update is None else float(update[0]),
            "update_max_5": None if update is None else float(update[1]),
            "largest_rise": rise,
            "largest_rise_step": rise_step,
        }

    def _validate(self, model: _Model) -> float:
        """Mean loss over all validation blocks.

        With gradients enabled, though none is taken: without, the model would be compiled a second time.
        """
        blocks, targets = self._valid
        total = torch.zeros((), device=self._device, dtype=torch.float64)
        counted = 0
        for inputs, labels in zip(blocks, targets, strict=True):
            rows = min(len(inputs), len(self._corpus.valid) - counted)
            total += model.loss(inputs, labels).detach() * rows
            counted += rows
        return float(total) / counted

    def _model(self, name: str) -> _Model:
        if name not in self._models:
            corpus = self._corpus
            spec = resolve_model(name).with_sequence(self._profile.sequence_length)
            spec = spec.with_vocabulary(len(corpus.tokenizer), corpus.max_token_id)
            module = spec.build(0)
            nn.Module.to(module, self._device)
            cuda = self._device.type == "cuda"

            def loss(blocks: Tensor, targets: Tensor) -> Tensor:
                return next_token_loss(module, blocks, targets, autocast=cuda)

            if cuda:
                loss = torch.compile(loss, dynamic=False)
                batch = self._train[: self._profile.batch_size]
                loss(batch, batch.clone()).backward()  # compiles, so that the first run's seconds are like any other's
                _forget_gradients(list(module.parameters()))
            self._models[name] = _Model(spec, spec.build(0, device="meta"), module, loss)
        return self._models[name]

    def recover(self) -> bool:
        """Free what a failed run held; whether the device still answers, which it does not after an illegal access."""
        for model in self._models.values():
            _forget_gradients(list(model.module.parameters()))
        gc.collect()
        if self._device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                return False
        return True


def update_size(before: list[Tensor], after: list[nn.Parameter], lr: float) -> Tensor:
    """Root mean square and largest element of an update in units of the learning rate, (2,), on the device."""
    updates = [new.detach() - old for old, new in zip(before, after, strict=True)]
    squares = torch.stack([update.square().sum() for update in updates]).sum()
    largest = torch.stack([update.abs().max() for update in updates]).max()
    return torch.stack([(squares / sum(update.numel() for update in updates)).sqrt(), largest]) / lr


def largest_rise(losses: Tensor) -> tuple[float | None, int | None]:
    """How far the training loss (S,) ever rose above the mean of the 20 steps before, and at which, after 60 steps.

    None of a run of fewer than 80.
    """
    if len(losses) < 80:
        return None, None
    means = losses.unfold(0, 20, 1).mean(dim=1)[40:-1]
    rises = losses[60:] - means
    return round(float(rises.max()), 4), 60 + int(rises.argmax())


def parse(contestant: str, model: nn.Module) -> Contestant:
    """A contestant as ``lorapre compare`` writes it, `DECAYING` or not, `AS` a prototype or as it is."""
    return parse_contestants([contestant.partition(AS)[0].removesuffix(DECAYING)], 0.25, model)[0]


def prototype_of(contestant: str) -> str:
    """The name of the prototype that it is made `AS`; empty where it is the library's."""
    return contestant.partition(AS)[2]


def load(folder: Path, profile: Profile) -> TextCorpus:
    """The corpus in ``folder``, encoded once and then from the cache."""
    return load_corpus(
        [str(folder / "train-0[01].txt.xz")],
        tokenizer=profile.tokenizer or str(folder / "tokenizer.json"),
        sequence_length=profile.sequence_length,
        valid_data=[str(folder / "valid.txt.xz")],
        max_valid_tokens=profile.valid_tokens,
    )


def make_trainer(folder: Path, profile: Profile) -> Trainer:
    """In a worker: on the one GPU that it sees, or the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Trainer(load(folder, profile), profile, device)


def _forget_gradients(parameters: list[nn.Parameter]) -> None:
    for param in parameters:
        param.grad = None
