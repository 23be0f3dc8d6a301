"""What `data` names, and how it is divided."""

from __future__ import annotations

import hashlib
import os
import platform
import random
import sysconfig
from pathlib import Path

import pytest

from lorapre.lab.data import check_data_spec, split_documents
from lorapre.lab.data.sources import StandardLibrary, check_disjoint, find_files
from lorapre.lab.errors import UserError


def names(entries: list[str], root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in find_files(entries, "text", "data").files]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.jsonl.gz", "sub/c.md", "sub/deep/d.py", "sub/picture.png", ".hidden.txt", "[x].txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path


def test_a_folder_gives_its_supported_files_sorted(tree: Path) -> None:
    assert names([str(tree)], tree) == ["[x].txt", "a.jsonl.gz", "b.txt", "sub/c.md", "sub/deep/d.py"]
    assert find_files([str(tree)], "text", "data").remark == "1 file of other kinds left out"


def test_globs_are_expanded_sorted_and_each_file_counts_once(tree: Path) -> None:
    assert names([f"{tree}/**/*.[mp]*"], tree) == ["sub/c.md", "sub/deep/d.py", "sub/picture.png"]
    assert names([f"{tree}/b.*", f"{tree}/*.txt"], tree) == ["b.txt", "[x].txt"]
    assert names([f"{tree}/[x].txt"], tree) == ["[x].txt"]


def test_folders_that_a_glob_matches_beside_files_are_counted(tree: Path) -> None:
    assert find_files([f"{tree}/*"], "text", "data").remark == "1 folder that a glob matches left out"
    assert find_files([f"{tree}/**"], "text", "data").remark == ""


def test_paths_are_relative_to_the_working_folder(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree / "sub")
    assert [path.as_posix() for path in find_files(["*.md", "../b.txt"], "text", "data").files] == ["c.md", "../b.txt"]


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ("{}/*.zip", ["data", "*.zip", "matches no file"]),
        ("{}/nothing.txt", ["nothing.txt", "does not exist"]),
        ("{}/sub/d*", ["matches only folders"]),
        ("{}/empty", ["holds no file of a known kind", "1 files"]),
        ("{}/x.tar.gz", [".tar", "unpack"]),
        ("{}/pipe", ["pipe", "more than once", "file"]),
        (" ", ["entry is empty"]),
        pytest.param("words and no name " * 300, ["data", "File name too long"], id="text"),
    ],
)
def test_an_entry_that_gives_nothing_is_named(tree: Path, entry: str, parts: list[str]) -> None:
    (tree / "empty").mkdir()
    (tree / "empty" / "a.png").touch()
    (tree / "x.tar.gz").touch()
    os.mkfifo(tree / "pipe")
    with pytest.raises(UserError) as caught:
        find_files([entry.format(tree)], "text", "data")
    assert [part for part in parts if part not in str(caught.value)] == []


def test_a_file_in_data_and_in_valid_data_is_an_error(tree: Path) -> None:
    with pytest.raises(UserError, match=r"b\.txt is in data and in valid_data"):
        check_disjoint(
            find_files([f"{tree}/*.txt"], "text", "data"), find_files([f"{tree}/sub/../b.txt"], "text", "valid_data")
        )


def test_the_identity_of_files_follows_their_size_and_time(tree: Path) -> None:
    def identity() -> list[object]:
        return find_files([f"{tree}/b.txt"], "text", "data").identity()

    before = identity()
    assert identity() == before
    (tree / "b.txt").write_text("longer")
    assert identity() != before


@pytest.mark.parametrize(
    ("data", "kind"), [(["stdlib"], "stdlib"), (["hf:a/b:en"], "hub"), (["a.txt", "b/*.py"], "files")]
)
def test_the_kind_of_data(data: list[str], kind: str) -> None:
    assert check_data_spec(data) == kind


@pytest.mark.parametrize("data", [[], [""], ["stdlib", "a.txt"], ["a.txt", "hf:x"], ["stdlib", "stdlib"]])
def test_empty_or_mixed_data_is_an_error(data: list[str]) -> None:
    with pytest.raises(UserError, match="stdlib"):
        check_data_spec(data)


