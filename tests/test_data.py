"""From files to rows: forms of data, what is scored, what is skipped, errors that name file and line, the cache."""

import bz2
import gc
import gzip
import json
import logging
import lzma
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from tiny import EOS, LETTERS, MASK, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import HfArgumentParser, PreTrainedTokenizerFast

from blockgen_hf.text_files import invalid_utf8
from blockgen_hf.training.data import DataArguments, load_datasets
from blockgen_hf.training.documents import PIECE_CHARACTERS
from blockgen_hf.training.tokenization import DocumentTokenizer
from blockgen_hf.training.tokenizers import train_tokenizer


Rows = list[dict[str, Any]]
Load = Callable[..., Rows]

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}r{% generation %}{{ m['content'] }}<end>"
    "{% endgeneration %}{% else %}q{{ m['content'] }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}r{% endif %}"
)
CHAT = [
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "cd"},
    {"role": "user", "content": "ef"},
    {"role": "assistant", "content": "g"},
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes to the cache of whoever runs it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    datasets.disable_progress_bars()


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerFast) -> Load:
    """Rows of training data, one a document, unless told otherwise."""

    def load(dataset: Path | list[str], **settings: Any) -> Rows:
        names = dataset if isinstance(dataset, list) else str(dataset)
        args = DataArguments(names, **{"sequence_length": 16, "packing": "none", **settings})
        return list(load_datasets(args, tokenizer)[0])

    return load


def ids(text: str, end: bool = True) -> list[int]:
    return [*map(LETTERS.index, text), *[EOS] * end]


def write_json(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(rows: Rows) -> list[str]:
    """Documents without their end."""
    return ["".join(LETTERS[token] for token in row["input_ids"] if token != EOS) for row in rows]


# Files


def test_a_text_file_is_a_document_unless_a_separator_says_otherwise(tmp_path: Path, load: Load) -> None:
    (tmp_path / "a.txt").write_text("abc<|endoftext|>\nde<|endoftext|>\n")
    (tmp_path / "b.txt").write_text("ab\n\ncd\r\n")
    assert texts(load(tmp_path / "a.txt", document_separator="<|endoftext|>")) == ["abc", "de"]
    assert texts(load(tmp_path / "b.txt", document_separator="\n")) == ["ab", "cd"]
    assert texts(load(tmp_path / "b.txt", document_separator="\\n")) == ["ab", "cd"], "as a shell hands it over"
    assert len(load(tmp_path / "b.txt")) == 1


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)]
)
def test_compressed_files_are_unpacked(
    suffix: str, pack: Callable[[bytes], bytes], streaming: bool, tmp_path: Path, load: Load
) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(b'\xef\xbb\xbf{"text": "ab"}\n\n{"text": "cd", "x": 1}'))
    assert texts(load(tmp_path / f"a.jsonl{suffix}", streaming=streaming)) == ["ab", "cd"]


