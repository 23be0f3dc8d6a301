"""`load_corpus` on local data: what it returns."""

from __future__ import annotations

import json
import lzma
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from _data import DOCUMENTS, load
from transformers import AutoTokenizer

import lorapre.lab.data.sources as sources
from lorapre.lab.data import (
    BigramModel,
    BlockDataset,
    TextCorpus,
    split_documents,
)
from lorapre.lab.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data" / "corpus"  # beside the project, where there is one


def texts(corpus: TextCorpus, side: str) -> list[str]:
    """The whole documents in the token file of a side."""
    blocks = getattr(corpus, side)
    assert isinstance(blocks, BlockDataset)
    ids = np.load(blocks.path)
    ends = np.flatnonzero(ids == corpus.tokenizer.eos_token_id)
    assert ends[-1] == len(ids) - 1
    parts = np.split(ids, ends + 1)[:-1]
    return [corpus.tokenizer.decode(part[:-1].tolist()) for part in parts]


def test_every_document_is_on_one_side_and_survives_the_round_trip(file: Path, cache: Path) -> None:
    lines: list[str] = []
    corpus = load(file, status=lines.append)
    split = split_documents(DOCUMENTS, 0.05)
    sides = list(split.apply(DOCUMENTS))
    assert texts(corpus, "train") == [text for side, text in sides if side == "train"]
    assert texts(corpus, "valid") == [text for side, text in sides if side == "valid"]
    size = sum(map(len, DOCUMENTS)) / 1000
    assert corpus.description == f"text.txt (300 documents, {size:.1f} kB)"
    assert lines == ["reading text.txt", "training a 300-entry tokenizer", f"encoding {size:.1f} kB"]
    assert isinstance(corpus.train, BlockDataset)
    total = len(np.load(corpus.train.path))
    assert corpus.train_tokens == len(corpus.train) * 16 == total // 16 * 16
    assert corpus.valid_tokens == len(corpus.valid) * 16
    both = np.concatenate([np.load(corpus.train.path), np.load(corpus.valid.path)])
    assert corpus.max_token_id == both.max() < 300
    assert both.dtype == np.uint16
    assert np.count_nonzero(both == 0) == 300


def test_the_input_is_not_touched(file: Path, cache: Path) -> None:
    before = (file.read_bytes(), file.stat().st_mtime_ns, sorted(file.parent.iterdir()))
    load(file.parent)
    assert (file.read_bytes(), file.stat().st_mtime_ns, sorted(file.parent.iterdir())) == before


def test_explicit_validation_files_are_not_mixed_with_training(file: Path, cache: Path) -> None:
    valid = file.with_name("valid.jsonl")
    valid.write_text("\n".join(json.dumps({"text": f"held out {n}"}) for n in range(20)))
    corpus = load(file, valid_data=[str(valid)])
    assert texts(corpus, "train") == DOCUMENTS
    assert texts(corpus, "valid") == [f"held out {n}" for n in range(20)]
    size = sum(map(len, DOCUMENTS)) / 1000
    assert corpus.description == f"text.txt (300 documents, {size:.1f} kB), validated on valid.jsonl"


