"""Packing: rows are the documents, joined and cut, however the work is shared out."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import EOS, LETTERS
from transformers import PreTrainedTokenizerFast

from blockgen_hf.training.data import DataArguments, load_datasets
from blockgen_hf.training.packing import pack, rows_of_documents, token_features, token_offsets


Tokens = list[int]

# Documents as the tokenizer leaves them: with their end, or empty because they were skipped.
DOCUMENTS = st.lists(
    st.one_of(st.just([]), st.lists(st.integers(0, 19), max_size=12).map(lambda words: [*words, EOS])), max_size=12
).filter(any)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test writes to the cache of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        datasets.disable_progress_bars()
        yield


def tokenized(documents: list[Tokens], labels: list[Tokens] | None = None) -> datasets.Dataset:
    columns: dict[str, Any] = {"input_ids": documents, "begins": [True] * len(documents)}
    columns |= {"status": [0] * len(documents), "source": list(range(len(documents)))}
    columns |= {"labels": labels} if labels is not None else {}
    return datasets.Dataset.from_dict(columns, features=token_features(labels is not None))


def joined(documents: list[Tokens], length: int) -> Tokens:
    """All tokens but the last remainder."""
    tokens = list(itertools.chain.from_iterable(documents))
    return tokens[: len(tokens) // length * length]


@given(DOCUMENTS, st.integers(1, 9))
@settings(max_examples=40)
def test_rows_are_the_documents_joined_and_cut(documents: list[Tokens], length: int) -> None:
    """No token is lost but the last remainder; `document_ids` change exactly behind each end; sources name the row."""
    rows = pack(tokenized(documents), length, isolate_documents=True)
    assert {len(ids) for ids in rows["input_ids"]} <= {length}
    assert list(itertools.chain.from_iterable(rows["input_ids"])) == joined(documents, length)
    offsets = np.cumsum([0] + [len(document) for document in documents])
    for number, row in enumerate(rows):
        ends = np.array(row["input_ids"]) == EOS
        assert np.diff(row["document_ids"]).tolist() == ends[:-1].astype(int).tolist()
        assert row["document_ids"][0] == 0
        assert offsets[row["source"]] <= number * length < offsets[row["source"] + 1]


@given(DOCUMENTS, st.integers(1, 9), st.data())
@settings(max_examples=40)
def test_any_sharing_out_of_the_documents_gives_the_same_rows(
    documents: list[Tokens], length: int, data: st.DataObject
) -> None:
    table = tokenized(documents).with_format("arrow")
    options = dict(documents=table, offsets=token_offsets(table), starts=None, sequence_length=length)
    cuts = data.draw(st.lists(st.integers(0, len(documents)), max_size=4).map(sorted))
    edges = [0, *cuts, len(documents)]
    rows: list[Tokens] = []
    for begin, end in itertools.pairwise(edges):
        if begin < end:
            made = rows_of_documents(table[begin:end], list(range(begin, end)), **options)
            rows += made["input_ids"].to_pylist()
    assert list(itertools.chain.from_iterable(rows)) == joined(documents, length)


def test_labels_are_cut_as_the_tokens_and_rows_without_any_are_left_out() -> None:
    documents = [[1, 2, 3, 4, 5, EOS], [6, 7, EOS]]
    labels = [[-100, -100, -100, -100, 5, EOS], [-100, 7, EOS]]
    rows = pack(tokenized(documents, labels), 3, isolate_documents=False)
    assert list(rows["input_ids"]) == [[4, 5, EOS], [6, 7, EOS]]
    assert list(rows["labels"]) == [[-100, 5, EOS], [-100, 7, EOS]]
    assert list(rows["source"]) == [0, 1]


def write_lines(path: Path, num_documents: int, seed: int = 0) -> list[str]:
    """Documents of 0 to 40 letters, one a line."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, 41, num_documents)
    texts = ["".join(generator.choice(list(LETTERS), length)) for length in lengths]
    path.write_text("\n".join(texts) + "\n")
    return texts


def arguments(path: Path, tmp_path: Path, **settings: Any) -> DataArguments:
    defaults = dict(dataset=str(path), document_separator="\n", sequence_length=16, cache_dir=str(tmp_path / "cache"))
    return DataArguments(**{**defaults, **settings})


