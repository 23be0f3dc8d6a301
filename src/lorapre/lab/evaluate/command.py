"""``lorapre evaluate``: options to configuration, answers to a table."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from lorapre.lab import cli_options as opt
from lorapre.lab.errors import UserError

_QUESTIONS, _ANSWERS = "Questions", "Answers"


def evaluate(
    model: Annotated[
        str, typer.Argument(help="Folder of a model or of a peft adapter, or a hub name.", show_default=False)
    ],
    tasks: Annotated[
        str | None, opt.option("Comma-separated: gsm8k, math500 (default gsm8k,math500).", _QUESTIONS)
    ] = None,
    data: Annotated[
        list[str] | None,
        opt.option(
            "FILE, or TASK=FILE for one of several tasks: .jsonl in the original's format (default: from the hub). "
            "Repeatable.",
            _QUESTIONS,
        ),
    ] = None,
    limit: Annotated[int | None, opt.option("Ask the first so many of each task (default: all).", _QUESTIONS)] = None,
    prompt: Annotated[
        str | None,
        opt.option(
            "task (default: the task's own), boxed (default in a chat), question, plain, qa, alpaca, metamath, or a "
            "text with {question}.",
            _QUESTIONS,
        ),
    ] = None,
    chat: Annotated[
        bool, opt.option("Put the prompt as a user's message in the model's chat template.", _QUESTIONS, "--chat")
    ] = False,
    stop: Annotated[
        list[str] | None,
        opt.option("End an answer where this text begins (default: the prompt's own). Repeatable.", _ANSWERS),
    ] = None,
    max_new_tokens: Annotated[int | None, opt.option("Tokens an answer at most (default 512).", _ANSWERS)] = None,
    temperature: Annotated[float | None, opt.option("Sample at it; 0 (default) is greedy.", _ANSWERS)] = None,
    top_p: Annotated[float | None, opt.option("Sample of so much probability (default 1).", _ANSWERS)] = None,
    seed: Annotated[int | None, opt.option("Of samples (default 0).", _ANSWERS)] = None,
    batch_size: Annotated[int | None, opt.option("Questions at a time (default 16).", opt.RUN)] = None,
    dtype: Annotated[
        str | None, opt.option("float32, bfloat16, or auto (default: bfloat16 on an accelerator).", opt.RUN)
    ] = None,
    second_opinion: Annotated[
        bool, opt.option("Have lm-eval judge the same answers, and report agreement.", opt.RUN, "--second-opinion")
    ] = False,
    out: Annotated[
        Path | None, opt.option("Folder of the evaluation (default runs/evaluate-<digest of the options>).", opt.RUN)
    ] = None,
) -> None:
    """Ask a model mathematical questions, and count the right answers.

    The same command goes on where an interrupted one ended.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("lorapre evaluate: needs the package math-verify. Install it: pip install 'lorapre[evaluate]'.")
    # Slow to import, and not needed for --help.
    from lorapre.lab.evaluate.config import build_evaluate_config
    from lorapre.lab.evaluate.run import run_evaluation
    from lorapre.lab.evaluate.summary import print_results

    options = {
        "model": model,
        "limit": limit,
        "prompt": prompt,
        "chat": chat,
        "stop": stop or None,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "batch_size": batch_size,
        "dtype": dtype,
        "second_opinion": second_opinion,
    }
    given = {name: value for name, value in options.items() if value is not None}
    config = build_evaluate_config(given, "gsm8k,math500" if tasks is None else tasks, data or [])
    console = opt.standard_output()
    out = out or Path("runs") / f"evaluate-{hashlib.sha256(config.to_yaml().encode()).hexdigest()[:8]}"
    try:
        summary = run_evaluation(config, out, console)
    except KeyboardInterrupt:
        console.print(
            f"Interrupted. The answers of whole batches are safe in {out}; the same command goes on from there.",
            soft_wrap=True,
            markup=False,
        )
        raise typer.Exit(130) from None
    print_results(summary, out, console)
