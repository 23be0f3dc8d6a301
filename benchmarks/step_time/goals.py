"""What the step is meant to reach, and whether the rows do."""

from __future__ import annotations

from dataclasses import dataclass

from step_time.rows import Results, StepRow

MODEL, DEFAULT, CAPTURED = "llama-1b", "LoRAPreAdamW", "LoRAPreAdamW, CUDA graph"
#: Ranks up to the first number: the ratio to fused AdamW's time that they may reach.
RATIOS = ((64, 0.6), (128, 0.8), (512, 1.5))
EXTRA_SHARE = 0.02
LAUNCHES = 20
TOKENS = 0.99


@dataclass(frozen=True)
class Goal:
    """One of them, for what was measured."""

    what: str
    found: str
    met: bool

    @property
    def line(self) -> str:
        return f"{'met' if self.met else 'MISSED'}: {self.what}: {self.found}"


def goals(results: Results) -> list[Goal]:
    """Those that can be judged by the rows; none without a GPU."""
    rows = [row for row in results.steps if row.device != "cpu"]
    ours = [row for row in rows if row.optimizer == DEFAULT and row.rank is not None]
    found = []
    lowest = 0
    for highest, most in RATIOS:
        for dtype in dict.fromkeys(row.dtype for row in ours):
            those = [
                row for row in ours if row.model == MODEL and row.dtype == dtype and lowest < _rank(row) <= highest
            ]
            if those:
                worst = max(those, key=lambda row: row.ratio_to_fused_adamw)
                ranks = f"r <= {highest}" if lowest == 0 else f"r = {lowest + 1} to {highest}"
                ratio = worst.ratio_to_fused_adamw
                what = f"{MODEL}, {dtype}, {ranks}: at most {most} of fused AdamW's time"
                found.append(Goal(what, f"{ratio:.2f} at r = {worst.rank}", ratio <= most))
        lowest = highest
    if sized := [
        (row.extra_bytes / row.parameter_bytes, row)
        for row in ours
        if row.extra_bytes is not None and row.parameter_bytes
    ]:
        share, row = max(sized, key=lambda pair: pair[0])
        what = f"at most {EXTRA_SHARE:.0%} of the weights' bytes on top during a step"
        found.append(Goal(what, f"{share:.2%} ({_name(row)})", share <= EXTRA_SHARE))
    if launched := [(row.launches, row) for row in ours if row.launches is not None]:
        most_launches, row = max(launched, key=lambda pair: pair[0])
        what = f"at most {LAUNCHES} kernel launches a step"
        found.append(Goal(what, f"{most_launches} ({_name(row)})", most_launches <= LAUNCHES))
    if replayed := [row for row in rows if row.optimizer == CAPTURED and row.same_bits is not None]:
        same = [row for row in replayed if row.same_bits]
        what = "replays of a captured step leave the bits of launched ones"
        found.append(Goal(what, f"{len(same)} of {len(replayed)} rows", len(same) == len(replayed)))
    if trained := [row for row in results.training if row.optimizer == DEFAULT and row.device != "cpu"]:
        least = min(trained, key=lambda row: row.ratio_to_fused_adamw)
        ratio = least.ratio_to_fused_adamw
        what = f"training at {TOKENS} of fused AdamW's tokens a second or above"
        found.append(Goal(what, f"{ratio:.3f} ({least.model}, r = {least.rank})", ratio >= TOKENS))
    return found


def _rank(row: StepRow) -> int:
    return row.rank or 0


def _name(row: StepRow) -> str:
    return f"{row.model}, {row.dtype}, r = {row.rank}"
