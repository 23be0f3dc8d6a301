"""How a question is put to a model: a template, and the model's chat format around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorapre.lab.errors import UserError
from lorapre.lab.evaluate.config import EvaluateConfig
from lorapre.lab.evaluate.tasks import Item, Task

_QUESTION = "{question}"

#: What ``--prompt`` may name beside `plain`, which is the task's own.
PROMPTS: Mapping[str, str] = {
    # Alpaca's frame with a first thought: what models fine-tuned on MetaMathQA are asked with (arXiv 2309.12284).
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{question}\n\n### Response: Let's think step by step."
    ),
    "boxed": "{question}\nPlease reason step by step, and put your final answer within \\boxed{}.",
}


def prompt_template(config: EvaluateConfig, task: Task) -> str:
    """The text around a question: the one that ``--prompt`` names or is; `boxed` in a chat, `plain` else.

    Raises:
        UserError: it is neither a name nor a text with ``{question}``.
    """
    name = config.prompt or ("boxed" if config.chat else "plain")
    if name == "plain":
        return task.plain
    if name in PROMPTS:
        return PROMPTS[name]
    if _QUESTION not in name:
        raise UserError(
            f"--prompt {name}: is neither plain, {', '.join(PROMPTS)}, nor a text that has {_QUESTION} where the "
            "question goes."
        )
    return name


def stop_strings(config: EvaluateConfig, task: Task) -> tuple[str, ...]:
    """What ends an answer beside the end of text: ``--stop``, or the task's for its own prompt."""
    if config.stop is not None:
        return tuple(config.stop)
    return task.stop if prompt_template(config, task) == task.plain else ()


def make_prompts(config: EvaluateConfig, task: Task, items: list[Item], tokenizer: Any) -> list[str]:
    """The whole text before each answer.

    Raises:
        UserError: ``--chat`` with a tokenizer that has no chat template, or as `prompt_template`.
    """
    template = prompt_template(config, task)
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
