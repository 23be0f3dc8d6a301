"""The options of a pre-training run: one typed record, its presets, and its way to and from YAML."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lorapre.lab.errors import UserError
from lorapre.routing import check_rank

#: Options, and where they were given.
Layer = tuple[str, Mapping[str, Any]]
_Config = TypeVar("_Config", bound=BaseModel)

Schedule = Literal["cosine", "linear", "constant"]

#: What `--data hf` means: the English part of C4, on which the paper and its peers pre-train.
DEFAULT_HUB_DATA = "hf:allenai/c4:en"


class PretrainConfig(BaseModel):
    """Every option of ``lorapre pretrain``. The defaults are the main job: minutes on two CPU cores."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = "llama-3m"
    data: list[str] = Field(default=["stdlib"], min_length=1)
    text_field: str = "text"
    valid_data: list[str] = []
    valid_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    valid_tokens: Annotated[int, Field(ge=1)] | None = 50_000
    tokenizer: str | None = None

    optimizer: str = "lorapre-adamw"
    rank: int | float = 0.25
    options: dict[str, Any] = {}
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    dense_lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0

    schedule: Schedule = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    min_lr_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1

    batch_size: Annotated[int, Field(ge=1)] = 8
    accumulation: Annotated[int, Field(ge=1)] = 1
    sequence_length: Annotated[int, Field(ge=2)] = 128
    steps: Annotated[int, Field(ge=1)] | None = None
    tokens: Annotated[int, Field(ge=1)] | None = None
    bf16: bool = False
    compile: bool = False

    log_every: Annotated[int, Field(ge=1)] | None = None
    eval_every: Annotated[int, Field(ge=1)] | None = None
    save_every: Annotated[int, Field(ge=1)] | None = None
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    diagnose: Annotated[int, Field(ge=0)] | None = None

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    compare: list[str] = []

    @field_validator("rank", mode="before")
    @classmethod
    def _written_rank(cls, rank: Any) -> Any:
        if isinstance(rank, bool):  # which would count as 1
            check_rank(rank)
        return _rank_of(rank) if isinstance(rank, str) else rank  # 1/4 is text to YAML

    @field_validator("rank")
    @classmethod
    def _valid_rank(cls, rank: int | float) -> int | float:
        check_rank(rank)
        return rank

    @field_validator("tokenizer")
    @classmethod
    def _named_tokenizer(cls, tokenizer: str | None) -> str | None:
        if tokenizer is not None and not tokenizer.strip():
            raise ValueError("names no tokenizer; leave it out for the default, or give bpe:SIZE, a file or a folder")
        return tokenizer

    @field_validator("data")
    @classmethod
    def _hub_default(cls, data: list[str]) -> list[str]:
        return [DEFAULT_HUB_DATA if entry == "hf" else entry for entry in data]

    @model_validator(mode="after")
    def _consistent(self) -> PretrainConfig:
        if self.steps is not None and self.tokens is not None:
            raise ValueError(f"--steps {self.steps} and --tokens {self.tokens} exclude each other: give one")
        if self.tokens is not None and self.tokens < self.tokens_per_step:
            raise ValueError(
                f"--tokens {self.tokens}: is less than one step of --batch-size x --sequence-length = "
                f"{self.tokens_per_step}; give more"
            )
        if self.valid_tokens is not None and self.valid_tokens < self.sequence_length:
            raise ValueError(
                f"--valid-tokens {self.valid_tokens}: is less than one sequence of --sequence-length "
                f"{self.sequence_length}; give more"
            )
        if self.save_every is not None and self.save_every % self.log_interval:
            raise ValueError(
                f"--save-every {self.save_every}: must be a multiple of --log-every {self.log_interval}, so that a "
                "resumed run logs the same averages"
            )
        if self.diagnose is not None and self.diagnose > self.total_steps:
            raise ValueError(
                f"--diagnose {self.diagnose}: is more than the run's {self.total_steps} steps, so nothing would be "
                "measured; give less"
            )
        if len({self.optimizer, *self.compare}) != 1 + len(self.compare):
            names = ", ".join([self.optimizer, *self.compare])
            raise ValueError(f"--compare: an optimizer occurs twice in {names}; name each once")
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, over all processes."""
        return self.batch_size * self.sequence_length

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run; the main job's when neither ``steps`` nor ``tokens`` is given."""
        if self.steps is not None:
            return self.steps
        return 600 if self.tokens is None else self.tokens // self.tokens_per_step

    @property
    def log_interval(self) -> int:
        """Steps between two records of the training loss."""
        return self.log_every or max(1, self.total_steps // 100)

    @property
    def eval_interval(self) -> int:
        """Steps between two validations; the end of the run is always one."""
        return self.eval_every or max(1, self.total_steps // 5)

    @property
    def save_interval(self) -> int:
        """Steps between two checkpoints, a multiple of ``log_interval``."""
        return self.save_every or max(1, self.total_steps // 5 // self.log_interval) * self.log_interval

    def to_yaml(self) -> str:
        """All options, in the order of this class."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _galore(size: str, rank: int, billions: float) -> dict[str, Any]:
    return {
        "model": f"llama-{size}",
        "data": [DEFAULT_HUB_DATA],
        "tokenizer": "t5-base",
        "valid_tokens": 10_000_000,
        "optimizer": "lorapre-adamw-paper",
        "rank": rank,
        # One rate for all parameters, as in the protocol, and the middle of the grid that the paper searched.
        "lr": 1e-3,
        "dense_lr": 1e-3,
        "sequence_length": 256,
        "batch_size": 512,
        "tokens": int(billions * 1e9),
        "warmup": 0.1,
        "min_lr_ratio": 0.1,
        "schedule": "cosine",
        "weight_decay": 0.0,
        "bf16": True,
        "log_every": 10,
        "eval_every": 1000,
        "save_every": 1000,
    }


#: The paper's pre-training protocol (GaLore's): Llama on C4, 512 x 256 tokens a step, cosine to a tenth.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "galore-60m": _galore("60m", 128, 1.1),
    "galore-130m": _galore("130m", 256, 2.2),
    "galore-350m": _galore("350m", 256, 6.4),
    "galore-1b": _galore("1b", 512, 13.1),
}


def build_config(
    options: Mapping[str, Any], *, preset: str | None = None, config_file: Path | None = None
) -> PretrainConfig:
    """Merge the defaults, a preset, a YAML file and ``options``, the later ones winning.

    ``steps`` given in one layer replaces ``tokens`` of an earlier one, and the other way round. A layer that changes
    the optimizer leaves the ``options`` of earlier ones behind, which were the other optimizer's.

    Raises:
        UserError: an unknown preset or key, an unreadable file, a value out of range, or one of ``options`` that
            nothing reads.
    """
    layers = preset_layer(preset)
    if config_file is not None:
        layers.append((str(config_file), read_yaml(config_file)))
    layers.append(("the command line", options))
    config = validated(PretrainConfig, options_of_last(layers, "optimizer"))
    _check_read(options, config)
    return config


def options_of_last(layers: Sequence[Layer], field: str, names: Mapping[str, str] | None = None) -> list[Layer]:
    """``layers`` without the ``options`` of those before the last that changes ``field``, whose options they are.

    ``names`` are other names of its values.
    """
    kept: list[Layer] = []
    before: Any = None
    for source, layer in layers:
        given = layer.get(field)
        now = (names or {}).get(str(given), given)
        if before is not None and now is not None and now != before:
            kept = [
                (origin, {name: earlier[name] for name in earlier if name != "options"}) for origin, earlier in kept
            ]
        before = before if now is None else now
        kept.append((source, layer))
    return kept


def _check_read(given: Mapping[str, Any], config: PretrainConfig) -> None:
    """Refuse what was ``given`` though ``config`` does not read it."""
    hub = any(entry.startswith("hf:") for entry in config.data)
    if "valid_fraction" in given and (config.valid_data or hub):
        instead = f"--valid-data {' '.join(config.valid_data)}" if config.valid_data else f"--data {config.data[0]}"
        raise UserError(
            f"--valid-fraction {config.valid_fraction}: holds nothing out, as {instead} has its own documents to "
            "validate on. Leave it out."
        )
    if "min_lr_ratio" in given and config.schedule == "constant":
        raise UserError(
            f"--min-lr-ratio {config.min_lr_ratio}: --schedule constant does not fall. Leave it out, or choose cosine "
            "or linear."
        )


def preset_layer(preset: str | None) -> list[Layer]:
    """The options of a preset, if one is named, with where they come from.

    Raises:
        UserError: there is no such preset.
    """
    if preset is None:
        return []
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: there is no such preset. Choose one of {', '.join(PRESETS)}.")
    return [(f"--preset {preset}", PRESETS[preset])]


def validated(
    kind: type[_Config], layers: Sequence[Layer], exclusive: tuple[str, str] = ("steps", "tokens")
) -> _Config:
    """A ``kind`` from all ``layers``, the later ones winning.

    One of the two ``exclusive`` options given in one layer replaces the other of an earlier one. ``options`` of the
    optimizer are merged name by name.

    Raises:
        UserError: an unknown key, or a value out of range.
    """
    merged: dict[str, Any] = {}
    for _, layer in layers:
        for one, other in (exclusive, exclusive[::-1]):
            if layer.get(one) is not None and layer.get(other) is None:
                merged.pop(other, None)
        before, now = merged.get("options"), layer.get("options")
        merged.update(layer)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            merged["options"] = {**before, **now}
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        raise UserError(_explain(error, kind, layers)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: the file is missing, unreadable, not YAML, or not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror}). Give the path of a YAML file.") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--config {path}: is not valid YAML ({reason}). `config.yaml` of any run folder is a good start."
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: holds a {type(content).__name__}, not `option: value` lines.")
    for name in content:
        if not isinstance(name, str):
            raise UserError(f"--config {path}: {name!r} is not the name of an option.")
    return content


def option_name(field: str) -> str:
    """How the command line calls a field of `PretrainConfig`."""
    return "--set" if field == "options" else "--" + field.replace("_", "-")


def check_as_recorded(
    recorded: _Config,
    given: Mapping[str, Any],
    out: Path,
    lengths: tuple[str, str],
    build: Callable[[dict[str, Any]], _Config],
    free: Collection[str] = (),
) -> _Config:
    """What ``build`` makes of a run's ``recorded`` options with those that are ``given`` to resume it.

    Args:
        recorded: of the run in ``out``.
        given: on the command line.
        out: the run's folder.
        lengths: two ways to give the length of a run, of which a configuration takes one.
        build: makes a configuration of options by their names.
        free: options that may change.

    Raises:
        UserError: another one is given than the run began with.
    """
    before = recorded.model_dump(exclude_none=True)
    began_with = {name: before.pop(name) for name in lengths if name in before}
    if not given.keys() & set(lengths):
        before |= began_with
    wanted = build({**before, **given})
    for name in given:
        old, new = getattr(recorded, name), getattr(wanted, name)
        if old != new and name not in free:
            # The length of a run may have been given by the other of two options.
            began = [f"{option_name(length)} {value}" for length, value in began_with.items() if name in lengths]
            raise UserError(
                f"{option_name(name)} {new}: the run in {out} began with {''.join(began) or old}, and a resumed run "
                "keeps its options. Leave it out, or start a new run with another --out."
            )
    return wanted


def parse_rank(text: str, option: str) -> int | float:
    """16, 0.25 or 1/4.

    Raises:
        UserError: it is none of them; ``option`` is the one to name in the message.
    """
    try:
        return _rank_of(text)
    except ValueError as error:
        raise UserError(f"{option}: {error}.") from None


def _rank_of(text: str) -> int | float:
    try:
        rank: int | float = int(text) if text.lstrip("+-").isdigit() else float(Fraction(text))
        check_rank(rank)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(
            f"{text!r} is no rank. Give an integer >= 1, or a fraction between 0 and 1 of each matrix's smaller side, "
            "such as 0.25 or 1/32"
        ) from None
    return rank


def parse_options(settings: Sequence[str], origin: str | None = None) -> dict[str, Any]:
    """``NAME=VALUE`` of each of ``settings``, the value as YAML reads it: 1, 0.5, true, null, text, [0.9,0.95].

    Raises:
        UserError: one is not written so, or a name occurs twice; ``origin`` is where, ``--set`` if it is None.
    """
    found: dict[str, Any] = {}
    for setting in settings:
        where = f"--set {setting}" if origin is None else f"{origin}: {setting}"
        name, equals, text = setting.partition("=")
        if not (name.isidentifier() and equals):
            raise UserError(f"{where}: is not written NAME=VALUE, such as eps=1e-6.")
        if name in found:
            raise UserError(f"{where}: {name} is set twice. Set it once.")
        try:
            found[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(
                f"{where}: the value is not valid YAML. Write a number, true, false, null, a word, or a list such as "
                "[0.9,0.95]."
            ) from None
    return found


def _explain(error: ValidationError, kind: type[BaseModel], layers: Sequence[Layer]) -> str:
    """One sentence a problem: the option, where it was set, its value, what would be right."""
    sentences = []
    for problem in error.errors():
        name = str(problem["loc"][0]) if problem["loc"] else ""
        message = problem["msg"].removeprefix("Value error, ").rstrip(".")
        if problem["type"] == "extra_forbidden":
            origin = next(source for source, layer in layers if name in layer)
            known = ", ".join(kind.model_fields)
            sentences.append(f"{origin}: there is no option {name!r}. The options are {known}.")
        elif not name:
            sentences.append(f"{message}.")
        else:
            option = option_name(name)
            message = message.removeprefix("Input should be ")
            verb = "must be " if message != problem["msg"].rstrip(".") and "Value error" not in problem["msg"] else ""
            sentences.append(f"{option} {problem['input']}: {verb}{message}.")
    return " ".join(dict.fromkeys(sentences))