def test_lists_globs_and_folders_name_files(tmp_path: Path, load: Load) -> None:
    for name in ("train-b", "train-a", "valid"):
        write_json(tmp_path / f"{name}.jsonl", {"text": name[-1]})
    assert texts(load(tmp_path / "train-*.jsonl")) == ["a", "b"]
    assert texts(load([str(tmp_path / "valid.jsonl"), str(tmp_path / "train-b.jsonl")])) == ["d", "b"]
    assert texts(load(tmp_path)) == ["a", "b"], "the training split of a folder, by the names of its files"
    assert texts(load(tmp_path, dataset_split="validation")) == ["d"]
    with pytest.raises(ValueError, match="no split `test` in this folder, only train, validation"):
        load(tmp_path, dataset_split="test")


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_and_lists_in_json_are_read(streaming: bool, tmp_path: Path, load: Load) -> None:
    rows = [{"text": "ab", "n": 1}, {"text": None, "n": 2}, {"text": "c", "n": 3}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    assert texts(load(tmp_path / "a.parquet", streaming=streaming)) == ["ab", "c"]
    assert texts(load(tmp_path / "a.json", streaming=streaming)) == ["ab", "c"]


def test_validation_is_another_file_or_the_last_documents(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_text("a\nb\nc\n\nd\n")
    (tmp_path / "b.txt").write_text("e\nf\n")

    def load(**settings: Any) -> list[list[str] | None]:
        defaults: dict[str, Any] = {"packing": "none", "document_separator": "\n", "sequence_length": 4}
        both = load_datasets(DataArguments(str(tmp_path / "a.txt"), **defaults, **settings), tokenizer)
        return [None if rows is None else texts(list(rows)) for rows in both]

    assert load() == [["a", "b", "c", "d"], None]
    assert load(validation_dataset=str(tmp_path / "b.txt")) == [["a", "b", "c", "d"], ["e", "f"]]
    assert load(validation_documents=2) == [["a", "b", "c"], ["d"]], "the empty document counts"
    assert load(validation_documents=1, max_documents=2) == [["a", "b"], ["d"]]
    assert load(max_documents=2, validation_dataset=str(tmp_path / "b.txt")) == [["a", "b"], ["e", "f"]]
    with pytest.raises(ValueError, match="holds out 5 documents, and .*a.txt' has 5"):
        load(validation_documents=5)


def test_max_documents_limits_all_files_together(tmp_path: Path, load: Load) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("a\nb\nc\n")
    for streaming in (False, True):
        rows = load(tmp_path / "*.txt", document_separator="\n", max_documents=4, streaming=streaming)
        assert texts(rows) == ["a", "b", "c", "a"]


# Forms of rows, and what is scored


def test_text_is_scored_throughout_and_has_no_labels(tmp_path: Path, load: Load) -> None:
    assert load(write_json(tmp_path / "a.jsonl", {"text": "abc"})) == [{"input_ids": ids("abc"), "source": 0}]
    rows = load(write_json(tmp_path / "b.jsonl", {"story": "abc", "text": 1}), text_column="story")
    assert rows[0]["input_ids"] == ids("abc")


def test_of_prompt_and_completion_the_completion_is_scored(tmp_path: Path, load: Load) -> None:
    path = write_json(tmp_path / "a.jsonl", {"question": "abc", "answer": "de", "text": "no"})
    columns = {"prompt_column": "question", "completion_column": "answer"}
    (row,) = load(path, **columns)
    assert row["input_ids"] == ids("abcde")
    assert row["labels"] == [-100] * 3 + ids("de")
    (row,) = load(path, prompt_separator="t", **columns)
    assert row["input_ids"] == ids("abctde") and row["labels"] == [-100] * 4 + ids("de")
    (row,) = load(path, train_on_prompt=True, **columns)
    assert row == {"input_ids": ids("abcde"), "source": 0}


def test_no_token_crosses_from_prompt_to_completion(tmp_path: Path) -> None:
    """The prompt has the tokens that it has alone, in generation."""
    tokenizer = train_tokenizer(["abab"] * 10, vocab_size=300, sequence_length=16)
    path = write_json(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "ab", "completion": "ab"})
    rows = load_datasets(DataArguments(str(path), sequence_length=16, packing="none"), tokenizer)[0]
    a, b, ab, abab = (tokenizer(text)["input_ids"] for text in ("a", "b", "ab", "abab"))
    assert len(ab) == len(abab) == 1
    assert [row["input_ids"][:-1] for row in rows] == [a + b, ab + ab]
    assert [row["labels"][:-1] for row in rows] == [[-100, *b], [-100, *ab]]


@pytest.mark.parametrize("ends", [" ", "", "\n"])
def test_no_space_is_added_where_prompt_and_completion_meet(ends: str, tmp_path: Path) -> None:
    """Of tokenizers that put a space before every text; the prompt has the tokens that it has alone."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>", "</s>"])
    backend.train_from_iterator(["The answer is four and five\n"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    prompt = f"The answer is{ends}"
    path = write_json(tmp_path / "a.jsonl", *({"prompt": prompt, "completion": text} for text in ("four", "wer a")))
    rows = load_datasets(DataArguments(str(path), sequence_length=32, packing="none"), tokenizer)[0]
    alone = tokenizer(prompt)["input_ids"]
    for row, completion in zip(rows, ("four", "wer a"), strict=True):
        assert row["input_ids"][: len(alone)] == alone
        assert tokenizer.decode(row["input_ids"]) == f"{prompt}{completion}</s>"


@pytest.mark.parametrize("generation_tags", [True, False])
@pytest.mark.parametrize("file", ["a.jsonl", "a.parquet"])
def test_of_messages_the_turns_of_the_assistant_are_scored(
    file: str, generation_tags: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, load: Load
) -> None:
    """With the template's own mask, and by the difference of prefixes: the same."""
    template = CHAT_TEMPLATE
    if not generation_tags:
        template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer.chat_template = template
    rows = [{"messages": CHAT}, {"messages": [{"role": "user", "content": "a", "name": "b"}]}, {"messages": []}]
    if file.endswith("parquet"):
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / file)
    else:
        write_json(tmp_path / file, *rows)
    (row,) = load(tmp_path / file)
    assert row["input_ids"] == [*ids("qab"), *ids("rcd"), *ids("qef"), *ids("rg")], (
        "no second end behind the template's"
    )
    assert row["labels"] == [-100] * 5 + ids("cd") + [-100] * 5 + ids("g")
    all_scored = load(tmp_path / file, train_on_prompt=True)
    assert [row["input_ids"] for row in all_scored] == [row["input_ids"], ids("qa")]


