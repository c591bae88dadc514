"""Texts of the model's own: made once for each request, in the form of the data whose prompts they continue."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_models import converted, original
from tiny import tiny_tokenizer

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.cli import main


pytest.importorskip("peft")
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}s{{ message.content }}{{ eos_token }}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}s{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    converted(folder, original(eos_token_id=tokenizer.eos_token_id), name="model")
    tokenizer.save_pretrained(folder / "model")
    texts = ["".join("abcdefghij"[i * j % 10] for j in range(1, 40)) for i in range(1, 50)]
    write(folder / "data.jsonl", [{"story": text} for text in texts])
    write(folder / "prompts.jsonl", [{"q": text[:5], "a": text[5:9]} for text in texts])
    talk = ["user", "assistant", "user", "assistant"]
    chats = [[{"role": role, "content": text[:3]} for role in talk] for text in texts]
    write(folder / "chats.jsonl", [{"turns": chat} for chat in chats])
    return folder


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("\n".join(map(json.dumps, rows)))


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def adapt(base: Path, data: str, *options: str) -> int:
    command = [
        "adapt",
        str(base / "model"),
        "--dataset",
        str(base / data),
        "--self-data",
        "12",
        "--prompt-tokens",
        "6",
    ]
    short = ["--batch-size", "4", "--sequence-length", "32", "--max-steps", "1", "--validation-documents", "3"]
    return main([*command, *short, "training.eval_strategy=no", "data.packing=none", *options])


def test_a_file_is_reused_for_the_same_request_only(base: Path, tmp_path: Path) -> None:
    own = ["data.text_column=story", f"training.output_dir={tmp_path / 'run'}"]  # as an override, too
    assert adapt(base, "data.jsonl", *own) == 0
    (first,) = tmp_path.glob("run-self-data-*.jsonl")
    stamp = first.stat().st_mtime_ns
    assert [list(row) for row in read(first)] == [["story"]] * 12
    (tmp_path / "run").rename(tmp_path / "before")
    assert adapt(base, "data.jsonl", *own, "training.learning_rate=0.001") == 0
    assert list(tmp_path.glob("run-self-data-*.jsonl")) == [first] and first.stat().st_mtime_ns == stamp
    for count, other in enumerate((["--seed", "5"], ["--prompt-tokens", "3"], ["--self-data", "13"]), start=2):
        (tmp_path / "run").rename(tmp_path / f"before-{count}")
        assert adapt(base, "data.jsonl", *own, *other) == 0
        assert len(list(tmp_path.glob("run-self-data-*.jsonl"))) == count
    assert first.stat().st_mtime_ns == stamp


def test_what_is_held_out_is_a_share_of_what_was_written(base: Path, tmp_path: Path) -> None:
    write(base / "few.jsonl", [{"text": "abcdefgh"}] * 9)
    assert adapt(base, "few.jsonl", "--output-dir", str(tmp_path / "run"), "--self-data", "1000") == 0
    (file,) = tmp_path.glob("run-self-data-*.jsonl")
    assert len(read(file)) == 6  # three are held out of the nine
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "validation_documents: 1\n" in recipe and file.name in recipe


def test_prompts_and_conversations_get_answers_of_the_models_own(base: Path, tmp_path: Path) -> None:
    columns = ["data.prompt_column=q", "data.completion_column=a"]
    assert adapt(base, "prompts.jsonl", *columns, "--output-dir", str(tmp_path / "pairs")) == 0
    (file,) = tmp_path.glob("pairs-self-data-*.jsonl")
    rows = read(file)
    given = [row["q"] for row in read(base / "prompts.jsonl")]
    assert rows and all(list(row) == ["q", "a"] and row["q"] in given for row in rows)
    assert any(row["a"] not in row["q"] for row in rows)

    chat = tmp_path / "chat"
    BlockGenForDiffusionLM.from_pretrained(base / "model").save_pretrained(chat / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(chat / "model")
    os.link(base / "chats.jsonl", chat / "chats.jsonl")
    assert adapt(chat, "chats.jsonl", "--messages-column", "turns", "--output-dir", str(tmp_path / "chats")) == 0
    (file,) = tmp_path.glob("chats-self-data-*.jsonl")
    for row in read(file):
        (question, answer) = row["turns"]
        assert question["role"] == "user" and answer["role"] == "assistant"
    assert any(answer["content"] != question["content"] for question, answer in (row["turns"] for row in read(file)))


def test_a_split_of_the_data_that_are_replaced_is_no_validation(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["--validation-split", "test", "--output-dir", str(tmp_path / "run"), "data.validation_documents=0"]
    assert adapt(base, "data.jsonl", *options, "data.text_column=story") != 0
    assert "`--validation-split` 'test' is a split of" in capsys.readouterr().err


def test_the_texts_do_not_touch_the_random_numbers_of_the_run(base: Path, tmp_path: Path) -> None:
    from blockgen_hf.training.self_data import text_prompts, write_self_data

    model, tokenizer = BlockGenForDiffusionLM.from_pretrained(base / "model").eval(), tiny_tokenizer()
    state = torch.get_rng_state()
    for name in ("one", "two"):
        prompts = text_prompts(["abcdefgh"] * 3, tokenizer, 6)
        assert write_self_data(model, tokenizer, prompts, tmp_path / name, count=5, length=12, seed=3) == 3
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text()
    assert torch.equal(torch.get_rng_state(), state)
