"""The options of an evaluation: one typed record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from lorapre.lab.config import validated
from lorapre.lab.errors import UserError
from lorapre.lab.evaluate.tasks import TASKS


class EvaluateConfig(BaseModel):
    """Every option of ``lorapre evaluate``; greedy decoding by default.

    ``data`` is a file by task, for those that are not read from the hub. ``prompt`` and ``stop`` None are the task's.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = Field(min_length=1)
    tasks: list[str] = Field(min_length=1)
    data: dict[str, str] = {}
    limit: Annotated[int, Field(ge=1)] | None = None

    prompt: str | None = None
    chat: bool = False
    stop: list[Annotated[str, Field(min_length=1)]] | None = None

    max_new_tokens: Annotated[int, Field(ge=1)] = 512
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    batch_size: Annotated[int, Field(ge=1)] = 16
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    second_opinion: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateConfig:
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"--tasks {task}: there is no such task; choose among {', '.join(TASKS)}")
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"--tasks {','.join(self.tasks)}: a task occurs twice; name each once")
        for task in self.data:
            if task not in self.tasks:
                raise ValueError(f"--data {task}={self.data[task]}: --tasks does not name {task}; name it there too")
        if self.top_p < 1 and not self.temperature:
            raise ValueError(f"--top-p {self.top_p}: greedy decoding has no use for it; give a --temperature too")
        return self

    def to_yaml(self) -> str:
        """All options, in the order of this class."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def build_evaluate_config(given: Mapping[str, Any], tasks: str, data: Sequence[str]) -> EvaluateConfig:
    """From the command line: ``tasks`` comma-separated, ``data`` as FILE (of the only task) or TASK=FILE.

    Raises:
        UserError: a value is out of range, there is no such task, or a file's task cannot be told.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError(f"--tasks {tasks!r}: names no task. Choose among {', '.join(TASKS)}, or leave it out for both.")
    if not given["model"]:
        raise UserError("MODEL '': is empty. Give the folder of a model or of a peft adapter, or a hub name.")
    config = validated(EvaluateConfig, [("the command line", {**given, "tasks": names})])
    files: dict[str, str] = {}
    for entry in data:
        task, equals, path = entry.partition("=")
        if not equals or task not in TASKS:
            if len(names) != 1:
                raise UserError(f"--data {entry}: of which task? Write TASK=FILE, such as {names[0]}={entry}.")
            task, path = names[0], entry
        if task in files:
            raise UserError(f"--data {entry}: {task} has a file already, {files[task]}. Give one file a task.")
        files[task] = path
    return validated(EvaluateConfig, [("the command line", {**config.model_dump(), "data": files})])
