"""Where documents come from: the standard library, or files that paths, folders and globs name.

A source can say what it is without being read (`identity`, for the cache) and can be read any number of times.
Datasets of the Hugging Face hub are streams, see `hub.py`.
"""

from __future__ import annotations

import glob
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from lorapre.lab.data.readers import JSON_SUFFIXES, inner_suffix, read_documents
from lorapre.lab.errors import UserError

DataKind = Literal["stdlib", "files", "hub"]
HUB_PREFIX = "hf:"

# In a folder only these are read; a file that is named, by itself or by a glob, may have any other suffix.
# fmt: off
TEXT_SUFFIXES = frozenset({
    ".txt", ".text", ".md", ".markdown", ".rst", ".org", ".tex", ".adoc", ".html", ".htm", ".xml", ".csv",
    ".tsv", ".log", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".kt",
    ".scala", ".js", ".ts", ".jsx", ".tsx", ".css", ".sh", ".sql", ".rb", ".php", ".pl", ".lua", ".jl",
    ".r", ".f90", ".hs", ".ml", ".lisp", ".el", ".toml", ".yaml", ".yml", ".ini", ".cfg",
})
# fmt: on
# fmt: off
_REFUSED_SUFFIXES = frozenset({
    ".zip", ".tar", ".tgz", ".txz", ".tbz2", ".7z", ".rar", ".pdf", ".docx", ".epub", ".odt", ".arrow",
    ".npy", ".npz", ".pt", ".pth", ".bin", ".safetensors", ".pickle", ".pkl", ".sqlite", ".db", ".lz4",
    ".br", ".lzma",
})
# fmt: on
_STDLIB_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


class Source(Protocol):
    """Documents that can be read again and again, in the same order."""

    @property
    def label(self) -> str:
        """What it is, in a few words, for people."""

    @property
    def remark(self) -> str:
        """What was left out, for people; empty if nothing. Complete once `documents` has been read through."""

    def identity(self) -> list[object]:
        """What the cache key depends on; cheap: reads no document."""

    def documents(self) -> Iterator[str]:
        """The documents in order, none empty. Raises UserError where one cannot be read."""


def check_data_spec(data: Sequence[str]) -> DataKind:
    """Which of the three kinds `data` is, judged by its wording; UserError if it is empty or mixes kinds."""
    if isinstance(data, str):
        raise TypeError(f"data is a sequence of entries; write [{data!r}]")
    if not data or not all(entry.strip() for entry in data):
        raise UserError(
            "data is empty; give 'stdlib', one or more files, folders or globs, or 'hf:<dataset>[:config]'."
        )
    alone = [entry for entry in data if entry == "stdlib" or entry.startswith(HUB_PREFIX)]
    if not alone:
        return "files"
    if len(data) > 1:
        raise UserError(
            f"data mixes {alone[0]!r} with other entries ({', '.join(data)}); 'stdlib' and 'hf:...' stand alone, "
            "only files, folders and globs can be combined."
        )
    return "stdlib" if alone[0] == "stdlib" else "hub"


class StandardLibrary:
    """The Python source of the running interpreter's standard library, one document a file.

    Tests and installed packages are left out; so are files that are not UTF-8 (some test exactly that) and
    empty ones.
    """

    def __init__(self) -> None:
        self.root = Path(sysconfig.get_paths()["stdlib"])
        self.files = sorted(self._find(), key=lambda path: path.relative_to(self.root).as_posix())
        self._undecodable = 0
        if not self.files:
            raise UserError(
                f"data='stdlib': there is no Python source below {self.root} (an interpreter without its sources, "
                "or with a zipped library); give files, folders or globs instead."
            )

    def _find(self) -> Iterator[Path]:
        for folder, subfolders, names in os.walk(self.root):
            subfolders[:] = [name for name in subfolders if name not in _STDLIB_LEFT_OUT]
            paths = (Path(folder, name) for name in names if name.endswith(".py"))
            yield from (path for path in paths if path.is_file())  # not a link to a file that is gone

    @property
    def label(self) -> str:
        return f"standard library of Python {'.'.join(platform.python_version_tuple()[:2])}"

    @property
    def remark(self) -> str:
        count = self._undecodable
        return f"{count:,} file{'s' * (count > 1)} not UTF-8 left out" if count else ""

    def identity(self) -> list[object]:
        facts = []
        for path in self.files:
            stat = path.stat()
            facts.append([path.relative_to(self.root).as_posix(), stat.st_size, stat.st_mtime_ns])
        return ["stdlib", platform.python_version(), facts]

    def documents(self) -> Iterator[str]:
        undecodable = 0
        for path in self.files:
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                undecodable += 1
                continue
            except OSError as error:
                raise UserError(
                    f"data='stdlib': {path} cannot be read ({error.strerror}); repair its permissions, or give "
                    "files, folders or globs instead."
                ) from error
            if text and not text.isspace():
                yield text
        self._undecodable = undecodable


