"""How a training run that ends early is told to the person who started it."""

from __future__ import annotations

import errno
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console

from lorapre import NonFiniteGradientError
from lorapre.lab import cli_options as opt
from lorapre.lab.errors import TrainingDivergedError, UserError


@contextmanager
def explained(out: Path, console: Console, command: str) -> Iterator[None]:
    """Within this, an interruption, a divergence or a full disk ends ``lorapre COMMAND`` with a word on what to do.

    Raises:
        UserError: as it is; the entry point prints it.
    """
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"Interrupted. {_way_on(out, command)}", soft_wrap=True, markup=False)
        raise typer.Exit(130) from None
    except (NonFiniteGradientError, TrainingDivergedError) as error:
        opt.print_error(
            f"The training has diverged: {error.args[0].partition('. ')[0]}. Start again with a smaller --lr or "
            f"--dense-lr, a longer --warmup, or a --max-grad-norm; {out} keeps the metrics up to here."
        )
        raise typer.Exit(1) from None
    except Exception as error:
        if isinstance(error, UserError) or not _disk_is_full(error):
            raise
        opt.print_error(f"--out {out}: its disk is full. Free some space. {_way_on(out, command)}")
        raise typer.Exit(1) from None


def _way_on(out: Path, command: str) -> str:
    from lorapre.lab.run_folder import RunFolder

    if not RunFolder(out).config.exists():
        return "Nothing was trained."
    return f"What was complete is safe; go on with: lorapre {command} --resume --out {shlex.quote(str(out))}"


def _disk_is_full(error: BaseException) -> bool:
    """Whether ``error`` says so: as an OSError, or in the words of safetensors or torch, whose errors are not."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    text = str(error)
    return "No space left on device" in text or "Disk quota exceeded" in text or "inline_container.cc" in text
