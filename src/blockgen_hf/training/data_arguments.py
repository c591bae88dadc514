"""What to train or evaluate on, as arguments."""

from dataclasses import dataclass, field
from typing import Any

from .documents import ACCEPTED_FILES


PACKINGS = ("packed", "none")


@dataclass
class DataArguments:
    """
    What to train on, and how rows are made of it. For `HfArgumentParser`, YAML files and Python.

    Raises:
        ValueError: a value that is not accepted, or settings that contradict one another.
    """

    dataset: list[str] | str = field(
        metadata={
            "help": f"The data: a data set on the Hub, or files, globs or a folder on this machine ({ACCEPTED_FILES})."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of `dataset` on the Hub."})
    dataset_split: str = field(
        default="train", metadata={"help": "Split to train on; on the Hub also a slice such as `train[:1%]`."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of `dataset` on the Hub."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read while training, and keep nothing on disk."})
    shuffle_buffer_size: int = field(
        default=0, metadata={"help": "With streaming: draw each row from so many; 0 keeps the order of the data."}
    )

    text_column: str | None = field(default=None, metadata={"help": "Column of plain text. Default: `text`."})
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of prompts (`question`, say). Default: `prompt`."}
    )
    completion_column: str | None = field(
        default=None, metadata={"help": "Column of what follows a prompt (`answer`, say). Default: `completion`."}
    )
    messages_column: str | None = field(
        default=None, metadata={"help": "Column of conversations. Default: `messages`."}
    )
    prompt_separator: str = field(
        default="", metadata={"help": "Stands between prompt and completion, as a part of the prompt."}
    )
    train_on_prompt: bool = field(
        default=False, metadata={"help": "Score prompts and the turns of users too, not only what answers them."}
    )
    document_separator: str | None = field(
        default=None,
        metadata={
            "help": "What stands between the documents of a .txt file: `<|endoftext|>`, `\\n` for one a line ... "
            "Default: a file is one document."
        },
    )

    validation_dataset: list[str] | str | None = field(
        default=None, metadata={"help": "Validation data, named as `dataset` is."}
    )
    validation_split: str | None = field(
        default=None,
        metadata={
            "help": "Split to validate on, of `validation_dataset` (default `validation`) or else of `dataset`."
        },
    )
    validation_documents: int = field(
        default=0, metadata={"help": "Instead: hold out so many documents at the end of the training data."}
    )
    max_documents: int | None = field(
        default=None, metadata={"help": "Train on so many documents at most, the first ones."}
    )

    sequence_length: int = field(default=1024, metadata={"help": "Tokens of a row; the longest row if not packed."})
    packing: str = field(
        default="packed",
        metadata={
            "help": "`packed`: documents joined with the end-of-text token and cut into rows of `sequence_length`. "
            "`none`: a document a row, truncated to `sequence_length`.",
            "choices": PACKINGS,
        },
    )
    isolate_documents: bool = field(
        default=False, metadata={"help": "Packed: keep the documents of a row apart in attention and in positions."}
    )
    train_on_padding: int = field(
        default=0,
        metadata={
            "help": "Not packed: end-of-text tokens that are scored behind the first one, as far as `sequence_length` "
            "allows. 0: none. `sequence_length`: rows are filled up with them."
        },
    )
    add_bos_token: bool = field(
        default=False, metadata={"help": "Begin documents and prompts with the tokenizer's BOS token."}
    )

    num_proc: int | None = field(default=None, metadata={"help": "Processes that read, tokenise and pack."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for prepared data. Default: that of `datasets`, $HF_DATASETS_CACHE."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Read, tokenise and pack anew."})

    def __post_init__(self) -> None:
        if not self.dataset or not all(self.dataset):
            raise ValueError("`dataset` names a data set on the Hub or files; it is empty.")
        if self.packing not in PACKINGS:
            raise ValueError(f"`packing` is one of {', '.join(map(repr, PACKINGS))}, not {self.packing!r}.")
        _check_number("sequence_length", self.sequence_length, 1)
        for name in ("validation_documents", "shuffle_buffer_size", "train_on_padding"):
            _check_number(name, getattr(self, name), 0)
        for name in ("max_documents", "num_proc"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), 1)
        if self.document_separator is not None:
            # As a terminal hands it over, and as the lines of any text end once they are read.
            self.document_separator = self.document_separator.replace("\\n", "\n").replace("\r\n", "\n")
            if not self.document_separator:
                raise ValueError("`document_separator` is a text, or None where a file is one document; it is empty.")
        self._check_contradictions()

    def _check_contradictions(self) -> None:
        forms = [self.text_column, self.prompt_column or self.completion_column, self.messages_column]
        if sum(name is not None for name in forms) > 1:
            raise ValueError(
                "Of `text_column`, `prompt_column` with `completion_column`, and `messages_column`, only one can be "
                "what documents are made of."
            )
        if self.isolate_documents and self.packing == "none":
            raise ValueError(
                "`isolate_documents` is for packed rows; with `packing='none'` rows are single documents."
            )
        if self.train_on_padding and self.packing != "none":
            raise ValueError("`train_on_padding` is for `packing='none'`; packed rows have no padding.")
        if self.validation_documents and (self.validation_dataset or self.validation_split):
            raise ValueError("`validation_documents` stands instead of `validation_dataset` and `validation_split`.")
        if self.streaming and self.validation_documents:
            raise ValueError(
                "`validation_documents` is unknown while streaming, since nobody knows where the data end: name a "
                "`validation_dataset` or `validation_split`."
            )
        if self.streaming and self.num_proc is not None:
            raise ValueError("`num_proc` prepares data on disk; with `streaming` there are none.")
        if self.shuffle_buffer_size and not self.streaming:
            raise ValueError("`shuffle_buffer_size` is for `streaming`; other rows are shuffled by the trainer.")


def _check_number(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` is a whole number from {least} on, not {value!r}.")


__all__ = ["PACKINGS", "DataArguments"]
