"""The answers of a trained model to a task's test questions, as ``lorapre evaluate --chat --prompt question`` has them.

The same functions ask and judge, on the model that is in memory: greedy, no stop string, weights in bfloat16.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from finetune.profiles import Task
from finetune.rows import packed
from lorapre.lab.evaluate.generation import Decoding, complete
from lorapre.lab.evaluate.scoring import score


def read_questions(folder: Path, task: Task) -> list[tuple[str, str]]:
    """Questions and their answers: what follows ``#### `` where it is there, else the whole text."""
    question, answer = task.fields
    lines = (folder / task.test).read_text(encoding="utf-8").splitlines()[: task.test_size]
    records = [json.loads(line) for line in lines]
    return [(each[question], each[answer].rpartition("#### ")[2].strip().replace(",", "")) for each in records]


def test_model(model: Any, tokenizer: Any, questions: list[tuple[str, str]], task: Task) -> dict[str, Any]:
    """How ``model`` answers ``questions``: ``right`` (`packed`), ``correct`` (how many), ``finish``, ``samples``.

    ``finish`` counts why answers ended: ``eos``, or ``length`` where they were cut off.
    """
    prompts = [
        str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
        )
        for question, _ in questions
    ]
    decoding = Decoding(task.max_new_tokens, 0.0, 1.0, (), special_tokens=False)
    lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    order = sorted(range(len(prompts)), key=lambda place: -lengths[place])
    verdicts = [False] * len(prompts)
    finish: Counter[str] = Counter()
    samples: dict[int, str] = {}
    for begin in range(0, len(order), task.test_batch):
        places = order[begin : begin + task.test_batch]
        answers = complete(model, tokenizer, [prompts[place] for place in places], [0] * len(places), decoding)
        for place, answer in zip(places, answers, strict=True):
            verdicts[place] = score(answer.text, questions[place][1], "hashes").correct
            finish[answer.finish] += 1
            if place < 2:
                samples[place] = answer.text
    return {
        "right": packed(verdicts),
        "correct": sum(verdicts),
        "asked": len(verdicts),
        "finish": dict(finish),
        "samples": [samples[place] for place in sorted(samples)],
    }
