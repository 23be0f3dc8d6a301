"""The paper's fine-tuning protocol, and the shapes of its models, which a dry run needs without their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig

LLAMA2_7B, LLAMA31_8B = "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-8B"

#: The public configurations of both, as far as they decide on shapes.
KNOWN_SHAPES: Mapping[str, Mapping[str, Any]] = {
    LLAMA2_7B: {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    LLAMA31_8B: {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
    },
}


def known_config(model: str) -> LlamaConfig | None:
    """The architecture of a preset's model, None for any other."""
    shape = KNOWN_SHAPES.get(model)
    return None if shape is None else LlamaConfig(**shape, tie_word_embeddings=False)


def _metamath(model: str) -> dict[str, Any]:
    return {
        "model": model,
        "data": "metamathqa",
        # Stated in arXiv 2602.24283: 100k examples of MetaMathQA, rank 8, rate 2e-5, and Algorithm 1's betas.
        "max_examples": 100_000,
        "method": "lorapre-adamw-paper",
        "rank": 8,
        "lr": 2e-5,
        "beta1": 0.9,
        "beta2": 0.95,
        "weight_decay": 0.0,
        # Not known from the paper; these are the values of LoRA-GA (arXiv 2407.05000), whose protocol on this data
        # LoRA-Pro (arXiv 2407.18242), by the same authors as LoRA-Pre, follows: one epoch, 32 examples a step, at most
        # 1024 tokens, cosine to zero after 3 % of warm-up, bfloat16, and questions as "Q: ... A: ...".
        # LoRA-GA takes the examples rewritten from GSM8K alone; LoRA-Pre is tried on MATH-500 too, so all are taken.
        "template": "qa",
        "max_length": 1024,
        "batch_size": 32,
        "epochs": 1.0,
        "schedule": "cosine",
        "warmup": 0.03,
        "min_lr_ratio": 0.0,
        "max_grad_norm": 1.0,
        "bf16": True,
        "accumulation": 8,
        "checkpointing": True,
        "valid_examples": 500,
        "log_every": 10,
        "eval_every": 500,
        "save_every": 500,
    }


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "metamath-llama2-7b": _metamath(LLAMA2_7B),
    "metamath-llama3.1-8b": _metamath(LLAMA31_8B),
}
