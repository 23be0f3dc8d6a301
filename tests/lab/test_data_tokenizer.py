"""Tokenizers that are trained here, and those that are loaded."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorapre.lab.data import load_tokenizer, train_bpe
from lorapre.lab.data.cache import Cache
from lorapre.lab.data.encode import Encoder, batches, id_count, pieces
from lorapre.lab.data.tokenizer import TrainingText, bpe_vocabulary, training_sample
from lorapre.lab.errors import UserError

HARD = "Grüße, 漢字 \U0001f600\x00\x7f\r\n\tx <|endoftext|> y  \n\n  z ﬁ é"


def words(count: int, seed: int = 0) -> str:
    """Many words of like frequency, so that the trainer meets many ties."""
    noise = random.Random(seed)
    return " ".join("".join(noise.choices("abcdefgh", k=noise.randint(1, 7))) for _ in range(count))


DOCUMENTS = [words(300, seed) for seed in range(20)]


def text_of(documents: list[str]) -> TrainingText:
    return TrainingText(["test", documents], lambda: iter(documents), lambda: sum(len(t.encode()) for t in documents))


def nothing_to_read() -> TrainingText:
    def fail() -> Iterator[str]:
        raise AssertionError("the documents were read")

    return TrainingText(["test", DOCUMENTS], fail, lambda: 0)


def load(spec: str, tmp_path: Path, text: TrainingText | None = None) -> PreTrainedTokenizerBase:
    lines: list[str] = []
    return load_tokenizer(spec, text or text_of(DOCUMENTS), cache=Cache(tmp_path / "cache"), status=lines.append)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load("bpe:400", tmp_path_factory.mktemp("trained"))


def test_a_trained_tokenizer_has_every_byte_and_ends_texts_with_id_0(trained: PreTrainedTokenizerBase) -> None:
    assert len(trained) == 400
    assert trained.eos_token == "<|endoftext|>"
    assert trained.eos_token_id == 0
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(trained.get_vocab())
    encoder = Encoder(trained)
    (ids,) = encoder.encode([HARD])
    assert ids[-1] == 0
    assert 0 not in ids[:-1]  # what the text spells out is no end of text
    assert trained.decode(ids[:-1]) == HARD
    assert len(encoder.encode([DOCUMENTS[0]])[0]) < 0.8 * len(DOCUMENTS[0])


def test_a_saved_tokenizer_is_loaded_by_autotokenizer_and_by_us(
    trained: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path / "saved")
    expected = Encoder(trained).encode([HARD])[0].tolist()
    for again in (AutoTokenizer.from_pretrained(tmp_path / "saved"), load(str(tmp_path / "saved"), tmp_path)):
        assert again.eos_token_id == 0
        assert len(again) == 400
        assert Encoder(again).encode([HARD])[0].tolist() == expected
        assert again.decode(expected[:-1]) == HARD
    alone = load(str(tmp_path / "saved" / "tokenizer.json"), tmp_path)
    assert (alone.eos_token_id, len(alone)) == (0, 400)


TRAIN = """
import hashlib, json, sys
from lorapre.lab.data import train_bpe
print(hashlib.sha256(train_bpe(json.load(sys.stdin), 700).to_str().encode()).hexdigest())
"""


def test_another_process_with_other_threads_trains_the_same_tokenizer() -> None:
    """And so does a change in the order of the documents: only the counts matter."""
    settings = {"RAYON_NUM_THREADS": "5", "TOKENIZERS_PARALLELISM": "true", "PYTHONHASHSEED": "5"}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN],
        env=os.environ | settings,
        input=json.dumps(DOCUMENTS),
        capture_output=True,
        text=True,
        check=True,
    )
    for documents in (DOCUMENTS, DOCUMENTS[::-1]):
        here = train_bpe(documents, 700).to_str()
        assert hashlib.sha256(here.encode()).hexdigest() == done.stdout.strip()


def test_training_is_cached_by_vocabulary_and_text_and_a_broken_file_is_written_again(tmp_path: Path) -> None:
    first = load("bpe:300", tmp_path).backend_tokenizer.to_str()
    assert load("bpe:300", tmp_path, nothing_to_read()).backend_tokenizer.to_str() == first
    with pytest.raises(AssertionError, match="were read"):
        load("bpe:301", tmp_path, nothing_to_read())
    (file,) = (tmp_path / "cache").glob("bpe-*.json")
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2])
    assert load("bpe:300", tmp_path).backend_tokenizer.to_str() == first
    assert file.read_bytes() == good
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [file.name]


def test_a_long_text_is_sampled_evenly_and_a_stream_from_its_beginning() -> None:
    documents = [f"{number:04}" for number in range(1000)]
    text = text_of(documents)
    assert list(training_sample(text, 4000)) == documents
    assert list(training_sample(text, 1001)) == documents[::4]
    stream = TrainingText([], text.documents, None)
    assert list(training_sample(stream, 1001)) == documents[:251]


def test_the_vocabulary_of_a_spec() -> None:
    assert bpe_vocabulary("bpe") == 4096
    assert bpe_vocabulary("bpe:257") == 257
    assert bpe_vocabulary("gpt2") is None
    for spec in ("bpe:256", "bpe:", "bpe:many", "bpe:-3", "bpe:1e4", "bpe:²"):
        with pytest.raises(UserError, match="257"):
            bpe_vocabulary(spec)


def word_level(vocabulary: list[str]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, vocabulary[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    return backend


def test_an_end_of_text_that_is_in_the_vocabulary_but_not_declared_is_used(tmp_path: Path) -> None:
    backend = word_level(["[unk]", "a", "<|endoftext|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    folder = tmp_path / "folder"
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    for spec in (tmp_path / "tokenizer.json", tmp_path, folder):
        tokenizer = load(str(spec), tmp_path)
        assert tokenizer.eos_token_id == 2
        assert Encoder(tokenizer).encode(["a b a"])[0].tolist() == [1, 0, 1, 2]


def test_ids_above_a_gap_in_the_vocabulary_are_counted_and_kept(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"[unk]": 0, "a": 1, "<|endoftext|>": 70_000}, "[unk]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load(str(tmp_path), tmp_path)
    assert (len(tokenizer), id_count(tokenizer)) == (3, 70_001)
    assert Encoder(tokenizer).encode(["a"])[0].tolist() == [1, 70_000]


def test_text_that_the_tokenizer_has_no_token_for_is_a_user_error(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 1}))
    backend.save(str(tmp_path / "tokenizer.json"))
    encoder = Encoder(load(str(tmp_path), tmp_path))
    with pytest.raises(UserError, match=r"cannot encode the data \(.*UNK.*give one that has an unknown token"):
        encoder.encode(["b"])


def make_bad_json(folder: Path) -> str:
    (folder / "t.json").write_text(json.dumps({"version": "1.0"}))
    return str(folder / "t.json")


def make_without_end(folder: Path) -> str:
    word_level(["[unk]", "a"]).save(str(folder / "t.json"))
    return str(folder / "t.json")


def make_folder_without_end(folder: Path) -> str:
    PreTrainedTokenizerFast(tokenizer_object=word_level(["[unk]", "a"])).save_pretrained(folder / "t")
    return str(folder / "t")


def make_empty_folder(folder: Path) -> str:
    (folder / "t").mkdir()
    return str(folder / "t")


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (make_bad_json, "cannot be read as a tokenizer.json"),
        (make_without_end, "no <|endoftext|> in its vocabulary"),
        (make_folder_without_end, "no <|endoftext|> in its vocabulary"),
        (make_empty_folder, "cannot be loaded"),
        (lambda folder: str(folder / "nothing.json"), "does not exist"),
        (lambda folder: "./nothing", "does not exist"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_named(tmp_path: Path, make: Callable[[Path], str], part: str) -> None:
    spec = make(tmp_path)
    with pytest.raises(UserError) as caught:
        load(spec, tmp_path)
    assert part in str(caught.value)
    assert f"tokenizer={spec!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_name_that_cannot_be_loaded_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(spec: str) -> None:
        raise OSError("We couldn't connect\nCheck your connection")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(UserError, match=r"tokenizer='a/b' cannot be loaded \(We couldn't connect\); check the name"):
        load("a/b", tmp_path)


def test_truncation_padding_and_added_ends_do_not_reach_the_corpus(trained: PreTrainedTokenizerBase) -> None:
    plain = Encoder(trained).encode(DOCUMENTS[:2])
    backend = tokenizers.Tokenizer.from_str(trained.backend_tokenizer.to_str())
    backend.enable_truncation(5)
    backend.enable_padding(length=4000)
    before = backend.to_str()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    limited = Encoder(tokenizer).encode(DOCUMENTS[:2])
    assert [ids.tolist() for ids in limited] == [ids.tolist() for ids in plain]
    assert backend.to_str() == before


def test_cutting_a_long_text_changes_no_token(trained: PreTrainedTokenizerBase) -> None:
    text = "".join(f"{words(20, n)}{gap}" for n, gap in enumerate(["\n", "  ", " \n\n ", ". ", "\t ", "é 漢 "] * 20))
    parts = list(pieces(text, 50))
    assert "".join(parts) == text
    assert len(parts) > 100
    whole = Encoder(trained).encode([text])[0].tolist()
    cut = [token for ids in Encoder(trained).encode(parts) for token in ids[:-1].tolist()]
    assert [*cut, 0] == whole
    assert list(pieces("x" * 200, 50)) == ["x" * 200]
    assert list(pieces("", 50)) == [""]


def test_batches_are_bounded_and_complete() -> None:
    items = [(number, "x" * 900_000) for number in range(11)]
    groups = list(batches(items))
    assert [len(group) for group in groups] == [5, 5, 1]
    assert [item for group in groups for item in group] == items
    assert [len(group) for group in batches((n, "") for n in range(5000))] == [4096, 904]
