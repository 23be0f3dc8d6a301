"""The options of a fine-tuning run: one typed record, and what of them the pre-training recipe shares."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lorapre.lab.config import Layer, PretrainConfig, Schedule, options_of_last, read_yaml, validated
from lorapre.lab.errors import UserError
from lorapre.lab.finetune.presets import PRESETS
from lorapre.routing import check_rank

#: The model and the task that a run without arguments makes itself.
TINY_MODEL, ARITHMETIC = "tiny", "arithmetic"

#: Options of methods that differ from their optimizer's defaults: in runs of a few hundred steps, as
#: fine-tuning's are, bases that move in every fourth alone find the subspace too late (docs/study-finetune.md).
OWN: Mapping[str, Mapping[str, Any]] = {"lorapre-adamw": {"sweep_interval": 1}}

#: Names of methods by the registry's.
_NAMES: Mapping[str, str] = {"adamw": "full-adamw"}

Adapter = Literal["lora", "rslora", "dora"]
_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class FinetuneConfig(BaseModel):
    """Every option of ``lorapre finetune``. The defaults are a minute on two CPU cores, but for what is said there."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = TINY_MODEL
    dtype: Literal["float32", "bfloat16"] = "float32"
    data: str = ARITHMETIC
    data_files: list[str] = []
    valid_data: list[str] = []
    valid_examples: Annotated[int, Field(ge=1)] = 200
    max_examples: Annotated[int, Field(ge=1)] | None = None
    template: Literal["auto", "chat", "qa", "alpaca", "plain"] = "auto"
    chat_template: str | None = None
    max_length: Annotated[int, Field(ge=2)] = 1024
    packing: bool = False
    learn_prompts: bool = False

    method: str = "lorapre-adamw"
    rank: int | float = 8
    options: dict[str, Any] = {}
    adapter: Adapter | None = None
    adapter_rank: Annotated[int, Field(ge=1)] | None = None
    alpha: Annotated[int, Field(ge=1)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] = []
    loraplus_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    lr: _Rate | None = None
    dense_lr: _Rate | None = None
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0

    schedule: Schedule = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    min_lr_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    batch_size: Annotated[int, Field(ge=1)] = 32
    accumulation: Annotated[int, Field(ge=1)] = 1
    epochs: _Rate | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    bf16: bool = False
    checkpointing: bool = False

    log_every: Annotated[int, Field(ge=1)] | None = None
    eval_every: Annotated[int, Field(ge=1)] | None = None
    save_every: Annotated[int, Field(ge=1)] | None = None
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    answers: Annotated[int, Field(ge=0)] | None = None
    merge: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @field_validator("rank", mode="before")
    @classmethod
    def _valid_rank(cls, rank: Any) -> Any:
        if isinstance(rank, (bool, int, float)):
            check_rank(rank)
        return rank

    @field_validator("method")
    @classmethod
    def _one_name(cls, method: str) -> str:
        return _NAMES.get(method, method)

    @model_validator(mode="after")
    def _consistent(self) -> FinetuneConfig:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"--steps {self.steps} and --epochs {self.epochs} exclude each other: give one")
        if self.data_files and self.data == ARITHMETIC:
            raise ValueError("--data-files: of which format? Name it with --data metamathqa, gsm8k or alpaca")
        if self.chat_template is not None and self.template not in ("auto", "chat"):
            raise ValueError(f"--chat-template {self.chat_template}: is not used by --template {self.template}")
        return self

    @property
    def total_epochs(self) -> float:
        """Passes over the training data where ``steps`` does not decide."""
        if self.epochs is not None:
            return self.epochs
        return 15.0 if self.data == ARITHMETIC else 1.0

    @property
    def answered(self) -> int:
        """Held-out prompts that are answered by generation, before and after."""
        if self.answers is not None:
            return self.answers
        return self.valid_examples if self.data == ARITHMETIC else 0

    def to_yaml(self) -> str:
        """All options, in the order of this class."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def build_finetune_config(
    options: Mapping[str, Any], *, preset: str | None = None, config_file: Path | None = None
) -> FinetuneConfig:
    """Merge the defaults, a preset, a YAML file and ``options``, the later ones winning; and `OWN` under all of them.

    ``steps`` given in one layer replaces ``epochs`` of an earlier one, and the other way round. A layer that changes
    the method leaves the ``options`` of earlier ones behind, which were the other method's.

    Raises:
        UserError: an unknown preset or key, an unreadable file, or a value out of range.
    """
    layers: list[Layer] = []
    if preset is not None:
        if preset not in PRESETS:
            raise UserError(f"--preset {preset}: there is no such preset. Choose one of {', '.join(PRESETS)}.")
        layers.append((f"--preset {preset}", PRESETS[preset]))
    if config_file is not None:
        layers.append((str(config_file), read_yaml(config_file)))
    layers.append(("the command line", options))
    config = validated(FinetuneConfig, options_of_last(layers, "method", _NAMES), ("steps", "epochs"))
    return config.model_copy(update={"options": {**OWN.get(config.method, {}), **config.options}})


def recipe(config: FinetuneConfig, optimizer: str, steps: int, **changes: Any) -> PretrainConfig:
    """What the rows of the registry and the shared training code read, as they read it in pre-training.

    Args:
        config: of the run.
        optimizer: row of the registry.
        steps: of the whole run.
        **changes: options that are not as in ``config``.

    Raises:
        UserError: two intervals do not fit together.
    """
    shared = {name: getattr(config, name) for name in PretrainConfig.model_fields if hasattr(config, name)}
    values = {
        **{name: value for name, value in shared.items() if name not in ("data", "valid_data", "valid_examples")},
        "optimizer": optimizer,
        "steps": steps,
        "sequence_length": config.max_length,
        "valid_tokens": None,
        **changes,
    }
    return validated(PretrainConfig, [("the options", values)])
