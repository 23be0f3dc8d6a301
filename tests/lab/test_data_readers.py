"""Files of every kind and compression give the documents that were written into them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lorapre.lab.data.readers import inner_suffix, read_documents
from lorapre.lab.errors import UserError

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda raw: raw,
    ".xz": lzma.compress,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    # With the checksum that the zstd tool writes too: without it, overwritten bytes can go unnoticed.
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
DOCUMENTS = ["First.\nTwo lines, é and 漢.\n", "Second, no line break at its end", "  \n indented\n\n"]


def write(path: Path, raw: bytes) -> Path:
    path.write_bytes(PACK["" if path.suffix not in PACK else path.suffix](raw))
    return path


def read(path: Path, text_field: str = "text") -> list[str]:
    return list(read_documents(path, text_field))


def message(path: Path, text_field: str = "text") -> str:
    with pytest.raises(UserError) as caught:
        read(path, text_field)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


@pytest.mark.parametrize("packing", PACK)
def test_plain_text_in_the_format_of_the_shared_corpus(tmp_path: Path, packing: str) -> None:
    raw = "".join(text + "\n<|endoftext|>\n" for text in DOCUMENTS).encode()
    assert read(write(tmp_path / f"a.txt{packing}", raw)) == DOCUMENTS


@pytest.mark.parametrize("packing", PACK)
def test_json_lines(tmp_path: Path, packing: str) -> None:
    raw = "\n".join(json.dumps({"id": 1, "body": text}) for text in DOCUMENTS).encode()
    assert read(write(tmp_path / f"a.jsonl{packing}", raw), "body") == DOCUMENTS


@pytest.mark.parametrize("packing", PACK)
def test_parquet(tmp_path: Path, packing: str) -> None:
    documents = [f"{number}: {DOCUMENTS[number % 3]}" for number in range(3000)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": documents, "n": range(3000)}), sink, row_group_size=700)
    assert read(write(tmp_path / f"a.parquet{packing}", sink.getvalue().to_pybytes())) == documents


def test_a_file_without_separator_is_one_document_to_the_byte(tmp_path: Path) -> None:
    text = "a\r\nb <|endoftext|> c\n <|endoftext|>\n<|endoftext|> \n"
    assert read(write(tmp_path / "a.py", text.encode())) == [text]


def test_windows_line_ends_byte_order_mark_and_a_last_document_without_separator(tmp_path: Path) -> None:
    raw = b"\xef\xbb\xbfone\r\n<|endoftext|>\r\ntwo\r\n\r\n<|endoftext|>\r\nthree\n"
    assert read(write(tmp_path / "a.txt", raw)) == ["one", "two\r\n", "three\n"]


def test_empty_documents_and_blank_json_lines_are_dropped(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.txt", b"<|endoftext|>\n\n<|endoftext|>\nx\n<|endoftext|>")) == ["x"]
    assert read(write(tmp_path / "a.txt", b"")) == []
    assert read(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "x"}\n\n{"text": " "}\n')) == ["x"]


def test_several_zstandard_frames_are_read_as_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    lines = [f"{random.Random(n).random()}\n" for n in range(60_000)]
    half = len(lines) // 2
    path.write_bytes(PACK[".zst"]("".join(lines[:half]).encode()) + PACK[".zst"]("".join(lines[half:]).encode()))
    assert read(path) == ["".join(lines)]


@pytest.mark.parametrize("packing", PACK)
def test_an_undecodable_byte_is_named_with_its_offset(tmp_path: Path, packing: str) -> None:
    raw = b"good\n<|endoftext|>\n" + "é".encode() + b" caf\xe9 bad"
    text = message(write(tmp_path / f"a.txt{packing}", raw))
    assert f"0xe9 at offset {raw.index(b' bad') - 1}" in text
    assert "iconv" in text


def test_text_in_utf_16_is_told_apart_from_latin1(tmp_path: Path) -> None:
    assert "iconv -f utf-16 -t utf-8" in message(write(tmp_path / "a.txt", "words\n".encode("utf-16")))
    assert "iconv -f latin1 -t utf-8" in message(write(tmp_path / "a.txt", b"\xff words"))


def test_an_undecodable_byte_in_json_lines(tmp_path: Path) -> None:
    text = message(write(tmp_path / "a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n'))
    assert "0xff at offset 24" in text


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"text": "x"', ["line 2", "not valid JSON", ".txt"]),
        ('["x"]', ["line 2", "list", "object"]),
        ('{"body": "x", "url": 1}', ["line 2", "no field 'text'", "'body', 'url'", "text_field"]),
        ('{"text": null}', ["line 2", "null"]),
        ('{"text": 3}', ["line 2", "int"]),
        ('{"text": "ab\\ud800"}', ["line 2", "surrogate", "character 2"]),
        pytest.param(f'{{"text": "x", "n": {"1" * 5000}}}', ["line 2", "not valid JSON", "digits"], id="digits"),
    ],
)
def test_a_bad_json_line_is_named_with_its_number(tmp_path: Path, line: str, parts: list[str]) -> None:
    text = message(write(tmp_path / "a.jsonl.gz", b'{"text": "x"}\n' + line.encode() + b"\n"))
    assert [part for part in parts if part not in text] == []


def test_parquet_without_the_column_with_a_null_and_with_bad_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), path)
    assert "no column 'text', only 'body', 'n'" in message(path)
    pq.write_table(pa.table({"text": ["x", None]}), path)
    assert "row 2" in message(path)
    binary = pa.array([b"ok", b"\xff\xfe"], pa.binary())
    pq.write_table(pa.table({"text": binary.view(pa.string())}), path)
    assert "not valid UTF-8" in message(path)
    path.write_bytes(b"PAR1 nothing of the kind PAR1")
    assert "damaged" in message(path)


@pytest.mark.parametrize("packing", [name for name in PACK if name])
@pytest.mark.parametrize("harm", ["truncated", "overwritten", "not compressed"])
def test_a_damaged_compressed_file_is_named(tmp_path: Path, packing: str, harm: str) -> None:
    path = tmp_path / f"a.txt{packing}"
    noise = random.Random(0)
    text = "".join(f"{noise.random()}\n" for _ in range(50_000)).encode()
    packed = bytearray(PACK[packing](text))
    if harm == "truncated":
        del packed[len(packed) // 2 :]
    elif harm == "overwritten":
        packed[1000:1400] = bytes(400)
    path.write_bytes(text if harm == "not compressed" else packed)
    assert "damaged" in message(path)


@pytest.mark.parametrize("packing", [name for name in PACK if name])
@pytest.mark.parametrize("harm", ["head of the second stream", "text behind the end", "empty"])
def test_a_damage_that_begins_where_a_stream_ends_is_named(tmp_path: Path, packing: str, harm: str) -> None:
    path = tmp_path / f"a.txt{packing}"
    first, second = PACK[packing](b"one\n"), PACK[packing](b"two\n")
    path.write_bytes(first + second)
    assert read(path) == ["one\ntwo\n"]
    spoilt = {
        "head of the second stream": first + b"XX" + second[2:],
        "text behind the end": first + b"# end",
        "empty": b"",
    }
    path.write_bytes(spoilt[harm])
    assert "damaged" in message(path)


def test_padding_between_xz_streams_and_behind_the_last_is_none_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress(b"one\n") + bytes(8) + lzma.compress(b"two\n") + bytes(40_000))
    assert read(path) == ["one\ntwo\n"]


def test_the_suffix_below_the_compression_decides() -> None:
    assert inner_suffix(Path("a.b/c.JSONL.gz")) == ".jsonl"
    assert inner_suffix(Path("a.txt")) == ".txt"
    assert inner_suffix(Path("README")) == ""
    assert inner_suffix(Path("dump.xz")) == ""
