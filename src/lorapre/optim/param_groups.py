"""Split a model's parameters into groups: matrices to compress, embeddings and heads, vectors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

Group = dict[str, Any]


def param_groups(
    model: nn.Module,
    rank: int | float | None = None,
    *,
    exclude: Iterable[str] = (),
    decay_vectors: bool = False,
    dense: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[Group]:
    """Named groups of ``model``'s trainable parameters for an optimizer of this library.

    Dense, by module type: ``nn.Embedding`` and ``nn.EmbeddingBag``; the output head (what a transformers model
    returns from ``get_output_embeddings()``, else the last ``nn.Linear`` if it is as wide as an embedding has
    rows); everything with fewer than two dimensions. Compressed: all other parameters of two and more
    dimensions whose smaller side exceeds the rank; ``nn.Conv1d`` weights are flattened to (out, in * kernel)
    like those of other convolutions, while other 3-D weights are stacks of matrices. Parameters that are tied
    appear once, and are dense if any of their modules is.

    Args:
        model: any module.
        rank: rank of the compressed groups, integer or fraction; None leaves it to the optimizer.
        exclude: shell-style patterns of parameter names to keep dense, such as ``"*.router.*"``.
        decay_vectors: let biases and norms decay too; by default their weight decay is 0.
        dense: options of the dense groups alone, such as ``{"lr": 2.5e-3}``.
        **options: options of the compressed groups alone, such as ``scale=0.25``.

    Returns:
        Between one and four groups; empty ones are left out.

    Raises:
        ValueError: the model has no trainable parameter, or an ``exclude`` pattern matches no parameter.
    """
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not trainable:
        raise ValueError("The model has no trainable parameter: every requires_grad is False.")
    patterns = tuple(exclude)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name, _ in trainable):
            raise ValueError(
                f"exclude={pattern!r} matches no trainable parameter; the first is called {trainable[0][0]!r}."
            )
    dense_ids = {id(param) for param in _embeddings_and_head(model)}
    conv1d_ids = {
        id(module.weight) for module in model.modules() if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d))
    }
    compressed: Group = {**({} if rank is None else {"rank": rank}), **options}
    kept_dense: Group = {"compress": False, **(dense or {})}
    members: dict[str, tuple[Group, list[tuple[str, Tensor]]]] = {
        "matrices": (compressed, []),
        "conv1d": ({**compressed, "view_3d": "flatten"}, []),
        "dense": (kept_dense, []),
        "vectors": ({**kept_dense, **({} if decay_vectors else {"weight_decay": 0.0})}, []),
    }
    for name, param in trainable:
        if param.ndim < 2:
            kind = "vectors"
        elif id(param) in dense_ids or any(fnmatchcase(name, pattern) for pattern in patterns):
            kind = "dense"
        else:
            kind = "conv1d" if id(param) in conv1d_ids else "matrices"
        members[kind][1].append((name, param))
    return [{"params": params, **group} for group, params in members.values() if params]


def _embeddings_and_head(model: nn.Module) -> list[Tensor]:
    embeddings = [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    found: list[Tensor] = [module.weight for module in embeddings]
    head = _declared_head(model)
    if head is None:
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        # A hidden layer may well be as wide as there are positions.
        rows = {
            module.num_embeddings
            for name, module in model.named_modules()
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and not re.search(r"(^|[._])(pos|wpe)", name)
        }
        if linears and linears[-1].out_features in rows:
            head = linears[-1]
    if head is not None:
        found += [param for param in head.parameters() if param.ndim >= 2]
    return found


def _declared_head(model: nn.Module) -> nn.Module | None:
    """The head that a transformers model names itself, also inside a DDP or torch.compile wrapper."""
    for candidate in (model, getattr(model, "module", None), getattr(model, "_orig_mod", None)):
        getter = getattr(candidate, "get_output_embeddings", None)
        if callable(getter):
            head = getter()
            return head if isinstance(head, nn.Module) else None
    return None