def test_conversations_may_be_split_into_prompt_and_completion(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, load: Load
) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    (row,) = load(write_json(tmp_path / "a.jsonl", {"prompt": CHAT[:3], "completion": CHAT[3:]}))
    assert row["labels"] == [-100] * 13 + ids("g")


def test_a_template_that_rewrites_what_came_before_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, load: Load
) -> None:
    tokenizer.chat_template = "{{ 'abcdefg'[messages | length] }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="row 0 .*first 1 messages otherwise"):
        load(write_json(tmp_path / "a.jsonl", {"messages": CHAT}))
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(ValueError, match="row 0 .*template refuses it: no such role"):
        load(write_json(tmp_path / "a.jsonl", {"messages": CHAT}))
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        load(write_json(tmp_path / "a.jsonl", {"messages": CHAT}))


def test_the_mask_token_in_a_text_is_letters(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, load: Load) -> None:
    """No clean text holds the mask token; other special tokens are read as such."""
    rows = load(write_json(tmp_path / "a.jsonl", {"text": "a<mask>b"}, {"text": "a<end>b"}))
    assert MASK not in rows[0]["input_ids"] and len(rows[0]["input_ids"]) == 1 + len("<mask>") + 1 + 1
    assert rows[1]["input_ids"] == [*ids("a"), *ids("b")]
    tokenizer.chat_template = CHAT_TEMPLATE
    spelt = [{**CHAT[0], "content": "<mask>"}, CHAT[1]]
    assert len(load(write_json(tmp_path / "b.jsonl", {"messages": spelt}, {"messages": CHAT}))) == 1


def test_long_documents_are_truncated_when_not_packed(tmp_path: Path, load: Load) -> None:
    rows = load(write_json(tmp_path / "a.jsonl", {"text": "abcde"}, {"text": "abc"}), sequence_length=4)
    assert [row["input_ids"] for row in rows] == [ids("abcd", end=False), ids("abc")]


def test_documents_may_begin_with_bos(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, load: Load) -> None:
    path = write_json(tmp_path / "a.jsonl", {"text": "abc"})
    with pytest.raises(ValueError, match="add_bos_token.*no BOS token"):
        load(path, add_bos_token=True)
    tokenizer.bos_token = "t"
    assert load(path, add_bos_token=True)[0]["input_ids"] == ids("tabc")


