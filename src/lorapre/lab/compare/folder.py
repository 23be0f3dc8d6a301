"""Where a comparison keeps what: the one layout that running and reporting share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorapre.lab.compare.runs import RunStore


@dataclass(frozen=True)
class ArenaFolder:
    """Where a comparison keeps what."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "comparison.yaml"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def runs(self) -> RunStore:
        return RunStore(self.path / "runs")

    @property
    def trials(self) -> RunStore:
        return RunStore(self.path / "trials")

    @property
    def timings(self) -> RunStore:
        return RunStore(self.path / "timings")

    def begun(self) -> bool:
        """Whether a comparison lies here."""
        return self.config.exists()