@dataclass(frozen=True)
class TextFiles:
    """Files of text; make one with `find_files`."""

    files: tuple[Path, ...]
    text_field: str
    other_files: int
    other_folders: int = 0

    @property
    def label(self) -> str:
        return self.files[0].name if len(self.files) == 1 else f"{len(self.files):,} files"

    @property
    def remark(self) -> str:
        files, folders = self.other_files, self.other_folders
        left_out = [f"{files:,} file{'s' * (files > 1)} of other kinds"] if files else []
        left_out += [f"{folders:,} folder{'s' * (folders > 1)} that a glob matches"] if folders else []
        return f"{' and '.join(left_out)} left out" if left_out else ""

    def identity(self) -> list[object]:
        facts: list[object] = []
        for path in self.files:
            stat = path.stat()
            facts.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
        return ["files", self.text_field, facts]

    def documents(self) -> Iterator[str]:
        for path in self.files:
            yield from read_documents(path, self.text_field)


def find_files(entries: Sequence[str], text_field: str, argument: str) -> TextFiles:
    """Expand paths, folders and globs; `argument` is the name of the argument they came from.

    The order is that of `entries`, sorted within each; a file that is named twice counts once.
    Raises UserError that names the entry where it matches nothing that can be read as text.
    """
    found: dict[Path, Path] = {}
    other_files = other_folders = 0
    for entry in entries:
        if not entry.strip():
            raise UserError(f"{argument}: an entry is empty; give a file, a folder or a glob, or leave it out.")
        path = Path(entry).expanduser()
        try:
            folder, file, there = path.is_dir(), path.is_file(), path.exists()
        except OSError as error:  # a name that is too long, or a folder on the way that is closed
            raise UserError(f"{argument}: {entry[:200]!r} cannot be read ({error.strerror}); correct it.") from error
        if folder:
            files, others = _below(path, argument)
            other_files += others
        elif file:
            files = [path]
        elif there:
            raise UserError(
                f"{argument}: {entry!r} is a pipe or a device, and data is read more than once; write it to a file "
                "and name that."
            )
        else:
            files, folders = _expand_glob(entry, argument)
            other_folders += folders
        for chosen in files:
            if inner_suffix(chosen) in _REFUSED_SUFFIXES:
                raise UserError(
                    f"{argument}: {chosen} is of a kind ({inner_suffix(chosen)}) that is not read; unpack or convert "
                    "it to .txt, .jsonl or .parquet, or leave it out."
                )
            found.setdefault(chosen.resolve(), chosen)
    return TextFiles(tuple(found.values()), text_field, other_files, other_folders)


def check_disjoint(train: TextFiles, valid: TextFiles) -> None:
    """UserError if a file is in both: the model would be validated on what it was trained on."""
    seen = {path.resolve() for path in train.files}
    for path in valid.files:
        if path.resolve() in seen:
            raise UserError(
                f"{path} is in data and in valid_data; leave it out of one of them (a glob in data may match it)."
            )


def _below(folder: Path, argument: str) -> tuple[list[Path], int]:
    """Supported files below `folder`, sorted, and how many others there are; hidden ones are not looked at."""
    files = [
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    supported = {*TEXT_SUFFIXES, *JSON_SUFFIXES, ".parquet"}
    chosen = sorted(path for path in files if inner_suffix(path) in supported)
    if not chosen:
        raise UserError(
            f"{argument}: the folder {folder} holds no file of a known kind (.txt, .md, .py, .jsonl, .parquet) "
            f"among {len(files):,} files; name the files themselves, or use a glob such as '{folder}/**/*.xyz'."
        )
    return chosen, len(files) - len(chosen)


def _expand_glob(entry: str, argument: str) -> tuple[list[Path], int]:
    """The files that `entry` matches, sorted, and how many folders that hold none of them it matches too."""
    # Not Path.glob: it takes no absolute pattern and does match hidden files.
    found = glob.glob(str(Path(entry).expanduser()), recursive=True)  # noqa: PTH207
    matches = [Path(match) for match in sorted(found)]
    files = [path for path in matches if path.is_file()]
    if files:
        looked_into = {folder for file in files for folder in file.parents}
        return files, sum(path.is_dir() and path not in looked_into for path in matches)
    if matches:
        raise UserError(
            f"{argument}: {entry!r} matches only folders; write '{entry.rstrip('/')}/*' or name one folder."
        )
    what = "matches no file" if glob.has_magic(entry) else "does not exist"
    raise UserError(
        f"{argument}: {entry!r} {what} (looked from {Path.cwd()}); correct the path, or put a glob in quotes so "
        "that the shell leaves it alone."
    )
