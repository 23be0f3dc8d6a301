"""How a conversation becomes text, and which of it the model is to learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lorapre.lab.errors import UserError
from lorapre.lab.finetune.config import FinetuneConfig
from lorapre.lab.finetune.formats import Example, Format

#: Text, and whether it is an answer.
Segment = tuple[str, bool]

#: What comes before an answer, and what joins the answer to it. The prompt ends before the space, as tokenizers that
#: take a space to the next word want it.
_PLAIN = {"qa": ("Q: {}\nA:", " "), "alpaca": ("### Instruction:\n{}\n\n### Response:\n", ""), "plain": ("{}\n", "")}


@dataclass(frozen=True)
class Template:
    """``name`` is recorded; ``segments`` gives an example's text in pieces.

    ``special`` says whether the text brings its own beginning and end, as a chat template's does; else the
    tokenizer's first token and its end-of-text token are put around it.
    """

    name: str
    segments: Callable[[Example], list[Segment]]
    special: bool


def choose_template(config: FinetuneConfig, form: Format, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The chat template, where the tokenizer has one or a file is given, else the one usual for the data.

    Raises:
        UserError: the file cannot be read, or ``--template chat`` finds none.
    """
    if config.chat_template is not None:
        try:
            tokenizer.chat_template = Path(config.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--chat-template {config.chat_template}: cannot be read ({error}). Give a file.") from None
    name = config.template
    if name == "auto":
        name = "chat" if tokenizer.chat_template else form.template  # type: ignore[assignment]
    if name != "chat":
        return Template(name, _Plain(name), special=False)
    if not tokenizer.chat_template:
        raise UserError(
            f"--template chat: the tokenizer of --model {config.model} has no chat template. Give one with "
            "--chat-template FILE, or another --template."
        )
    return Template("chat", _Chat(tokenizer), special=True)


@dataclass(frozen=True)
class _Plain:
    """A prompt and its answer, between fixed words."""

    name: str

    def __call__(self, example: Example) -> list[Segment]:
        if len(example.messages) != 2:
            raise UserError(
                f"{example.where}: has {len(example.messages)} messages, and --template {self.name} takes one prompt "
                "and one answer. Take a model with a chat template, or give one with --chat-template."
            )
        before, joint = _PLAIN[self.name]
        return [(before.format(example.messages[0]["content"]), False), (joint + example.answer, True)]


@dataclass(frozen=True)
class _Chat:
    """What the tokenizer's chat template makes of a conversation, cut where each answer begins and ends."""

    tokenizer: PreTrainedTokenizerBase

    def _render(self, example: Example, count: int, *, prompt: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(example.messages[:count]), tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(
                f"{example.where}: the chat template refuses the conversation ({error}). Change it, or give another "
                "template with --chat-template."
            ) from None
        return str(text)

    def __call__(self, example: Example) -> list[Segment]:
        segments: list[Segment] = []
        done = ""
        for index, message in enumerate(example.messages):
            if message["role"] != "assistant":
                continue
            for count, answer in ((index, False), (index + 1, True)):
                text = self._render(example, count, prompt=not answer)
                if not text.startswith(done):
                    raise UserError(
                        f"{example.where}: the chat template changes what came before when message {index + 1} is "
                        "added, so that where the answer begins cannot be told. Give a template that only appends, "
                        "with --chat-template, or conversations of one answer."
                    )
                segments.append((text[len(done) :], answer))
                done = text
        return segments
