"""The cache of `load_corpus`: hits, damage, and several processes at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
from _data import DOCUMENTS, load

import lorapre.lab.data.sources as sources
from lorapre.lab.data import default_cache_dir, train_bpe
from lorapre.lab.data.tokens import _Writer
from lorapre.lab.errors import UserError


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the moment it is called on, reading a document fails."""

    def fail(path: Path, text_field: str) -> Iterator[str]:
        raise AssertionError(f"{path} was read")

    return lambda: monkeypatch.setattr(sources, "read_documents", fail)


def test_a_second_call_reads_no_document_and_gives_the_same(
    file: Path, cache: Path, no_reading: Callable[[], None]
) -> None:
    first = load(file)
    value = first.bigram_cross_entropy()
    no_reading()
    lines: list[str] = []
    again = load(file, status=lines.append)
    assert lines == []
    assert again.description == first.description
    assert (again.train_tokens, again.valid_tokens) == (first.train_tokens, first.valid_tokens)
    assert again.max_token_id == first.max_token_id
    np.testing.assert_array_equal(again.valid.tokens, first.valid.tokens)
    assert again.bigram_cross_entropy() == value
    # Another length of block, or fewer tokens to validate on, are views of the same files.
    assert load(file, sequence_length=32).valid.path == first.valid.path
    assert load(file, max_valid_tokens=50).valid_tokens == 48


@pytest.mark.parametrize("change", ["text", "time", "fraction", "field", "tokenizer", "valid"])
def test_whatever_decides_the_tokens_is_part_of_the_key(
    file: Path, cache: Path, no_reading: Callable[[], None], change: str
) -> None:
    load(file)
    settings: dict[str, object] = {}
    if change == "text":
        file.write_text(file.read_text() + "x")
    elif change == "time":
        os.utime(file, (1, 1))
    elif change == "fraction":
        settings["valid_fraction"] = 0.1
    elif change == "field":
        settings["text_field"] = "body"
    elif change == "tokenizer":
        train_bpe(DOCUMENTS, 301).save(str(file.with_name("tokenizer.json")))
        settings["tokenizer"] = str(file.with_name("tokenizer.json"))
    else:
        other = file.with_name("valid.md")
        other.write_text("held out")
        settings["valid_data"] = [str(other)]
    no_reading()
    with pytest.raises(AssertionError, match="was read"):
        load(file, **settings)


def test_a_damaged_entry_is_written_again(file: Path, cache: Path) -> None:
    tokens = np.array(load(file).valid.tokens)  # a copy: the map would show the damage
    files = {path: path.read_bytes() for path in cache.iterdir()}
    assert len(files) == 4
    for path, content in files.items():
        for harmed in (content[: len(content) // 2], b"", None):
            if harmed is None:
                path.unlink()
            else:
                path.write_bytes(harmed)
            again = load(file)
            np.testing.assert_array_equal(again.valid.tokens, tokens)
            assert {path: path.read_bytes() for path in cache.iterdir()} == files


def report(file: Path, out: Path) -> None:
    corpus = load(file)
    out.write_text(f"{corpus.train_tokens} {corpus.valid_tokens} {corpus.bigram_cross_entropy()}")


def write_until_killed(file: Path, reached: Path) -> None:
    """Stops between the last token and the header that says how many there are."""
    header = _Writer.header

    def stop(writer: _Writer) -> None:
        if writer.count:
            writer.file.flush()
            reached.touch()
            time.sleep(60)
        header(writer)

    _Writer.header = stop  # type: ignore[method-assign]
    load(file)


def start(target: Callable[[Path, Path], None], file: Path, out: Path) -> BaseProcess:
    # Forked, since importing everything anew takes longer than all the rest.
    process = multiprocessing.get_context("fork").Process(target=target, args=(file, out))
    process.start()
    return process


def test_processes_at_once_and_one_that_is_killed_leave_a_good_cache(
    file: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    killed = start(write_until_killed, file, tmp_path / "reached")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (tmp_path / "reached").exists():
        time.sleep(0.01)
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert list(cache.glob(".tokens-*.tmp"))
    assert not list(cache.glob("tokens-*"))

    pair = [start(report, file, tmp_path / f"{number}.out") for number in range(2)]
    for process in pair:
        process.join()
        assert process.exitcode == 0
    here = load(file, cache_dir=tmp_path / "other")
    expected = f"{here.train_tokens} {here.valid_tokens} {here.bigram_cross_entropy()}"
    assert [(tmp_path / f"{number}.out").read_text() for number in range(2)] == [expected, expected]
    for path in (tmp_path / "other").iterdir():
        assert (cache / path.name).read_bytes() == path.read_bytes()


def test_a_cache_that_cannot_be_written_is_an_error_that_names_the_variable(file: Path, tmp_path: Path) -> None:
    (tmp_path / "occupied").touch()
    with pytest.raises(UserError, match=r"occupied/cache cannot be used .*LORAPRE_CACHE"):
        load(file, cache_dir=tmp_path / "occupied" / "cache")
    with pytest.raises(UserError, match=r"occupied cannot be used .*LORAPRE_CACHE"):
        load(file, cache_dir=tmp_path / "occupied")


def test_the_default_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("LORAPRE_CACHE", "~/chosen")
    assert default_cache_dir() == Path("/home/someone/chosen")
    monkeypatch.delenv("LORAPRE_CACHE")
    assert default_cache_dir() == Path("/xdg/lorapre")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path("/home/someone/.cache/lorapre")


def test_cache_files_can_be_read_by_others_as_the_umask_allows(file: Path, cache: Path) -> None:
    old = os.umask(0o022)
    try:
        load(file)
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in cache.iterdir()} == {0o644}
