"""What transformers, trl and peft would print, and no user of a recipe can act on."""

from __future__ import annotations

import logging
import warnings

import datasets
import transformers


def keep_quiet() -> None:
    """Silence their progress bars, their notes, and what they deprecate in each other."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.disable_progress_bar()
    for name in ("accelerate", "trl", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("transformers", "trl", "peft"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    # Said once, in the plan's own words and with what to do about it.
    warnings.filterwarnings("ignore", message=".* compresses nothing", category=UserWarning)
