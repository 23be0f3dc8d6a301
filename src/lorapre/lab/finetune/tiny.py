"""The model and the task of a run without arguments: nothing is downloaded, and the same comes out every time."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from lorapre.lab.finetune.formats import Example

_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_END, _PAD = "<|end|>", "<|pad|>"
_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
#: Summands below this; 2500 additions in all.
_LARGEST = 50


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and those of a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = [_PAD, _END, *_ROLES]
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_END,
        additional_special_tokens=list(_ROLES),
        chat_template=_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_config() -> LlamaConfig:
    """Two layers of width 64, 115 thousand parameters."""
    tokenizer = tiny_tokenizer()
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_model(seed: int) -> PreTrainedModel:
    """Fresh weights from ``seed``: it knows nothing yet, so that all it answers is learned in the run."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.float32)
    return model


def additions() -> list[Example]:
    """All sums of two numbers below 50, as questions and answers."""
    return [
        Example(
            ({"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": str(a + b)}),
            f"{a}+{b}",
            f"the addition {a}+{b}",
        )
        for a in range(_LARGEST)
        for b in range(_LARGEST)
    ]