def test_one_string_as_data_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="write"):
        check_data_spec("stdlib")


def test_the_standard_library_against_an_independent_walk() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    expected, undecodable = [], 0
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if left_out & set(path.relative_to(root).parts[:-1]):
            continue
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            undecodable += 1
            continue
        if text.strip():
            expected.append(hashlib.sha256(text.encode()).hexdigest())
    source = StandardLibrary()
    found = [hashlib.sha256(text.encode()).hexdigest() for text in source.documents()]
    assert found == expected
    assert len(found) > 300
    assert source.remark == (f"{undecodable:,} file{'s' * (undecodable > 1)} not UTF-8 left out" if undecodable else "")
    assert source.label == "standard library of Python " + platform.python_version().rpartition(".")[0]


def test_undecodable_files_of_the_standard_library_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="no Python source"):
        StandardLibrary()
    (tmp_path / "a.py").write_bytes(b"x = '\xff'")
    (tmp_path / "b.py").write_bytes(b"")
    (tmp_path / "c.py").write_bytes(b"y")
    (tmp_path / "link.py").symlink_to(tmp_path / "gone.py")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "d.py").write_bytes(b"z")
    source = StandardLibrary()
    assert list(source.documents()) == ["y"]
    assert len(source.identity()) == 3
    assert source.remark == "1 file not UTF-8 left out"


TEXTS = [f"document {number}" for number in range(2000)]


def held_out(documents: list[str], fraction: float) -> list[str]:
    split = split_documents(documents, fraction)
    return [text for side, text in split.apply(documents) if side == "valid"]


def test_the_share_that_is_held_out_and_its_independence_of_order() -> None:
    out = held_out(TEXTS, 0.05)
    assert 0.035 < len(out) / len(TEXTS) < 0.065
    shuffled = random.Random(1).sample(TEXTS, len(TEXTS))
    assert sorted(held_out(shuffled, 0.05)) == sorted(out)
    # A document stays where it is whatever is beside it, and copies stay together.
    assert set(held_out(TEXTS[:1000] * 2, 0.05)) == set(out) & set(TEXTS[:1000])
    # A larger share holds out the same and more.
    assert set(out) < set(held_out(TEXTS, 0.2))


def test_the_rule_is_blake2b_of_the_text() -> None:
    expected = {
        text for text in TEXTS if int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) / 2**64 < 0.05
    }
    assert set(held_out(TEXTS, 0.05)) == expected


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("documents", [["a", "b"], ["a", "b", "a"], TEXTS[:7]])
def test_each_side_has_a_document_however_small_the_share(documents: list[str], fraction: float) -> None:
    split = split_documents(documents, fraction)
    sides = list(split.apply(documents))
    assert {side for side, _ in sides} == {"train", "valid"}
    assert [text for _, text in sides] == documents
    assert (split.documents, split.utf8_bytes) == (len(documents), sum(map(len, documents)))
    assert not {t for s, t in sides if s == "train"} & {t for s, t in sides if s == "valid"}


@pytest.mark.parametrize(
    ("text", "fraction", "parts"),
    [
        ("0123\n5678\n0123\n5678\n", 0.25, ("0123\n5678\n0123\n", "5678\n")),
        ("0123\n5678\n0123\n5678\n", 0.3, ("0123\n5678\n", "0123\n5678\n")),
        ("0123456789\nab", 0.9, ("0123456789\n", "ab")),
        ("0123456789", 0.3, ("0123456", "789")),
        ("012345678\n", 0.3, ("0123456", "78\n")),
        ("ab", 0.01, ("a", "b")),
    ],
)
def test_a_single_document_is_cut_near_its_end(text: str, fraction: float, parts: tuple[str, str]) -> None:
    split = split_documents([text], fraction)
    assert split.sides(text) == [("train", parts[0]), ("valid", parts[1])]


def test_no_document_or_one_that_cannot_be_cut_is_an_error() -> None:
    with pytest.raises(UserError, match="holds no text"):
        split_documents([], 0.05)
    with pytest.raises(UserError, match="single document of 1 character"):
        split_documents(["a"], 0.05)
