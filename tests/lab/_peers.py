"""What the rivals' tests share: the rows, a model that is only ever given gradients, and how it is trained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _peer_formulas import Run
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from lorapre.lab.config import PretrainConfig
from lorapre.lab.optimizers import galore_family, packaged, torch_peers
from lorapre.lab.optimizers.entry import OptimizerEntry

ENTRIES = {entry.name: entry for module in (torch_peers, galore_family, packaged) for entry in module.ENTRIES}
LR, DENSE_LR = 2**-7, 2**-8  # exact in float32, where torchao keeps its rate


def installed(name: str) -> OptimizerEntry:
    """The row called ``name``; without its package the test is skipped."""
    entry = ENTRIES[name]
    if entry.installed_version() is None:
        pytest.skip(f"needs the package {entry.package} (extra `peers`)")
    return entry


class Net(nn.Module):
    """One large matrix, one that no rank compresses, an embedding, a bias and a norm; only ever given gradients."""

    def __init__(self, p: int = 64, q: int = 80, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=q, num_attention_heads=2)
        self.embed = nn.Embedding(7, 5, dtype=dtype)
        self.mlp = nn.Linear(q, p, bias=False, dtype=dtype)
        self.narrow_mlp = nn.Linear(5, 2, dtype=dtype)
        self.norm = nn.LayerNorm(5, dtype=dtype)


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, bos_token_id=0, eos_token_id=0, **sizes, **changes))


def make(entry: OptimizerEntry, model: nn.Module, run: Run | None = None) -> Optimizer:
    """As the recipe makes it; projections are renewed every ``run.gap`` steps."""
    run = run or Run()
    config = PretrainConfig(
        rank=run.rank,
        beta1=run.beta1,
        beta2=run.beta2,
        weight_decay=run.weight_decay,
        seed=run.seed,
        options={"update_proj_gap": run.gap} if "update_proj_gap" in entry.options else {},
    )
    if entry.prepare is not None:
        entry.prepare(model, config)
    make_optimizer, kwargs = entry.build(model, config, LR, DENSE_LR)
    optimizer = make_optimizer(**kwargs)
    for group in optimizer.param_groups:
        if "kappa" in group:
            group["kappa"] = run.gap
    return optimizer


def step(optimizer: Optimizer) -> None:
    """One step, uncompiled: torchao compiles for each shape, which takes seconds; eager, it computes the same."""
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()


def train(model: nn.Module, optimizer: Optimizer, steps: int, seed: int = 0) -> None:
    for number in range(steps):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        for param in model.parameters():
            if param.requires_grad:
                param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
        step(optimizer)


def matrix_part(optimizer: Optimizer) -> Optimizer:
    """The part that is the rival, not AdamW for the rest."""
    part: Optimizer = optimizer.parts[0]  # type: ignore[attr-defined]
    return part


def drawn(optimizer: Optimizer, param: Tensor) -> Tensor | None:
    """The random projection of the last step, as (min(p, q), r)."""
    projector = optimizer.state[param].get("projector")
    if projector is None:
        return None
    P: Tensor = projector.ortho_matrix
    return P.mT if param.shape[0] >= param.shape[1] else P
