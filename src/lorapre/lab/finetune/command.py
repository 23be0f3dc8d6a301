"""``lorapre finetune``: its options, and what it does with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from lorapre.lab import cli_options as opt
from lorapre.lab.cli_errors import explained
from lorapre.lab.config import check_as_recorded, parse_options, parse_rank
from lorapre.lab.errors import UserError

MODEL, METHOD, TRAINING, RUN = "Model and data", "Method", "Training", "Run"


def finetune(
    model: Annotated[
        str | None, opt.option("tiny (default: made here), a folder, or a hub name of a causal model.", MODEL)
    ] = None,
    dtype: Annotated[str | None, opt.option("Of the weights: float32 (default) or bfloat16.", MODEL)] = None,
    data: Annotated[
        str | None,
        opt.option(
            "arithmetic (default: made here), metamathqa, gsm8k, alpaca, or files (quote globs) of JSON lines with "
            "prompt and response, or messages.",
            MODEL,
        ),
    ] = None,
    data_files: Annotated[
        list[str] | None,
        opt.option("Read these (json, jsonl, parquet) in the format of --data, not the hub. Repeatable.", MODEL),
    ] = None,
    valid_data: Annotated[
        list[str] | None, opt.option("Files to validate on, instead of a held-out part. Repeatable.", MODEL)
    ] = None,
    valid_examples: Annotated[int | None, opt.option("Examples to validate on, at most (default 200).", MODEL)] = None,
    max_examples: Annotated[int | None, opt.option("Examples to train on, at most (default: all).", MODEL)] = None,
    template: Annotated[
        str | None,
        opt.option("auto (default: the tokenizer's chat template, if any), chat, qa, alpaca or plain.", MODEL),
    ] = None,
    chat_template: Annotated[str | None, opt.option("File with a chat template in Jinja.", MODEL)] = None,
    max_length: Annotated[int | None, opt.option("Tokens an example, at most (default 1024).", MODEL)] = None,
    packing: Annotated[bool | None, opt.option("Join short examples to one sequence.", MODEL)] = None,
    learn_prompts: Annotated[
        bool | None, opt.option("Loss on prompts too; by default on the answers alone.", MODEL)
    ] = None,
    method: Annotated[
        str | None,
        opt.option(
            "lorapre-adamw (default), full-adamw or any other that `lorapre optimizers` lists, on all weights; or "
            "lora, rslora, lora+, dora, lora-pro, loft.",
            METHOD,
        ),
    ] = None,
    rank: Annotated[
        str | None,
        opt.option("Of the momentum, or of the adapter that --method brings (default 8; fractions work).", METHOD),
    ] = None,
    settings: Annotated[
        list[str] | None,
        opt.option("NAME=VALUE: an option of the optimizer, as in pretrain. Repeatable.", METHOD, "--set"),
    ] = None,
    adapter: Annotated[
        str | None, opt.option("Train lora, rslora or dora with --method's optimizer, not all weights.", METHOD)
    ] = None,
    adapter_rank: Annotated[int | None, opt.option("Of --adapter; --rank is the momentum's then.", METHOD)] = None,
    alpha: Annotated[int | None, opt.option("The adapter's scale (default twice its rank).", METHOD)] = None,
    dropout: Annotated[float | None, opt.option("The adapter's dropout (default 0).", METHOD)] = None,
    target_modules: Annotated[
        list[str] | None, opt.option("Modules to adapt (default: all linear, not the head). Repeatable.", METHOD)
    ] = None,
    loraplus_ratio: Annotated[float | None, opt.option("Of B's rate to A's in lora+ (default 16).", METHOD)] = None,
    lr: Annotated[
        float | None, opt.option("Peak learning rate (default 2e-5; for tiny, the optimizer's own).", METHOD)
    ] = None,
    dense_lr: Annotated[
        float | None, opt.option("Of embeddings, head and norms (default: as --lr; for tiny 4e-3).", METHOD)
    ] = None,
    beta1: Annotated[float | None, opt.option("Decay of the first moment (default 0.9).", METHOD)] = None,
    beta2: Annotated[float | None, opt.option("Decay of the second moment (default 0.999).", METHOD)] = None,
    weight_decay: opt.WeightDecayOption = None,
    max_grad_norm: opt.MaxGradNormOption = None,
    schedule: opt.ScheduleOption = None,
    warmup: Annotated[float | None, opt.option("Share of steps to warm up in (default 0.03).", TRAINING)] = None,
    min_lr_ratio: Annotated[
        float | None, opt.option("Share of the peak at which cosine and linear end (default 0).", TRAINING)
    ] = None,
    batch_size: Annotated[
        int | None, opt.option("Sequences a step, over all processes (default 32).", TRAINING)
    ] = None,
    accumulation: opt.AccumulationOption = None,
    epochs: Annotated[float | None, opt.option("Passes over the data (default 1; arithmetic 15).", TRAINING)] = None,
    steps: Annotated[int | None, opt.option("Optimizer steps, instead of epochs.", TRAINING)] = None,
    bf16: Annotated[bool | None, opt.option("Autocast to bfloat16, whatever the weights' dtype.", TRAINING)] = None,
    checkpointing: Annotated[
        bool | None,
        opt.option("Gradient checkpointing: compute activations twice, to hold fewer.", TRAINING),
    ] = None,
    log_every: opt.LogEveryOption = None,
    eval_every: Annotated[int | None, opt.option("Steps between validations (default 20 %).", RUN)] = None,
    save_every: Annotated[int | None, opt.option("Steps between checkpoints (default 20 %).", RUN)] = None,
    keep_checkpoints: Annotated[int | None, opt.option("Checkpoints to keep, at least 2 (default 2).", RUN)] = None,
    answers: Annotated[
        int | None,
        opt.option("Held-out prompts to answer before and after (default 0; arithmetic all).", RUN),
    ] = None,
    seed: Annotated[int | None, opt.option("Of adapters, factors and data order (default 0).", RUN)] = None,
    preset: Annotated[
        str | None, opt.option("The paper's protocol: metamath-llama2-7b, metamath-llama3.1-8b.", RUN)
    ] = None,
    config: Annotated[
        Path | None, opt.option("YAML file of options, such as a run's config.yaml; the command line wins.", RUN)
    ] = None,
    out: Annotated[Path | None, opt.option("Folder of the run (default runs/finetune-<method>-<time>).", RUN)] = None,
    resume: Annotated[bool, opt.option("Go on with the interrupted run in --out.", RUN, "--resume")] = False,
    merge: Annotated[
        bool, opt.option("Write merged/ too: after training, or from the finished run in --out.", RUN, "--merge")
    ] = False,
    dry_run: Annotated[bool, opt.option("Print model, memory, tokens and steps, and stop.", RUN, "--dry-run")] = False,
) -> None:
    """Fine-tune a language model with LoRA-Pre, other optimizers, or adapters.

    Without options: a tiny model that is made here learns to add, in about a minute.
    """
    options = _given(locals())
    if settings:
        options["options"] = parse_options(settings)
    _need_packages()
    # Slow to import, and not needed for --help.
    from lorapre.lab.finetune import job
    from lorapre.lab.finetune.config import build_finetune_config
    from lorapre.lab.finetune.report import print_dry_run, print_summary
    from lorapre.lab.pretrain import default_out

    console = opt.standard_output()
    if out is not None and set(options) == {"merge"} and not resume and job.run_folder(out).config.exists():
        merged = _merged(out, {"--preset": preset, "--config": config, "--dry-run": dry_run})
        console.print(f"merged model: {merged}", soft_wrap=True, markup=False)
        return
    if resume:
        wanted = _resumed(out, options, preset, config)
    else:
        wanted = build_finetune_config(options, preset=preset, config_file=config)
    if dry_run:
        print_dry_run(wanted, console)
        return
    out = out or default_out(f"finetune-{wanted.method}")
    with explained(out, console, job.COMMAND):
        summary = job.run_finetuning(wanted, out, console, resume=resume)
    print_summary(summary, out, console)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, from the command's ``locals()``."""
    own = {"settings", "preset", "config", "out", "resume", "dry_run", "rank"}
    # By identity: 0 equals False, and is a value.
    options = {
        name: value
        for name, value in values.items()
        if name not in own and value is not None and value is not False and value != []
    }
    # False is something to say of those whose default is not.
    options |= {name: values[name] for name in _FLAGS if values[name] is not None}
    if values["rank"] is not None:
        options["rank"] = parse_rank(values["rank"], f"--rank {values['rank']}")
    return options


