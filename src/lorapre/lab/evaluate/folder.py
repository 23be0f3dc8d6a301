"""The folder of an evaluation: its files, and how an interrupted one goes on in it.

``config.yaml`` and ``provenance.json`` come first, then a line an item in ``<task>.jsonl``, a batch at a time, and at
the end ``summary.json``: a folder that has it is finished.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorapre.lab.config import option_name
from lorapre.lab.errors import UserError
from lorapre.lab.evaluate.config import EvaluateConfig
from lorapre.lab.provenance import provenance
from lorapre.lab.run_folder import RunFolder, write_json, write_text

Row = dict[str, Any]


#: A verdict may change with them.
_JUDGES = ("math-verify", "latex2sympy2_extended", "sympy", "peft", "lm-eval")


@dataclass(frozen=True)
class EvaluationFolder(RunFolder):
    """Paths within the folder of an evaluation, and its state."""

    command: str = "evaluate"

    def items(self, task: str) -> Path:
        """The rows of a task."""
        return self.path / f"{task}.jsonl"

    def open(self, config: EvaluateConfig, data: Mapping[str, Any]) -> None:
        """Make the folder, or make sure that what is there began with the same options, model and questions.

        ``data`` is the fingerprint of model and questions.

        Raises:
            UserError: it did not, something else is there, or it cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path}: is a file. Give a folder, or a path where none exists yet.")
        if self.config.exists():
            self._check_same(config, data)
        elif self.path.exists() and any(self.path.iterdir()):
            raise UserError(f"--out {self.path}: is not empty, and holds no evaluation. Give another folder.")
        self.check_writable(create=True)
        if not self.config.exists():
            write_json(self.provenance, {**provenance(*_JUDGES, seed=config.seed), "data": data})
            write_text(self.config, config.to_yaml())  # last: what has it has its provenance too

    def _check_same(self, config: EvaluateConfig, data: Mapping[str, Any]) -> None:
        try:
            before = yaml.safe_load(self.config.read_text(encoding="utf-8"))
            began = json.loads(self.provenance.read_text(encoding="utf-8"))["data"]
        except (OSError, ValueError, KeyError, yaml.YAMLError):
            raise UserError(
                f"--out {self.path}: its config.yaml or provenance.json is damaged. Give another."
            ) from None
        for name, now in config.model_dump(mode="json").items():
            if not isinstance(before, dict) or before.get(name) != now:
                was = before.get(name) if isinstance(before, dict) else None
                option = "MODEL" if name == "model" else option_name(name)  # the one argument that is no option
                raise UserError(
                    f"{option} {_shown(now)}: the evaluation in {self.path} began with {_shown(was)}. Give what it "
                    "began with to go on, or another --out."
                )
        for name in sorted({*began, *data}):
            if began.get(name) != data.get(name):
                raise UserError(
                    f"--out {self.path}: {name} is not what the evaluation there began with. Put it back to go on, or "
                    "give another --out."
                )

    def complete_rows(self, task: str, total: int, batch_size: int) -> list[Row]:
        """The rows of whole batches; what an interruption left of another is taken off the file.

        Whole, since the rounding of an answer may depend on its batch: the same batches are asked again.
        """
        path = self.items(task)
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").split("\n")
        rows: list[Row] = []
        for line in lines[:-1]:  # the last one has no end of line, so it is not whole
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if not isinstance(row, dict) or row.get("index") != len(rows):
                break
            rows.append(row)
        kept = len(rows) if len(rows) == total else len(rows) // batch_size * batch_size
        if kept + 1 != len(lines) or lines[-1]:
            write_text(path, "".join(line + "\n" for line in lines[:kept]))
        return rows[:kept]

    def append(self, task: str, rows: Sequence[Row]) -> None:
        """Add the rows of a batch, and have them on the disk before the next one begins."""
        with self.items(task).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())


def _shown(value: Any) -> str:
    """As the command line has it."""
    if isinstance(value, dict):
        return " ".join(f"{name}={one}" for name, one in value.items()) or "none"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
