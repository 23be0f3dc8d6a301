"""Data as people have it: every format is read, and what is wrong is refused by file and line before anything runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from _finetune import finetune, pairs, write_lines
from _lab import summary, tree

from lorapre.lab.errors import UserError
from lorapre.lab.finetune import data as data_module
from lorapre.lab.finetune import formats
from lorapre.lab.finetune.config import FinetuneConfig
from lorapre.lab.finetune.data import Examples, load_examples

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def broken(path: Path, line: int, text: str) -> Path:
    """Twenty good lines, ``text`` in place of one of them."""
    lines = [json.dumps(pair) for pair in pairs(20)]
    lines[line - 1] = text
    path.write_text("\n".join(lines) + "\n")
    return path


def said(*messages: Any) -> str:
    return json.dumps({"messages": list(messages)})


BAD = {
    "truncated JSON": ('{"prompt": "what is it", "resp', "is not valid JSON"),
    "a missing field": ('{"prompt": "what"}', "there is no field 'response', only 'prompt'"),
    "neither kind of fields": (
        '{"text": "what"}',
        "there is neither 'prompt' and 'response' nor 'messages', only 'text'",
    ),
    "an empty answer": ('{"prompt": "what", "response": " \\n"}', "'response' is empty"),
    "an empty prompt": ('{"prompt": "", "response": "that"}', "'prompt' is empty"),
    "a number for a text": ('{"prompt": "what", "response": 7}', "'response' is a int, not a text"),
    "a list for an object": ('["what", "that"]', "holds a list, not an object"),
    "no messages": ('{"messages": []}', "'messages' is not a list of messages"),
    "an answer first": (said(ANSWER, USER), "message 1: the role is 'assistant' where 'user' must be"),
    "two questions": (said(USER, USER, ANSWER), "message 2: the role is 'user' where 'assistant' must be"),
    "a late system message": (
        said(USER, {"role": "system", "content": "s"}, ANSWER),
        "message 2: the role is 'system'",
    ),
    "a tool": (said(USER, {"role": "tool", "content": "s"}), "message 2: the role is 'tool'"),
    "no last answer": (said(USER, ANSWER, USER), "the last message is of 'user', so there is no answer to learn"),
    "an empty message": (said(USER, {"role": "assistant", "content": ""}), "message 2: 'content' is empty"),
    "no role": (said({"content": "s"}), "message 1: there is no field 'role'"),
    "a text for a message": (said("hello"), "message 1: there is no field 'role'"),
    "half of a character": (
        '{"prompt": "so \\ud83d", "response": "that"}',
        "'prompt' has half of a character at place 4, '\\ud83d'",
    ),
    "half of a character in a message": (
        said(USER, {"role": "assistant", "content": "\ud83d"}),
        "message 2: 'content' has half",
    ),
    "a nest without end": ('{"prompt": ' + "[" * 100_000, "is nested too deeply to be read"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_data_is_refused_with_file_and_line(tmp_path: Path, kind: str) -> None:
    text, words = BAD[kind]
    path = broken(tmp_path / "own.jsonl", 17, text)
    with pytest.raises(UserError) as refused:
        load_examples(FinetuneConfig(data=str(path)))
    assert str(refused.value).startswith(f"{path}, line 17")
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "kind", ["truncated JSON", "a missing field", "an empty answer", "two questions", "half of a character"]
)
def test_the_command_refuses_bad_data_before_it_trains_and_leaves_everything_as_it_was(
    here: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = broken(here / "own.jsonl", 17, BAD[kind][0])
    before = tree(here)
    outcome = finetune(capsys, "--data", path.name, "--out", "run")
    assert outcome.code == 2
    assert f"{path.name}, line 17" in outcome.message
    assert BAD[kind][1] in outcome.message
    assert tree(here) == before


def test_a_run_does_not_overwrite_what_is_there(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(here / "own.jsonl", pairs())
    (here / "run").mkdir()
    (here / "run" / "thesis.txt").write_text("years of work")
    before = tree(here)
    outcome = finetune(capsys, "--data", "own.jsonl", "--out", "run")
    assert outcome.code == 2
    assert "--out run: exists and is not empty" in outcome.message
    assert "lorapre finetune --resume" in outcome.message
    assert tree(here) == before


def test_a_bad_element_of_a_json_array_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "MetaMathQA-395K.json"
    good = {"query": "q [1, {", "response": "a ]\n"}
    path.write_text(json.dumps([good, {**good, "query": "2"}, {"query": "3"}], indent=1))
    line = 1 + path.read_text()[: path.read_text().rindex("{")].count("\n")
    with pytest.raises(UserError, match=f"line {line}: there is no field 'response'"):
        load_examples(FinetuneConfig(data="metamathqa", data_files=[str(path)]))
    path.write_text(path.read_text()[: path.read_text().rindex('"3"')])
    with pytest.raises(UserError, match=f"line {line}: an object of the array begins here, and is not valid JSON"):
        load_examples(FinetuneConfig(data="metamathqa", data_files=[str(path)]))
    path.write_text(json.dumps([good])[:-1])
    with pytest.raises(UserError, match=r"line 1: no comma or \] follows"):
        load_examples(FinetuneConfig(data="metamathqa", data_files=[str(path)]))


@pytest.mark.parametrize(
    ("more", "line", "shown"),
    [('[{"query": "q"}]', 4, '\'[{"query": "q"}]\''), ("the end\nof it", 4, "'the end'"), ("]", 4, "']'")],
    ids=["another array", "text", "a bracket"],
)
def test_what_follows_a_json_array_is_refused(tmp_path: Path, more: str, line: int, shown: str) -> None:
    path = tmp_path / "two.json"
    path.write_text('[\n{"query": "q", "response": "a"}]\n\n' + more)
    with pytest.raises(UserError) as refused:
        load_examples(FinetuneConfig(data="metamathqa", data_files=[str(path)]))
    assert str(refused.value).startswith(f"{path}, line {line}: the array has ended, and something follows: {shown}.")


def test_an_element_of_a_json_array_that_is_nested_too_deeply_is_named(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text('[\n{"query": ' + "[" * 100_000)
    with pytest.raises(UserError, match="line 2: an object of the array begins here, and is nested too deeply"):
        load_examples(FinetuneConfig(data="metamathqa", data_files=[str(path)]))


def test_a_parquet_row_and_a_file_that_is_none_are_named(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"question": ["a", "b", "c"], "answer": ["1", "", "3"]}), path)
    with pytest.raises(UserError, match=r"train\.parquet, row 2: 'answer' is empty"):
        load_examples(FinetuneConfig(data="gsm8k", data_files=[str(path)]))
    path.write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"train\.parquet: is no valid Parquet file"):
        load_examples(FinetuneConfig(data="gsm8k", data_files=[str(path)]))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"data": "metamath"}, "--data metamath: is neither a format"),
        ({"data": "gone.jsonl"}, "--data gone.jsonl: there is no such file"),
        ({"data": "own.jsonl", "data_files": ["x.json"]}, "--data-files needs the name of a format"),
        ({"data": "alpaca", "data_files": ["gone.json"]}, "--data-files gone.json: there is no such file"),
        ({"data": "latin.jsonl"}, "latin.jsonl: is not UTF-8 at byte 12"),
        ({"data": "empty.jsonl"}, "empty.jsonl: holds no example"),
        ({"data": "one.jsonl"}, "of 1 examples none is left for training"),
    ],
)
def test_data_that_is_not_there_or_not_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é", "response": "b"}'.encode("latin-1"))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    write_lines(tmp_path / "one.jsonl", pairs(1))
    with pytest.raises(UserError) as refused:
        load_examples(FinetuneConfig(**given))
    assert words in str(refused.value)


RECORDS: dict[str, tuple[dict[str, str], str, str, str]] = {
    "metamathqa": (
        {"query": "{i}+1?", "response": "Hm. The answer is: {i}"},
        "{i}+1?",
        "Hm. The answer is: {i}",
        "{i}",
    ),
    "gsm8k": ({"question": "{i}+1?", "answer": "Hm.\n#### 1,00{i}"}, "{i}+1?", "Hm.\n#### 1,00{i}", "100{i}"),
    "alpaca": (
        {"instruction": "Add", "input": "1 {i}", "output": " {i}"},
        "Add\n\n### Input:\n1 {i}",
        " {i}",
        "{i}",
    ),
}


def made(name: str, count: int = 9) -> list[dict[str, str]]:
    return [{key: value.format(i=i) for key, value in RECORDS[name][0].items()} for i in range(count)]


def check_read(loaded: Examples, name: str, count: int = 9) -> None:
    _, prompt, answer, final = RECORDS[name]
    found = {example.messages[0]["content"]: example.answer for example in (*loaded.train, *loaded.valid)}
    assert found == {prompt.format(i=i): answer.format(i=i) for i in range(count)}
    finals = sorted(loaded.form.final(example.answer) for example in (*loaded.train, *loaded.valid))
    assert finals == [final.format(i=i) for i in range(count)]


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("name", RECORDS)
def test_each_format_is_read_from_local_files(tmp_path: Path, name: str, kind: str) -> None:
    path, records = tmp_path / f"data.{kind}", made(name)
    if kind == "json":
        path.write_text(json.dumps(records))
    elif kind == "jsonl":
        write_lines(path, records)
    else:
        pq.write_table(pa.Table.from_pylist(records), path)
    check_read(load_examples(FinetuneConfig(data=name, data_files=[str(tmp_path / "data.*")])), name)


@pytest.mark.parametrize("name", RECORDS)
def test_each_format_is_read_as_the_hub_gives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    form = formats.FORMATS[name]
    repository = tmp_path / "repository"
    repository.mkdir()
    records = made(name)
    held = 3 if form.valid_split else 0
    pq.write_table(pa.Table.from_pylist(records[held:]), repository / "train-00000-of-00001.parquet")
    if form.valid_split:
        pq.write_table(pa.Table.from_pylist(records[:held]), repository / f"{form.valid_split}-00000-of-00001.parquet")
    local = replace(form, repository=str(repository), configuration=None)
    monkeypatch.setattr(data_module, "FORMATS", {name: local})
    loaded = load_examples(FinetuneConfig(data=name))
    check_read(loaded, name)
    if form.valid_split:
        assert len(loaded.valid) == held
        assert {example.answer for example in loaded.valid} == {record["answer"] for record in records[:held]}


@pytest.mark.parametrize("name", RECORDS)
def test_records_of_the_hub_without_an_answer_are_left_out_and_counted_and_those_of_a_file_are_refused(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    field, valid_split = formats.FORMATS[name].answer, formats.FORMATS[name].valid_split
    records = [{**record, field: {3: "", 7: " \n"}.get(i, record[field])} for i, record in enumerate(made(name, 30))]
    monkeypatch.setattr(data_module.datasets, "load_dataset", lambda *_, **__: records)
    given = ["--data", name, "--steps", "1", "--max-length", "64"]
    outcome = finetune(capsys, *given, "--out", "run")
    assert outcome.code == 0
    missing = 2 if valid_split is None else 4
    assert f"Warning: --data {name}: the hub has {missing} records without an answer there" in outcome.out
    facts = summary(here / "run")
    assert facts["data"].endswith(f" held out, {missing} without an answer left out)")
    assert facts["examples"]["train"] + facts["examples"]["valid"] == (28 if valid_split is None else 56)
    provenance = json.loads((here / "run" / "provenance.json").read_text())
    assert facts["data"] in json.dumps(provenance)
    write_lines(here / "local.jsonl", records)
    refused = finetune(capsys, *given, "--data-files", "local.jsonl", "--out", "other")
    assert refused.code == 2
    assert f"local.jsonl, line 4: '{field}' is empty" in refused.message


def test_a_hub_that_cannot_be_reached_is_a_paragraph_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub\nmore")

    monkeypatch.setattr(data_module.datasets, "load_dataset", refuse)
    with pytest.raises(
        UserError, match=r"--data gsm8k: openai/gsm8k, split train cannot be loaded \(ConnectionError: no"
    ):
        load_examples(FinetuneConfig(data="gsm8k"))


def test_the_names_on_the_hub_are_those_of_the_data() -> None:
    assert {name: (form.repository, form.configuration) for name, form in formats.FORMATS.items()} == {
        "metamathqa": ("meta-math/MetaMathQA", None),
        "gsm8k": ("openai/gsm8k", "main"),
        "alpaca": ("tatsu-lab/alpaca", None),
    }


def test_held_out_examples_share_no_original_question_and_do_not_depend_on_the_order(tmp_path: Path) -> None:
    records = [
        {"query": f"rewriting {i}", "response": "r", "original_question": f"original {i % 10}"} for i in range(60)
    ]
    sides = []
    for name, rows in (("a", records), ("b", records[::-1])):
        path = write_lines(tmp_path / f"{name}.jsonl", rows)
        loaded = load_examples(FinetuneConfig(data="metamathqa", data_files=[str(path)], valid_examples=7))
        assert not {example.key for example in loaded.train} & {example.key for example in loaded.valid}
        # A tenth is 6: one original question with all its rewritings.
        assert (len(loaded.train), len(loaded.valid)) == (54, 6)
        sides.append([[example.messages for example in side] for side in (loaded.train, loaded.valid)])
    assert sides[0] == sides[1]


@pytest.mark.parametrize("valid_examples", [200, 20])
def test_a_prompt_that_occurs_too_often_to_be_held_out_is_trained_on_and_nothing_is_lost(
    tmp_path: Path, valid_examples: int
) -> None:
    same = "the same 3711"  # whose hash is smaller than those of the others: it would be held out first
    often = [{"prompt": same, "response": str(i)} for i in range(500)]
    path = write_lines(tmp_path / "own.jsonl", [*often, *pairs(500)])
    loaded = load_examples(FinetuneConfig(data=str(path), valid_examples=valid_examples))
    held = min(valid_examples, 100)  # a tenth
    assert (len(loaded.train), len(loaded.valid)) == (1000 - held, held)
    assert same not in {example.key for example in loaded.valid}


def test_where_every_prompt_occurs_too_often_the_remedy_is_named(tmp_path: Path) -> None:
    records = [{"prompt": f"prompt {i % 5}", "response": str(i)} for i in range(40)]
    path = write_lines(tmp_path / "own.jsonl", records)
    with pytest.raises(UserError) as refused:
        load_examples(FinetuneConfig(data=str(path)))
    assert f"--data {path}: prompts repeat, each at least 8 times" in str(refused.value)
    assert "4 of 40 examples may be. Give examples to validate on with --valid-data" in str(refused.value)
    valid = write_lines(tmp_path / "valid.jsonl", pairs(3))
    loaded = load_examples(FinetuneConfig(data=str(path), valid_data=[str(valid)]))
    assert (len(loaded.train), len(loaded.valid)) == (40, 3)


def test_max_examples_takes_a_part_that_the_seed_decides(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "own.jsonl", pairs(100))
    taken = [
        {e.key for e in load_examples(FinetuneConfig(data=str(path), max_examples=20, seed=seed)).train}
        for seed in (0, 0, 1)
    ]
    assert [len(keys) for keys in taken] == [20, 20, 20]
    assert taken[0] == taken[1] != taken[2]


def test_own_validation_data_is_all_that_is_validated_on(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", pairs(30))
    valid = write_lines(tmp_path / "valid.jsonl", [{"prompt": "other", "response": "x"}])
    loaded = load_examples(FinetuneConfig(data=str(train), valid_data=[str(valid)]))
    assert (len(loaded.train), [example.answer for example in loaded.valid]) == (30, ["x"])
