"""What ``lorapre optimizers`` prints."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from lorapre.lab.optimizers import OPTIMIZERS


def optimizer_table() -> Table:
    """One row an optimizer: name, state of a square matrix in numbers a weight, default rate, where it comes from."""
    table = Table(title="--optimizer, --optimizers", title_justify="left", pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("state", justify="right")
    table.add_column("lr", justify="right", no_wrap=True)
    table.add_column("what, and from where")
    side = 1024
    for entry in OPTIMIZERS.values():
        share = entry.state_bytes(side, side, side // 4) / (8 * side**2)
        missing = "" if entry.installed_version() is not None else f" [red](needs {entry.package})[/]"
        table.add_row(entry.name, f"{share:.2f}", f"{entry.default_lr:g}", escape(entry.source) + missing)
    sets: dict[str, list[str]] = {}
    for entry in OPTIMIZERS.values():
        if entry.options:
            sets.setdefault(", ".join(entry.options), []).append(entry.name)
    table.caption = "\n".join(
        [
            f"state: of a {side} x {side} matrix, AdamW = 1, at rank {side // 4} where there is one; lr: default peak "
            "learning rate of the matrices",
            *(escape(f"--set of {', '.join(names)}: {options}") for options, names in sets.items()),
        ]
    )
    table.caption_justify = "left"
    return table