@pytest.mark.parametrize(
    ("num_proc", "batch"), [(None, 1), (None, 7), (None, 1000), (2, 7), pytest.param(3, 1, marks=pytest.mark.slow)]
)
def test_processes_and_batches_do_not_change_the_rows(
    num_proc: int | None,
    batch: int,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("blockgen_hf.training.data._DOCUMENTS_AT_A_TIME", batch)
    monkeypatch.setattr("blockgen_hf.training.packing._TOKENS_AT_A_TIME", batch)
    texts = write_lines(tmp_path / "lines.txt", 60)
    args = arguments(tmp_path / "lines.txt", tmp_path, num_proc=num_proc)
    rows, _ = load_datasets(args, tokenizer)
    expected = [[*map(LETTERS.index, text), EOS] for text in texts if text]
    assert list(itertools.chain.from_iterable(rows["input_ids"])) == joined(expected, 16)


STREAMS: list[dict[str, Any]] = [
    {},
    {"isolate_documents": True},
    {"packing": "none"},
    {"max_documents": 17, "isolate_documents": True},
]


@pytest.mark.parametrize("settings", STREAMS, ids=str)
def test_a_stream_gives_the_same_rows(
    settings: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    write_lines(tmp_path / "lines.txt", 150)
    rows, _ = load_datasets(arguments(tmp_path / "lines.txt", tmp_path, **settings), tokenizer)
    stream, _ = load_datasets(arguments(tmp_path / "lines.txt", tmp_path, streaming=True, **settings), tokenizer)
    assert list(stream) == list(rows)


def test_a_stream_of_prompts_gives_the_same_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    lines = "".join(f'{{"prompt": "abc", "completion": "{LETTERS[: n % 20]}"}}\n' for n in range(40))
    (tmp_path / "prompts.jsonl").write_text(lines)
    rows, _ = load_datasets(arguments(tmp_path / "prompts.jsonl", tmp_path), tokenizer)
    stream, _ = load_datasets(arguments(tmp_path / "prompts.jsonl", tmp_path, streaming=True), tokenizer)
    assert list(stream) == list(rows)


@pytest.mark.parametrize("packing", ["packed", "none"])
def test_a_stream_goes_on_where_its_state_was_saved(
    packing: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    write_lines(tmp_path / "lines.txt", 60)
    args = arguments(tmp_path / "lines.txt", tmp_path, streaming=True, packing=packing)
    stream, _ = load_datasets(args, tokenizer)
    iterator = iter(stream)
    for _ in range(5):
        next(iterator)
    state = stream.state_dict()
    rest = list(iterator)
    resumed, _ = load_datasets(args, tokenizer)
    resumed.load_state_dict(state)
    assert list(resumed) == rest


@pytest.mark.parametrize("packing", ["packed", "none"])
def test_workers_of_a_loader_lose_nothing_of_a_stream(
    packing: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Files are shards, which `datasets` shares out among workers; a packed stream reads them all in one."""
    from torch.utils.data import DataLoader

    paths = [tmp_path / f"{number}.txt" for number in range(3)]
    for seed, path in enumerate(paths):
        write_lines(path, 10, seed)
    args = arguments(tmp_path / "*.txt", tmp_path, streaming=True, packing=packing)
    stream, _ = load_datasets(args, tokenizer)
    loaded = [row["input_ids"] for row in DataLoader(stream, batch_size=None, num_workers=2)]
    assert sorted(loaded) == sorted(row["input_ids"] for row in stream)


def test_a_shuffled_stream_has_the_same_rows_in_an_order_of_its_seed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    write_lines(tmp_path / "lines.txt", 60)
    args = arguments(tmp_path / "lines.txt", tmp_path, streaming=True)
    plain = [row["input_ids"] for row in load_datasets(args, tokenizer)[0]]
    args.shuffle_buffer_size = 10
    orders = [[row["input_ids"] for row in load_datasets(args, tokenizer, seed)[0]] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] != plain
    assert sorted(orders[0]) == sorted(plain)


def test_a_long_document_comes_in_pieces_and_is_still_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of some hundred characters here; the tokens are those of the whole text."""
    monkeypatch.setattr("blockgen_hf.training.documents.PIECE_CHARACTERS", 200)
    monkeypatch.setattr("blockgen_hf.training.documents._LONGEST_PIECE", 800)
    monkeypatch.setattr("blockgen_hf.training.documents._BLOCK", 300)
    generator = np.random.default_rng(0)
    long = "".join(generator.choice([*LETTERS, *"     "], 5000)).strip()
    (tmp_path / "long.txt").write_text(f"abc<end>\n{long}\n<end>\n\nde\n<end>\n")
    args = arguments(
        tmp_path / "long.txt", tmp_path, document_separator="<end>", isolate_documents=True, sequence_length=5001
    )
    documents = [tokenizer(text)["input_ids"] + [EOS] for text in ("abc", long, "de")]
    for streaming in (False, True):
        args.streaming = streaming
        rows = list(load_datasets(args, tokenizer)[0])
        assert rows[0]["input_ids"] == [*documents[0], *documents[1], *documents[2]][:5001]
        assert rows[0]["document_ids"] == ([0] * 4 + [1] * 5001 + [2] * 3)[:5001]
    args = arguments(tmp_path / "long.txt", tmp_path, document_separator="<end>", packing="none")
    rows = list(load_datasets(args, tokenizer)[0])
    assert [row["input_ids"] for row in rows] == [document[:16] for document in documents]
