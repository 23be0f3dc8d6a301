"""``lorapre evaluate`` from end to end, on a model that was taught its answers; and what interrupts it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from _evaluate import SAYS, byte_tokenizer, evaluate, gsm8k_records, math_record, random_llama, teach, write_jsonl
from _lab import tree
from transformers import AutoModelForCausalLM

from lorapre.lab.evaluate import run
from lorapre.lab.evaluate.intervals import wilson_interval


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers every question of `SAYS` as it was taught, with its tokenizer."""
    folder = tmp_path_factory.mktemp("taught") / "model"
    model, tokenizer = random_llama(initializer_range=0.02), byte_tokenizer()
    teach(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def place(here: Path, taught: Path) -> Path:
    """The current folder, with ``model`` and ``gsm8k.jsonl``."""
    shutil.copytree(taught, here / "model")
    write_jsonl(here / "gsm8k.jsonl", gsm8k_records())
    return here


def arguments(out: str, *more: Any, model: str = "model") -> list[Any]:
    given = [model, "--tasks", "gsm8k", "--data", "gsm8k.jsonl", "--batch-size", 2, "--max-new-tokens", 40]
    return [*given, "--out", out, *more]


def rows(folder: Path, task: str = "gsm8k") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]


def summary(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return content


def test_every_answer_is_kept_with_its_verdict_and_counted(place: Path, capsys: Any) -> None:
    outcome = evaluate(capsys, *arguments("out"))
    assert outcome.code == 0
    found = rows(place / "out")
    assert [row["completion"] for row in found] == list(SAYS.values())
    assert [row["correct"] for row in found] == [True, False, True, True, False]
    assert [row["answer"] for row in found] == ["5", "13", "3", "2,000", None]
    assert [row["gold"] for row in found] == ["5", "14", "3", "2000", "7"]
    assert {row["finish"] for row in found} == {"eos"}
    assert [row["tokens"] for row in found] == [len(answer) for answer in SAYS.values()]
    low, high = wilson_interval(3, 5)
    result = summary(place / "out")["tasks"]["gsm8k"]
    assert (result["items"], result["right"], result["accuracy"]) == (5, 3, 0.6)
    assert (result["low"], result["high"]) == (low, high)
    assert (result["unanswered"], result["found_by"]) == (1, {"hashes": 4, "nothing": 1})
    assert f"{low:.1%} to {high:.1%}" in outcome.out
    assert "3/5" in outcome.out


class Interrupted(KeyboardInterrupt):
    pass


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Call with a number of batches, after which generation is interrupted; with None it is not any more.

    It returns the list of batches that are asked from then on, each as its number of prompts.
    """
    original, left = run.complete, [0]
    asked: list[int] = []

    def complete(model: Any, tokenizer: Any, prompts: list[str], *rest: Any) -> Any:
        if left[0] == 0:
            raise Interrupted
        left[0] -= 1
        asked.append(len(prompts))
        return original(model, tokenizer, prompts, *rest)

    def limit(batches: int | None) -> list[int]:
        left[0] = -1 if batches is None else batches
        asked.clear()
        return asked

    monkeypatch.setattr(run, "complete", complete)
    return limit


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_an_interrupted_evaluation_goes_on_and_gives_the_same_files(
    sampled: bool, place: Path, capsys: Any, stop_after: Any
) -> None:
    more = ["--temperature", 1.5, "--seed", 5] if sampled else []
    stop_after(None)
    assert evaluate(capsys, *arguments("whole", *more)).code == 0
    for batches in (1, 1):
        stop_after(batches)
        outcome = evaluate(capsys, *arguments("cut", *more))
        assert outcome.code == 130
        assert "the same command goes on" in outcome.out
    with (place / "cut" / "gsm8k.jsonl").open("a") as file:  # what a batch that was being written may leave
        file.write('{"index": 4, "id": "4", "correct": tr')
    stop_after(1)  # two batches are there, so one is left
    assert evaluate(capsys, *arguments("cut", *more)).code == 0
    for name in ("gsm8k.jsonl", "summary.json", "config.yaml"):
        assert (place / "cut" / name).read_bytes() == (place / "whole" / name).read_bytes()


def test_rows_of_a_batch_that_is_not_whole_are_asked_again(place: Path, capsys: Any, stop_after: Any) -> None:
    stop_after(None)
    assert evaluate(capsys, *arguments("out")).code == 0
    before = tree(place / "out")
    lines = (place / "out" / "gsm8k.jsonl").read_text().splitlines(keepends=True)
    (place / "out" / "gsm8k.jsonl").write_text("".join(lines[:3]))
    asked = stop_after(None)
    assert evaluate(capsys, *arguments("out")).code == 0
    assert asked == [2, 1]  # items 3 and 4 together, as at first, and then the last one
    assert tree(place / "out") == before


def test_a_finished_evaluation_is_shown_again_without_the_model(
    place: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate(capsys, *arguments("out")).code == 0
    before = tree(place / "out")
    monkeypatch.setattr(run, "load_model", None)
    outcome = evaluate(capsys, *arguments("out"))
    assert outcome.code == 0
    assert "3/5" in outcome.out
    assert tree(place / "out") == before


def test_other_options_data_or_weights_are_refused_in_a_folder_that_has_begun(place: Path, capsys: Any) -> None:
    assert evaluate(capsys, *arguments("out")).code == 0
    before = tree(place / "out")
    outcome = evaluate(capsys, *arguments("out", "--seed", 3))
    assert (outcome.code, "--seed 3" in outcome.message) == (2, True)
    shutil.copytree(place / "model", place / "other")
    outcome = evaluate(capsys, *arguments("out", model="other"))
    assert (outcome.code, "MODEL other: the evaluation in out began with model." in outcome.message) == (2, True)
    shutil.copy(place / "gsm8k.jsonl", place / "moved.jsonl")
    outcome = evaluate(capsys, "model", "--tasks", "gsm8k", "--data", "moved.jsonl", *arguments("out")[5:])
    words = "--data gsm8k=moved.jsonl: the evaluation in out began with gsm8k=gsm8k.jsonl."
    assert (outcome.code, words in outcome.message) == (2, True)
    write_jsonl(place / "gsm8k.jsonl", gsm8k_records()[::-1])
    outcome = evaluate(capsys, *arguments("out"))
    assert (outcome.code, "the data of gsm8k" in outcome.message) == (2, True)
    write_jsonl(place / "gsm8k.jsonl", gsm8k_records())
    random_llama(seed=1, initializer_range=0.02).save_pretrained(place / "model")
    outcome = evaluate(capsys, *arguments("out"))
    assert (outcome.code, "model.safetensors" in outcome.message) == (2, True)
    assert tree(place / "out") == before


def test_an_adapter_answers_as_the_model_that_it_is_merged_into(place: Path, capsys: Any) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained("model")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, param in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.3)
    adapted.peft_config["default"].base_model_name_or_path = "model"
    adapted.save_pretrained("adapter")
    adapted.merge_and_unload().save_pretrained("merged")
    byte_tokenizer().save_pretrained("merged")
    for name in ("adapter", "merged", "model"):
        assert evaluate(capsys, *arguments(f"out-{name}", model=name)).code == 0
    texts = {
        name: [row["completion"] for row in rows(place / f"out-{name}")] for name in ("adapter", "merged", "model")
    }
    assert texts["adapter"] == texts["merged"]
    assert texts["adapter"] != texts["model"]


def test_two_tasks_with_a_second_opinion_of_lm_eval(place: Path, capsys: Any) -> None:
    pytest.importorskip("lm_eval")
    write_jsonl(place / "math.jsonl", [math_record(), math_record(unique_id="2", subject="Geometry", level=5)])
    given = ["model", "--data", "gsm8k=gsm8k.jsonl", "--data", "math500=math.jsonl", "--max-new-tokens", 40]
    outcome = evaluate(capsys, *given, "--out", "out", "--second-opinion")
    assert outcome.code == 0
    # The strict match wants hashes, as we do; 2,000 and 2000 are the same to both. The flexible one reads any number.
    assert [row["second_opinion"] for row in rows(place / "out")] == [
        {"strict-match": right, "flexible-extract": right} for right in (True, False, True, True, False)
    ]
    tasks = summary(place / "out")["tasks"]
    strict = tasks["gsm8k"]["second_opinion"]["strict-match"]
    assert (strict["right"], strict["agreement"]) == (3, 1.0)
    assert set(tasks["math500"]["by_subject"]) == {"Algebra", "Geometry"}
    assert set(tasks["math500"]["by_level"]) == {"2", "5"}
    assert set(tasks["math500"]["second_opinion"]) == {"hendrycks_math500", "last-box"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--tasks", "gsm8k,aime"], ["--tasks aime", "gsm8k, math500"]),
        (["--tasks", "gsm8k,gsm8k"], ["twice"]),
        (["--tasks", ""], ["--tasks '': names no task. Choose among gsm8k, math500"]),
        (["--tasks", " ,"], ["--tasks ' ,': names no task"]),
        (["--tasks", "gsm8k,math500"], ["--data gsm8k.jsonl", "TASK=FILE"]),
        (["--data", "math500=x.jsonl"], ["--tasks does not name math500"]),
        (["--batch-size", 0], ["--batch-size 0", "greater than or equal to 1"]),
        (["--temperature", -1], ["--temperature -1"]),
        (["--top-p", 0.9], ["--top-p 0.9", "--temperature"]),
        (["--max-new-tokens", 500], ["--max-new-tokens 500", "512 positions"]),
        (["--dtype", "float16"], ["--dtype float16"]),
        (["--prompt", "what?"], ["--prompt what?", "{question}"]),
        (["--chat"], ["--chat", "no chat template"]),
    ],
)
def test_options_that_do_not_fit_are_refused(change: list[Any], words: list[str], place: Path, capsys: Any) -> None:
    outcome = evaluate(capsys, *arguments("out", *change))
    assert outcome.code == 2
    for word in words:
        assert word in outcome.message
    assert not (place / "out").exists()


@pytest.mark.usefixtures("place")
def test_an_empty_name_of_a_model_is_refused(capsys: Any) -> None:
    outcome = evaluate(capsys, *arguments("out", model=""))
    assert (outcome.code, "MODEL '': is empty" in outcome.message) == (2, True)


def test_a_folder_with_something_else_in_it_is_left_alone(place: Path, capsys: Any) -> None:
    (place / "out").mkdir()
    (place / "out" / "notes.txt").write_text("mine")
    before = tree(place / "out")
    outcome = evaluate(capsys, *arguments("out"))
    assert (outcome.code, "holds no evaluation" in outcome.message) == (2, True)
    assert tree(place / "out") == before
