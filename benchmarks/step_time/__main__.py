"""Time of one optimizer step on a Llama's matrices, and of whole training steps, as ratios to fused AdamW.

    python benchmarks/step_time --budget 9m --out benchmarks/results/step-time     # a GPU: all; again until it is done
    python benchmarks/step_time --models llama-60m --ranks 8,32,128 --out benchmarks/results/step-time-cpu    # a CPU
    python benchmarks/step_time --publish --readme --out benchmarks/results/step-time        # table, figures, README

Weights are the matrices of the layers alone, with random gradients that stay. A row is timed in turn with fused AdamW,
round after round, so that what else the machine does falls on both; its time is the median over all steps, on a GPU by
CUDA events. Memory is the peak of a step beyond what was held before it; launches are the kernels of one step in the
profiler's trace. What a step must at least move and multiply is counted by the algorithm (``costs.py``) and set against
a copy and a large product (TF32 for float32) measured in the same process. Products of contestants are of torch's
default precision: float32 is not multiplied as TF32 unless an optimizer itself says so.

GaLore, Fira and APOLLO do more every 200 steps: a plain step (with projections that nobody computed) and what the rare
step takes more are timed apart, the latter on ``--rare-layers`` layers and multiplied, and the mean is the row's time.

``step_time.json`` is written after every row, and the same command makes only those that are missing: first
Llama-1B, ours before all others, then the other models, then whole training steps (tokens a second).
"""

import sys
import time
from pathlib import Path


def _run() -> None:
    began = time.monotonic()  # the imports count
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from step_time.command import main

    main(began, __doc__)


if __name__ == "__main__":
    _run()
