"""Figures of a run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from lorapre.lab.run_folder import write_atomically

#: Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

#: What tells apart runs of one colour, once there are more than colours.
_LINES = ("-", "-.", ":", (0, (1, 1, 4, 1)), (0, (8, 2)))


def plot_loss(path: Path, runs: Mapping[str, list[dict[str, Any]]], *, bigram: float, title: str) -> None:
    """Draw training loss (thin) and validation loss (marked) of each run against tokens, into a PNG.

    Args:
        path: where to put it, atomically.
        runs: records of ``metrics.jsonl`` by label.
        bigram: cross-entropy of the bigram model on the same validation text, in nats a token.
        title: one line.
    """
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        styles = itertools.cycle(itertools.product(_LINES, COLOURS))
        for (label, records), (line, colour) in zip(runs.items(), styles, strict=False):
            train = [(record["tokens"] / 1e6, record["loss"]) for record in records if "loss" in record]
            valid = [(record["tokens"] / 1e6, record["valid_loss"]) for record in records if "valid_loss" in record]
            if train:
                axes.plot(
                    *zip(*train, strict=True),
                    color=colour,
                    linestyle=line,
                    alpha=0.45,
                    linewidth=1,
                    label=f"{label}, training",
                )
            if valid:
                axes.plot(
                    *zip(*valid, strict=True),
                    color=colour,
                    linestyle=line,
                    linewidth=2,
                    marker="o",
                    markersize=5,
                    label=f"{label}, validation ({valid[-1][1]:.3f})",
                )
        axes.axhline(bigram, color="#555555", linestyle="--", linewidth=1.2, label=f"bigram model ({bigram:.3f})")
        axes.set_xlabel("tokens (millions)")
        axes.set_ylabel("loss (nats a token)")
        axes.set_title(title, loc="left", parse_math=False)  # names of files, which may have dollar signs
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=144))
