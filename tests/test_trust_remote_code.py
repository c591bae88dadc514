"""Without `--trust-remote-code` no code of a folder runs, and nothing asks on standard input whether it may."""

import builtins
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from published_reference import settings, weights, write
from recipes import TINY, stand_ins
from tiny import tiny_model, tiny_tokenizer

import blockgen_hf
from blockgen_hf.cli import main
from blockgen_hf.hub.cards import template


SOURCE = Path(blockgen_hf.__file__).parent
CODE = """
from transformers import PreTrainedTokenizerFast
open({mark!r}, "w").close()
class Evil(PreTrainedTokenizerFast): pass
"""


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose tokenizer is code that leaves a mark; whoever asks is told to run it."""
    folder = tmp_path / "hostile"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "evil.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
    asked: list[str] = []

    def answer(prompt: str = "") -> str:
        asked.append(prompt)
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 10))
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    yield folder
    assert asked == [] and not (tmp_path / "mark").exists()


def test_generate(hostile: Path) -> None:
    main(["generate", "a", "--model", str(hostile), "--max-new-tokens", "1"])


def test_convert(hostile: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "source", settings("block-dit"), weights("block-dit"))
    sizes = ["--diffusion-type", "masked", "--block-sizes", "1,4"]
    main(["convert", str(source), "--output", str(tmp_path / "out"), *sizes, "--tokenizer", str(hostile)])


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_train(options: list[str], hostile: Path, tmp_path: Path) -> None:
    words = [*TINY, *stand_ins("laptop", tmp_path / "data"), "tokenizer.train=null"]
    words += [f"tokenizer.name_or_path={hostile}", "--output-dir", str(tmp_path / "run"), *options]
    main(["train", "laptop", *words])


def test_finetune(hostile: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a b c"}\n' * 4)
    words = [str(hostile), "--max-steps", "1", "--output-dir", str(tmp_path / "run")]
    main(["finetune", *words, "--dataset", str(tmp_path / "data.jsonl")])


def test_metrics(hostile: Path) -> None:
    pytest.importorskip("evaluate")
    from blockgen_hf.metrics.distinct_n.distinct_n import token_sequences
    from blockgen_hf.metrics.generative_perplexity.generative_perplexity import load_judge
    from blockgen_hf.metrics.mauve_score.mauve_score import load_featurizer

    for load in (load_judge, load_featurizer, lambda name: token_sequences(["a"], name)):
        with suppress(ValueError, OSError):
            load(str(hostile))


def test_the_code_runs_where_it_is_trusted(hostile: Path, tmp_path: Path) -> None:
    """Or else the tests above would prove nothing."""
    main(["generate", "a", "--model", str(hostile), "--max-new-tokens", "1", "--trust-remote-code"])
    assert (tmp_path / "mark").exists()
    (tmp_path / "mark").unlink()


def test_whatever_is_loaded_says_whether_code_may_run() -> None:
    """Of classes that choose by what a folder says, as `AutoTokenizer` does: not saying so is asking."""
    calls = re.compile(r"\bAuto\w+\.from_pretrained\(")
    for file in [*SOURCE.rglob("*.py"), *SOURCE.rglob("*.md")]:
        text = file.read_text(encoding="utf-8")
        for call in calls.finditer(text):
            assert "trust_remote_code" in text[call.end() : call.end() + 200], (file, call.group())


@pytest.mark.slow
def test_a_published_snippet_opens_the_tokenizer_without_a_question(saved: Path) -> None:
    """In a process without the package, whose standard input stays open: a question would wait for 15 seconds."""
    (line,) = re.findall(r"^tokenizer = .*$", template("model_card.md"), flags=re.MULTILINE)
    code = f"""
import builtins, sys
sys.modules["blockgen_hf"] = None
def asked(prompt=""):
    print("ASKED")
    raise SystemExit(3)
builtins.input = asked
from transformers import AutoTokenizer
MODEL = {str(saved)!r}
{line.replace("{{ repo_id }}", str(saved))}
print(tokenizer("abc")["input_ids"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "[0, 1, 2]\n", done.stdout + done.stderr
