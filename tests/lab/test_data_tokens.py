"""Token files, and the blocks that are cut from them."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lorapre.lab.data import BlockDataset
from lorapre.lab.data.cache import Cache
from lorapre.lab.data.tokens import open_tokens, read_token_files, store_tokens
from lorapre.lab.errors import UserError


def stored(tmp_path: Path, count: int, dtype: type = np.uint16) -> Path:
    path = tmp_path / "tokens.npy"
    np.save(path, (np.arange(count) * 7 % 65_000).astype(dtype))
    return path


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_a_token_file_holds_what_was_added_in_order(tmp_path: Path, dtype: type) -> None:
    noise = np.random.default_rng(0)
    arrays = [noise.integers(0, 60_000, noise.integers(0, 50)).astype(dtype) for _ in range(400)]
    sides = ["valid" if number % 7 == 0 else "train" for number in range(400)]
    cache = Cache(tmp_path)
    files = store_tokens(cache, "k", zip(sides, arrays, strict=True), ("train", "valid"), np.dtype(dtype), "words")
    assert files == read_token_files(cache, "k")
    assert files.train is not None
    for side, path in (("train", files.train), ("valid", files.valid)):
        expected = np.concatenate([ids for s, ids in zip(sides, arrays, strict=True) if s == side])
        found = np.load(path)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, expected)
    assert files.max_token_id == max(int(ids.max(initial=0)) for ids in arrays)
    assert files.description == "words"
    tokens = open_tokens(files.valid)
    assert isinstance(tokens, np.memmap)
    assert not tokens.flags.writeable


def test_an_entry_that_is_cut_short_or_lacks_a_file_is_no_entry(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    arrays = [("train", np.arange(9, dtype=np.uint16)), ("valid", np.arange(5, dtype=np.uint16))]

    def write() -> None:
        store_tokens(cache, "k", arrays, ("train", "valid"), np.dtype(np.uint16), "")

    for name in ("tokens-k-train.npy", "tokens-k-valid.npy", "tokens-k.json"):
        write()
        assert read_token_files(cache, "k") is not None
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-1])
        assert read_token_files(cache, "k") is None
        (tmp_path / name).unlink()
        assert read_token_files(cache, "k") is None


def test_nothing_is_left_behind_when_writing_fails(tmp_path: Path) -> None:
    def arrays():  # type: ignore[no-untyped-def]
        yield "train", np.arange(9, dtype=np.uint16)
        raise UserError("a file is damaged")

    with pytest.raises(UserError, match="damaged"):
        store_tokens(Cache(tmp_path), "k", arrays(), ("train", "valid"), np.dtype(np.uint16), "")
    assert list(tmp_path.iterdir()) == []


def test_blocks_are_consecutive_and_the_rest_is_left_out(tmp_path: Path) -> None:
    path = stored(tmp_path, 103)
    dataset = BlockDataset(path, 10)
    tokens = np.load(path).astype(np.int64)
    assert len(dataset) == 10
    for index in (0, 9, -1):
        item = dataset[index]
        start = index % 10 * 10
        assert set(item) == {"input_ids", "labels"}
        assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
        assert item["input_ids"].tolist() == item["labels"].tolist() == tokens[start : start + 10].tolist()
        assert item["input_ids"].data_ptr() != item["labels"].data_ptr()
    for index in (10, -11):
        with pytest.raises(IndexError):
            dataset[index]
    np.testing.assert_array_equal(dataset.tokens, tokens[:100])


def test_ids_above_32767_stay_positive(tmp_path: Path) -> None:
    assert max(BlockDataset(stored(tmp_path, 20_000), 20_000)[0]["input_ids"].tolist()) > 60_000


def test_max_tokens_counts_whole_blocks(tmp_path: Path) -> None:
    path = stored(tmp_path, 103)
    assert [len(BlockDataset(path, 10, max_tokens=n)) for n in (10, 39, 40, 1000)] == [1, 3, 4, 10]


def test_too_few_tokens_for_a_block_is_an_error_that_names_both(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the text has 103 tokens, too few .* sequence_length=104"):
        BlockDataset(stored(tmp_path, 103), 104, what="the text")
    with pytest.raises(UserError, match=r"103 tokens, of which 50 may be used \(max_valid_tokens\)"):
        BlockDataset(stored(tmp_path, 103), 64, max_tokens=50)


def test_a_pickle_holds_the_name_and_not_the_tokens(tmp_path: Path) -> None:
    dataset = BlockDataset(stored(tmp_path, 100_000), 10, max_tokens=5000)
    packed = pickle.dumps(dataset)
    assert len(packed) < 1000
    again = pickle.loads(packed)
    assert len(again) == 500
    assert torch.equal(again[499]["labels"], dataset[499]["labels"])


def test_workers_of_a_dataloader_read_the_same_blocks(tmp_path: Path) -> None:
    path = stored(tmp_path, 1000)
    loader = DataLoader(BlockDataset(path, 10), batch_size=5, num_workers=2)
    found = torch.cat([batch["input_ids"] for batch in loader])
    np.testing.assert_array_equal(found.numpy().ravel(), np.load(path))
