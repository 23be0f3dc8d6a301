"""Models to pre-train: Llama presets, a configuration file, or a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lorapre.lab.errors import UserError

#: Vocabulary of the published Llama sizes; kept where the tokenizer has at least that many entries.
PUBLISHED_VOCABULARY = 32_000


@dataclass(frozen=True)
class LlamaSize:
    """The numbers that tell one Llama from another; heads have no grouping, and positions are rotary."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    tied: bool = False


#: 60m to 7b: GaLore's configurations, which the paper uses. 1m, 3m and 20m are this project's, for small machines.
LLAMAS: Mapping[str, LlamaSize] = {
    "llama-1m": LlamaSize(128, 344, 4, 4, tied=True),
    "llama-3m": LlamaSize(320, 864, 2, 5, tied=True),
    "llama-20m": LlamaSize(256, 688, 6, 4),
    "llama-60m": LlamaSize(512, 1376, 8, 8),
    "llama-130m": LlamaSize(768, 2048, 12, 12),
    "llama-350m": LlamaSize(1024, 2736, 24, 16),
    "llama-1b": LlamaSize(2048, 5461, 24, 32),
    "llama-7b": LlamaSize(4096, 11008, 32, 32),
}


@dataclass(frozen=True)
class ModelSpec:
    """A model that is known but not built: ``config`` for a fresh one, ``checkpoint`` for one with weights."""

    name: str
    config: Any
    checkpoint: str | None = None
    resizable: bool = False
    #: Trained on the data where none is named. A few minutes of training do not fill a large vocabulary.
    default_tokenizer: str = "bpe:4096"

    def with_vocabulary(self, tokenizer_size: int, max_token_id: int, end: int | None = None) -> ModelSpec:
        """Fit the embedding to the tokenizer, and a preset's end of text to ``end``, which also begins a text.

        A preset takes the tokenizer's size, or the published 32,000 where every id that occurs fits (T5's
        tokenizer counts a hundred sentinels beyond it). Files and checkpoints say their own size.

        Raises:
            UserError: the tokenizer has ids that the model's embedding lacks.
        """
        if self.resizable:
            published = max_token_id < PUBLISHED_VOCABULARY <= tokenizer_size
            self.config.vocab_size = PUBLISHED_VOCABULARY if published else tokenizer_size
            if end is not None:
                self.config.bos_token_id = self.config.eos_token_id = end
        elif max_token_id >= self.config.vocab_size:
            raise UserError(
                f"--model {self.name}: its vocabulary has {self.config.vocab_size} entries, but the tokenizer "
                f"produces the id {max_token_id}. Give the tokenizer that belongs to the model with --tokenizer."
            )
        return self

    def with_sequence(self, sequence_length: int) -> ModelSpec:
        """Make sure that ``sequence_length`` tokens fit into the model's positions.

        Raises:
            UserError: the model is limited to fewer.
        """
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit is not None and sequence_length > limit:
            if not self.resizable:
                raise UserError(
                    f"--sequence-length {sequence_length}: --model {self.name} has {limit} positions. Give fewer."
                )
            self.config.max_position_embeddings = sequence_length
        return self

    def build(self, seed: int, device: str | None = None) -> PreTrainedModel:
        """The model in float32: fresh weights from ``seed``, or the checkpoint's; ``device="meta"`` has neither.

        Raises:
            UserError: the checkpoint cannot be loaded, or the configuration is of no causal language model.
        """
        if device == "meta":
            try:
                with torch.device("meta"):
                    model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
            except Exception as error:  # each architecture fails in its own way
                raise UserError(_not_causal(self.name, error)) from error
            return model
        torch.manual_seed(seed)  # also for weights that a checkpoint lacks
        if self.checkpoint is not None:
            try:
                model = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32)
            except Exception as error:
                raise UserError(_unloadable(self.name, error)) from error
            return model
        fresh: PreTrainedModel = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        return fresh


def resolve_model(name: str) -> ModelSpec:
    """What ``--model`` means: a preset, a ``config.json``, a checkpoint folder, or a hub name with a slash.

    Raises:
        UserError: it is none of these, or cannot be read.
    """
    if name in LLAMAS:
        size = LLAMAS[name]
        config = LlamaConfig(
            vocab_size=PUBLISHED_VOCABULARY,
            hidden_size=size.hidden,
            intermediate_size=size.mlp,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            max_position_embeddings=1024,
            rms_norm_eps=1e-6,
            tie_word_embeddings=size.tied,
            bos_token_id=0,
            eos_token_id=0,
        )
        small = name in ("llama-1m", "llama-3m")
        return ModelSpec(name, config, resizable=True, default_tokenizer="bpe:1024" if small else "bpe:4096")
    path = Path(name)
    if path.suffix == ".json":
        return ModelSpec(name, _read_config(path))
    if not path.is_dir() and "/" not in name:
        raise UserError(
            f"--model {name}: is neither a preset ({', '.join(LLAMAS)}), nor a .json file, nor a checkpoint folder, "
            "nor a hub name such as HuggingFaceTB/SmolLM2-135M."
        )
    try:
        return ModelSpec(name, AutoConfig.from_pretrained(name), checkpoint=name)
    except Exception as error:
        raise UserError(_unloadable(name, error)) from error


def _read_config(path: Path) -> Any:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        model_type = values.pop("model_type")
        return AutoConfig.for_model(model_type, **values)
    except OSError as error:
        raise UserError(f"--model {path}: cannot be read ({error.strerror}). Give an existing config.json.") from None
    except KeyError:
        raise UserError(f'--model {path}: has no "model_type" entry. Add one, such as "model_type": "llama".') from None
    except Exception as error:  # transformers' own checks have no common class
        raise UserError(
            f"--model {path}: is not a model configuration ({_reason(error)}). Compare it with the config.json of a "
            "saved model."
        ) from None


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _not_causal(name: str, error: Exception) -> str:
    return (
        f"--model {name}: no causal language model can be made of its configuration ({_reason(error)}). Give one such "
        "as Llama's or GPT-2's, with sizes that fit together."
    )


def _unloadable(name: str, error: Exception) -> str:
    return (
        f"--model {name}: cannot be loaded ({_reason(error)}). Give a folder written by save_pretrained, or a hub name "
        "that this machine can reach."
    )
