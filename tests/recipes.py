"""What the tests of recipes share: small data and tokenizers that stand in for those of the Hub."""

import json
import random
from pathlib import Path
from typing import Any

from tiny import LETTERS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


SEPARATOR = "<|endoftext|>"
# A model that takes no time, and steps that take little.
TINY = (
    "model.hidden_size=16",
    "model.intermediate_size=32",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "model.cond_dim=8",
    "model.max_position_embeddings=null",
    "data.sequence_length=16",
    "data.num_proc=null",
    "training.max_steps=5",
    "training.global_batch_size=4",
    "training.per_device_train_batch_size=2",
    "training.per_device_eval_batch_size=4",
    "training.dataloader_num_workers=0",
    "training.warmup_steps=2",
    "training.logging_steps=1",
    "training.eval_strategy=no",
    "training.eval_monte_carlo_samples=2",
)


def sentences(count: int = 40, seed: int = 0) -> list[str]:
    """Words of one letter, known to all tokenizers here."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(LETTERS, k=draw.randint(5, 12))) for _ in range(count)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_text(path: Path, documents: list[str]) -> str:
    path.write_text(f"\n{SEPARATOR}\n".join(documents))
    return str(path)


def save_tokenizer(folder: Path, **special: str) -> str:
    """A token a letter, and the special tokens behind them."""
    vocabulary = {word: i for i, word in enumerate([*LETTERS, *special.values()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return str(folder)


def stand_ins(name: str, folder: Path) -> list[str]:
    """Overrides that put a bundled recipe on local data of the same columns, and on a tokenizer of the same kind."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = sentences()
    overrides = [f"data.cache_dir={folder / 'cache'}"]
    if name == "laptop":
        return [
            *overrides,
            f"data.dataset={write_text(folder / 'stories.txt', texts)}",
            "data.validation_documents=4",
            "tokenizer.train.vocab_size=262",
        ]
    special = {"eos_token": "<end>"}  # as GPT-2 and SmolLM: neither mask nor padding
    rows = [{"text": text} for text in texts]
    if name == "tinygsm":
        rows = [{"question": text, "code": text[:5]} for text in texts]
    if name in ("owt", "tinygsm"):
        overrides.append("data.validation_documents=4")
    else:
        special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        file = write_rows(folder / "test.jsonl", [{"text": text} for text in sentences(8, seed=1)])
        overrides += [f"data.validation_dataset={file}", "data.validation_split=null"]
    return [
        *overrides,
        f"data.dataset={write_rows(folder / 'train.jsonl', rows)}",
        f"tokenizer.name_or_path={save_tokenizer(folder / 'tokenizer', **special)}",
        "model.vocab_size=null",
    ]
