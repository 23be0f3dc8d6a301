"""lm-eval's verdict on the same completions: its filters, its extraction and its exact match."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

import yaml

from lorapre.lab.errors import UserError

#: A completion and its item's record to the verdict of each rule, by lm-eval's name of the rule.
Judge = Callable[[str, Mapping[str, Any]], dict[str, bool]]


def check_installed() -> None:
    """Raise ``UserError`` where lm-eval is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "--second-opinion: needs the package lm-eval, which is not installed. Leave the option out, or install it: "
            "pip install lm-eval."
        )


def judge(task: str) -> Judge:
    """lm-eval's rules for a task: gsm8k's ``strict-match`` and ``flexible-extract``; hendrycks_math500's for math500.

    The latter compares the text between the first and the last dollar sign, as its prompt asks for an answer alone.
    ``last-box`` is the same comparison of the last box, for completions that reason first.
    """
    return {"gsm8k": _gsm8k, "math500": _math500}[task]()


def _gsm8k() -> Judge:
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters import build_filter_ensemble

    settings = yaml.safe_load((files("lm_eval") / "tasks" / "gsm8k" / "gsm8k.yaml").read_text(encoding="utf-8"))
    (metric,) = (dict(entry) for entry in settings["metric_list"])
    options = {key: metric[key] for key in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
    ensembles = [
        build_filter_ensemble(
            rule["name"],
            [(step["function"], {key: step[key] for key in step if key != "function"}) for step in rule["filter"]],
        )
        for rule in settings["filter_list"]
    ]

    def verdict(completion: str, record: Mapping[str, Any]) -> dict[str, bool]:
        instance = Instance("generate_until", dict(record), (), 0, resps=[completion])
        for ensemble in ensembles:
            ensemble.apply([instance])
        return {
            name: bool(
                exact_match_hf_evaluate(predictions=[found], references=[record["answer"]], **options)["exact_match"]
            )
            for name, found in instance.filtered_resps.items()
        }

    return verdict


def _math500() -> Judge:
    from lm_eval.tasks.hendrycks_math import utils

    def verdict(completion: str, record: Mapping[str, Any]) -> dict[str, bool]:
        gold = utils.last_boxed_only_string(record["solution"])
        if gold is None or not gold.startswith("\\boxed"):  # lm-eval takes the answer from the solution's last box
            gold = f"\\boxed{{{record['answer']}}}"
        whole = utils.process_results({"solution": gold}, [completion])["exact_match"]
        box = utils.last_boxed_only_string(completion)
        inner = utils.remove_boxed(box) if box is not None and box.startswith(("\\boxed{", "\\boxed ")) else None
        return {
            "hendrycks_math500": bool(whole),
            "last-box": bool(utils.is_equiv(inner, utils.remove_boxed(gold))),
        }

    return verdict
