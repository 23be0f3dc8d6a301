"""What an evaluation amounts to: shares of right answers with their intervals, and how far two judges agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lorapre.lab.evaluate.intervals import wilson_interval

Row = Mapping[str, Any]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The result of one task, from its rows alone."""
    summary = {
        **_share(row["correct"] for row in rows),
        "unanswered": sum(row["answer"] is None for row in rows),
        "found_by": _counts(row["rule"] or "nothing" for row in rows),
        "finish": _counts(row["finish"] for row in rows),
        "mean_tokens": sum(row["tokens"] for row in rows) / len(rows),
    }
    for label in rows[0]["labels"]:
        values = sorted({row["labels"][label] for row in rows})
        summary[f"by_{label}"] = {
            value: _share(row["correct"] for row in rows if row["labels"][label] == value) for value in values
        }
    opinions = rows[0]["second_opinion"]
    if opinions is not None:
        summary["second_opinion"] = {name: _agreement(rows, name) for name in opinions}
    return summary


def _share(verdicts: Iterable[bool]) -> dict[str, Any]:
    counted = Counter(verdicts)
    right, total = counted[True], counted.total()
    low, high = wilson_interval(right, total)
    return {"items": total, "right": right, "accuracy": right / total, "low": low, "high": high}


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _agreement(rows: Sequence[Row], name: str) -> dict[str, Any]:
    pairs = Counter((row["correct"], row["second_opinion"][name]) for row in rows)
    return {
        **_share(row["second_opinion"][name] for row in rows),
        "agreement": (pairs[True, True] + pairs[False, False]) / len(rows),
        "right_for_us_alone": pairs[True, False],
        "right_for_lm_eval_alone": pairs[False, True],
    }


def print_results(summary: Mapping[str, Any], out: Path, console: Console) -> None:
    """Print one row a task and judge, and where the files are."""
    table = Table(title=str(summary["model"]), title_justify="left")
    table.add_column("")
    table.add_column("judge")
    for heading in ("right", "accuracy", "95 % interval", "agrees"):
        table.add_column(heading, justify="right")
    for task, result in summary["tasks"].items():
        judges = {"math-verify": result}
        judges |= {f"lm-eval, {name}": other for name, other in result.get("second_opinion", {}).items()}
        for judge, found in judges.items():
            table.add_row(
                task if judge == "math-verify" else "",
                judge,
                f"{found['right']}/{found['items']}",
                f"{found['accuracy']:.1%}",
                f"{found['low']:.1%} to {found['high']:.1%}",
                f"{found['agreement']:.1%}" if "agreement" in found else "",
            )
    console.print(table)
    for task, result in summary["tasks"].items():
        if cut := result["finish"].get("length", 0):
            console.print(
                f"{task}: {cut} of {result['items']} answers were cut off at --max-new-tokens; give more if they "
                "reason to the end.",
                soft_wrap=True,
                markup=False,
            )
    files = ", ".join(f"{task}.jsonl" for task in summary["tasks"])
    console.print(f"evaluation: {out} (summary.json, {files})", soft_wrap=True, markup=False)
