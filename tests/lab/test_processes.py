"""Several processes by torchrun on the CPU (gloo): the same run as one process with the same global batch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from _lab import Cli, losses, options, records, summary, tree, write_model

from lorapre.lab.config import PretrainConfig
from lorapre.lab.errors import UserError
from lorapre.lab.preparation import plan_run


def torchrun(here: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node 2 --no-python lorapre pretrain ...` in ``here``."""
    script = here / "lorapre"
    script.write_text(f"#!{sys.executable}\nfrom lorapre.lab.cli import main\nmain()\n")
    script.chmod(0o755)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"),
        *(str(script), "pretrain", *arguments),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LORAPRE_CACHE": str(here / "cache")}
    return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_what_the_first_process_refuses_all_refuse_in_one_paragraph(here: Path) -> None:
    (here / "bytes.txt").write_bytes(b"abc\xff")
    ended = torchrun(here, *options(data="bytes.txt", tokenizer="bpe:300", out="run"))
    assert ended.returncode != 0
    assert ended.stderr.count("is not valid UTF-8") == 1
    ours = ended.stderr.partition("ChildFailedError")[0]
    assert "barrier" not in ours
    assert "Connection closed" not in ours
    codes = re.findall(r"exitcode  : (-?\d+)", ended.stderr)
    assert "2" in codes
    assert set(codes) <= {"2", "-15"}, "torchrun may end the others before they have said no themselves"
    assert not (here / "run").exists()


@pytest.mark.slow
def test_two_processes_train_as_one_and_write_one_folder(pretrain: Cli, here: Path) -> None:
    write_model(here / "calm.json", attention_dropout=0.0)
    arguments = options(
        model="calm.json",
        data="text.txt",
        tokenizer="bpe:300",
        batch_size=8,
        sequence_length=16,
        steps=36,  # 31 make an epoch
        log_every=1,
        eval_every=10,
        compare="adamw",
    )
    ended = torchrun(here, *arguments, "--out", "two")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("run folder: two") == 1
    assert ended.stdout.count("lorapre-adamw step 36/36") == 1  # one process speaks
    assert "Traceback" not in ended.stderr

    assert pretrain(*arguments, "--out", "one").code == 0
    for part in (".", "compare-adamw"):
        one, two = here / "one" / part, here / "two" / part
        assert losses(two) == pytest.approx(losses(one), abs=1e-4)
        assert [line.keys() for line in records(two)] == [line.keys() for line in records(one)]
        assert [line["tokens"] for line in records(two)] == [line["tokens"] for line in records(one)]
        valid = [[line["valid_loss"] for line in records(run) if "valid_loss" in line] for run in (one, two)]
        assert valid[1] == pytest.approx(valid[0], abs=1e-4)
        assert summary(two)["state_bytes"] == summary(one)["state_bytes"]
        assert summary(two)["bigram_loss"] == pytest.approx(summary(one)["bigram_loss"])
    names = [{name for name in tree(here / run) if "rng_state" not in name} for run in ("one", "two")]
    assert names[0] == names[1]
    assert not [path for path in here.iterdir() if path.name.startswith("two") and path.name != "two"]
    assert json.loads((here / "two" / "provenance.json").read_text())["seed"] == 0


def test_a_batch_that_the_processes_cannot_share_is_refused() -> None:
    config = PretrainConfig(batch_size=6, accumulation=2)
    assert plan_run(config, processes=1).micro_batch == 3
    assert plan_run(config, processes=3).micro_batch == 1
    with pytest.raises(UserError, match=r"--batch-size 6: .*2 x 4 process.*multiple of 8"):
        plan_run(config, processes=4)
