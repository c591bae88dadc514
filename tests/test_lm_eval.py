"""lm-evaluation-harness: its model `hf` on a BlockGen checkpoint, and ours, `blockgen`, on everything else."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_models import adopted, original
from tiny import EOS, LETTERS, MASK, generate, tiny_model, tiny_tokenizer

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.evaluation import sequence_nll


lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from blockgen_hf.evaluation.harness import BlockGenLM  # noqa: E402


PAIRS = [("abc", "de"), ("abc", "df"), ("q", "cdefgh"), ("abcdefghij", "k"), ("abcdefghij", "l"), ("hg", "h")]
BEGINNINGS = [("", "ghab"), ("", "t")]


def ids(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]


def asked(*arguments: tuple[Any, ...]) -> list[Instance]:
    """Requests as the harness makes them."""
    return [Instance("loglikelihood", {}, args, index) for index, args in enumerate(arguments)]


def blockgen(model: BlockGenForDiffusionLM, **settings: Any) -> BlockGenLM:
    return BlockGenLM(model, **{"tokenizer": tiny_tokenizer(), "batch_size": 4, **settings})


def stock(model: Any, **settings: Any) -> HFLM:
    return HFLM(model, **{"tokenizer": tiny_tokenizer(), "batch_size": 4, **settings})


def values(answers: list[tuple[float, bool]]) -> list[float]:
    return [value for value, _ in answers]


def close(values: Any) -> Any:
    return pytest.approx(values, abs=1e-4)


@torch.no_grad()
def conditional(model: BlockGenForDiffusionLM, tokens: list[int]) -> torch.Tensor:
    """log p of each token given those before it, `[L]`, by the denoiser with block size 1."""
    x = torch.tensor([tokens])
    queries = model.fixed_queries(torch.arange(len(tokens))[None])
    log_x_hat = model.diffusion.log_probs(model(x, queries, block_size=1, noise_level=1.0).logits.double(), queries)
    return log_x_hat.gather(-1, x[..., None])[0, :, 0]


def log_likelihood(model: BlockGenForDiffusionLM, context: str, continuation: str) -> float:
    return float(conditional(model, ids(context + continuation))[len(context) :].sum())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny masked model and its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model(eos_token_id=EOS).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


# ---- the harness's own model
@pytest.mark.parametrize("variant", ["masked", "uniform"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_stock_log_likelihoods_are_those_of_the_autoregressive_model(variant: str, batch_size: int) -> None:
    model = tiny_model(variant)
    answers = stock(model, batch_size=batch_size).loglikelihood(asked(*PAIRS), disable_tqdm=True)
    assert values(answers) == close([log_likelihood(model, *pair) for pair in PAIRS])


def test_the_stock_model_puts_the_end_of_text_before_an_empty_context(model: BlockGenForDiffusionLM) -> None:
    expected = float(conditional(model, [EOS, *ids("ghab")])[1:].sum())
    answers = stock(model).loglikelihood(asked(("", "ghab")), disable_tqdm=True)
    assert values(answers) == close([expected])
    assert expected != close(log_likelihood(model, "", "ghab"))


def test_stock_rolling_windows_read_one_position_more_than_the_model_has(model: BlockGenForDiffusionLM) -> None:
    text = (LETTERS * 4)[:70]
    tokens = [EOS, *ids(text)]
    first, last = conditional(model, tokens[:65])[1:], conditional(model, tokens[6:])[-6:]
    (answer,) = stock(model).loglikelihood_rolling(asked((text,)), disable_tqdm=True)
    assert answer == close(float(first.sum() + last.sum()))


def test_a_folder_serves_the_stock_model_with_remote_code(checkpoint: str) -> None:
    model = tiny_model()
    lm = HFLM(checkpoint, trust_remote_code=True, device="cpu", batch_size=2)
    answers = lm.loglikelihood(asked(*PAIRS), disable_tqdm=True)
    assert values(answers) == close([log_likelihood(model, *pair) for pair in PAIRS])
    settings = {"until": ["jq"], "max_gen_toks": 12, "decoding": "ar"}
    (text,) = lm.generate_until(asked(("abc", settings)), disable_tqdm=True)
    assert text == continued(model, "abc", "jq", decoding="ar", max_new_tokens=12)


def test_a_converted_model_has_the_log_likelihoods_of_the_original() -> None:
    source = original(vocab_size=23, pad_token_id=20)
    model, requests = adopted(source), asked(*PAIRS)
    expected = stock(source).loglikelihood(requests, disable_tqdm=True)
    for found in (stock(model), blockgen(model)):
        answers = found.loglikelihood(requests, disable_tqdm=True)
        assert values(answers) == close(values(expected))
        assert [greedy for _, greedy in answers] == [greedy for _, greedy in expected]


def continued(model: BlockGenForDiffusionLM, prompt: str, stop: str, **settings: Any) -> str:
    """The greedy continuation up to the stop string."""
    tokens = generate(model, torch.tensor([ids(prompt)]), do_sample=False, eos_token_id=EOS, **settings)
    return tiny_tokenizer().decode(tokens[0, len(prompt) :], skip_special_tokens=True).split(stop)[0]


# ---- log-likelihoods
@pytest.mark.parametrize("variant", ["masked", "uniform", "time_conditional", "without_adaln"])
def test_ar_log_likelihoods_are_exact_and_begin_a_text_with_its_first_token(variant: str) -> None:
    model = tiny_model(variant)
    answers = blockgen(model).loglikelihood(asked(*PAIRS, *BEGINNINGS, ("  abc", "d")), disable_tqdm=True)
    assert values(answers[:-1]) == close([log_likelihood(model, *pair) for pair in PAIRS + BEGINNINGS])


def test_requests_that_differ_in_their_last_token_share_a_row(model: BlockGenForDiffusionLM) -> None:
    lm, shapes = blockgen(model), []
    model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    answers = lm.loglikelihood(asked(*(("abc", letter) for letter in "defg"), ("abc", "de"), ("abcd", "")))
    assert shapes == [(3, 4)]
    expected = [*(log_likelihood(model, "abc", letter) for letter in "defg"), log_likelihood(model, "abc", "de"), 0]
    assert values(answers) == close(expected)
    assert values(lm.loglikelihood(asked(("", ""), ("", "t")))) == close([0, log_likelihood(model, "", "t")])


def test_greedy_continuations_are_told_whatever_the_likelihood(model: BlockGenForDiffusionLM) -> None:
    greedy = continued(model, "abc", "<none>", decoding="ar", max_new_tokens=5)
    other = greedy[:4] + ("a" if greedy[4] != "a" else "b")
    for likelihood in ("ar", "elbo", "mixture"):
        answers = blockgen(model, likelihood=likelihood, monte_carlo_samples=1).loglikelihood(
            asked(("abc", greedy), ("abc", other))
        )
        assert [is_greedy for _, is_greedy in answers] == [True, False]


def test_the_elbo_is_conditional_on_the_context(model: BlockGenForDiffusionLM) -> None:
    """Three tokens of one block: all ways to mask some of them, each number of masks alike (Eq. 15)."""
    text = torch.tensor([ids("abcdefgh")])
    for scored in [(5, 6, 7), (6, 7)]:
        expected = 0.0
        for count in range(1, len(scored) + 1):
            subsets = list(itertools.combinations(scored, count))
            for subset in subsets:
                z = text.clone()
                z[0, list(subset)] = MASK
                with torch.no_grad():
                    log_x_hat = model.diffusion.log_probs(model(text, z, block_size=4).logits, z)
                gathered = log_x_hat.gather(-1, text[..., None])[0, list(subset), 0]
                expected += float(gathered.sum()) / (count / len(scored)) / len(subsets) / len(scored)
        lm = blockgen(model, likelihood="elbo", block_size=4, monte_carlo_samples=96)
        cut = scored[0]
        (answer,) = lm.loglikelihood(asked((LETTERS[:cut], LETTERS[cut:8])), disable_tqdm=True)
        assert answer[0] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_the_mixture_is_the_log_sum_exp_of_the_elbos_of_each_request(variant: str) -> None:
    weights = {1: 0.1, 4: 0.6, 8: 0.3}
    model = tiny_model(variant, block_sizes=list(weights), block_size_weights=list(weights.values()))
    requests = asked(*PAIRS, *BEGINNINGS)
    each = {
        size: values(blockgen(model, likelihood="elbo", block_size=size, seed=3).loglikelihood(requests))
        for size in weights
    }
    mixed = values(blockgen(model, likelihood="mixture", seed=3).loglikelihood(requests))
    for index, value in enumerate(mixed):
        terms = [math.log(weight) + each[size][index] for size, weight in weights.items()]
        assert value == close(float(torch.logsumexp(torch.tensor(terms), 0)))
    other = values(blockgen(model, likelihood="mixture", seed=4).loglikelihood(requests))
    assert max(abs(a - b) for a, b in zip(mixed, other, strict=True)) > 1e-3


def test_the_elbo_has_the_noise_of_the_package(model: BlockGenForDiffusionLM) -> None:
    tokens = torch.tensor([ids("abcdefgh")])
    labels = tokens.masked_fill(torch.arange(8) < 3, -100)
    expected = sequence_nll(model, {"input_ids": tokens, "labels": labels}, [8], 5, seed=7).mean()
    lm = blockgen(model, likelihood="elbo", monte_carlo_samples=5, seed=7)
    assert values(lm.loglikelihood(asked(("abc", "defgh")))) == close([-float(expected)])


@pytest.mark.parametrize(
    ("variant", "likelihood"), [("masked", "ar"), ("uniform", "elbo"), ("masked", "mixture"), ("uniform", "mixture")]
)
def test_log_likelihoods_do_not_depend_on_batches_and_order(variant: str, likelihood: str) -> None:
    model, pairs = tiny_model(variant, block_sizes=[1, 4]), [*PAIRS, *BEGINNINGS]
    settings: dict[str, Any] = {"likelihood": likelihood, "monte_carlo_samples": 3}
    together = blockgen(model, batch_size=3, **settings).loglikelihood(asked(*pairs))
    alone = blockgen(model, batch_size=1, **settings).loglikelihood(asked(*reversed(pairs)))
    found = blockgen(model, batch_size="auto", max_batch_size=8, **settings).loglikelihood(asked(*pairs))
    assert values(together) == close(values(alone)[::-1])
    assert values(together) == close(values(found))


def test_rolling_windows_have_all_the_positions_of_the_model(model: BlockGenForDiffusionLM) -> None:
    text = (LETTERS * 8)[:140]
    tokens = ids(text)
    expected = conditional(model, tokens[:63]).sum()
    expected += conditional(model, tokens[62:126])[1:].sum()
    expected += conditional(model, tokens[76:])[-14:].sum()
    assert len(tokens[62:126]) == len(tokens[76:]) == 64
    answers = blockgen(model).loglikelihood_rolling(asked((text,), ("abc",), ("",)))
    assert answers == close([float(expected), log_likelihood(model, "", "abc"), 0])
    bounds = blockgen(model, likelihood="mixture").loglikelihood_rolling(asked(("abc",)))
    assert bounds == close(values(blockgen(model, likelihood="mixture").loglikelihood(asked(("", "abc")))))


def test_contexts_are_cut_on_the_left_and_continuations_never(
    model: BlockGenForDiffusionLM, caplog: pytest.LogCaptureFixture
) -> None:
    text = (LETTERS * 5)[:70]
    answers = blockgen(model).loglikelihood(asked((text, "ab"), ("c", "ab")))
    assert values(answers) == close([log_likelihood(model, text[-62:], "ab"), log_likelihood(model, "c", "ab")])
    assert "1 of 2 contexts are cut on the left: the model takes 64 tokens." in caplog.messages
    with pytest.raises(ValueError, match="A continuation of 65 tokens cannot be scored: the model takes 64 at most"):
        blockgen(model).loglikelihood(asked(("a", (LETTERS * 5)[:65])))


def test_a_prefix_token_of_the_users_choice_stands_before_a_text(model: BlockGenForDiffusionLM) -> None:
    lm = blockgen(model, prefix_token_id=EOS)
    expected = float(conditional(model, [EOS, *ids("ghab")])[1:].sum())
    assert values(lm.loglikelihood(asked(("", "ghab")))) == close([expected])
    assert lm.loglikelihood_rolling(asked(("ghab",))) == close([expected])


@pytest.mark.parametrize("likelihood", ["ar", "elbo", "mixture"])
def test_a_mask_token_is_impossible(model: BlockGenForDiffusionLM, likelihood: str) -> None:
    answers = blockgen(model, likelihood=likelihood).loglikelihood(asked(("abc", "d<mask>e"), ("abc", "de")))
    assert answers[0][0] < -1e30 and -100 < answers[1][0] < 0


def test_next_token_models_need_a_token_before_a_text() -> None:
    model = tiny_model(next_token_prediction=True, block_sizes=None)
    with torch.no_grad():
        log_probs = model(torch.tensor([[EOS, *ids("gha")]])).logits.log_softmax(-1)[0]
    expected = float(log_probs.gather(-1, torch.tensor(ids("ghab"))[:, None]).sum())
    for likelihood in ("ar", "elbo", "mixture"):
        lm = blockgen(model, likelihood=likelihood)
        assert values(lm.loglikelihood(asked(("", "ghab")))) == close([expected])
        assert lm.loglikelihood_rolling(asked(("ghab",))) == close([expected])
    requests = asked(*PAIRS)
    assert values(blockgen(model).loglikelihood(requests)) == close(values(stock(model).loglikelihood(requests)))
    (text,) = blockgen(model).generate_until(asked(("abc", {"until": ["<none>"], "max_gen_toks": 9})))
    assert text == continued(model, "abc", "<none>", max_new_tokens=9)


def test_block_causal_models_have_bounds_and_no_greedy_text() -> None:
    model = tiny_model("block_causal")
    lm = blockgen(model, likelihood="elbo")
    tokens = torch.tensor([ids("abcde")])
    expected = sequence_nll(model, {"input_ids": tokens, "labels": tokens.masked_fill(tokens < 3, -100)}).mean()
    assert lm.loglikelihood(asked(("abc", "de"))) == [(close(-float(expected)), False)]
    assert lm.generate_until(asked(("abc", {"max_gen_toks": 8})))[0]
    for settings, message in [({}, "`likelihood='ar'`"), ({"likelihood": "elbo", "batch_size": "auto"}, "batch_size")]:
        with pytest.raises(ValueError, match=message):
            blockgen(model, **settings)


# ---- texts
@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("masked", {"decoding": "ar"}),
        ("masked", {"decoding": "block_diffusion", "block_size": 4, "denoising_steps": 3}),
        ("masked", {"decoding": "arpc", "block_size": 8, "nfe_per_block": 8, "corrector_period": 3}),
        ("uniform", {"decoding": "arpc", "block_size": 8, "nfe_per_block": 8, "corrector_period": 3}),
        ("uniform", {"decoding": "speculative", "block_size": 8, "acceptance": "match"}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["decoding"],
)
def test_texts_of_every_decoding_do_not_depend_on_batches(variant: str, settings: dict[str, Any]) -> None:
    model = tiny_model(variant)
    wish = {"max_gen_toks": 16, "do_sample": True, "temperature": 0.9}
    requests = asked(*((prompt, wish) for prompt in ("abc", "", "defghi", "abc", "q", "abc")))
    together = blockgen(model, batch_size=4, **settings)
    texts = together.generate_until(requests)
    alone = blockgen(model, batch_size=1, **settings)
    assert alone.generate_until(requests) == texts
    assert len({texts[0], texts[3], texts[5]}) == 3  # of one prompt
    assert blockgen(model, batch_size=4, seed=1, **settings).generate_until(requests) != texts
    assert together.num_new_tokens == alone.num_new_tokens > 0
    if settings["decoding"] != "speculative":  # drafts are as long as the longest of the batch
        assert together.num_function_evaluations == alone.num_function_evaluations > 0


def test_gen_kwargs_override_the_decoding_and_greedy_is_the_default(model: BlockGenForDiffusionLM) -> None:
    lm = blockgen(model, decoding="block_diffusion", block_size=4)
    request = ("abc", {"until": ["jq"], "max_gen_toks": 12, "decoding": "ar"})
    assert lm.generate_until(asked(request)) == [continued(model, "abc", "jq", decoding="ar", max_new_tokens=12)]


def test_the_cost_is_counted(model: BlockGenForDiffusionLM) -> None:
    lm = blockgen(model, decoding="block_diffusion", block_size=4, denoising_steps=2)
    model.generation_config.eos_token_id = None
    texts = lm.generate_until(asked(*((prompt, {"max_gen_toks": 12, "until": ["<none>"]}) for prompt in "abc")))
    tokens = sum(map(len, texts))
    info = lm.get_model_info()
    assert info["num_new_tokens"] >= tokens > 0
    assert lm.num_function_evaluations == info["num_function_evaluations"] <= 3 * 3 * 2
    assert info["tokens_per_forward"] == pytest.approx(info["num_new_tokens"] / info["num_function_evaluations"])


@pytest.mark.parametrize("draft", [{"draft_steps": 2}, {"acceptance": "rejection", "fused_drafts": True}])
def test_speculation_gives_the_texts_of_ar_with_their_stop_strings(
    model: BlockGenForDiffusionLM, draft: dict[str, Any]
) -> None:
    full = continued(model, "abc", "<none>", decoding="ar", max_new_tokens=24)
    wishes = [{"until": [full[place : place + 2]], "max_gen_toks": 24} for place in (2, 5, 11)]
    requests = asked(*((prompt, wish) for prompt in ("abc", "d", "ef") for wish in wishes))
    by_ar = blockgen(model, decoding="ar", batch_size=2)
    lm = blockgen(model, decoding="speculative", block_size=8, batch_size=2, **draft)
    assert lm.generate_until(requests) == by_ar.generate_until(requests)
    assert lm.num_new_tokens == by_ar.num_new_tokens
    assert lm.get_model_info()["tokens_per_forward"] == lm.num_new_tokens / lm.num_function_evaluations


def test_rows_end_at_their_own_stop_string(model: BlockGenForDiffusionLM) -> None:
    """And not at one that begins in the prompt."""
    full = continued(model, "abc", "<none>", decoding="ar", max_new_tokens=12)
    stop = full[3:5]
    place = full.index(stop)
    lm = blockgen(model, decoding="ar")
    wish = {"until": [stop], "max_gen_toks": 12}
    assert lm.generate_until(asked(("abc", wish))) == [full[:place]]
    assert lm.num_function_evaluations == place + 2
    spanning = {"until": ["c" + full[0]], "max_gen_toks": 12}
    assert lm.generate_until(asked(("abc", spanning))) == [full.split("c" + full[0])[0]]


def test_a_checkpoints_length_does_not_replace_that_of_the_task(model: BlockGenForDiffusionLM) -> None:
    model.generation_config.max_new_tokens = 30
    lm = blockgen(model, decoding="ar", max_gen_toks=6)
    assert [len(text) for text in lm.generate_until(asked(("abc", {"until": []}), ("a", {"max_gen_toks": 9})))] == [
        6,
        9,
    ]


def test_the_users_random_numbers_are_left_alone(model: BlockGenForDiffusionLM) -> None:
    before = torch.get_rng_state()
    lm = blockgen(model, likelihood="mixture")
    lm.generate_until(asked(("abc", {"max_gen_toks": 8, "do_sample": True, "temperature": 1.0})))
    lm.loglikelihood(asked(*PAIRS))
    assert torch.equal(torch.get_rng_state(), before)


# ---- tasks
def choice_task(folder: Path) -> dict[str, Any]:
    rows = [
        {"question": "abcd", "choices": ["e", "fg", "h"], "answer": 1},
        {"question": "q", "choices": ["ab", "cd", "ef"], "answer": 0},
        {"question": "hgf", "choices": ["ed", "de", "k"], "answer": 2},
        {"question": "nop", "choices": ["q", "rs", "t"], "answer": 0},
    ]
    return {
        "task": "tiny_choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        **local_data(folder / "choice.jsonl", rows),
    }


def text_task(folder: Path) -> dict[str, Any]:
    rows = [{"question": question, "answer": "qq"} for question in ("abc", "def", "hgfe")]
    return {
        "task": "tiny_text",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["j"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **local_data(folder / "text.jsonl", rows),
    }


def local_data(file: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data_files": {"test": str(file)}, "cache_dir": str(file.parent / "cache")}
    return {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}


@pytest.mark.parametrize("name", ["hf", "blockgen"])
def test_both_models_do_a_task_of_choices_and_one_of_texts(name: str, checkpoint: str, tmp_path: Path) -> None:
    model, choice = tiny_model(), choice_task(tmp_path)
    results = lm_eval.simple_evaluate(
        model=name,
        model_args={"pretrained": checkpoint, "trust_remote_code": name == "hf"},
        tasks=[choice, text_task(tmp_path)],
        gen_kwargs={"decoding": "ar"},
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    hits = 0
    samples = results["samples"]["tiny_choice"]
    for sample in samples:
        doc = sample["doc"]
        expected = [log_likelihood(model, doc["question"], text) for text in doc["choices"]]
        assert [response[0][0] for response in sample["resps"]] == close(expected)
        hits += max(range(3), key=expected.__getitem__) == doc["answer"]
    assert results["results"]["tiny_choice"]["acc,none"] == hits / 4
    for sample in results["samples"]["tiny_text"]:
        prompt = sample["doc"]["question"]
        assert sample["resps"] == [[continued(model, prompt, "j", decoding="ar", max_new_tokens=8)]]
    if name == "blockgen":
        assert results["config"]["likelihood"] == "ar"
        assert results["config"]["num_function_evaluations"] == results["config"]["num_new_tokens"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "model", "settings"),
    [
        ("lm_eval", "hf", "trust_remote_code=True"),  # which knows the folder alone, not the package
        ("blockgen_hf.evaluation.harness", "blockgen", "likelihood=elbo,block_size=4,monte_carlo_samples=2"),
    ],
    ids=["hf", "blockgen"],
)
def test_the_command_line_of_the_harness_runs_both_models(
    module: str, model: str, settings: str, checkpoint: str, tmp_path: Path
) -> None:
    (tmp_path / "task.yaml").write_text(json.dumps(choice_task(tmp_path)))  # JSON is YAML
    options = f"--model {model} --model_args pretrained={checkpoint},{settings} --tasks tiny_choice --device cpu"
    folders = ["--include_path", str(tmp_path), "--output_path", str(tmp_path), "--log_samples"]
    command = [sys.executable, "-m", module, *options.split(), *folders]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("**/results_*.json")
    config = json.loads(file.read_text())["config"]
    assert config["model"] == model and config.get("likelihood") == ("elbo" if model == "blockgen" else None)
    (file,) = tmp_path.glob("**/samples_*.jsonl")
    lm = blockgen(tiny_model(), likelihood="elbo", block_size=4, monte_carlo_samples=2)
    for sample in map(json.loads, file.read_text().splitlines()):
        pairs = [(sample["doc"]["question"], choice) for choice in sample["doc"]["choices"]]
        expected = values((blockgen(tiny_model()) if model == "hf" else lm).loglikelihood(asked(*pairs)))
        assert [float(response[0][0]) for response in sample["resps"]] == close(expected)


# ---- what is refused
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"likelihood": "exact"}, "`likelihood` must be one of .'ar', 'elbo', 'mixture'., but is 'exact'"),
        ({"monte_carlo_samples": 0}, "`monte_carlo_samples` must be a positive integer"),
        ({"likelihood": "elbo", "block_size": 0}, "`block_size` must be an integer of at least 1"),
        ({"decoding": "beam"}, "`decoding` must be one of"),
        ({"denoising_steps": 4, "nfe_per_block": 4}, "contradict"),
        ({"decodng": "ar"}, "Unknown settings .'decodng'."),
    ],
)
def test_bad_settings_are_refused(model: BlockGenForDiffusionLM, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blockgen(model, **settings)


def test_other_models_are_sent_to_the_stock_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(ValueError, match="must be a BlockGen model, but .* is of type 'gpt2': take the model `hf`"):
        BlockGenLM(str(tmp_path), device="cpu")


def test_without_the_harness_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "blockgen_hf.evaluation.harness")
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    with pytest.raises(ModuleNotFoundError, match="pip install 'blockgen-hf"):
        __import__("blockgen_hf.evaluation.harness")


def test_a_folder_loads_as_the_class_of_the_package(checkpoint: str) -> None:
    """Whose noise is that of the package, also where the folder's own code may run."""
    assert type(BlockGenLM(checkpoint, device="cpu", trust_remote_code=True).model) is BlockGenForDiffusionLM
