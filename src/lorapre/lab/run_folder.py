"""The folder that a run writes: where its files lie, and how they get there whole.

``config.yaml`` and ``provenance.json`` are written at the start, ``metrics.jsonl`` line by line, ``checkpoints/``
during the run, and ``model/``, ``loss.png`` and ``summary.json`` at its end, in this order: a folder with a
``summary.json`` is a finished run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapre.lab.errors import UserError, in_one_line
from lorapre.optim.summary import format_bytes

#: Written into a checkpoint once everything else is in it; one without was interrupted.
COMPLETE_MARKER = "complete"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file or folder beside ``path``, then put it in place of ``path``."""
    temporary = path.with_name(f".{path.stem}.tmp-{os.getpid()}{path.suffix}")
    _remove(temporary)
    try:
        write(temporary)
        if path.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        _remove(temporary)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def damaged_checkpoint(checkpoint: Path, error: Exception) -> UserError:
    """What to say where a file of ``checkpoint`` cannot be read for ``error``."""
    return UserError(
        f"--resume: the checkpoint {checkpoint} cannot be read ({in_one_line(error)}). Remove this folder to go on "
        "from the checkpoint before it, or from the beginning where there is none."
    )


@dataclass(frozen=True)
class RunFolder:
    """Paths within one run's folder, and its state; ``command`` is the one that makes it and goes on with it."""

    path: Path
    command: str = "pretrain"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def twin(self, optimizer: str) -> RunFolder:
        """The folder of the run that ``--compare optimizer`` adds; it has the same layout."""
        return RunFolder(self.path / f"compare-{optimizer}")

    def check_resumable(self) -> None:
        """Raise ``UserError`` where no run has begun here, or the folder cannot be written to."""
        if not self.config.exists():
            raise UserError(
                f"--resume --out {self.path}: there is no run to resume, as {self.config} does not exist. Leave "
                "--resume out to start one, or give the folder of an interrupted run."
            )
        self.check_writable()

    def create(self) -> None:
        """Make the folder and prove that it can be written to.

        Raises:
            UserError: something is there already, or it cannot be written.
        """
        try:
            self.path.exists()
        except OSError as error:  # a name too long, a folder that may not be searched
            raise UserError(f"--out {self.path}: cannot be used ({error.strerror}). Give another folder.") from None
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path}: is a file. Give a folder, or a path where none exists yet.")
        if self.summary.exists():
            raise UserError(f"--out {self.path}: holds a finished run. Give another --out, or remove it first.")
        if self.path.exists() and any(self.path.iterdir()):
            raise UserError(
                f"--out {self.path}: exists and is not empty. Continue an interrupted run there with `lorapre "
                f"{self.command} --resume --out {self.path}`, or give another --out."
            )
        self.check_writable(create=True)

    def discard(self) -> None:
        """Remove the folder of a run that could not begin, so that the corrected command may use it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def check_writable(self, *, create: bool = False) -> None:
        """Raise ``UserError`` unless a file can be written in the folder; ``create`` makes it first."""
        probe = self.path / f".probe-{os.getpid()}"
        try:
            if create:
                self.path.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"x" * 4096)
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"--out {self.path}: cannot be written ({error.strerror}). Give a folder on a disk with free space "
                "where you may create files."
            ) from None

    def check_space(self, needed: int) -> None:
        """Raise ``UserError`` unless the disk has ``needed`` bytes free, less what an interrupted run has used."""
        needed -= sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise UserError(
                f"--out {self.path}: the disk has {format_bytes(free)} free, and the run's checkpoints and model need "
                f"about {format_bytes(needed)}. Free some space, give an --out on another disk, or lower "
                "--keep-checkpoints."
            )

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, after removing what an interruption left half-written."""
        for temporary in self.path.glob(".*.tmp-*"):  # of `write_atomically`, in a process that was killed
            _remove(temporary)
        complete: list[tuple[int, Path]] = []
        for folder in self.checkpoints.glob("checkpoint-*"):
            if (folder / COMPLETE_MARKER).exists():
                complete.append((int(folder.name.rpartition("-")[2]), folder))
            else:
                shutil.rmtree(folder)
        return max(complete)[1] if complete else None

    def read_metrics(self) -> list[dict[str, Any]]:
        """All records of ``metrics.jsonl``; a last line that was cut short is left out."""
        if not self.metrics.exists():
            return []
        records = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def rewind_metrics(self, step: int) -> list[dict[str, Any]]:
        """Drop the records after ``step``, which the resumed run will write again; return the others."""
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))
        return kept
