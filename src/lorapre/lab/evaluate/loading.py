"""The model that is asked: a folder, a hub name, or a peft adapter on one of them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lorapre.lab.errors import UserError

_ADAPTER = "adapter_config.json"
_WHOLE = 2**24  # bytes of a file that a fingerprint reads in full; of larger ones it reads both ends


@dataclass(frozen=True)
class Source:
    """What the argument MODEL means: a model by folder or hub name, and an adapter's folder on top of it or None."""

    name: str
    base: str
    adapter: Path | None = None


def find_source(name: str) -> Source:
    """Tell a model's folder, an adapter's folder and a hub name from each other; nothing is loaded.

    Raises:
        UserError: it is none of them, or the adapter's base is.
    """
    folder = Path(name)
    if not folder.is_dir():
        return Source(name, _hub_name(name, f"MODEL {name}"))
    if (folder / _ADAPTER).exists():
        if importlib.util.find_spec("peft") is None:
            raise UserError(
                f"MODEL {name}: is a peft adapter, and the package peft is not installed. Install it: pip install "
                "'lorapre[evaluate]'."
            )
        try:
            base = json.loads((folder / _ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"MODEL {name}: its {_ADAPTER} cannot be read, or names no base_model_name_or_path. Save the adapter "
                "again with save_pretrained."
            ) from None
        where = f"MODEL {name}: base_model_name_or_path {base} of its {_ADAPTER}"
        is_model = isinstance(base, str) and (Path(base) / "config.json").exists()
        return Source(name, base if is_model else _hub_name(str(base), where), folder)
    if (folder / "config.json").exists():
        return Source(name, name)
    inner = [folder / "model" / "config.json", folder / "adapter" / _ADAPTER]  # of a run's folder
    hint = "".join(f" Did you mean {path.parent}?" for path in inner if path.exists())
    raise UserError(
        f"MODEL {name}: the folder has neither config.json nor {_ADAPTER}. Give one written by save_pretrained.{hint}"
    )


def _hub_name(name: str, where: str) -> str:
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise UserError(
            f"{where}: is neither a folder with a model nor a hub name such as HuggingFaceTB/SmolLM2-135M. Correct it."
        )
    return name


def load_tokenizer(source: Source) -> Any:
    """The adapter's own tokenizer if it has one, else the base model's; it pads on the left.

    Raises:
        UserError: there is none that can be loaded.
    """
    own = source.adapter is not None and any(source.adapter.glob("tokenizer*"))
    place = str(source.adapter) if own else source.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left")
    except Exception as error:  # files, hub and formats have no common class
        raise UserError(f"MODEL {source.name}: no tokenizer in {place} ({_reason(error)}). Save it there.") from error
    if tokenizer.pad_token is None:  # any will do, as padding is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_config(source: Source) -> Any:
    """The configuration of the base model.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        return AutoConfig.from_pretrained(source.base)
    except Exception as error:
        raise UserError(f"MODEL {source.name}: cannot be loaded ({_reason(error)}). Correct it.") from error


def load_model(source: Source, dtype: Literal["auto", "float32", "bfloat16"]) -> PreTrainedModel:
    """The model on the accelerator, if there is one, ready to be asked; an adapter is not merged into the weights.

    ``dtype`` auto is bfloat16 on an accelerator and float32 on a CPU.

    Raises:
        UserError: it cannot be loaded.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if dtype == "auto":
        dtype = "float32" if device is None or device.type == "cpu" else "bfloat16"
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source.base, dtype=getattr(torch, dtype))
        if source.adapter is not None:
            from peft import PeftModel  # an optional dependency

            model = PeftModel.from_pretrained(model, str(source.adapter))
    except Exception as error:
        raise UserError(
            f"MODEL {source.name}: cannot be loaded ({_reason(error)}). Give a folder written by save_pretrained, or "
            "a hub name that this machine can reach."
        ) from error
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def fingerprint(source: Source, config: Any) -> dict[str, str]:
    """What tells one model from another: its files' hashes, or its commit on the hub."""
    found: dict[str, str] = {}
    for place in (Path(source.base), source.adapter):
        if place is not None and place.is_dir():
            for path in sorted(place.iterdir()):
                if path.suffix in (".json", ".safetensors", ".bin", ".model", ".jinja"):
                    found[str(path)] = _hash(path)
    if not Path(source.base).is_dir():
        found[source.base] = str(getattr(config, "_commit_hash", None))
    return found


def _hash(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_WHOLE))
        file.seek(max(size - _WHOLE, 0))
        digest.update(file.read(_WHOLE))
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
