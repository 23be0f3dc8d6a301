"""The data of the lab: where documents come from, how they become tokens, and how tokens become blocks."""

from lorapre.lab.data.bigram import BigramModel
from lorapre.lab.data.cache import default_cache_dir
from lorapre.lab.data.corpus import TextCorpus, load_corpus
from lorapre.lab.data.sources import check_data_spec
from lorapre.lab.data.split import Split, split_documents
from lorapre.lab.data.stream import StreamBlockDataset
from lorapre.lab.data.tokenizer import load_tokenizer, train_bpe
from lorapre.lab.data.tokens import BlockDataset

__all__ = [
    "BigramModel",
    "BlockDataset",
    "Split",
    "StreamBlockDataset",
    "TextCorpus",
    "check_data_spec",
    "default_cache_dir",
    "load_corpus",
    "load_tokenizer",
    "split_documents",
    "train_bpe",
]
