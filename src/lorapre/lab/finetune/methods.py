"""What ``--method`` names: an optimizer on all weights, or an adapter with its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim import Optimizer

from lorapre.lab.baselines.loft import LoFT
from lorapre.lab.baselines.loft import state_bytes as loft_state_bytes
from lorapre.lab.baselines.lora_pairs import lora_pair_groups
from lorapre.lab.baselines.lora_pro import LoRAPro
from lorapre.lab.baselines.lora_pro import state_bytes as lora_pro_state_bytes
from lorapre.lab.config import PretrainConfig
from lorapre.lab.errors import UserError
from lorapre.lab.finetune.config import TINY_MODEL, Adapter, FinetuneConfig
from lorapre.lab.optimizers import OPTIMIZERS, OptimizerEntry, find_optimizer, matrix_parameters
from lorapre.lab.optimizers.beside import adam_options
from lorapre.routing import matrix_view

#: Of B's learning rate to A's: 2^4, which the authors of LoRA+ (arXiv 2402.12354, section 5) advise.
LORAPLUS_RATIO = 16.0
#: What weights that know something already are fine-tuned at, in the paper and in most protocols.
PRETRAINED_LR = 2e-5

#: Makes the optimizer of a model with adapters, at a learning rate.
AdapterBuild = Callable[[PeftModel, FinetuneConfig, float], Optimizer]


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Attributes:
        name: what ``--method`` takes.
        optimizer: row of the registry that moves what is trained, or comes nearest to ``build`` in state.
        adapter: kind of adapter that the method itself brings, None where ``--adapter`` decides.
        build: makes an optimizer that is no row of the registry.
        state: bytes that ``build``'s optimizer holds for a model with adapters, where they are not the row's.
        clips: the optimizer itself keeps to ``--max-grad-norm``, by a norm of its own.
    """

    name: str
    optimizer: str
    adapter: Adapter | None = None
    build: AdapterBuild | None = None
    state: Callable[[nn.Module], int] | None = None
    clips: bool = False

    @property
    def entry(self) -> OptimizerEntry:
        """The row of the registry."""
        return OPTIMIZERS[self.optimizer]


def _loraplus(model: PeftModel, config: FinetuneConfig, lr: float) -> Optimizer:
    ratio = LORAPLUS_RATIO if config.loraplus_ratio is None else config.loraplus_ratio
    options = {
        "betas": (config.beta1, config.beta2),
        "eps": 1e-8,
        "loraplus_weight_decay": config.weight_decay,
        "loraplus_lr_embedding": lr,
    }
    optimizer: Optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=ratio, **options
    )
    return optimizer


def _pair_options(config: FinetuneConfig, lr: float) -> dict[str, Any]:
    return {"lr": lr, "betas": (config.beta1, config.beta2), "eps": 1e-8, "weight_decay": config.weight_decay}


def _lora_pro(model: PeftModel, config: FinetuneConfig, lr: float) -> Optimizer:
    return LoRAPro(lora_pair_groups(model), **_pair_options(config, lr))


def _loft(model: PeftModel, config: FinetuneConfig, lr: float) -> Optimizer:
    return LoFT(lora_pair_groups(model), max_grad_norm=config.max_grad_norm or None, **_pair_options(config, lr))


def _lora_pro_state(model: nn.Module) -> int:
    return lora_pro_state_bytes(lora_pair_groups(model))


def _loft_state(model: nn.Module) -> int:
    return loft_state_bytes(lora_pair_groups(model))


#: Methods of adapters.
_ADAPTER_METHODS = (
    Method("lora", "adamw", "lora"),  # arXiv 2106.09685
    Method("rslora", "adamw", "rslora"),  # arXiv 2312.03732
    Method("lora+", "adamw", "lora", _loraplus),  # arXiv 2402.12354
    Method("dora", "adamw", "dora"),  # arXiv 2402.09353
    Method("lora-pro", "adamw", "lora", _lora_pro, _lora_pro_state),  # arXiv 2407.18242
    Method("loft", "adamw", "lora", _loft, _loft_state, clips=True),  # arXiv 2505.21289
)

#: Every optimizer of the registry but those that replace the weights by factors, which trained weights are not; and
#: the adapters.
METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        *(
            Method("full-adamw" if name == "adamw" else name, name)
            for name, entry in OPTIMIZERS.items()
            if entry.prepare is None
        ),
        *_ADAPTER_METHODS,
    )
}