# What is skipped, and what is refused


def test_what_is_skipped_is_counted(
    tmp_path: Path, load: Load, loud_transformers: None, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [("abc", "de"), ("abc", " \n"), ("", "de"), (None, "de"), ("abc", None), ("abcdefgh", "de")]
    path = write_json(tmp_path / "a.jsonl", *({"prompt": prompt, "completion": rest} for prompt, rest in rows))
    with caplog.at_level(logging.WARNING):
        loaded = load(path, sequence_length=8)
    assert [row["source"] for row in loaded] == [0, 2, 3]
    assert "2 of 6 documents were skipped, because they are empty" in caplog.text
    assert "1 of 6 documents were skipped, because no token of theirs would be scored" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load(path, sequence_length=8)
    assert "2 of 6 documents were skipped" in caplog.text, "from the cache too"


def test_packed_rows_in_which_nothing_is_scored_are_counted(
    tmp_path: Path, load: Load, loud_transformers: None, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_json(tmp_path / "a.jsonl", {"prompt": "abcdefgh", "completion": "abc"})
    with caplog.at_level(logging.WARNING):
        assert [row["source"] for row in load(path, sequence_length=4, packing="packed")] == [0]
    assert "in 2 of 3 rows nothing is scored" in caplog.text
    with pytest.raises(ValueError, match="in none of 1 rows anything is scored"):
        load(path, sequence_length=8, packing="packed")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet"])
def test_files_without_documents_are_refused(name: str, streaming: bool, tmp_path: Path, load: Load) -> None:
    if name.endswith("parquet"):
        datasets.Dataset.from_dict({"text": []}).to_parquet(tmp_path / name)
    else:
        (tmp_path / name).write_text("[]" if name == "a.json" else "")
    with pytest.raises(ValueError, match=f"`dataset` .*{name}' holds no documents"):
        load(tmp_path / name, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_that_are_all_skipped_are_refused(streaming: bool, tmp_path: Path, load: Load) -> None:
    path = write_json(tmp_path / "a.jsonl", *[{"text": ""}, {"text": None}] * 50)
    with pytest.raises(ValueError, match="of 100 documents none can be trained on: 100 skipped, because they are emp"):
        load(path, streaming=streaming)
    path = write_json(tmp_path / "b.jsonl", {"prompt": "a" * 20, "completion": "b"}, {"prompt": "a", "completion": ""})
    with pytest.raises(
        ValueError, match="none can be trained on: 1 skipped, because they.*; 1 skipped, because no to"
    ):
        load(path, streaming=streaming)
    with pytest.raises(ValueError, match="do not fill one row of `sequence_length` 64"):
        load(path, sequence_length=64, packing="packed", streaming=streaming)


def test_a_stream_whose_first_rows_are_far_behind_is_taken(tmp_path: Path, load: Load) -> None:
    path = write_json(tmp_path / "a.jsonl", *[{"text": ""}] * 100, {"text": "ab"})
    assert [row["source"] for row in load(path, streaming=True)] == [100]


BAD_LINES = {
    '{"text": "a", }': "line 2: not JSON",
    '["a"]': "line 2: a list instead of an object",
    '{"story": "a", "n": 1}': "line 2: no column `text`; there are `story`, `n`",
    '{"text": 5}': "line 2, `text`: a int instead of a string",
    '{"text": ["a"]}': "line 2, `text`: a list instead of a string",
    '{"text": "\\ud800"}': "line 2, `text`: holds half of a surrogate pair",
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:20])
def test_bad_lines_are_refused_by_file_and_line(line: str, streaming: bool, tmp_path: Path, load: Load) -> None:
    (tmp_path / "bad.jsonl").write_text(f'{{"text": "ab"}}\n{line}\n')
    with pytest.raises(ValueError) as caught:
        load(
            [str(write_json(tmp_path / "good.jsonl", {"text": "a"})), str(tmp_path / "bad.jsonl")], streaming=streaming
        )
    assert f"{tmp_path / 'bad.jsonl'}, {BAD_LINES[line]}" in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_line_nested_too_deeply_is_refused(streaming: bool, tmp_path: Path, load: Load) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text(f'{{"text": "ab"}}\n{"[" * 100_000}\n')
    # Collected where no frame is left, other tests' garbage could not run its finalisers: pytest calls that an error.
    gc.disable()
    try:
        with pytest.raises(ValueError, match="line 2: JSON nested too deeply"):
            load(path, streaming=streaming)
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_invalid_utf8_is_refused_by_file_line_and_byte(name: str, tmp_path: Path, load: Load) -> None:
    data = b'{"text": "ab"}\n{"text": "\xff"}\n'
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(ValueError) as caught:
        load(tmp_path / name)
    assert f"{tmp_path / name}, line 2: byte 25 (0xff) is not UTF-8" in str(caught.value)


def test_the_place_of_an_invalid_byte_is_right_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockgen_hf.training.documents._BLOCK", 3)
    (tmp_path / "a.txt").write_bytes("aé\n€€\n".encode() + b"\xe2\x82a")
    assert "line 3: byte 11 (0xe2)" in invalid_utf8(str(tmp_path / "a.txt"))
    (tmp_path / "b.txt").write_bytes("aé\n".encode() + b"\xe2\x82")
    assert "line 2: the file ends within a character" in invalid_utf8(str(tmp_path / "b.txt"))


def test_damaged_files_are_refused_by_name(tmp_path: Path, load: Load) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(os.urandom(1000).hex().encode())[:-500])
    (tmp_path / "b.txt.xz").write_bytes(b"no xz")
    (tmp_path / "c.parquet").write_bytes(b"no parquet")
    for name in ("a.txt.gz", "b.txt.xz", "c.parquet"):
        with pytest.raises(ValueError, match=name):
            load(tmp_path / name)


def test_values_of_a_wrong_type_in_parquet_are_refused_by_row(tmp_path: Path, load: Load) -> None:
    datasets.Dataset.from_dict({"text": [1, 2]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet', row 0 .*`text`: a int instead of a string"):
        load(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no column `story`; its columns are `text`"):
        load(tmp_path / "a.parquet", text_column="story")


def test_names_on_the_hub_are_loaded_by_datasets(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With configuration and revision of the training data; validation is the split of that name."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def load_dataset(path: str, **options: Any) -> datasets.Dataset:
        calls.append((path, {name: value for name, value in options.items() if value}))
        return datasets.Dataset.from_dict({"question": ["ab"], "answer": ["c"], "id": [0]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    args = DataArguments(
        "openai/gsm8k",
        dataset_config="main",
        dataset_revision="v1",
        validation_dataset="else/where",
        prompt_column="question",
        completion_column="answer",
        packing="none",
    )
    train, validation = load_datasets(args, tokenizer)
    assert train[0]["labels"] == validation[0]["labels"] == [-100, -100, *ids("c")]
    assert calls == [
        ("openai/gsm8k", {"name": "main", "revision": "v1", "split": "train"}),
        ("else/where", {"split": "validation"}),
    ]


@pytest.mark.parametrize("messages", ["abc", [{"content": "a"}], [{"role": "user"}], {"role": "user", "content": "a"}])
def test_what_is_no_conversation_is_refused(
    messages: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, load: Load
) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    with pytest.raises(ValueError, match="`messages`: .*(list of messages)"):
        load(write_json(tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": messages}))


def test_names_of_nothing_are_refused(tmp_path: Path, load: Load) -> None:
    with pytest.raises(FileNotFoundError, match="`dataset`: there is no file '.*nothing.jsonl'"):
        load(tmp_path / "nothing.jsonl")
    with pytest.raises(FileNotFoundError, match="there is no file '.*txt'"):
        load(tmp_path / "*.txt")
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder here, nor a data set that the Hub gives"):
        load(["nobody/has-this"])
    (tmp_path / "a.docx").write_text("a")
    with pytest.raises(ValueError, match=r"a.docx' is of no kind that is read: .txt, .jsonl"):
        load([str(tmp_path / "a.docx")])
    with pytest.raises(ValueError, match="files have no splits, but `test`"):
        load(write_json(tmp_path / "a.jsonl", {"text": "a"}), dataset_split="test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is a folder without data"):
        load(tmp_path / "empty")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": ""}, "`dataset`"),
        ({"sequence_length": 0}, "`sequence_length` is a whole number from 1 on, not 0"),
        ({"num_proc": 0}, "`num_proc`"),
        ({"max_documents": 0}, "`max_documents`"),
        ({"packing": "bfd"}, "`packing` is one of 'packed', 'none', not 'bfd'"),
        ({"document_separator": ""}, "`document_separator`"),
        ({"text_column": "a", "prompt_column": "b"}, "only one"),
        ({"isolate_documents": True, "packing": "none"}, "`isolate_documents`"),
        ({"validation_documents": 1, "validation_split": "test"}, "`validation_documents`"),
        ({"validation_documents": 1, "streaming": True}, "streaming"),
        ({"shuffle_buffer_size": 10}, "`shuffle_buffer_size`"),
        ({"num_proc": 2, "streaming": True}, "`num_proc`"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataArguments(**{"dataset": "a.txt", **settings})


def test_a_tokenizer_without_end_of_text_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, load: Load
) -> None:
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token.*set `tokenizer.eos_token`"):
        load(write_json(tmp_path / "a.jsonl", {"text": "a"}))


def test_arguments_come_from_the_command_line_and_from_yaml() -> None:
    parser = HfArgumentParser(DataArguments)
    line = "--dataset a.txt b.txt --document-separator \\n --validation-dataset c.txt --isolate-documents"
    (parsed,) = parser.parse_args_into_dataclasses(line.split())
    assert parsed.dataset == ["a.txt", "b.txt"] and parsed.document_separator == "\n"
    assert parsed.validation_dataset == "c.txt" and parsed.isolate_documents
    (parsed,) = parser.parse_dict({"dataset": "openwebtext", "validation_documents": 100_000})
    assert parsed.dataset == "openwebtext"


# The cache


def refuse_to_tokenize(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("tokenised again")


def test_the_second_start_tokenises_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the tokenizer was used in between, which leaves its marks in it; a changed file is read again."""
    path = write_json(tmp_path / "a.jsonl", *({"text": "abc"} for _ in range(20)))
    args = DataArguments(str(path), sequence_length=8)
    tokenizer = tiny_tokenizer()
    first = list(load_datasets(args, tokenizer)[0])
    tokenizer(["a", "bc"], padding=True, truncation=True, max_length=1)
    with monkeypatch.context() as patch:
        patch.setattr(DocumentTokenizer, "__call__", refuse_to_tokenize)
        patch.setattr("blockgen_hf.training.packing.rows_of_documents", refuse_to_tokenize)
        assert list(load_datasets(args, tokenizer)[0]) == first
        for change in ({"overwrite_cache": True}, {"train_on_prompt": True}, {"num_proc": 2, "overwrite_cache": True}):
            with pytest.raises(RuntimeError, match="tokenised again"):
                load_datasets(DataArguments(str(path), sequence_length=8, **change), tokenizer)
        with pytest.raises(RuntimeError, match="tokenised again"):
            load_datasets(DataArguments(str(path), sequence_length=4), tokenizer)
    write_json(path, *({"text": "bbb"} for _ in range(20)))
    assert texts(list(load_datasets(args, tokenizer)[0]))[0] == "bbbbbb"


def test_an_interruption_leaves_nothing_that_is_taken_for_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_json(tmp_path / "a.jsonl", *({"text": "abc"} for _ in range(20)))
    args = DataArguments(str(path), sequence_length=8)
    monkeypatch.setattr("blockgen_hf.training.data._DOCUMENTS_AT_A_TIME", 4)
    whole = DocumentTokenizer.__call__

    def interrupted(self: DocumentTokenizer, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        if indices[0] >= 12:
            raise KeyboardInterrupt
        return whole(self, batch, indices)

    with monkeypatch.context() as patch:
        patch.setattr(DocumentTokenizer, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_datasets(args, tiny_tokenizer())
    rows, _ = load_datasets(args, tiny_tokenizer())
    assert [token for row in rows["input_ids"] for token in row] == ids("abc") * 20


SCRIPT = """
import os, signal, sys
import datasets
from tiny import tiny_tokenizer
from blockgen_hf.training.data import DataArguments, load_datasets
from blockgen_hf.training.tokenization import DocumentTokenizer

path, cache, mode = sys.argv[1:]
whole = DocumentTokenizer.__call__
def call(self, batch, indices):
    if mode == "refuse" or (mode == "kill" and indices[0] >= 64):
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, batch, indices)
DocumentTokenizer.__call__ = call
rows, _ = load_datasets(DataArguments(path, sequence_length=8, cache_dir=cache), tiny_tokenizer())
print(sum(map(len, rows["input_ids"])))
"""


@pytest.mark.slow
def test_another_process_finds_the_cache_and_a_killed_one_leaves_none(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.jsonl", *({"text": "abc"} for _ in range(200)))

    def run(mode: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SCRIPT, str(path), str(tmp_path / "cache"), mode]
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "home"),
        }
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert run("kill").returncode == -signal.SIGKILL
    assert run("whole").stdout.strip() == "800"
    assert run("refuse").stdout.strip() == "800"


# Long documents, and a tokenizer of one's own


def long_text(num_words: int) -> str:
    """Words and numbers, with all sorts of white space between them."""
    generator = np.random.default_rng(0)
    vocabulary = [*("".join(generator.choice(list("abcdefgh é€"), 5)) for _ in range(500)), "12", "...", "\n\n", "  "]
    return " ".join(generator.choice(vocabulary, num_words))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("smaller", [32, pytest.param(1, marks=pytest.mark.slow)], ids=["100 KB", "3 MB"])
def test_a_long_document_has_the_tokens_of_the_whole(
    smaller: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for constant, value in (("PIECE_CHARACTERS", PIECE_CHARACTERS), ("_LONGEST_PIECE", 4 * PIECE_CHARACTERS)):
        monkeypatch.setattr(f"blockgen_hf.training.documents.{constant}", value // smaller)
    text = long_text(500_000 // smaller)
    assert len(text) > 8 * PIECE_CHARACTERS // smaller
    tokenizer = train_tokenizer([text[:50_000]], vocab_size=400, sequence_length=1024)
    (tmp_path / name).write_text(text if name == "a.txt" else json.dumps({"text": text}))
    rows, _ = load_datasets(DataArguments(str(tmp_path / name), sequence_length=1024), tokenizer)
    expected = [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
    tokens = rows.with_format("numpy")["input_ids"][:].ravel().tolist()
    assert tokens == expected[: len(expected) // 1024 * 1024]


def test_a_tokenizer_is_trained_with_the_mask_last() -> None:
    tokenizer = train_tokenizer(["once upon a time"] * 5, vocab_size=280, sequence_length=32)
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|pad|>", "<|mask|>"]) == [
        len(tokenizer) - 3,
        len(tokenizer) - 2,
        len(tokenizer) - 1,
    ]
    assert len(tokenizer) <= 280 and tokenizer.model_max_length == 32 and tokenizer.padding_side == "left"
    text = "Zoë once 你好\n\t upon"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with pytest.raises(ValueError, match="`vocab_size` is 259 at least"):
        train_tokenizer(["a"], vocab_size=258, sequence_length=32)
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer([], vocab_size=300, sequence_length=32)
