"""Rivals with low-rank state in our own implementations (`lorapre.lab.baselines`): plain tensors, exact resume."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from lorapre.lab.baselines.fira import Fira
from lorapre.lab.baselines.galore import GaLore
from lorapre.lab.baselines.galore_muon import GaLoreMuon
from lorapre.lab.baselines.ldadam import LDAdam
from lorapre.lab.baselines.mlorc import MLorc
from lorapre.lab.baselines.mofasgd import MoFaSGD
from lorapre.lab.config import PretrainConfig
from lorapre.lab.optimizers.beside import adam_options, beside_adamw, full_rank_groups, low_rank_groups
from lorapre.lab.optimizers.entry import Build, ClassAndKwargs, OptimizerEntry, split_parameters

#: Decay rate of momentum where the update is orthogonal, as of the row `muon`; ``--beta1`` is Adam's.
_MUON_BETA = 0.95


def _adam_like(make: type[GaLore | Fira | MLorc | LDAdam]) -> Build:
    def build(model: nn.Module, config: PretrainConfig, lr: float, dense_lr: float) -> ClassAndKwargs:
        split = split_parameters(model, rank=config.rank, dense_lr=dense_lr)
        seeded: dict[str, Any] = {"seed": config.seed} if make is MLorc else {}
        part = (partial(make, **adam_options(config, lr), **seeded), low_rank_groups(split))
        return beside_adamw(part, [*full_rank_groups(split), *split.dense], config, lr)

    return build


def _muon_like(make: type[GaLoreMuon | MoFaSGD]) -> Build:
    def build(model: nn.Module, config: PretrainConfig, lr: float, dense_lr: float) -> ClassAndKwargs:
        split = split_parameters(model, rank=config.rank, dense_lr=dense_lr)
        part = (partial(make, lr=lr, beta=_MUON_BETA, weight_decay=config.weight_decay), low_rank_groups(split))
        return beside_adamw(part, [*full_rank_groups(split), *split.dense], config, lr)

    return build


def _galore_bytes(p: int, q: int, r: int) -> int:
    return 4 * ((min(p, q) + 2 * max(p, q)) * r + 1)


def _fira_bytes(p: int, q: int, r: int) -> int:
    return _galore_bytes(p, q, r) + 4  # the norm that limits the growth of the next


def _galore_muon_bytes(p: int, q: int, r: int) -> int:
    return 4 * ((p + q) * r + 1)


def _mlorc_bytes(p: int, q: int, r: int) -> int:
    return 4 * (2 * (p + q + 1) * r + 1)


def _mofasgd_bytes(p: int, q: int, r: int) -> int:
    return 4 * ((p + q + 1) * r + 1)


def _ldadam_bytes(p: int, q: int, r: int) -> int:
    return _galore_bytes(p, q, r) + 4 * p * q  # the error that is fed back


ENTRIES = (
    OptimizerEntry(
        name="galore-ours",
        title="GaLore (ours)",
        source="arXiv 2403.03507; this library",
        build=_adam_like(GaLore),
        state_bytes=_galore_bytes,
        default_lr=1e-2,
        ranked=True,
        limitations="Steps 1, 201, ... take a full SVD of every matrix. The update never leaves the subspace between "
        "them.",
    ),
    OptimizerEntry(
        name="fira-ours",
        title="Fira (ours)",
        source="arXiv 2410.01623; this library",
        build=_adam_like(Fira),
        state_bytes=_fira_bytes,
        default_lr=1e-2,
        ranked=True,
        limitations="Steps 1, 201, ... take a full SVD of every matrix. The residual is the released code's, which "
        "keeps 1 - alpha of the projected gradient.",
    ),
    OptimizerEntry(
        name="galore-muon",
        title="GaLore-Muon",
        source="GaLore (arXiv 2403.03507) around Muon; this library",
        build=_muon_like(GaLoreMuon),
        state_bytes=_galore_muon_bytes,
        default_lr=1e-2,
        ranked=True,
        limitations="Steps 1, 201, ... take a full SVD of every matrix. Nesterov momentum 0.95, whatever --beta1 says, "
        "and the update's scale are Muon's in torch; the settings behind published GaLore-Muon figures are not known. "
        "Matrices at full rank take AdamW.",
    ),
    OptimizerEntry(
        name="mlorc",
        title="MLorc-AdamW",
        source="arXiv 2506.01897; this library",
        build=_adam_like(MLorc),
        state_bytes=_mlorc_bytes,
        default_lr=1e-3,
        ranked=True,
        limitations="A step builds both moments at full size, one matrix at a time, and takes two randomized SVDs of "
        "each matrix. Published for fine-tuning; the learning rate for pre-training is ours.",
    ),
    OptimizerEntry(
        name="mofasgd",
        title="MoFaSGD",
        source="arXiv 2507.08091; this library",
        build=_muon_like(MoFaSGD),
        state_bytes=_mofasgd_bytes,
        default_lr=2e-2,
        ranked=True,
        limitations="The paper's step U V^T, of spectral norm lr whatever the matrix's shape; the released code "
        "divides by the singular values instead. Momentum is 0.95 whatever --beta1 says, without the released warm-up "
        "of it. Two QR decompositions and an SVD of 2r x 2r a matrix and step. Matrices at full rank take AdamW.",
    ),
    OptimizerEntry(
        name="ldadam",
        title="LDAdam",
        source="arXiv 2410.16103; this library",
        build=_adam_like(LDAdam),
        state_bytes=_ldadam_bytes,
        default_lr=2e-3,
        ranked=True,
        limitations="The error feedback is a buffer of the matrix's full size, counted here; the released code keeps "
        "it in the gradient's memory, where it is not counted as state but cannot be freed either. Betas are the "
        "run's, not the authors' (0.908, 0.99).",
    ),
)
