"""From a comparison's folder to the `Comparison` that tables, figures and pages show. Reads only that folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorapre.lab.compare.config import CompareConfig, make_planners
from lorapre.lab.compare.contestants import Contestant
from lorapre.lab.compare.diagnostics import momentum_curves
from lorapre.lab.compare.folder import ArenaFolder
from lorapre.lab.compare.plan import Job, Planner
from lorapre.lab.compare.results import Comparison
from lorapre.lab.compare.rows import build_rows
from lorapre.lab.compare.runs import Outcome, losses_of, read_json
from lorapre.lab.config import PretrainConfig, read_yaml, validated
from lorapre.lab.errors import UserError
from lorapre.lab.optimizers.entry import DENSE_LR


def collect(folder: ArenaFolder) -> Comparison:
    """Everything that the runs in ``folder`` say.

    Raises:
        UserError: there is no comparison, none of its runs has begun, or a file of it is damaged.
    """
    if not folder.begun():
        raise UserError(f"--out {folder.path}: holds no comparison, as {folder.config} does not exist.")
    if not folder.plan.exists():
        raise UserError(f"--out {folder.path}: none of its runs has begun. Run the same command without --render.")
    config = validated(CompareConfig, [(str(folder.config), read_yaml(folder.config))])
    plan = read_json(folder.plan, "The command that made the comparison writes it anew, and repeats no finished run.")
    # Plans from before there were options have none.
    contestants = tuple(Contestant(c["optimizer"], c["rank"], c.get("options", {})) for c in plan["contestants"])
    outcomes = folder.runs.outcomes()
    planners = make_planners(config, contestants, plan["search"])
    keys = {contestant.key for contestant in contestants}
    rows = build_rows(contestants, planners, outcomes, folder.timings.outcomes())
    return Comparison(
        title=f"{config.training.model} on {plan['data']}",
        command=plan["command"],
        settings=_settings(config, plan),
        environment=_environment(plan),
        bigram_loss=plan["bigram_loss"],
        rows=rows,
        # An earlier session may have made more seeds than this one asks for: the rows leave them out, figures too.
        runs=tuple(
            outcome.to_run()
            for job, outcome in outcomes.items()
            if job.contestant in keys and job.seed in config.seed_list()
        ),
        notes=(*plan["notes"], *_incomplete(planners, outcomes, plan)),
        momentum=momentum_curves(rows, planners, folder.runs),
    )


def _incomplete(planners: Mapping[str, Planner], outcomes: Mapping[Job, Outcome], plan: dict[str, Any]) -> list[str]:
    if plan["complete"]:
        return []
    losses = losses_of(outcomes)
    asked = sum(len(planner.asks(losses)) for planner in planners.values())
    return [f"This comparison was interrupted: at least {asked} run(s) are missing."]


def _settings(config: CompareConfig, plan: dict[str, Any]) -> dict[str, Any]:
    training: PretrainConfig = config.training
    tokens = training.total_steps * training.tokens_per_step
    precision = "bf16 autocast, float32 weights" if training.bf16 else "float32"
    return {
        "model": f"{training.model}, {plan['parameters']:,} parameters",
        "data": plan["data"],
        "tokens a run": f"{tokens:,} ({training.total_steps:,} steps of {training.batch_size} x "
        f"{training.sequence_length})",
        "schedule": f"{training.schedule}, {training.warmup:.0%} warm-up, down to {training.min_lr_ratio:.0%}",
        "betas": f"{training.beta1}, {training.beta2}",
        "weight decay": training.weight_decay,
        "gradient clipping": training.max_grad_norm or "none",
        "embeddings, head, norms": f"AdamW, learning rate {training.dense_lr or DENSE_LR:g}, under every optimizer",
        "precision": precision + (", compiled" if training.compile else ""),
        "learning rates": "the registry's grid of each optimizer, grown where the best was at its edge"
        if config.lr_grid == "auto"
        else config.lr_grid,
        "search": plan["search_description"],
        "seeds": ", ".join(map(str, config.seed_list())),
        "runs at a time on a device": config.jobs_per_device,
        **({"momentum measured": f"every {training.diagnose} steps"} if training.diagnose else {}),
    }


def _environment(plan: dict[str, Any]) -> dict[str, Any]:
    environment = plan["environment"]
    return {
        "hardware": environment["hardware"],
        "date": environment["date"],
        **environment["versions"],
        **plan["packages"],
    }