_FLAGS = ("packing", "learn_prompts", "bf16", "checkpointing")
#: Two ways to give the length of a run, of which the configuration takes one.
_LENGTHS = ("steps", "epochs")


def _need_packages() -> None:
    try:
        import peft  # noqa: F401
        import trl  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"lorapre finetune: needs the package {error.name}, which is not installed. Install what it takes: pip "
            "install 'lorapre[finetune]'."
        ) from None


def _merged(out: Path, others: dict[str, Any]) -> Path:
    """The merged model of the finished run in ``out``; ``others`` are options that mean nothing to that."""
    from lorapre.lab.finetune.job import run_folder
    from lorapre.lab.finetune.saving import merge_adapter

    folder = run_folder(out)
    if not folder.summary.exists():
        raise UserError(
            f"--merge --out {out}: the run there is unfinished. Finish and merge it with `lorapre finetune --resume "
            f"--merge --out {out}`, or give another --out to start one."
        )
    given = [name for name, value in others.items() if value]
    if given:
        raise UserError(
            f"{' '.join(given)}: --merge --out {out} merges the adapter of the finished run there, which has its own "
            "options. Leave the others out, or give another --out to start a run."
        )
    return merge_adapter(folder)


def _resumed(out: Path | None, options: dict[str, Any], preset: str | None, config: Path | None) -> Any:
    """The configuration of the run in ``out``, with which nothing in ``options`` disagrees."""
    from lorapre.lab.finetune.config import FinetuneConfig, build_finetune_config
    from lorapre.lab.finetune.job import load_resumable
    from lorapre.lab.finetune.methods import find_method
    from lorapre.lab.optimizers import read_options

    if out is None:
        raise UserError("--resume: which run? Give its folder with --out.")
    if preset is not None or config is not None:
        raise UserError("--resume: takes all options from the run's config.yaml. Leave --preset and --config out.")
    settings = load_resumable(out)
    given = read_options(find_method(settings).entry, options.get("options", {}))

    def build(together: dict[str, Any]) -> FinetuneConfig:
        return build_finetune_config({**together, "options": {**settings.options, **given}})

    wanted = check_as_recorded(settings, options, out, _LENGTHS, build, free=("merge",))
    return settings.model_copy(update={"merge": wanted.merge})
