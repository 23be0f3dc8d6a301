"""What README says is what the scripts behind it print now."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from lorapre.optim.summary import format_bytes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

pytest.importorskip("transformers")


def script(name: str) -> ModuleType:
    """A benchmark, imported without being run."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def between(begin: str, end: str) -> str:
    return README.partition(begin)[2].partition(end)[0].strip()


def test_the_memory_table_is_what_the_optimizer_holds_today() -> None:
    benchmark = script("memory_table")
    assert between(benchmark.BEGIN, benchmark.END) == benchmark.table()


def test_the_main_jobs_section_is_made_from_the_committed_results() -> None:
    benchmark = script("main_job")
    summary, origin = (
        json.loads((benchmark.RESULTS / name).read_text(encoding="utf-8"))
        for name in ("summary.json", "provenance.json")
    )
    assert between(benchmark.BEGIN, benchmark.END) == benchmark.section(summary, origin)


def test_every_file_that_readme_links_to_exists() -> None:
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_two_commands_stand_alone_and_ci_finds_the_second() -> None:
    commands = re.findall(r"^python3 -m venv .*$", README, flags=re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith("lorapre pretrain")
    assert commands[1].endswith("pytest")


_ADAMW = "lorapre-adamw+residual_gain=4.0+update_clipping=true"
#: README's names of the study's finalists, each with three seeds.
FINALISTS = {
    "Muon": "muon",
    "AdamW": "adamw",
    **{
        f"`{cls}`, r = d/{share}{more}": f"{contestant}@1/{share}"
        for cls, more, contestant in (
            ("LoRAPreAdamW", "", f"{_ADAMW}+sweep_interval=4+spectral_clipping=3.0"),
            ("LoRAPreAdamW", ", a sweep in every step", f"{_ADAMW}+spectral_clipping=3.0"),
            ("LoRAPreMuon", "", "lorapre-muon+residual_gain=4.0+momentum=0.9+normalization=longer_side"),
        )
        for share in (4, 32)
    },
}


@pytest.mark.parametrize("page", ["README.md", "docs/study-defaults.md"])
def test_the_finalists_of_the_study_are_quoted_as_they_were_measured(page: str) -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "study" / "table.json").read_text(encoding="utf-8"))
    cells = [
        [cell.strip().replace("**", "") for cell in line.strip("|").split("|")]
        for line in (ROOT / page).read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    quoted: dict[str, list[str]] = {}
    for line in cells:  # the first table of a page has them
        quoted.setdefault(re.sub(r"^(LoRA-Pre) (\w+)", r"`LoRAPre\2`", line[0]).replace(" (torch)", ""), line)
    found = set()
    for name, contestant in FINALISTS.items():
        if name not in quoted:
            continue
        found.add(name)
        setting = ("llama-20m", 50_000_000, contestant)
        own = [row for row in rows if (row["model"], row["tokens"], row["contestant"]) == setting]
        best = min((row for row in own if row["seed"] == 0), key=lambda row: row["loss"])
        losses = [row["loss"] for row in own if row["lr"] == best["lr"]]
        assert len(losses) == 3
        spread = max(losses) - min(losses)
        assert quoted[name][1] == format_bytes(best["state_bytes"]), name
        assert quoted[name][-1] == f"{sum(losses) / 3:.3f} ± {spread:.3f}", name
    # README has the defaults alone
    assert found == {name for name in FINALISTS if page != "README.md" or "every step" not in name}


#: The study's names of the methods that fine-tune.
METHODS = {
    "LoRA-Pre Muon": "lorapre-muon", "LoRA-Pre AdamW": "lorapre-adamw", "AdamW, all weights": "full-adamw",
    "Fira": "fira", "LoRA+": "lora+", "APOLLO": "apollo", "rsLoRA": "rslora", "DoRA": "dora", "LoRA": "lora",
    "GaLore": "galore", "LoRA-Pro": "lora-pro", "LoFT": "loft",
}  # fmt: skip


@pytest.mark.parametrize("task", ["chain-sum", "gsm8k"])
def test_the_fine_tuning_of_each_method_is_quoted_as_it_was_measured(task: str) -> None:
    table = ROOT / "benchmarks" / "results" / f"finetune-{task}" / "table.json"
    rows = json.loads(table.read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "study-finetune.md").read_text(encoding="utf-8")
    block = page[page.index(f"| `{task}`") :].split("\n\n", 1)[0]
    lines = [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]]
    assert [line[0] for line in lines] == sorted(METHODS, key=[line[0] for line in lines].index)
    accuracies = []
    for name, second, rate, accuracy, loss, *rest in lines:
        (row,) = (r for r in rows if r["method"] == METHODS[name] and r["rank"] in (8, None) and not r["options"])
        low, high = row["interval"]
        assert accuracy == f"{100 * row['accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]", name
        assert (float(rate), loss) == (row["lr"], f"{row['loss']:.3f}"), name
        assert rest[-1] == f"{row['peak_bytes'] / 1e9:.2f} GB", name
        seeds = len(row["seeds"])
        assert second == (str(seeds) if task == "gsm8k" else "–" if row["rank"] is None else "8"), name
        assert seeds == 3 or task == "gsm8k"
        accuracies.append(row["accuracy"])
    assert accuracies == sorted(accuracies, reverse=True)
