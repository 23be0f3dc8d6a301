"""How a question is put to a model: a template, and the model's chat format around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorapre.lab.errors import UserError
from lorapre.lab.evaluate.config import EvaluateConfig
from lorapre.lab.evaluate.tasks import Item, Task

_QUESTION = "{question}"

#: What ``--prompt`` may name beside `task`, which is the task's own: the text, and what ends an answer to it.
PROMPTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "question": (_QUESTION, ()),
    "plain": (_QUESTION + "\n", ()),
    "qa": ("Q: {question}\nA:", ("\nQ:",)),
    "alpaca": ("### Instruction:\n{question}\n\n### Response:\n", ("### Instruction:",)),
    # Alpaca's long frame with a first thought: what models fine-tuned on MetaMathQA are asked with (arXiv 2309.12284).
    "metamath": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{question}\n\n### Response: Let's think step by step.",
        ("### Instruction:",),
    ),
    "boxed": ("{question}\nPlease reason step by step, and put your final answer within \\boxed{}.", ()),
}


def choose_prompt(config: EvaluateConfig, task: Task) -> tuple[str, tuple[str, ...]]:
    """The text around a question that ``--prompt`` names or is, and the strings that end an answer.

    The text is `boxed` in a chat and the task's own else; the strings are those of ``--stop``, or the prompt's.

    Raises:
        UserError: ``--prompt`` is neither a name nor a text with ``{question}``.
    """
    name = config.prompt or ("boxed" if config.chat else "task")
    if name == "task":
        template, stop = task.prompt, task.stop
    elif name in PROMPTS:
        template, stop = PROMPTS[name]
    elif _QUESTION in name:
        template, stop = name, ()
    else:
        raise UserError(
            f"--prompt {name}: is neither task, {', '.join(PROMPTS)}, nor a text that has {_QUESTION} where the "
            "question goes."
        )
    return template, stop if config.stop is None else tuple(config.stop)


def make_prompts(config: EvaluateConfig, task: Task, items: list[Item], tokenizer: Any) -> list[str]:
    """The whole text before each answer.

    Raises:
        UserError: ``--chat`` with a tokenizer that has no chat template, or as `choose_prompt`.
    """
    template, _ = choose_prompt(config, task)
    texts = [template.replace(_QUESTION, item.question) for item in items]
    if not config.chat:
        return texts
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"--chat: the tokenizer of MODEL {config.model} has no chat template. Leave --chat out, or add "
            "chat_template.jinja to the model's folder."
        )
    return [
        str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        )
        for text in texts
    ]
