"""The model to fine-tune and its tokenizer: made here, a folder, or from the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lorapre.lab.errors import UserError
from lorapre.lab.finetune.config import TINY_MODEL, FinetuneConfig
from lorapre.lab.finetune.presets import known_config
from lorapre.lab.finetune.tiny import tiny_config, tiny_model, tiny_tokenizer
from lorapre.lab.run_folder import write_atomically


@dataclass(frozen=True)
class Base:
    """A model that is known and not loaded; ``tokenizer`` is None in a dry run of a model that is not here."""

    name: str
    config: Any
    tokenizer: PreTrainedTokenizerBase | None

    def on_meta(self) -> nn.Module:
        """Shapes alone.

        Raises:
            UserError: the configuration is of no causal language model.
        """
        try:
            with torch.device("meta"):
                model: nn.Module = AutoModelForCausalLM.from_config(self.config)
        except Exception as error:  # each architecture fails in its own way
            raise UserError(f"--model {self.name}: is no causal language model ({_reason(error)}).") from error
        return model


def find_base(config: FinetuneConfig, *, dry: bool = False) -> Base:
    """What ``--model`` names.

    Args:
        config: of the run.
        dry: only shapes are wanted, and of the presets' models they are known: nothing is downloaded for them.

    Raises:
        UserError: it is neither ``tiny`` nor a folder nor a hub name, or cannot be loaded.
    """
    name = config.model
    if name == TINY_MODEL:
        return Base(name, tiny_config(), tiny_tokenizer())
    known = known_config(name)
    if dry and known is not None:
        return Base(name, known, None)
    if not Path(name).is_dir() and "/" not in name:
        raise UserError(
            f"--model {name}: is neither {TINY_MODEL}, nor a folder, nor a hub name such as {_EXAMPLE}. Give one."
        )
    try:
        found = Base(name, AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name))
    except Exception as error:
        raise UserError(_unloadable(name, error)) from error
    _check_positions(found, config)
    return found


_EXAMPLE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def _check_positions(base: Base, config: FinetuneConfig) -> None:
    limit = getattr(base.config, "max_position_embeddings", None)
    if limit is not None and config.max_length > limit:
        raise UserError(f"--max-length {config.max_length}: --model {base.name} has {limit} positions. Give fewer.")


def check_vocabulary(base: Base, largest: int) -> None:
    """Raise ``UserError`` where the tokenizer gives an id that the model's embedding lacks."""
    size = base.config.get_text_config().vocab_size
    if largest >= size:
        raise UserError(
            f"--model {base.name}: its vocabulary has {size} entries, but its tokenizer gives the id {largest}. Take "
            "the tokenizer that belongs to the model, or enlarge the embedding."
        )


def keep_tiny(folder: Path, seed: int) -> None:
    """Write the tiny model and its tokenizer to ``folder``, where adapters find their base later."""

    def save(path: Path) -> None:
        tiny_model(seed).save_pretrained(path)
        tiny_tokenizer().save_pretrained(path)

    if not folder.exists():
        write_atomically(folder, save)


def load_base(source: str, dtype: str) -> PreTrainedModel:
    """The weights in ``dtype``, on the CPU.

    Raises:
        UserError: they cannot be loaded.
    """
    # A folder by its full path: an adapter records it, and is to be loadable from any other folder.
    place = str(Path(source).resolve()) if Path(source).is_dir() else source
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, dtype))
    except Exception as error:
        raise UserError(_unloadable(source, error)) from error
    return model


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _unloadable(name: str, error: Exception) -> str:
    return (
        f"--model {name}: cannot be loaded ({_reason(error)}). Give a folder written by save_pretrained, with its "
        "tokenizer, or a hub name that this machine can reach."
    )
