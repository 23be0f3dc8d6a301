"""`hf:` data, on folders that look like datasets: the code is the same for the hub."""

from __future__ import annotations

import gzip
import json
import math
import pickle
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

import lorapre.lab.data.corpus as corpus_module
import lorapre.lab.data.hub as hub
from lorapre.lab.data import BigramModel, StreamBlockDataset, TextCorpus, load_corpus
from lorapre.lab.data.corpus import _largest_ordinary_id
from lorapre.lab.errors import UserError


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


def texts(split: str, count: int) -> list[str]:
    return [f"{split} document {number} says {number * number}.\n" for number in range(count)]


def make(folder: Path, splits: dict[str, list[str]], field: str = "text", shards: int = 1) -> str:
    """A dataset of JSON lines; document n of a split goes to shard n % shards."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, documents in splits.items():
        for shard in range(shards):
            name = f"{split}-{shard:05}-of-{shards:05}.jsonl.gz" if shards > 1 else f"{split}.jsonl.gz"
            with gzip.open(folder / "data" / name, "wt", encoding="utf-8") as file:
                file.writelines(json.dumps({field: t, "url": "u"}) + "\n" for t in documents[shard::shards])
    return f"hf:{folder}"


def load(spec: str, **settings: object) -> TextCorpus:
    defaults: dict[str, object] = {"tokenizer": "bpe:300", "sequence_length": 16, "shuffle_stream": False}
    return load_corpus([spec], **(defaults | settings))  # type: ignore[arg-type]


def documents_of(corpus: TextCorpus, blocks: int, workers: int = 0) -> list[str]:
    """Whole documents in the first `blocks` blocks, as one worker or several deliver them."""
    parts: list[str] = []
    loader = DataLoader(corpus.train, batch_size=None, num_workers=workers)
    lanes: dict[int, list[int]] = {}
    for number, item in enumerate(islice(loader, blocks)):
        assert item["input_ids"].shape == (corpus.valid.sequence_length,)
        assert item["input_ids"].dtype == torch.int64
        assert torch.equal(item["input_ids"], item["labels"])
        lanes.setdefault(number % max(1, workers), []).extend(item["input_ids"].tolist())
    for ids in lanes.values():
        parts += corpus.tokenizer.decode(ids).split("<|endoftext|>")[:-1]
    return parts


def test_a_stream_gives_all_documents_in_order_then_starts_again(tmp_path: Path) -> None:
    train, valid = texts("train", 50), texts("valid", 9)
    corpus = load(make(tmp_path / "d", {"train": [*train[:20], " ", *train[20:]], "validation": valid}))
    assert corpus.train_tokens is None
    assert isinstance(corpus.train, StreamBlockDataset)
    found = documents_of(corpus, 200)
    assert len(found) > 100
    assert found == [train[number % 50] for number in range(len(found))]
    decoded = corpus.tokenizer.decode(corpus.valid.tokens.tolist())
    assert "<|endoftext|>".join(valid).startswith(decoded)
    assert corpus.valid_tokens == len(corpus.valid) * 16
    assert corpus.description == f"{tmp_path / 'd'} (streamed), validated on its split 'validation'"
    assert corpus.max_token_id == len(corpus.tokenizer) - 1


def test_shuffling_is_by_seed_and_anew_on_each_pass(tmp_path: Path) -> None:
    train = texts("train", 50)
    spec = make(tmp_path / "d", {"train": train, "test": texts("t", 9)}, shards=3)

    def passes(seed: int) -> tuple[list[str], list[str]]:
        corpus = load(spec, seed=seed, shuffle_stream=True)
        assert "'test'" in corpus.description
        found = documents_of(corpus, 220)
        return found[:50], found[50:100]

    first, second = passes(0)
    assert sorted(first) == sorted(second) == sorted(train)
    assert len({tuple(first), tuple(second), tuple(train)}) == 3
    assert passes(0) == (first, second)
    assert passes(1)[0] == second  # the second pass of seed 0 is the first of seed 1
    assert passes(7)[0] != first


@pytest.mark.parametrize(
    ("shards", "held_out", "shuffle"),
    [(1, False, False), (4, False, False), (4, False, True), (1, True, True), (4, True, False)],
)
def test_workers_share_the_documents_without_loss_or_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int, held_out: bool, shuffle: bool
) -> None:
    monkeypatch.setattr(hub, "HELD_OUT_DOCUMENTS", 10)
    documents = texts("train", 60)
    splits = {"train": documents} if held_out else {"train": documents, "validation": texts("valid", 9)}
    spec = make(tmp_path / "d", splits, shards=shards)
    in_order = [text for shard in range(shards) for text in documents[shard::shards]]
    wanted = in_order[10:] if held_out else in_order
    corpus = load(spec, sequence_length=4, shuffle_stream=shuffle)
    per_pass = sum(len(ids) for ids in corpus_module.Encoder(corpus.tokenizer).encode(wanted)) // 4
    found = documents_of(corpus, 2 * per_pass, workers=2)
    # Each worker goes round its own half, so copies come only from further passes.
    assert set(found) == set(wanted)
    counts = [found.count(text) for text in wanted]
    assert max(counts) <= 3
    half = documents_of(corpus, per_pass * 9 // 10, workers=2)
    assert len(half) > 0.7 * len(wanted)
    assert len(half) == len(set(half))


def test_a_worker_without_documents_is_an_error_and_no_endless_loop(tmp_path: Path) -> None:
    corpus = load(make(tmp_path / "d", {"train": ["only one " * 20], "validation": texts("valid", 20)}))
    with pytest.raises(UserError, match=r"DataLoader workers \(2\)"):
        documents_of(corpus, 20, workers=2)


def test_without_a_validation_split_the_first_documents_are_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "HELD_OUT_DOCUMENTS", 10)
    train = texts("train", 50)
    spec = make(tmp_path / "d", {"train": train})
    corpus = load(spec)
    assert "<|endoftext|>".join(train[:10]).startswith(corpus.tokenizer.decode(corpus.valid.tokens.tolist()))
    assert len(corpus.valid) > 1
    assert documents_of(corpus, 150)[:40] == train[10:]
    assert set(documents_of(load(spec, shuffle_stream=True), 300)) == set(train[10:])
    monkeypatch.setattr(hub, "HELD_OUT_DOCUMENTS", 50)
    with pytest.raises(UserError, match="leaves no document to train on; its first"):
        load(spec, tokenizer=str(saved(corpus, tmp_path)))


def saved(corpus: TextCorpus, tmp_path: Path) -> Path:
    corpus.tokenizer.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_explicit_validation_files_leave_the_whole_stream_to_training(tmp_path: Path) -> None:
    train = texts("train", 30)
    (tmp_path / "valid.txt").write_text("held out " * 50)
    corpus = load(make(tmp_path / "d", {"train": train}), valid_data=[str(tmp_path / "valid.txt")])
    assert documents_of(corpus, 80)[:30] == train
    assert ("held out " * 50).startswith(corpus.tokenizer.decode(corpus.valid.tokens.tolist()))
    assert corpus.description.endswith("validated on valid.txt")


def test_max_valid_tokens_reads_no_more_than_it_needs(tmp_path: Path) -> None:
    spec = make(tmp_path / "d", {"train": texts("train", 30), "validation": texts("valid", 5000)})
    whole, limited = load(spec), load(spec, max_valid_tokens=100)
    assert limited.valid_tokens == 96
    np.testing.assert_array_equal(limited.valid.tokens, whole.valid.tokens[:96])
    assert limited.valid.path.stat().st_size < 1000 < whole.valid.path.stat().st_size


def test_validation_tokens_are_cached_until_the_files_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "d"
    spec = make(folder, {"train": texts("train", 30), "validation": texts("valid", 20)})
    first = load(spec)
    lines: list[str] = []
    again = load(spec, status=lines.append)
    assert lines == []
    assert again.valid.path == first.valid.path
    make(folder, {"validation": texts("other", 20)})
    changed = load(spec, status=lines.append)
    assert "encoding the validation documents" in lines
    assert "other document 0" in changed.tokenizer.decode(changed.valid.tokens.tolist())


def test_the_bigram_model_of_a_stream_uses_its_first_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "BIGRAM_STREAM_TOKENS", 500)
    train = texts("train", 100)
    corpus = load(make(tmp_path / "d", {"train": train, "validation": texts("valid", 20)}), shuffle_stream=True)
    ids = np.concatenate(corpus_module.Encoder(corpus.tokenizer).encode(train))[:500]
    expected = BigramModel.fit(ids, len(corpus.tokenizer)).cross_entropy(corpus.valid.tokens, 16)
    assert corpus.bigram_cross_entropy() == expected
    assert 0 < expected < math.log(300)


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("hf:", "names no dataset"),
        ("hf:/no/such/folder", "cannot be opened"),
        ("hf:{}:nothing", "cannot be opened"),
        ("hf:{}", "no split 'train', only 'validation'"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_named(tmp_path: Path, spec: str, part: str) -> None:
    make(tmp_path / "d", {"validation": texts("valid", 3)})
    spec = spec.format(tmp_path / "d")
    with pytest.raises(UserError) as caught:
        load(spec)
    assert part in str(caught.value)
    assert repr(spec) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_network_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, config: str | None) -> None:
        assert (name, config) == ("allenai/c4", "en")
        raise ConnectionError("Couldn't reach 'allenai/c4' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(UserError, match=r"data='hf:allenai/c4:en' cannot be opened \(ConnectionError: Couldn't"):
        load("hf:allenai/c4:en")


def test_a_missing_field_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    spec = make(tmp_path / "d", {"train": texts("t", 30), "validation": texts("v", 30)}, field="body")
    with pytest.raises(UserError, match="no field 'text', only 'body', 'url'"):
        load(spec)
    assert load(spec, text_field="body").valid_tokens > 0


def test_a_damaged_file_of_a_dataset_is_a_user_error(tmp_path: Path) -> None:
    spec = make(tmp_path / "d", {"train": texts("t", 3000), "validation": texts("v", 30)}, shards=2)
    files = sorted((tmp_path / "d" / "data").glob("train-*"))
    files[1].write_bytes(files[1].read_bytes()[:-500])  # the first is looked at when the dataset is opened
    with pytest.raises(UserError, match=r"split 'train' cannot be read \(EOFError: Compressed file ended"):
        load(spec)
    files[0].write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"cannot be opened \(BadGzipFile"):
        load(spec)


def test_t5_is_the_tokenizer_of_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def note(spec: str, *_: object, **__: object) -> None:
        asked.append(spec)
        raise UserError("enough")

    monkeypatch.setattr(corpus_module, "load_tokenizer", note)
    with pytest.raises(UserError, match="enough"):
        load(make(tmp_path / "d", {"train": texts("t", 3)}), tokenizer=None)
    assert asked == ["t5-base"]


def test_a_stream_pickles_for_workers_that_are_spawned(tmp_path: Path) -> None:
    corpus = load(make(tmp_path / "d", {"train": texts("t", 30), "validation": texts("v", 30)}), shuffle_stream=True)
    again = pickle.loads(pickle.dumps(corpus.train))
    for ours, theirs in zip(islice(corpus.train, 40), islice(again, 40), strict=True):
        assert torch.equal(ours["input_ids"], theirs["input_ids"])


def test_the_sentinels_of_a_t5_tokenizer_do_not_count_as_ids_of_text() -> None:
    model = models.Unigram([("a", 0.0), ("b", -1.0), ("</s>", 0.0)], unk_id=0)
    sentinels = [f"<extra_id_{number}>" for number in range(5)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), eos_token="</s>", additional_special_tokens=sentinels
    )
    assert len(tokenizer) == 8
    assert _largest_ordinary_id(tokenizer) == 2
