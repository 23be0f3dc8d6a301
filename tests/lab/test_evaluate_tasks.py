"""Questions: the originals' formats from files and from the hub's library, and what is wrong with a file, by line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from _evaluate import byte_tokenizer, evaluate, gsm8k_records, math_record, random_llama, write_jsonl

from lorapre.lab.errors import UserError
from lorapre.lab.evaluate import loading, run
from lorapre.lab.evaluate.config import EvaluateConfig
from lorapre.lab.evaluate.prompts import PROMPTS, choose_prompt, make_prompts
from lorapre.lab.evaluate.tasks import TASKS, read_items

GSM8K, MATH = TASKS["gsm8k"], TASKS["math500"]


def test_gsm8k_has_its_answer_after_the_hashes_without_commas(tmp_path: Path) -> None:
    items = read_items(GSM8K, str(write_jsonl(tmp_path / "d.jsonl", gsm8k_records())), None)
    assert [item.gold for item in items] == ["5", "14", "3", "2000", "7"]
    assert [item.id for item in items] == ["0", "1", "2", "3", "4"]
    assert items[3].question == "And 1,000 twice?"


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", gsm8k_records())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [item.gold for item in read_items(GSM8K, str(path), None)] == ["5", "14", "3", "2000", "7"]


def test_math500_has_its_answer_as_latex_and_labels(tmp_path: Path) -> None:
    (item,) = read_items(MATH, str(write_jsonl(tmp_path / "d.jsonl", [math_record()])), None)
    assert (item.id, item.question, item.gold) == ("test/algebra/1.json", "What is $1/2$?", "\\frac{1}{2}")
    assert item.labels == {"subject": "Algebra", "level": "2"}


def test_the_limit_takes_the_first_and_checks_all(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", gsm8k_records())
    assert [item.gold for item in read_items(GSM8K, str(path), 2)] == ["5", "14"]
    write_jsonl(path, [*gsm8k_records(), {"question": "?"}])
    with pytest.raises(UserError, match="line 6"):
        read_items(GSM8K, str(path), 2)


def hub_layout(folder: Path, records: list[Any]) -> Any:
    """The task whose repository on the hub, which tests cannot reach, is laid out in ``folder``."""
    folder.mkdir()
    write_jsonl(folder / "test.jsonl", records)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: test.jsonl\n---\n"
    )
    return replace(GSM8K, hub=(str(folder), "main", "test"))


def test_the_hubs_records_are_read_by_its_own_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    task = hub_layout(tmp_path / "good", gsm8k_records())
    assert [item.gold for item in read_items(task, None, None)] == ["5", "14", "3", "2000", "7"]
    with pytest.raises(UserError, match="--data gsm8k=FILE"):
        read_items(replace(task, hub=(task.hub[0], "main", "train")), None, None)
    task = hub_layout(tmp_path / "bad", [*gsm8k_records(), {"question": "?", "answer": "none"}])
    with pytest.raises(UserError, match="split 'test', record 6: its 'answer' does not end"):
        read_items(task, None, None)


def cut_short(path: Path) -> None:
    lines = [json.dumps(record) for record in gsm8k_records() * 5]
    lines[16] = lines[16][:40]
    path.write_text("\n".join(lines))


def gsm8k_with(*records: Any) -> Callable[[Path], object]:
    return lambda path: write_jsonl(path, [*gsm8k_records(), *records])


def math_with(*records: Any) -> Callable[[Path], object]:
    return lambda path: write_jsonl(path, [math_record(), *records])


BAD: dict[str, tuple[str, Callable[[Path], object], list[str]]] = {
    "a line that was cut short": ("gsm8k", cut_short, ["line 17", "not valid JSON", "column", "copy the file again"]),
    "a missing field": ("gsm8k", gsm8k_with({"question": "?"}), ["line 6", "no field 'answer'", "question, answer"]),
    "an empty answer": ("gsm8k", gsm8k_with({"question": "?", "answer": " "}), ["line 6", "'answer' is empty"]),
    "an answer without hashes": ("gsm8k", gsm8k_with({"question": "?", "answer": "5"}), ["line 6", "####"]),
    "hashes without a number": ("gsm8k", gsm8k_with({"question": "?", "answer": "#### x"}), ["line 6", "number"]),
    "a number for text": ("gsm8k", gsm8k_with({"question": 5, "answer": "#### 5"}), ["line 6", "'question' is 5"]),
    "a list": ("gsm8k", gsm8k_with([1]), ["line 6", "list", "object"]),
    "records of the other task": ("math500", gsm8k_with(), ["line 1", "no field 'problem'", "unique_id"]),
    "an empty LaTeX answer": ("math500", math_with(math_record(answer="", unique_id="2")), ["line 2", "'answer'"]),
    "one question twice": ("math500", math_with(math_record()), ["line 2", "unique_id", "line 1"]),
    "a level that is no number": ("math500", math_with(math_record(level=None)), ["line 2", "'level' is None"]),
    "half of a character": (
        "gsm8k",
        gsm8k_with({"question": "\ud83d?", "answer": "#### 5"}),
        ["line 6", "'question' has half of a character at place 1", "\\ud83d"],
    ),
    "a nest without end": (
        "gsm8k",
        lambda path: path.write_text('{"question": ' + "[" * 100_000),
        ["line 1", "nested too deeply"],
    ),
    "no record": ("gsm8k", lambda path: path.write_text("\n\n"), ["no record"]),
    "bytes that are no text": ("gsm8k", lambda path: path.write_bytes(b"{\xff}"), ["UTF-8", "byte 1"]),
    "no file": ("gsm8k", lambda path: None, ["cannot be read", "No such file"]),
    "a folder": ("gsm8k", lambda path: path.mkdir(), ["is a folder"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_refused_by_file_and_line_before_the_model_is_loaded(
    name: str, here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, prepare, words = BAD[name]
    prepare(here / "bad.jsonl")
    random_llama(16).save_pretrained(here / "model")

    def never(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    for loader in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(run, loader, never)
    outcome = evaluate(capsys, "model", "--tasks", task, "--data", "bad.jsonl", "--out", "out")
    assert outcome.code == 2
    for word in ["--data bad.jsonl", *words]:
        assert word in outcome.message
    assert not (here / "out").exists()


def config(**given: Any) -> EvaluateConfig:
    return EvaluateConfig(model="m", tasks=["gsm8k"], **given)


def test_prompts_are_the_tasks_own_a_named_one_or_a_text(tmp_path: Path) -> None:
    items = read_items(GSM8K, str(write_jsonl(tmp_path / "d.jsonl", gsm8k_records())), 1)
    question = "What is 2+3?"
    assert make_prompts(config(), GSM8K, items, None) == [f"Question: {question}\nAnswer:"]
    assert make_prompts(config(), MATH, items, None) == [f"Problem:\n{question}\n\nSolution:"]
    for name, (text, _) in PROMPTS.items():
        assert make_prompts(config(prompt=name), GSM8K, items, None) == [text.replace("{question}", question)]
    assert make_prompts(config(prompt="Q {question} {x}"), GSM8K, items, None) == [f"Q {question} {{x}}"]
    with pytest.raises(UserError, match="--prompt other"):
        make_prompts(config(prompt="other"), GSM8K, items, None)


def test_a_chat_has_the_templates_frame_around_the_boxed_prompt(tmp_path: Path) -> None:
    items = read_items(GSM8K, str(write_jsonl(tmp_path / "d.jsonl", gsm8k_records())), 1)
    tokenizer = byte_tokenizer()
    with pytest.raises(UserError, match="no chat template"):
        make_prompts(config(chat=True), GSM8K, items, tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    inner = PROMPTS["boxed"][0].replace("{question}", "What is 2+3?")
    assert make_prompts(config(chat=True), GSM8K, items, tokenizer) == [f"<user>{inner}<assistant>"]


def test_stop_strings_belong_to_the_prompt_unless_given() -> None:
    assert choose_prompt(config(), GSM8K)[1] == ("Question:",)
    assert choose_prompt(config(), MATH)[1] == ("Problem:",)
    assert choose_prompt(config(prompt="alpaca"), GSM8K)[1] == ("### Instruction:",)
    assert choose_prompt(config(prompt="My {question}"), GSM8K)[1] == ()
    assert choose_prompt(config(chat=True), GSM8K)[1] == ()
    assert choose_prompt(config(prompt="qa", stop=["\n\n"]), GSM8K)[1] == ("\n\n",)


def test_a_source_is_a_model_an_adapter_or_a_hub_name(tmp_path: Path) -> None:
    model, adapter = tmp_path / "m", tmp_path / "a"
    random_llama(16).save_pretrained(model)
    adapter.mkdir()
    for base in (str(model), "some/model"):
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        assert loading.find_source(str(adapter)) == loading.Source(str(adapter), base, adapter)
    assert loading.find_source(str(model)) == loading.Source(str(model), str(model))
    assert loading.find_source("some/model") == loading.Source("some/model", "some/model")
    (adapter / "adapter_config.json").write_text("{}")
    for name, words in ((str(adapter), "base_model_name_or_path"), ("nowhere", "neither"), ("./no/thing", "neither")):
        with pytest.raises(UserError, match=words):
            loading.find_source(name)
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="Did you mean"):
        loading.find_source(str(tmp_path / "run"))