def find_method(config: FinetuneConfig) -> Method:
    """The method of ``config``, whose other options fit to it.

    Raises:
        UserError: there is none, its package is not installed, or an option means nothing to it.
    """
    if config.method not in METHODS:
        raise UserError(f"--method {config.method}: there is no such method. Choose one of {', '.join(METHODS)}.")
    method = METHODS[config.method]
    find_optimizer(method.optimizer, "--method")
    brings = method.adapter is not None
    if brings and config.adapter is not None:
        raise UserError(
            f"--adapter {config.adapter}: --method {method.name} brings its own adapter. Leave it out, or name the "
            "optimizer that moves the adapter with --method."
        )
    if brings and config.adapter_rank is not None:
        raise UserError(f"--adapter-rank {config.adapter_rank}: --method {method.name} takes its rank from --rank.")
    if brings and config.dense_lr is not None:
        raise UserError(
            f"--dense-lr {config.dense_lr}: --method {method.name} trains an adapter alone, at --lr. Leave it out of "
            "the command, or of the file that --config names."
        )
    if brings and not isinstance(config.rank, int):
        raise UserError(f"--rank {config.rank}: an adapter's rank is a whole number. Give one such as 8.")
    if adapter_kind(config, method) is None:
        for name in ("adapter_rank", "alpha", "dropout", "target_modules"):
            if getattr(config, name):
                raise UserError(
                    f"--{name.replace('_', '-')}: is an adapter's, and --method {method.name} trains all weights. Add "
                    "--adapter lora, or leave it out."
                )
    elif brings is False and config.adapter_rank is None:
        raise UserError(
            f"--adapter {config.adapter}: of which rank? --rank is the optimizer's; give --adapter-rank, such as 16."
        )
    if config.loraplus_ratio is not None and method.name != "lora+":
        raise UserError(f"--loraplus-ratio {config.loraplus_ratio}: is for --method lora+ alone. Leave it out.")
    return method


def adapter_kind(config: FinetuneConfig, method: Method) -> Adapter | None:
    """The adapter that is trained; None where all weights are."""
    return method.adapter or config.adapter


def add_adapter(model: nn.Module, config: FinetuneConfig, method: Method) -> nn.Module:
    """``model`` with the adapter of ``config``, or as it is; the adapter's weights are drawn from ``--seed``.

    Raises:
        UserError: one of ``--target-modules`` names no module.
    """
    kind = adapter_kind(config, method)
    if kind is None:
        return model
    _check_targets(model, config.target_modules)
    rank = int(config.rank) if method.adapter is not None else config.adapter_rank
    assert rank is not None
    settings = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        # Twice the rank: LoRA-GA's and LoRA-Pro's 16 at rank 8.
        lora_alpha=config.alpha or 2 * rank,
        lora_dropout=config.dropout,
        target_modules=config.target_modules or "all-linear",
        use_rslora=kind == "rslora",
        use_dora=kind == "dora",
    )
    torch.manual_seed(config.seed)
    try:
        adapted: nn.Module = get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(f"--target-modules {' '.join(config.target_modules)}: {error}") from None
    return adapted


def _check_targets(model: nn.Module, targets: list[str]) -> None:
    """Each names a module, by the end of its path: peft itself asks that of one of them alone."""
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            matrices = (name for name, param in model.named_parameters() if param.ndim == 2)
            known = dict.fromkeys(name.split(".")[-2] for name in matrices)
            raise UserError(
                f"--target-modules {target}: the model has no such module. Choose among {', '.join(known)}, or a "
                "longer part of a module's path."
            )


def learning_rates(config: FinetuneConfig, method: Method) -> tuple[float, float]:
    """Of the matrices and of everything else.

    Trained weights are moved by 2e-5. The tiny model has fresh weights, and takes the rates of pre-training.
    """
    fresh = config.model == TINY_MODEL
    lr = config.lr or (method.entry.default_lr if fresh else PRETRAINED_LR)
    if config.dense_lr is not None:
        return lr, config.dense_lr
    return lr, method.entry.default_dense_lr if fresh else lr


@dataclass(frozen=True)
class OptimizerArguments:
    """What the trainer takes: an optimizer, or a class that it builds once the model is on its device."""

    made: Optimizer | None
    kind: tuple[type[Optimizer], dict[str, Any]] | None


def optimizer_arguments(
    model: nn.Module, config: FinetuneConfig, shared: PretrainConfig, method: Method
) -> OptimizerArguments:
    """The optimizer of ``method`` over what ``model`` trains; ``shared`` is the `recipe` of ``config``."""
    lr, dense_lr = learning_rates(config, method)
    if method.build is not None:
        assert isinstance(model, PeftModel)
        return OptimizerArguments(method.build(model, config, lr), None)
    if method.adapter is not None:  # everything of an adapter is alike, also what peft keeps beside its matrices
        params = [param for param in model.parameters() if param.requires_grad]
        return OptimizerArguments(None, (torch.optim.AdamW, {"params": params, **adam_options(shared, lr)}))
    return OptimizerArguments(None, method.entry.build(model, shared, lr, dense_lr))


@dataclass(frozen=True)
class Compression:
    """How many of the trained matrices keep their momentum at low rank."""

    compressed: int
    matrices: int


def compression(model: nn.Module, config: FinetuneConfig, method: Method) -> Compression | None:
    """Of ``method`` on ``model`` at ``--rank``; None where the optimizer has no rank."""
    if method.adapter is not None or not method.entry.ranked:
        return None
    shapes = [param.shape for param in matrix_parameters(model)]
    views = [matrix_view(shape, config.rank) for shape in shapes]
    return Compression(sum(view is not None for view in views), len(shapes))


def compression_warning(found: Compression, config: FinetuneConfig) -> str:
    """Why nothing is compressed on an adapter; empty where something is."""
    if found.compressed:
        return ""
    return (
        f"--rank {config.rank}: nothing is compressed, as no matrix of the adapter has a smaller side above it (they "
        f"have --adapter-rank {config.adapter_rank}). The optimizer works at full rank. Give a smaller --rank."
    )
