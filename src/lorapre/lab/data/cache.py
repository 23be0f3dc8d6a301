"""The cache folder: where it is, how its files are named, and how they are written."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lorapre.lab.errors import UserError

# Part of every key: raise it whenever the same input would give other files, so that old entries are not read.
FORMAT_VERSION = 1


def default_cache_dir() -> Path:
    """`$LORAPRE_CACHE`, else `$XDG_CACHE_HOME/lorapre`, else `~/.cache/lorapre`."""
    if chosen := os.environ.get("LORAPRE_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lorapre"


def make_key(*parts: object) -> str:
    """A name for what `parts` (anything that JSON holds) describe: 32 hexadecimal digits."""
    text = json.dumps([FORMAT_VERSION, *parts], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Cache:
    """Files in one folder, each written under another name and then renamed.

    A reader sees a whole file or none, also while other processes write the same one. The folder is made when
    the first file is written, so that a filled cache may be read-only.
    """

    folder: Path

    def path(self, name: str) -> Path:
        return self.folder / name

    @contextmanager
    def write(self, name: str) -> Iterator[BinaryIO]:
        """Write `name` through the yielded binary file; nothing appears under that name if the body raises.

        Raises UserError where the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Not tempfile: its files are closed to everyone else, and a cache may be shared.
            temporary = self.folder / f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
            file = temporary.open("xb")
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            with file:
                yield file
            temporary.replace(self.path(name))
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def write_json(self, name: str, value: object) -> None:
        with self.write(name) as file:
            file.write(json.dumps(value, indent=1, sort_keys=True).encode())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The object in `name`; None where there is no such file, or no JSON object in it."""
        try:
            value = json.loads(self.path(name).read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        except OSError as error:
            raise self._unwritable(error) from error
        return value if isinstance(value, dict) else None

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"the cache folder {self.folder} cannot be used ({error.strerror or error}); set the environment "
            "variable LORAPRE_CACHE, or cache_dir, to a folder that can be written and has room."
        )
