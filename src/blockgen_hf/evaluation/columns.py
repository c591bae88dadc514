"""
What the columns of a row mean, in training and in evaluation: what they mean to transformers' own collators.

A column that would change the loss and cannot be followed is refused by name. Others (texts, lengths,
`special_tokens_mask`, `offset_mapping` ...) say nothing to a language model, and are left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..modeling.inputs_blockgen import document_positions


Batch = dict[str, torch.Tensor]

IGNORED_LABEL = -100  # not scored, as everywhere in transformers

# By the names that transformers' collators give them.
_NAMES: dict[str, tuple[str, ...]] = {
    "input_ids": ("input_ids",),
    "labels": ("labels", "label_ids", "label"),
    "attention_mask": ("attention_mask",),
    "document_ids": ("document_ids", "seq_idx"),
    "position_ids": ("position_ids",),
    "token_type_ids": ("token_type_ids",),
    "assistant_masks": ("assistant_masks",),
    "completion_mask": ("completion_mask",),
}
# In padding. None: the last value goes on.
_FILLINGS: dict[str, int | None] = {"labels": IGNORED_LABEL, "attention_mask": 0, "document_ids": None}
_DRAWN = "what a step denoises is drawn by the trainer"
_PACKED = "give `document_ids`, `seq_idx` or `position_ids`, which tell packed documents apart"
_REFUSED = {
    "inputs_embeds": "the noise is put on `input_ids`",
    "decoder_input_ids": "the model has no decoder",
    "shift_labels": "labels stand where their tokens are: give `labels`",
    "cu_seq_lens_q": _PACKED,
    "cu_seq_lens_k": _PACKED,
    "max_length_q": _PACKED,
    "max_length_k": _PACKED,
    "perm_mask": "the model has no permuted attention",
    "target_mapping": "the model has no permuted attention",
    "noisy_input_ids": _DRAWN,
    "noise_level": _DRAWN,
    "block_size": _DRAWN,
}


def model_columns(given: Any, where: str) -> Batch:
    """
    What the model needs of a row, or of a batch, whatever else is in it.

    Args:
        given: a mapping with `input_ids`, and perhaps

            - `labels` (or `label_ids`, `label`): -100 where a token is not scored. Without them all tokens are, or
              those that `assistant_masks` and `completion_mask` name;
            - `attention_mask`: 0 for padding, on either side, which is neither attended to nor scored;
            - `document_ids` (or `seq_idx`, or `seq_lengths` of a row, or `position_ids` that restart at 0): documents
              packed into a row, which do not see one another;
            - `token_type_ids`, all zero.

            Or the `input_ids` alone. Numbers `[L]`, or `[B, L]` for a batch. None is as good as nothing.
        where: what it is, for messages.

    Returns:
        long tensors of the shape of `input_ids`: `input_ids`, `labels` (-100 at padding) and `attention_mask`, and
        `document_ids` if there are any.

    Raises:
        ValueError: no `input_ids`, a column of another shape, columns that contradict one another, or one that the
            model cannot follow.
    """
    if not isinstance(given, Mapping):
        given = {"input_ids": given}
    if given.get("input_ids") is None:
        raise ValueError(f"{where} has no `input_ids`, but only {list(given)}: tokenise the text first.")
    for name, reason in _REFUSED.items():
        if given.get(name) is not None:
            raise ValueError(f"{where} has the column `{name}`, which cannot be followed: {reason}.")
    columns = {name: tensor for name in _NAMES if (tensor := _column(given, name, where)) is not None}
    input_ids = columns["input_ids"]
    for name, tensor in columns.items():
        if tensor.ndim == 0 or tensor.shape != input_ids.shape:
            raise ValueError(
                f"{where} has `input_ids` of the shape {list(input_ids.shape)} and `{name}` of the shape "
                f"{list(tensor.shape)}: every token needs one."
            )
    mask = columns.setdefault("attention_mask", torch.ones_like(input_ids))
    if ((mask != 0) & (mask != 1)).any():
        raise ValueError(
            f"`attention_mask` of {where} must be 0 for padding and 1 elsewhere, but has the values "
            f"{mask.unique().tolist()}. Documents packed into a row are told apart by `document_ids`."
        )
    if "token_type_ids" in columns and (columns["token_type_ids"] * mask).any():
        raise ValueError(f"`token_type_ids` of {where} must be zero: the model has no token types. Leave them out.")
    documents = _documents(columns, given.get("seq_lengths"), where)
    labels = columns.get("labels")
    if labels is None:
        labels = input_ids
        for name in ("assistant_masks", "completion_mask"):
            if name in columns:
                labels = labels.masked_fill(columns[name] == 0, IGNORED_LABEL)
    labels = labels.masked_fill(mask == 0, IGNORED_LABEL)
    found = {"input_ids": input_ids, "labels": labels, "attention_mask": mask}
    return found if documents is None else {**found, "document_ids": documents}


def _column(given: Mapping[str, Any], name: str, where: str) -> torch.Tensor | None:
    names = [alias for alias in _NAMES[name] if given.get(alias) is not None]
    if len(names) > 1:
        raise ValueError(f"{where} has both `{names[0]}` and `{names[1]}`, which mean the same: leave one out.")
    if not names:
        return None
    try:
        return torch.as_tensor(given[names[0]]).long()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`{names[0]}` of {where} must be numbers, one for each token: {error}") from error


def _documents(columns: Batch, seq_lengths: Any, where: str) -> torch.Tensor | None:
    """The documents packed into a row, by whichever column tells them; None if there is one."""
    documents, mask = columns.get("document_ids"), columns["attention_mask"]
    if seq_lengths is not None:
        lengths = torch.as_tensor(seq_lengths)
        if mask.ndim != 1 or lengths.ndim != 1 or int(lengths.sum()) != len(mask):
            raise ValueError(
                f"`seq_lengths` of {where} must be the lengths of the documents of a row, {mask.shape[-1]} tokens in "
                f"all, but are {lengths.tolist()}."
            )
        documents = torch.arange(len(lengths)).repeat_interleave(lengths) if documents is None else documents
    positions = columns.get("position_ids")
    if positions is None:
        return documents
    if documents is None:
        starts = (positions == 0) & (mask == 1)
        documents = starts.long().cumsum(-1) if (starts.sum(-1) > 1).any() else None
    if ((positions != token_positions(mask, documents)) & (mask == 1)).any():
        raise ValueError(
            f"`position_ids` of {where} must count from 0 in every document, without gaps, but are "
            f"{positions.tolist()}."
        )
    return documents


def token_positions(attention_mask: torch.Tensor, document_ids: torch.Tensor | None) -> torch.Tensor:
    """Where tokens stand in their document, or in their row without padding, of the masks' shape; any at padding."""
    if document_ids is None:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    shape = attention_mask.shape
    return document_positions(document_ids.view(-1, shape[-1]), attention_mask.view(-1, shape[-1])).view(shape)


def stack_rows(rows: Sequence[Batch], width: int, pad_token_id: int) -> Batch:
    """
    Rows of [`model_columns`] side by side, filled up on the right: long `[B, width]`. Padding belongs to the last
    document of its row; a row without `document_ids` is one document.
    """
    batch: Batch = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        fill = pad_token_id if name == "input_ids" else _FILLINGS[name]
        batch[name] = torch.zeros(len(rows), width, dtype=torch.long)
        for place, row in zip(batch[name], rows, strict=True):
            values = row[name] if name in row else torch.zeros_like(row["input_ids"])
            place[: len(values)] = values
            if fill is not None or len(values):
                place[len(values) :] = values[-1] if fill is None else fill
    return batch


__all__ = ["IGNORED_LABEL", "Batch", "model_columns", "stack_rows", "token_positions"]
