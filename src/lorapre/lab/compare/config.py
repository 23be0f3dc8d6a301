"""The options of a comparison: the training that all share, and how rates and seeds are tried."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator

from lorapre.lab.compare.contestants import Contestant
from lorapre.lab.compare.plan import SEARCHES, Planner, SearchName
from lorapre.lab.config import Layer, PretrainConfig, preset_layer, read_yaml, validated
from lorapre.lab.optimizers import OPTIMIZERS, OptimizerEntry

#: What `lorapre compare` trains without options: minutes on two CPU cores.
DEFAULT_JOB: Mapping[str, Any] = {"model": "llama-1m", "steps": 160, "valid_tokens": 20_000}
#: How it searches then. Quarters of a run this short would say nothing about its rates.
DEFAULT_SEARCH: Mapping[str, Any] = {"lr_grid": "x0.25,x0.5,x1,x2", "search": "grid"}
DEFAULT_OPTIMIZERS = ("lorapre-adamw", "adamw", "galore-ours", "fira-ours")

#: Options of a run that a comparison sets itself.
SET_BY_COMPARISON = ("optimizer", "options", "lr", "compare", "eval_every", "save_every", "keep_checkpoints")

#: Validations of a run of full length; shorter runs have as many as fit at the same distance.
VALIDATIONS = 8


class CompareConfig(BaseModel):
    """Every option of ``lorapre compare`` but those of the training itself, which are ``training``'s."""

    model_config = ConfigDict(extra="forbid")

    training: PretrainConfig
    optimizers: list[str] = list(DEFAULT_OPTIMIZERS)
    lr_grid: str = "auto"
    seeds: Annotated[int, Field(ge=1, le=100)] = 1
    search: SearchName | None = None
    budget: str | None = None
    validations: Annotated[int, Field(ge=1)] = VALIDATIONS
    jobs_per_device: Annotated[int, Field(ge=1)] = 1

    @field_validator("optimizers")
    @classmethod
    def _somebody(cls, names: list[str]) -> list[str]:
        if not names:
            raise ValueError("names nobody. Give names of `lorapre optimizers`, separated by commas")
        return names

    @field_validator("budget")
    @classmethod
    def _valid_budget(cls, budget: str | None) -> str | None:
        if budget is not None:
            parse_duration(budget)
        return budget

    @field_validator("lr_grid")
    @classmethod
    def _valid_grid(cls, text: str) -> str:
        parse_grid(text)
        return text

    @property
    def budget_seconds(self) -> float | None:
        """``budget`` in seconds."""
        return None if self.budget is None else parse_duration(self.budget)

    def seed_list(self) -> tuple[int, ...]:
        """The seeds: ``training.seed`` and those after it."""
        return tuple(self.training.seed + number for number in range(self.seeds))

    def grid(self, entry: OptimizerEntry) -> tuple[float, ...]:
        """Learning rates for ``entry``, ascending."""
        kind, numbers = parse_grid(self.lr_grid)
        if kind == "auto":
            return entry.lr_grid
        rates = numbers if kind == "rates" else tuple(number * entry.default_lr for number in numbers)
        return tuple(sorted(map(_six_digits, rates)))

    @property
    def grid_grows(self) -> bool:
        """Whether rates may be added where the best one lies at the edge: only to a grid that the user did not set."""
        return self.lr_grid == "auto"

    def to_yaml(self) -> str:
        """All options, in the order of this class."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def parse_duration(text: str) -> float:
    """Seconds of ``90s``, ``20m``, ``1.5h`` or ``1h30m``.

    Raises:
        ValueError: it is not written so, or is not above zero.
    """
    match = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s)?", text.strip())
    try:
        seconds = 0.0
        if match is not None:
            seconds = sum(float(part) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True) if part)
    except ValueError:
        seconds = 0.0
    if seconds <= 0:
        raise ValueError(f"--budget {text}: is no length of time. Write 20m, 1.5h, 1h30m or 90s")
    return seconds


def parse_grid(text: str) -> tuple[str, tuple[float, ...]]:
    """``auto``; learning rates ``1e-3,2e-3`` for all; or multiples ``x0.5,x1,x2`` of each optimizer's default.

    Returns:
        "auto", "rates" or "multiples", and the numbers.

    Raises:
        ValueError: it is none of them.
    """
    if text == "auto":
        return "auto", ()
    parts = [part.strip() for part in text.split(",")]
    multiples = all(part.startswith("x") for part in parts)
    try:
        numbers = tuple(_six_digits(float(part[1:] if multiples else part)) for part in parts)
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < number < float("inf") for number in numbers) or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"--lr-grid {text}: is no grid. Write auto, different rates for all optimizers (5e-4,1e-3,2e-3), or "
            "multiples of each one's default (x0.5,x1,x2)"
        )
    return ("multiples" if multiples else "rates"), numbers


def _six_digits(number: float) -> float:
    """As runs' folders write it: x3 of 2e-4 is 6e-4, not 6.000000000000001e-4 beside it in the same folder."""
    return float(f"{number:.6g}")


def build_compare_config(
    training: Mapping[str, Any], options: Mapping[str, Any], *, preset: str | None, config_file: Path | None
) -> CompareConfig:
    """The configuration that the command line asks for.

    ``--preset`` and ``--config`` (a run's or a comparison's YAML) give the training options, ``training`` and
    ``options`` what was given on the command line, which wins.

    Raises:
        UserError: an unknown name, or a value out of range.
    """
    of_comparison: dict[str, Any] = {}
    of_training: dict[str, Any] = {}
    if config_file is not None:
        content = read_yaml(config_file)
        if isinstance(content.get("training"), dict):
            of_training = content.pop("training")
            of_comparison = content
        else:
            of_training = {name: value for name, value in content.items() if name not in SET_BY_COMPARISON}
    file_layer: list[Layer] = [(str(config_file), of_training)]
    default_layer: list[Layer] = [] if preset or of_training else [("the defaults", DEFAULT_JOB)]
    command_layer: list[Layer] = [("the command line", training)]
    base = validated(PretrainConfig, [*default_layer, *preset_layer(preset), *file_layer, *command_layer])
    own = {name: PretrainConfig.model_fields[name].get_default() for name in SET_BY_COMPARISON}
    base = base.model_copy(update={**own, "diagnose": base.diagnose or None})  # 0 is the same training as none
    plain = not (training or preset or config_file)
    search_layer: list[Layer] = [("the defaults", DEFAULT_SEARCH)] if plain else []
    together: Layer = ("the training", {"training": base})
    return validated(
        CompareConfig, [*search_layer, (str(config_file), of_comparison), ("the command line", options), together]
    )


def make_planners(config: CompareConfig, contestants: tuple[Contestant, ...], search: SearchName) -> dict[str, Planner]:
    """One planner a contestant, by key."""
    return {
        contestant.key: Planner(
            contestant.key,
            config.grid(OPTIMIZERS[contestant.optimizer]),
            config.grid_grows,
            config.seed_list(),
            config.training.total_steps,
            SEARCHES[search],
        )
        for contestant in contestants
    }
