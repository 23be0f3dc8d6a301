"""The study behind the defaults: variants of LoRA-Pre and their rivals, rates searched for each.

    python benchmarks/study --corpus corpus --budget 25m       # goes on from the rows in benchmarks/results/study
    python benchmarks/study --publish                          # table and figures of these rows
    python benchmarks/study --profile variants --corpus corpus # many variants, short runs; results/study/variants

``--corpus`` is a folder as for ``arena.py``. Every training is that of ``lorapre pretrain`` in one process: registry,
start, batches and their order, schedule, clipping at 1, bfloat16 autocast, embeddings, head and norms by AdamW at one
rate, the whole validation text. Three things differ, and rounding by them: the loss is compiled together with the
model, validation keeps gradients enabled and fills its last batch with sequences that do not count (a model is then
compiled once), and a run that diverges is stopped at a validation or at a gradient that is not finite. It is done here
in processes that stay, because starting and compiling take as long as a short run.

``rows.jsonl`` gets a line when a run ends, so that a session may be ended at any time. A run that would not fit into
``--budget`` is not begun; what still runs when it is over is stopped. ``--stages`` says what to make, the most urgent
first: ``rates`` the searches, ``seeds`` more seeds, ``larger`` models with searches of their own, ``larger-seeds``,
``long`` runs at the best rate and, as ``half``, at half of it. ``--profile tiny`` is for a machine without a GPU, to
try the script itself.
"""

import sys
import time
from pathlib import Path


def _run() -> None:
    began = time.monotonic()  # the imports count
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from study.command import main

    main(began, __doc__)


if __name__ == "__main__":
    _run()
