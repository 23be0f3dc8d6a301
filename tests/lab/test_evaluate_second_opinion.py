"""The second opinion against lm-eval's own run of its tasks, on a model that says what we want."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from _evaluate import math_record, write_jsonl

from lorapre.lab.errors import UserError
from lorapre.lab.evaluate import second_opinion
from lorapre.lab.evaluate.scoring import score
from lorapre.lab.evaluate.tasks import TASKS

lm_eval = pytest.importorskip("lm_eval")

#: Completions of a question whose answer is 1,250, with our verdict, lm-eval's strict and its flexible one.
GSM8K: list[tuple[str, tuple[bool, bool, bool]]] = [
    ("It is so.\n#### 1250", (True, True, True)),
    ("#### 1,250", (True, True, True)),
    ("#### $1,250", (True, False, True)),
    ("#### 1250.00", (True, False, False)),
    ("#### 1250.", (True, True, True)),
    ("#### 1251", (False, False, False)),
    ("The answer is 1250", (True, False, True)),
    ("\\boxed{1250} in all", (True, False, True)),
    ("#### 1250\nor #### 3", (True, True, False)),
    ("1250 or 3", (False, False, False)),
    ("no idea", (False, False, False)),
    ("", (False, False, False)),
]
#: The same for one half, with hendrycks_math500's own reading and the last box's.
MATH: list[tuple[str, tuple[bool, bool, bool]]] = [
    ("$\\frac{1}{2}$", (True, True, False)),
    ("So \\boxed{\\frac{1}{2}}", (True, False, True)),
    ("So $x = \\boxed{\\frac12}$", (True, False, True)),
    ("So \\boxed{0.5}", (True, False, True)),
    ("So \\boxed{\\frac{2}{4}}", (True, False, False)),
    ("So \\boxed{2}", (False, False, False)),
    ("none", (False, False, False)),
]


def gsm8k_record() -> dict[str, str]:
    return {"question": "?", "answer": "Because.\n#### 1,250"}


def harness(config: dict[str, Any], completions: list[str], records: list[dict[str, Any]], here: Path) -> list[Any]:
    """The samples of lm-eval's own evaluation of one task, in order."""
    from lm_eval.api.model import LM
    from lm_eval.api.task import ConfigurableTask

    class Says(LM):  # type: ignore[misc]
        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return [completions[request.idx if request.doc_id is None else request.doc_id] for request in requests]

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            raise AssertionError

        loglikelihood_rolling = loglikelihood

    path = str(write_jsonl(here / "records.jsonl", records))
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": path}}}
    splits = {"training_split": None, "fewshot_split": None, "test_split": "test", "num_fewshot": 0}
    task = ConfigurableTask(config={**config, **local, **splits})
    result = lm_eval.evaluate(Says(), {config["task"]: task}, bootstrap_iters=0, log_samples=True)
    return sorted(result["samples"][config["task"]], key=lambda sample: sample["doc_id"])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_gsm8k_is_judged_as_by_lm_evals_own_run(tmp_path: Path) -> None:
    completions = [text for text, _ in GSM8K]
    config = yaml.safe_load((files("lm_eval") / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())
    samples = harness(config, completions, [gsm8k_record() for _ in completions], tmp_path)
    theirs: list[dict[str, bool]] = [{} for _ in completions]
    for sample in samples:
        theirs[sample["doc_id"]][sample["filter"]] = bool(sample["exact_match"])
    judge = second_opinion.judge("gsm8k")
    assert [judge(text, gsm8k_record()) for text in completions] == theirs


def test_math500_is_judged_as_by_lm_evals_own_run(tmp_path: Path) -> None:
    from lm_eval.tasks.hendrycks_math import utils

    completions = [text for text, _ in MATH]
    config = {
        "task": "hendrycks_math500",
        "process_docs": utils.process_docs,
        "process_results": utils.process_results,
        "output_type": "generate_until",
        "doc_to_text": "Problem: {{problem}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["Problem:"], "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    samples = harness(config, completions, [math_record() for _ in completions], tmp_path)
    judge = second_opinion.judge("math500")
    ours = [judge(text, math_record())["hendrycks_math500"] for text in completions]
    assert ours == [bool(sample["exact_match"]) for sample in samples]


@pytest.mark.parametrize(("text", "expected"), GSM8K)
def test_where_the_judges_of_gsm8k_part(text: str, expected: tuple[bool, bool, bool]) -> None:
    other = second_opinion.judge("gsm8k")(text, gsm8k_record())
    ours = score(text, "1250", TASKS["gsm8k"].marking).correct
    assert (ours, other["strict-match"], other["flexible-extract"]) == expected


@pytest.mark.parametrize(("text", "expected"), MATH)
def test_where_the_judges_of_math500_part(text: str, expected: tuple[bool, bool, bool]) -> None:
    other = second_opinion.judge("math500")(text, math_record())
    ours = score(text, "\\frac{1}{2}", TASKS["math500"].marking).correct
    assert (ours, other["hendrycks_math500"], other["last-box"]) == expected


def test_without_lm_eval_a_second_opinion_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_opinion.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install lm-eval"):
        second_opinion.check_installed()
