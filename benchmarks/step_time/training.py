"""End to end: whole training steps of a Llama on random tokens, in turn with fused AdamW, in tokens a second.

Weights are float32 under bfloat16 autocast, as in ``lorapre pretrain --bf16``; no checkpointing of activations, no
clipping. Embeddings, head and norms are the optimizers' own affair, or with the registry's rivals torch's AdamW's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorapre.lab.errors import UserError
from lorapre.lab.models import LLAMAS, resolve_model
from step_time.clock import each_step, in_turn, middle
from step_time.contestants import REFERENCE, Contestant, reference
from step_time.measure import WARM_UP, Effort, cycle, said, today
from step_time.rare import Amortised, rare_ms, without_svd
from step_time.rows import TrainingRow

#: Model, title, rank: milliseconds of the work that is rare, where they have been measured.
KnownRare = Callable[[str, str, "int | None"], "float | None"]

#: Of sequences of 1024 tokens; halved until it fits beside the optimizer with the largest state.
BATCHES = {"llama-350m": 16, "llama-1b": 8}
#: In sizes of the weights: what a step may need beyond what fused AdamW's needs, for the state of another optimizer
#: (fused AdamW's own stays) and a temporary of that size.
_HEADROOM = 3


@dataclass(frozen=True)
class Shape:
    """Sequences of a step and tokens of a sequence."""

    batch: int
    sequence: int

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence


class TrainingBench:
    """A model, tokens, and fused AdamW; ``known_rare_ms`` spares SVDs that a row of steps has timed already.

    Raises:
        UserError: not even one sequence fits.
    """

    def __init__(
        self, model: str, shape: Shape, device: torch.device, effort: Effort, known_rare_ms: KnownRare
    ) -> None:
        self.name, self.device, self.effort, self.known_rare_ms = model, device, effort, known_rare_ms
        spec = resolve_model(model).with_sequence(shape.sequence)
        with device:  # drawing a billion weights takes a CPU long
            self.model: nn.Module = spec.build(0).train()
        self.vocabulary: int = spec.config.vocab_size
        self.reference = reference(self.model)
        self.shape, self.tokens = self._fitting(shape)

    def _fitting(self, shape: Shape) -> tuple[Shape, Tensor]:
        weights = sum(param.numel() * param.element_size() for param in self.model.parameters())
        batch = shape.batch
        while batch > 0:
            generator = torch.Generator(self.device).manual_seed(0)
            size = (batch, shape.sequence)
            tokens = torch.randint(self.vocabulary, size, generator=generator, device=self.device)
            with contextlib.suppress(torch.OutOfMemoryError):
                if self.device.type == "cpu":
                    self.step(self.reference, tokens)
                    return Shape(*size), tokens
                torch.cuda.reset_peak_memory_stats()
                for _ in range(WARM_UP):
                    self.step(self.reference, tokens)
                total = torch.cuda.get_device_properties(self.device).total_memory
                if torch.cuda.max_memory_allocated() + _HEADROOM * weights < 0.97 * total:
                    return Shape(*size), tokens
            self.model.zero_grad(set_to_none=True)
            if self.device.type != "cpu":
                torch.cuda.empty_cache()
            batch //= 2
        raise UserError(
            f"--training {self.name}: not even one sequence of {shape.sequence} tokens fits into memory. Give a "
            "smaller model or --sequence, or --training none."
        )

    def step(self, optimizer: Optimizer, tokens: Tensor) -> None:
        """Forward, backward, optimizer."""
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def row(self, contestant: Contestant | None, rank: int | None) -> TrainingRow:
        """The row of ``contestant``, or of the reference where it is None."""
        theirs = lambda: self.step(self.reference, self.tokens)  # noqa: E731
        if contestant is None:
            own = middle([each_step(theirs, self.effort.count, self.device) for _ in range(self.effort.rounds)])
            return self._row(REFERENCE, None, Amortised(own, 0.0), own, "")
        optimizer = contestant.make(self.model, rank)

        def ours() -> None:
            self.step(optimizer, self.tokens)

        with said() as notes:
            step = cycle(ours, contestant.period)
            found, others = self._in_turn(step, theirs, svd=contestant.rare == "svd")
            found /= contestant.period
        rare = 0.0 if contestant.rare is None else self.known_rare_ms(self.name, contestant.title, rank)
        if rare is None:
            layers = LLAMAS[self.name].layers
            rare = rare_ms(
                contestant,
                rank,
                model=self.name,
                layers=layers,
                measured=min(self.effort.rare_layers, layers),
                dtype=torch.float32,
                device=self.device,
            )
        return self._row(contestant.title, rank, Amortised(found, rare), others, " ".join(notes))

    def _in_turn(self, ours: Callable[[], None], theirs: Callable[[], None], *, svd: bool) -> tuple[float, float]:
        with without_svd() if svd else contextlib.nullcontext():
            for _ in range(WARM_UP):
                ours()
        effort = self.effort
        found, others = in_turn(
            ours, theirs, rounds=effort.rounds, count=effort.count, seconds=effort.seconds, device=self.device
        )
        return middle(found), middle(others)

    def _row(self, title: str, rank: int | None, mean: Amortised, reference_ms: float, note: str) -> TrainingRow:
        return TrainingRow(
            device=self.device.type,
            model=self.name,
            optimizer=title,
            rank=rank,
            batch=self.shape.batch,
            sequence=self.shape.sequence,
            step_ms=round(mean.step_ms, 3),
            tokens_per_second=round(self.shape.tokens / (mean.step_ms / 1e3), 1),
            ratio_to_fused_adamw=round(reference_ms / mean.step_ms, 4),
            optimizer_share_ms=round(mean.share_ms, 3),
            note=note,
            date=today(),
        )
