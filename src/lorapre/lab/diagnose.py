"""``lorapre pretrain --diagnose N``: figures of the momentum every N steps, in a file, and drawn at the end.

``diagnostics.jsonl`` holds one row a watched matrix and measured step (`lorapre.diagnostics.MomentumRecord`; null is
nan or infinity), one matrix of each shape; ``diagnostics.png`` draws it.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorapre import param_groups
from lorapre.diagnostics import MomentumDiagnostics
from lorapre.lab.config import PretrainConfig
from lorapre.lab.errors import UserError
from lorapre.lab.optimizers import OPTIMIZERS
from lorapre.lab.optimizers.hybrid import parts_of
from lorapre.lab.plots import COLOURS
from lorapre.lab.run_folder import RunFolder, damaged_checkpoint, write_atomically, write_text
from lorapre.optim.base import FactoredOptimizer
from lorapre.routing import matrix_view

#: Within a checkpoint: the dense momenta that the factors are measured against.
STATE_FILE = "diagnostics.pt"


def rows_path(folder: RunFolder) -> Path:
    """Where the rows of a run are."""
    return folder.path / "diagnostics.jsonl"


def plot_path(folder: RunFolder) -> Path:
    """Where the figure of a run is."""
    return folder.path / "diagnostics.png"


def diagnosed_every(name: str, config: PretrainConfig) -> int | None:
    """``--diagnose`` of the run of ``name`` in ``config``: None where it is off, or a twin's that has no factors.

    Raises:
        UserError: ``name`` is the run's own optimizer and has none.
    """
    if not config.diagnose or OPTIMIZERS[name].factored:
        return config.diagnose
    if name == config.optimizer:
        ours = ", ".join(entry.name for entry in OPTIMIZERS.values() if entry.factored)
        raise UserError(
            f"--diagnose {config.diagnose}: measures momentum that is kept as factors, which --optimizer {name} has "
            f"not. Leave it out, or choose one of {ours}."
        )
    return None


def momenta_bytes(model: nn.Module, rank: int | float) -> int:
    """Bytes of the dense momenta in a checkpoint: of one matrix of each shape, in float32 or wider.

    ``model`` may be on the meta device.
    """
    found: dict[torch.Size, int] = {}
    for group in param_groups(model):
        for _, param in group["params"] if group.get("compress", True) else ():
            if matrix_view(param.shape, rank, group.get("view_3d", "stack")) is not None:
                found[param.shape] = param.numel() * torch.promote_types(param.dtype, torch.float32).itemsize
    return sum(found.values())


def read_rows(folder: RunFolder) -> list[dict[str, Any]]:
    """All rows of a run; a last line that was cut short is left out."""
    path = rows_path(folder)
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class DiagnosticsWriter(TrainerCallback):
    """Attaches `MomentumDiagnostics` to the optimizer, appends its records to ``diagnostics.jsonl``.

    All of a row is a function of the configuration: a resumed run writes it again to the bit (on the CPU). For that
    each checkpoint holds the dense momenta.

    Args:
        folder: of the run.
        every: steps between two measurements.
        checkpoint: to go on from; rows of later steps are dropped.
    """

    def __init__(self, folder: RunFolder, every: int, checkpoint: Path | None) -> None:
        self._path = rows_path(folder)
        self._every = every
        self._state: dict[str, Any] | None = None
        self._diagnostics: MomentumDiagnostics | None = None
        done = 0
        if checkpoint is not None:
            done = int(checkpoint.name.rpartition("-")[2])
            if not (checkpoint / STATE_FILE).exists():
                raise UserError(
                    f"--diagnose {every}: {checkpoint} has no {STATE_FILE}, so it was written without this option. Set "
                    "`diagnose: null` in the run's config.yaml, or start a new run."
                )
            try:
                self._state = torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
            except Exception as error:  # of zipfile, pickle and torch
                raise damaged_checkpoint(checkpoint, error) from error
        kept = [row for row in read_rows(folder) if row["step"] <= done]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        # By now the checkpoint is loaded, and accelerate has wrapped the optimizer.
        parts = parts_of(getattr(optimizer, "optimizer", optimizer))
        ours = next(part for part in parts if isinstance(part, FactoredOptimizer))
        self._diagnostics = MomentumDiagnostics(ours, every=self._every)
        if self._state is not None:
            self._diagnostics.load_state_dict(self._state)
            self._state = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        diagnostics = self._attached
        if diagnostics.records:
            rows = diagnostics.to_dicts()
            diagnostics.records.clear()
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        path = Path(args.output_dir or "") / f"checkpoint-{state.global_step}" / STATE_FILE
        torch.save(self._attached.state_dict(), path)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._attached.close()

    @property
    def _attached(self) -> MomentumDiagnostics:
        assert self._diagnostics is not None, "the Trainer begins with on_train_begin"
        return self._diagnostics


def diagnostics_writer(config: PretrainConfig, folder: RunFolder, checkpoint: Path | None) -> list[TrainerCallback]:
    """The callback of ``--diagnose``, to stand before the one that marks checkpoints complete; none where it is off.

    Raises:
        UserError: ``checkpoint`` was written without it.
    """
    return [DiagnosticsWriter(folder, config.diagnose, checkpoint)] if config.diagnose else []


#: Panels: title, the value above which to draw on a logarithmic scale (None: linear), and figures with the words for
#: each, drawn solid, dashed and dotted. A drift below 1e-9 is rounding.
PANELS: tuple[tuple[str, float | None, tuple[tuple[str, str], ...]], ...] = (
    (
        "error against the dense momentum",
        None,
        (("ema_error", "of the factors"), ("best_error", "of the best of this rank")),
    ),
    ("gradient energy outside the subspace", None, (("outside", ""),)),
    ("drift of the subspace in a step", 1e-9, (("drift", ""),)),
    ("condition number", 0.0, (("condition_product", "of m_B m_A"), ("condition_m_A", "of m_A"))),
    (
        "update / learning rate",
        0.0,
        (
            ("update_max", "maximum"),
            ("update_rms", "root mean square"),
            ("update_norm", "largest singular value / (√p + √q)"),
        ),
    ),
)
_LINES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")


def plot_diagnostics(folder: RunFolder, title: str) -> None:
    """Draw the rows of a run against steps into its ``diagnostics.png``: a panel a figure, a colour a shape."""
    rows = read_rows(folder)
    shapes = {tuple(row["shape"]): (row["name"], row["rank"]) for row in rows}
    colours = dict(zip(shapes, itertools.cycle(COLOURS), strict=False))
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 7.2), layout="constrained")
        *panels, corner = figure.subplots(2, 3).flat
        for axes, (heading, floor, fields) in zip(panels, PANELS, strict=True):
            for (field, _), line in zip(fields, _LINES, strict=False):
                for shape, colour in colours.items():
                    points = [(row["step"], row[field]) for row in rows if tuple(row["shape"]) == shape]
                    steps, values = zip(*_drawable(points, floor), strict=True)
                    marker = "o" if len(points) < 3 else None
                    axes.plot(steps, values, line, color=colour, linewidth=1.4, marker=marker, markersize=4)
            if floor is None:
                axes.set_ylim(bottom=0)
            else:
                axes.set_yscale("log")
            if len(fields) > 1:
                handles = [Line2D([], [], color="#555555", linestyle=line) for line in _LINES[: len(fields)]]
                axes.legend(handles, [words for _, words in fields], frameon=False, fontsize=9)
            axes.set_title(heading, loc="left", fontsize=11)
            axes.set_xlabel("step")
            axes.grid(alpha=0.25)
        corner.axis("off")
        handles = [Line2D([], [], color=colour, linewidth=3) for colour in colours.values()]
        labels = [f"{_sides(shape)}, rank {rank}\n{name}" for shape, (name, rank) in shapes.items()]
        corner.legend(
            handles, labels, loc="upper left", frameon=False, labelspacing=0.9, title="matrix", alignment="left"
        )
        figure.suptitle(title, x=0.01, ha="left", parse_math=False)
        write_atomically(plot_path(folder), lambda temporary: figure.savefig(temporary, dpi=120))


def _sides(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _drawable(points: list[tuple[int, float | None]], floor: float | None) -> Iterator[tuple[int, float]]:
    """The points, with a gap where there is no number, or none above ``floor``."""
    for step, value in points:
        yield step, math.nan if value is None or (floor is not None and value <= floor) else value
