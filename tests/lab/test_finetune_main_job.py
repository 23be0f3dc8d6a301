"""The run without arguments: about a minute, on any machine, and it works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from _finetune import finetune
from _lab import exit_code, summary
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorapre.lab.finetune.tiny import additions

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_without_arguments_a_tiny_model_learns_to_add_numbers_that_it_was_not_shown(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = finetune(capsys, "--out", "run")
    assert trained.code == 0
    facts = summary(here / "run")
    assert facts["exact_match_before"] == 0
    assert facts["exact_match"] > 0.9
    assert facts["seconds"] < 170
    # By the command that README, the guide and the run itself give.
    command = "run/model --tasks gsm8k --data run/questions.jsonl --chat --prompt question --max-new-tokens 10"
    assert f"lorapre evaluate {command}" in trained.out
    for page in ("README.md", "docs/finetune.md"):
        assert f"lorapre evaluate {command.replace('run/', 'runs/sums/')}" in (ROOT / page).read_text()
    assert exit_code("evaluate", *command.split(), "--out", "asked") == 0
    asked = summary(here / "asked")["tasks"]["gsm8k"]
    assert asked["items"] == facts["examples"]["valid"] == 200
    assert asked["accuracy"] == pytest.approx(facts["exact_match"], abs=0.01)  # rounding goes by the batch
    # By hand, from the folder, in plain transformers.
    model = AutoModelForCausalLM.from_pretrained(here / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(here / "run" / "model")
    right = 0
    for example in additions()[7::50]:
        ids = tokenizer(f"<|user|>{example.messages[0]['content']}<|end|><|assistant|>", return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
        right += tokenizer.decode(written, skip_special_tokens=True) == example.answer
    assert right >= 45
    assert json.loads((here / "run" / "provenance.json").read_text())["versions"].keys() >= {"trl", "peft", "torch"}
