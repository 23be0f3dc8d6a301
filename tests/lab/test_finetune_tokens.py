"""What is learned of an example: token by token, against a reading of the ids themselves."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from _finetune import pairs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lorapre.lab.errors import UserError
from lorapre.lab.finetune.config import FinetuneConfig
from lorapre.lab.finetune.formats import OWN, Example, read_examples
from lorapre.lab.finetune.packing import PackedCollator, pack
from lorapre.lab.finetune.records import Record
from lorapre.lab.finetune.templates import Template, choose_template
from lorapre.lab.finetune.tiny import tiny_config, tiny_tokenizer
from lorapre.lab.finetune.tokens import IGNORED, Encoded, encode, tokenize, truncation_warning

USER, ASSISTANT, SYSTEM, END = "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"


def conversation(*contents: str, system: str | None = None) -> Example:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return read_examples([Record({"messages": messages}, "here")], OWN)[0]


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE without a chat template that has learned to join 'a' and 'b', and puts <s> first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=265,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["ab"] * 50, trainer)
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def encoded(examples: list[Example], tokenizer: Any, *, max_length: int = 1024, **given: Any) -> Encoded:
    config = FinetuneConfig(data="own.jsonl", **given)
    template = choose_template(config, OWN, tokenizer)
    return encode(examples, template, tokenizer, max_length=max_length, completion_only=not config.learn_prompts)


def expected_by_marks(tokenizer: Any, ids: list[int]) -> list[int]:
    """Labels read off the ids alone: after each <|assistant|>, up to and with the next <|end|>."""
    begin, end = tokenizer.convert_tokens_to_ids([ASSISTANT, END])
    labels, learning = [], False
    for token in ids:
        labels.append(token if learning else IGNORED)
        learning = (learning or token == begin) and token != end
    return labels


@pytest.mark.parametrize("seed", range(5))
def test_exactly_the_tokens_of_the_answers_and_their_ends_are_learned(seed: int) -> None:
    draw = random.Random(seed)
    words = [" ".join(draw.choices(["one", "två", "3+4=7", "\n", "“quoted”"], k=draw.randint(1, 6))) for _ in range(6)]
    contents = [word if word.strip() else "filled" for word in words[: draw.choice([2, 4, 6])]]
    example = conversation(*contents, system="Be brief." if seed % 2 else None)
    tokenizer = tiny_tokenizer()
    (row,) = encoded([example], tokenizer).rows
    assert row.labels == expected_by_marks(tokenizer, row.ids)
    learned = tokenizer.decode([label for label in row.labels if label != IGNORED])
    assert learned == "".join(content + END for content in contents[1::2])


def test_the_prompt_has_the_ids_that_it_has_alone_also_where_a_tokenizer_would_join_across_the_border() -> None:
    tokenizer = merging_tokenizer()
    joined = tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert len(joined) == 1  # else this tests nothing
    a, b = (tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in "ab")
    row = tokenize([("xa", False), ("b", True)], tokenizer, special=False, completion_only=True)
    x = tokenizer("x", add_special_tokens=False)["input_ids"]
    assert row.ids == [0, *x, *a, *b, 1]
    assert row.labels == [IGNORED, IGNORED, IGNORED, *b, 1]
    assert row.prompt == 3


def test_a_joint_within_the_answer_is_left_to_the_tokenizer() -> None:
    tokenizer = merging_tokenizer()
    row = tokenize([("x", False), ("ab", True)], tokenizer, special=False, completion_only=True)
    assert row.labels == [IGNORED, IGNORED, *tokenizer("ab", add_special_tokens=False)["input_ids"], 1]


def test_prompts_are_learned_too_on_demand() -> None:
    (row,) = encoded([conversation("hi", "there")], tiny_tokenizer(), learn_prompts=True).rows
    assert row.labels == row.ids


@pytest.mark.parametrize(
    ("template", "expected"),
    [("qa", "Q: 2+2?\nA:| 4"), ("alpaca", "### Instruction:\n2+2?\n\n### Response:\n|4"), ("plain", "2+2?\n|4")],
)
def test_a_tokenizer_without_a_chat_template_takes_a_plain_one(template: str, expected: str) -> None:
    tokenizer = merging_tokenizer()
    (row,) = encoded([conversation("2+2?", "4")], tokenizer, template=template).rows
    prompt, answer = expected.split("|")
    assert tokenizer.decode(row.ids[1 : row.prompt]) == prompt
    assert tokenizer.decode([label for label in row.labels if label != IGNORED]) == answer + "</s>"


def test_a_plain_template_refuses_a_conversation_of_two_answers_and_chat_one_without_a_template() -> None:
    with pytest.raises(UserError, match=r"here: has 4 messages, and --template qa"):
        encoded([conversation("a", "b", "c", "d")], merging_tokenizer(), template="qa")
    with pytest.raises(UserError, match=r"--template chat: the tokenizer of --model .* has no chat template"):
        encoded([conversation("a", "b")], merging_tokenizer(), template="chat")


def test_a_chat_template_that_rewrites_earlier_messages_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match=r"here: the chat template changes what came before when message 2"):
        encoded([conversation("a", "b")], tokenizer)


def test_what_max_length_takes_is_counted_and_named() -> None:
    tokenizer = tiny_tokenizer()
    # <|user|>, prompt, <|end|>, <|assistant|>, answer, <|end|>: four tokens beside the letters.
    lengths = [(3, 3), (3, 4), (3, 20), (6, 1), (7, 1), (30, 2)]
    examples = [
        Example(conversation("p" * p, "a" * a).messages, str(i), f"line {i}") for i, (p, a) in enumerate(lengths)
    ]
    side = encoded(examples, tokenizer, max_length=10)
    assert side.cut == ["line 1", "line 2", "line 3"]
    assert side.dropped == ["line 4", "line 5"]
    assert [example.where for example in side.kept] == ["line 0", "line 1", "line 2", "line 3"]
    for row, (p, a) in zip(side.rows, lengths, strict=False):
        assert len(row.ids) == min(10, p + a + 4)
        assert sum(label != IGNORED for label in row.labels) == min(10, p + a + 4) - (p + 3)
    warning = truncation_warning(side, 10)
    assert "3 answers are cut short (line 1, line 2, line 3)" in warning
    assert "2 examples are left out" in warning
    assert "line 4, line 5" in warning
    assert truncation_warning(encoded(examples[:1], tokenizer, max_length=10), 10) == ""


def packed_batch(side: Encoded, max_length: int) -> dict[str, torch.Tensor]:
    rows = list(pack(side.dataset(), max_length))
    assert 1 < len(rows) < len(side.rows)
    return PackedCollator(0)(rows)


@pytest.mark.parametrize("learn_prompts", [False, True])
def test_a_packed_batch_has_the_loss_of_its_examples_one_by_one(learn_prompts: bool) -> None:
    tokenizer = tiny_tokenizer()
    examples = read_examples([Record(pair, "here") for pair in pairs(12)], OWN)
    side = encoded(examples, tokenizer, learn_prompts=learn_prompts)
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config()).double().eval()
    batch = packed_batch(side, 64)

    def summed(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
        loss = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORED, reduction="sum")
        return loss, int((labels[1:] != IGNORED).sum())

    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        together = [summed(one, labels) for one, labels in zip(logits, batch["labels"], strict=True)]
        alone = [
            summed(model(input_ids=torch.tensor([row.ids])).logits[0], torch.tensor(row.labels)) for row in side.rows
        ]
    assert sum(count for _, count in together) == sum(count for _, count in alone)
    torch.testing.assert_close(sum(loss for loss, _ in together), sum(loss for loss, _ in alone), rtol=1e-12, atol=0)


def test_packing_cuts_no_example_and_loses_no_token() -> None:
    tokenizer = tiny_tokenizer()
    side = encoded(read_examples([Record(pair, "here") for pair in pairs(30)], OWN), tokenizer)
    found = []
    for row in pack(side.dataset(), 50):
        assert len(row["input_ids"]) <= 50
        start = 0
        for length in row["seq_lengths"]:
            found.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            start += length
        assert start == len(row["input_ids"])
    assert sorted(found) == sorted((row.ids, row.labels) for row in side.rows)


def test_the_chat_template_may_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(
        "{% for m in messages %}[{{ m['role'][0] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[a] {% endif %}"
    )
    tokenizer = merging_tokenizer()
    (row,) = encoded([conversation("hi", "yo")], tokenizer, chat_template=str(path)).rows
    assert tokenizer.decode(row.ids) == "[u] hi\n[a] yo\n"
    assert tokenizer.decode([label for label in row.labels if label != IGNORED]) == "yo\n"


def test_template_names_are_kept_for_the_record() -> None:
    chosen: Template = choose_template(FinetuneConfig(data="own.jsonl"), OWN, tiny_tokenizer())
    assert (chosen.name, chosen.special) == ("chat", True)
    assert choose_template(FinetuneConfig(data="own.jsonl"), OWN, merging_tokenizer()).name == "plain"
