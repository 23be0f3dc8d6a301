"""Generation: a batch against one prompt at a time, and against a plain loop without padding or cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from _evaluate import byte_tokenizer, random_llama
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lorapre.lab.evaluate.generation import Completion, Decoding, _Noise, complete
from lorapre.lab.finetune.evaluation import Question, exact_match

PROMPTS = [
    "A question?",
    "Q",
    "Another question that is quite a bit longer than the others, so all are padded: é?",
    "7",
]
SEEDS = [11, 12, 13, 14]
GREEDY = Decoding(max_new_tokens=24, temperature=0.0, top_p=1.0, stop=(), special_tokens=True)
SAMPLED = replace(GREEDY, temperature=0.9, top_p=0.95)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded = byte_tokenizer()
    loaded.pad_token = loaded.eos_token
    return loaded


@pytest.fixture
def model() -> LlamaForCausalLM:
    return random_llama().double()  # so that no tie is decided by rounding


def tokens_of(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, count: int, ends: set[int]
) -> list[int]:
    """The likeliest token each time, the whole text being read again for each."""
    ids = tokenizer(prompt)["input_ids"]
    found: list[int] = []
    with torch.no_grad():
        while len(found) < count:
            token = int(model(torch.tensor([ids + found])).logits[0, -1].argmax())
            if token in ends:
                break
            found.append(token)
    return found


def test_a_greedy_batch_is_what_a_plain_loop_gives_for_each_prompt_alone(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = [tokens_of(model, tokenizer, prompt, 24, {0}) for prompt in PROMPTS]
    found = complete(model, tokenizer, PROMPTS, SEEDS, GREEDY)
    assert found == [
        Completion(tokenizer.decode(tokens), len(tokens), "length" if len(tokens) == 24 else "eos")
        for tokens in expected
    ]
    assert len({completion.text for completion in found}) == len(PROMPTS)


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_is_the_same_as_one_prompt_at_a_time(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, decoding: Decoding
) -> None:
    batch = complete(model, tokenizer, PROMPTS, SEEDS, decoding)
    alone = [complete(model, tokenizer, [p], [s], decoding)[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    assert batch == alone


def test_a_sample_depends_on_its_seed(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    first, again, other = (complete(model, tokenizer, PROMPTS[:1], [seed], SAMPLED)[0].text for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_noise_samples_the_softmax() -> None:
    rows = 20_000
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, float("-inf")])
    chosen = _Noise(range(rows), torch.device("cpu"))(torch.empty(0), logits.repeat(rows, 1)).argmax(-1)
    share = torch.bincount(chosen, minlength=5) / rows
    p = logits.softmax(0)
    assert ((share - p).abs() <= 4 * (p * (1 - p) / rows).sqrt()).all()


def test_the_nucleus_keeps_unlikely_tokens_out(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """With hardly any probability in it, the nucleus is the likeliest token alone."""
    narrow = replace(SAMPLED, top_p=1e-6)
    texts = [c.text for c in complete(model, tokenizer, PROMPTS, SEEDS, narrow)]
    assert texts == [c.text for c in complete(model, tokenizer, PROMPTS, SEEDS, GREEDY)]


def test_an_answer_ends_where_a_stop_string_begins_and_the_others_go_on(model: LlamaForCausalLM) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "~"  # which is no end token
    whole = complete(model, tokenizer, PROMPTS, SEEDS, GREEDY)
    text = next(c.text for c in whole if c.finish == "length")
    stop = (text[9:12], "never said")
    found = complete(model, tokenizer, PROMPTS, SEEDS, replace(GREEDY, stop=stop))
    for before, after in zip(whole, found, strict=True):
        place = before.text.find(stop[0])
        if place < 0:
            assert after == before
        else:
            assert after == Completion(before.text[:place], place + 3, "stop")
    assert {c.finish for c in found} >= {"stop", "length"}


def test_an_end_token_ends_one_row_and_is_not_counted(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    end = tokens_of(model, tokenizer, PROMPTS[0], 8, {0})[5]
    model.generation_config.eos_token_id = [0, end]
    found = complete(model, tokenizer, PROMPTS, SEEDS, GREEDY)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        tokens = tokens_of(model, tokenizer, prompt, 24, {0, end})
        assert completion == Completion(tokenizer.decode(tokens), len(tokens), "length" if len(tokens) == 24 else "eos")
    assert found[0].finish == "eos"


@pytest.mark.parametrize("piece", [1, 5, 24])
def test_rows_that_have_ended_leave_the_batch_and_the_others_go_on_as_if_they_had_not(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    longest = max(range(len(PROMPTS)), key=lambda place: len(PROMPTS[place]))
    model.generation_config.eos_token_id = [0, tokens_of(model, tokenizer, PROMPTS[longest], 8, {0})[5]]
    whole = complete(model, tokenizer, PROMPTS, SEEDS, GREEDY)
    assert {completion.finish for completion in whole} == {"eos", "length"}
    shapes: list[tuple[int, ...]] = []
    forward = model.forward

    def noted(*given: Any, **named: Any) -> Any:
        shapes.append(tuple(named["input_ids"].shape))
        return forward(*given, **named)

    monkeypatch.setattr(model, "forward", noted)
    monkeypatch.setattr("lorapre.lab.evaluate.generation.PIECE", piece)
    assert complete(model, tokenizer, PROMPTS, SEEDS, GREEDY) == whole
    assert len(shapes) == 24
    going = sum(completion.finish == "length" for completion in whole)
    assert shapes[-1][0] == (4 if piece == 24 else going)
    if piece == 5:  # 20 tokens more, and no padding of a longer prompt that is not there any more
        kept = (prompt for prompt, end in zip(PROMPTS, whole, strict=True) if end.finish == "length")
        assert shapes[20][1] == 20 + max(len(tokenizer(prompt)["input_ids"]) for prompt in kept)


def test_the_models_own_generation_settings_do_not_apply(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = complete(model, tokenizer, PROMPTS, SEEDS, GREEDY)
    model.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=3.0, max_length=40)
    assert complete(model, tokenizer, PROMPTS, SEEDS, GREEDY) == expected
    assert model.generation_config.repetition_penalty == 5.0


@pytest.mark.parametrize("kind", ["model", "adapter", "adapter of no task"])
def test_they_do_not_apply_to_the_answers_that_finetune_counts_either(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, kind: str
) -> None:
    answers = [tokenizer.decode(tokens_of(model, tokenizer, prompt, 24, {0})) for prompt in PROMPTS]
    asked = [Question(tokenizer(p)["input_ids"], answer) for p, answer in zip(PROMPTS, answers, strict=True)]
    model.generation_config.update(repetition_penalty=5.0, num_beams=3, min_new_tokens=24)
    settings = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM" if kind == "adapter" else None)
    asking: Any = model if kind == "model" else peft.get_peft_model(model, settings)
    assert exact_match(asking, tokenizer, asked, str, 24) == 1
    for one in (asking, model):
        assert one.generation_config.repetition_penalty == 5.0


def test_a_stop_string_that_is_a_special_token_ends_an_answer(model: LlamaForCausalLM) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    whole = complete(model, tokenizer, PROMPTS[:1], SEEDS[:1], GREEDY)[0]
    end = whole.text[4]
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    (found,) = complete(model, tokenizer, PROMPTS[:1], SEEDS[:1], replace(GREEDY, stop=(end,)))
    place = whole.text.index(end)
    assert found == Completion(whole.text[:place], place, "eos")