def test_files_of_several_kinds_and_a_single_document(tmp_path: Path, cache: Path) -> None:
    text = "".join(f"line {n}\n" for n in range(1000))
    (tmp_path / "one.py").write_text(text)
    single = load(tmp_path / "one.py")
    (head,), (tail,) = texts(single, "train"), texts(single, "valid")
    assert head + tail == text
    assert head.endswith("\n")
    assert 0.04 < len(tail) / len(text) < 0.06
    (tmp_path / "two.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    several = load(tmp_path / "one.py", tmp_path / "two.jsonl", valid_fraction=0.5, sequence_length=2)
    assert sorted(texts(several, "train") + texts(several, "valid")) == sorted([text, "a", "b"])
    assert several.description.startswith("2 files (3 documents")


def test_the_bigram_cross_entropy_is_of_the_blocks(file: Path, cache: Path) -> None:
    corpus = load(file)
    assert isinstance(corpus.train, BlockDataset)
    model = BigramModel.fit(np.array(corpus.train.tokens), len(corpus.tokenizer))
    blocks = [item["input_ids"].numpy() for item in (corpus.valid[i] for i in range(len(corpus.valid)))]
    losses = [-np.log(model.probabilities(block[:-1], block[1:])) for block in blocks]
    assert corpus.bigram_cross_entropy() == pytest.approx(np.concatenate(losses).mean(), rel=1e-12)
    assert corpus.bigram_cross_entropy() < math.log(300)


def test_the_tokenizer_of_a_corpus_can_be_given_for_the_next(file: Path, cache: Path, tmp_path: Path) -> None:
    corpus = load(file)
    corpus.tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token_id == 0
    again = load(file, tokenizer=str(tmp_path / "saved"))
    np.testing.assert_array_equal(again.valid.tokens, corpus.valid.tokens)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"sequence_length": 1}, "sequence_length=1 "),
        ({"sequence_length": 100_000}, "sequence_length=100,000"),
        ({"valid_fraction": 0.0}, "valid_fraction=0.0"),
        ({"valid_fraction": 1.0}, "valid_fraction=1.0"),
        ({"max_valid_tokens": 15}, "max_valid_tokens=15"),
        ({"valid_data": ["stdlib"]}, "valid_data='stdlib'"),
        ({"valid_data": ["nothing.txt"]}, "valid_data: 'nothing.txt' does not exist"),
        ({"tokenizer": "bpe:256"}, "tokenizer='bpe:256'"),
    ],
)
def test_a_setting_that_cannot_work_is_named_with_its_value(
    file: Path, cache: Path, settings: dict[str, object], part: str
) -> None:
    with pytest.raises(UserError) as caught:
        load(file, **settings)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_data_and_empty_validation_data_are_errors(file: Path, cache: Path) -> None:
    empty = file.with_name("empty.txt")
    empty.write_text(" \n")
    with pytest.raises(UserError, match="holds no text"):
        load(empty)
    with pytest.raises(UserError, match=r"data \(empty.txt\) holds no text"):
        load(empty, valid_data=[str(file)])
    with pytest.raises(UserError, match=r"valid_data \(empty.txt\) holds no text"):
        load(file, valid_data=[str(empty)])


def test_the_standard_library(cache: Path) -> None:
    """On a few of its files: the whole is measured elsewhere."""
    whole = sources.StandardLibrary()
    few = [path for path in whole.files if path.parent == whole.root][:30]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources.StandardLibrary, "_find", lambda self: iter(few))
        lines: list[str] = []
        corpus = load("stdlib", tokenizer=None, sequence_length=64, status=lines.append)
    found = texts(corpus, "train") + texts(corpus, "valid")
    assert sorted(found) == sorted(path.read_bytes().decode() for path in few)
    assert len(corpus.tokenizer) == 4096
    assert lines[0] == f"reading standard library of Python {sys.version_info.major}.{sys.version_info.minor}"
    assert f"({len(few)} documents, " in corpus.description


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the shared corpus in {SHARED}")
def test_the_shared_corpus_has_one_end_of_text_a_document(tmp_path: Path) -> None:
    """The beginning of valid.txt.xz, counted here as its description says."""
    with lzma.open(SHARED / "valid.txt.xz") as unpacked:
        raw = unpacked.read(1_000_000)
    documents = raw[: raw.index(b"\n<|endoftext|>\n", 400_000)].decode().split("\n<|endoftext|>\n")
    (tmp_path / "part.txt").write_text("".join(f"{text}\n<|endoftext|>\n" for text in documents), newline="")
    corpus = load(tmp_path / "part.txt", tokenizer=str(SHARED / "tokenizer.json"), cache_dir=tmp_path / "cache")
    backend = tokenizers.Tokenizer.from_file(str(SHARED / "tokenizer.json"))
    expected = sum(len(backend.encode(text, add_special_tokens=False).ids) + 1 for text in documents)
    assert isinstance(corpus.train, BlockDataset)
    assert len(np.load(corpus.train.path)) + len(np.load(corpus.valid.path)) == expected
