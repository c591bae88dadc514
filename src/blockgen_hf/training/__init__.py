"""
Training: from rows of a dataset to checkpoints.

    data (documents -> tokens -> rows) -> collator -> trainer (draws: block sizes, noise levels, noise) -> model
        -> loss -> EMA -> checkpoint
"""

from ..presets import PRESETS, apply_preset
from .arguments import BlockGenTrainingArguments
from .collator import BlockGenDataCollator
from .data import load_datasets
from .data_arguments import DataArguments
from .draws import stratified_block_sizes
from .ema import EMACallback
from .tokenizers import train_tokenizer
from .trainer import BlockGenTrainer


__all__ = [
    "PRESETS",
    "BlockGenDataCollator",
    "BlockGenTrainer",
    "BlockGenTrainingArguments",
    "DataArguments",
    "EMACallback",
    "apply_preset",
    "load_datasets",
    "stratified_block_sizes",
    "train_tokenizer",
]
