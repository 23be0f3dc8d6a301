"""Fixtures of the lab's tests: everything tiny, no file outside pytest's own folders."""

from __future__ import annotations

import gc
import importlib
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent))

from _data import DOCUMENTS
from _finetune import pairs, write_lines
from _lab import FINISHED, Cli, call, exit_code, options, sentences, write_model, write_text


@pytest.fixture(scope="session", autouse=True)
def still() -> Iterator[None]:
    """The modules' own objects are left out of garbage collections, of which accelerate makes one after each run."""
    for module in ("cli", "training", "finetune", "evaluate"):
        importlib.import_module(f"lorapre.lab.{module}")
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are put together and written, but not drawn: for tests of runs, of which that is half of the time."""
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: Path(path).write_bytes(b"a figure"))


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with ``tiny.json``, ``text.txt`` (31 steps of 8 x 16 tokens an epoch), ``valid.txt``, and a cache."""
    folder = tmp_path_factory.mktemp("lab")
    write_model(folder / "tiny.json")
    write_text(folder / "text.txt", sentences(60))
    write_text(folder / "valid.txt", sentences(4, seed=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAPRE_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture
def here(lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a test, with copies of the files of ``lab`` (and its cache) in it."""
    work = tmp_path / "work"
    work.mkdir()
    for name in ("tiny.json", "text.txt", "valid.txt"):
        shutil.copy2(lab / name, work / name)
    monkeypatch.chdir(work)
    monkeypatch.setenv("LORAPRE_CACHE", str(lab / "cache"))
    monkeypatch.setenv("COLUMNS", "400")  # messages on one line, whatever they name
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return work


@pytest.fixture
def pretrain(here: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    """``lorapre pretrain`` in this process, from the folder ``here``."""
    return lambda *arguments: call(capsys, *arguments)


@pytest.fixture
def tiny() -> list[str]:
    """Arguments of a run that takes a second."""
    return options(
        model="tiny.json", data="text.txt", tokenizer="bpe:300", batch_size=8, sequence_length=16, steps=4, log_every=1
    )


@pytest.fixture(scope="session")
def finished(lab: Path) -> tuple[Path, str]:
    """The folder of a finished comparison, 50 steps (more than an epoch) with AdamW as the twin; what it printed."""
    arguments = options(
        model=lab / "tiny.json",
        data=lab / "text.txt",
        valid_data=lab / "valid.txt",
        **FINISHED,
        compare="adamw",
        out=lab / "finished",
    )
    printed = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setenv("COLUMNS", "80")
        assert exit_code("pretrain", *arguments) == 0
    return lab / "finished", printed.getvalue()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The documents of ``_data`` in one text file."""
    path = tmp_path / "data" / "text.txt"
    path.parent.mkdir()
    path.write_text("".join(f"{text}\n<|endoftext|>\n" for text in DOCUMENTS))
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, the one that is used."""
    monkeypatch.setenv("LORAPRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def own(here: Path) -> Path:
    """The folder ``here`` with ``own.jsonl`` in it, forty prompts and responses."""
    write_lines(here / "own.jsonl", pairs())
    return here


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks the network fails the test."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
