"""
Training: from rows of a dataset to checkpoints.

    data (documents -> tokens -> rows) -> collator -> trainer (draws: block sizes, noise levels, noise) -> model
        -> loss -> EMA -> checkpoint
"""

from .arguments import BlockGenTrainingArguments
from .collator import BlockGenDataCollator
from .data import load_datasets
from .data_arguments import DataArguments
from .draws import stratified_block_sizes
from .ema import EMACallback
from .tokenizers import train_tokenizer
from .trainer import BlockGenTrainer


__all__ = [
    "BlockGenDataCollator",
    "BlockGenTrainer",
    "BlockGenTrainingArguments",
    "DataArguments",
    "EMACallback",
    "load_datasets",
    "stratified_block_sizes",
    "train_tokenizer",
]
