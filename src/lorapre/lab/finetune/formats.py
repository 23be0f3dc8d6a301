"""What each kind of data looks like, and how its records become conversations; anything else is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from lorapre.lab.errors import UserError
from lorapre.lab.finetune.records import Record
from lorapre.lab.text import broken_character

Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """A conversation that ends with an answer.

    Attributes:
        messages: ``role`` and ``content``: a system message or none, then user and assistant in turn.
        key: examples of the same key are never on both sides of the split.
        where: file and line.
    """

    messages: tuple[Message, ...]
    key: str
    where: str

    @property
    def answer(self) -> str:
        """The last assistant's message."""
        return self.messages[-1]["content"]


def _whole(text: str) -> str:
    return text.strip()


def _after(mark: str) -> Callable[[str], str]:
    def final(text: str) -> str:
        return text.rpartition(mark)[2].strip().rstrip(".").replace(",", "") if mark in text else ""

    return final


@dataclass(frozen=True)
class Format:
    """One kind of data.

    Attributes:
        name: what ``--data`` calls it.
        template: of a tokenizer without a chat template.
        read: a record as an example.
        repository: on the Hugging Face hub, None where there is none.
        configuration: of the repository.
        valid_split: of the repository, where there is one.
        final: what is compared of an answer and its reference; empty where an answer does not have it.
        answer: field of an answer on the hub.
    """

    name: str
    template: str
    read: Callable[[Record], Example]
    repository: str | None = None
    configuration: str | None = None
    valid_split: str | None = None
    final: Callable[[str], str] = _whole
    answer: str = "response"


def _text(record: Record, field: str, *, may_be_empty: bool = False) -> str:
    if field not in record.fields:
        there = ", ".join(map(repr, record.fields)) or "none"
        raise UserError(f"{record.where}: there is no field {field!r}, only {there}. Add it, or choose another --data.")
    value = record.fields[field]
    if not isinstance(value, str):
        raise UserError(f"{record.where}: {field!r} is a {type(value).__name__}, not a text. Write it as a string.")
    if not value.strip() and not may_be_empty:
        raise UserError(f"{record.where}: {field!r} is empty. Fill it, or remove the record.")
    if broken := broken_character(value):
        raise UserError(f"{record.where}: {field!r} {broken}. Correct it, or remove the record.")
    return value


def _pair(prompt: str, answer: str, record: Record, key: str | None = None) -> Example:
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    return Example(messages, prompt if key is None else key, record.where)


def _metamathqa(record: Record) -> Example:
    # One original question has dozens of rewritings: all of them go to the same side.
    key = record.fields.get("original_question")
    pair = _text(record, "query"), _text(record, "response")
    return _pair(*pair, record, key if isinstance(key, str) else None)


def _gsm8k(record: Record) -> Example:
    return _pair(_text(record, "question"), _text(record, "answer"), record)


def _alpaca(record: Record) -> Example:
    prompt = _text(record, "instruction")
    context = _text(record, "input", may_be_empty=True) if record.fields.get("input") is not None else ""
    if context.strip():
        prompt = f"{prompt}\n\n### Input:\n{context}"
    return _pair(prompt, _text(record, "output"), record)


def _own(record: Record) -> Example:
    if "messages" in record.fields:
        return _conversation(record)
    if "prompt" in record.fields or "response" in record.fields:
        return _pair(_text(record, "prompt"), _text(record, "response"), record)
    there = ", ".join(map(repr, record.fields)) or "none"
    raise UserError(
        f"{record.where}: there is neither 'prompt' and 'response' nor 'messages', only {there}. Rename the fields, or "
        "give the format with --data metamathqa, gsm8k or alpaca and the file with --data-files."
    )


def _conversation(record: Record) -> Example:
    messages = record.fields["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"{record.where}: 'messages' is not a list of messages. Write [{{'role': ..., 'content': ...}}]."
        )
    read: list[Message] = []
    for number, message in enumerate(messages, start=1):
        inner = Record(message if isinstance(message, Mapping) else {}, f"{record.where}, message {number}")
        role = _text(inner, "role")
        _check_role(role, read, inner.where)
        read.append({"role": role, "content": _text(inner, "content")})
    if read[-1]["role"] != "assistant":
        raise UserError(
            f"{record.where}: the last message is of {read[-1]['role']!r}, so there is no answer to learn. End with "
            "'assistant'."
        )
    key = next(message["content"] for message in read if message["role"] == "user")
    return Example(tuple(read), key, record.where)


def _check_role(role: str, before: list[Message], where: str) -> None:
    if role == "system" and not before:
        return
    expected = "assistant" if before and before[-1]["role"] == "user" else "user"
    if role != expected:
        raise UserError(
            f"{where}: the role is {role!r} where {expected!r} must be. The order is 'system' (or none), then "
            "'user' and 'assistant' in turn."
        )


FORMATS: Mapping[str, Format] = {
    one.name: one
    for one in (
        Format("metamathqa", "qa", _metamathqa, "meta-math/MetaMathQA", final=_after("The answer is:")),
        Format("gsm8k", "qa", _gsm8k, "openai/gsm8k", "main", "test", final=_after("####"), answer="answer"),
        Format("alpaca", "alpaca", _alpaca, "tatsu-lab/alpaca", answer="output"),
    )
}
#: Of a JSON lines file that ``--data`` names.
OWN = Format("own", "plain", _own)


def read_examples(records: Iterable[Record], form: Format) -> list[Example]:
    """Every record as an example.

    Raises:
        UserError: one is not as ``form`` has it; the message names its file and line.
    """
    return [form.read(record) for record in records]
