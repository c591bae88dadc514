"""The command line in-process, on a tiny untrained checkpoint."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import transformers
from tiny import EOS, PAD, spaced_tokenizer, tiny_model
from tokenizers.processors import TemplateProcessing

import blockgen_hf
from blockgen_hf.checkpoints import shipped_checkpoint
from blockgen_hf.cli import COMMANDS, main, make_parser
from blockgen_hf.cli.generate import CHOICES
from blockgen_hf.generation.generation_configuration_blockgen import (
    ACCEPTANCES,
    CORRECTORS,
    DECODINGS,
    DRAFT_DECODINGS,
    NOISE_REMOVALS,
    REVISE_SCORES,
    SAMPLERS,
)


COST = re.compile(
    r"(\d+) new tokens, (\d+) function evaluations, ([\d.]+) tokens per forward, [\d.]+ tokens/s, [\d.]+ s"
    r"(?:, \d+ of \d+ drafted tokens accepted)? \((.*)\)"
)
ARPC = ("--decoding", "arpc", "--nfe-per-block", "8", "--corrector-period", "3")


def save(folder: Path, variant: str = "masked", **settings: Any) -> str:
    """A checkpoint with a tokenizer, whose texts are of words only, no pads and ends."""
    model = tiny_model(variant)
    model.generation_config.update(**{"max_new_tokens": 16, "suppress_tokens": [PAD, EOS], **settings})
    model.save_pretrained(folder)
    spaced_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("checkpoint"))


Command = Callable[..., str]


@pytest.fixture
def run(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> Command:
    """
    Runs `blockgen-hf generate` on the checkpoint and returns what it prints: texts on standard output, and what they
    cost, and nothing else, on standard error.
    """

    def run_command(*arguments: str) -> str:
        assert main(["generate", "--model", checkpoint, *arguments]) == 0
        printed = capsys.readouterr()
        assert all(line == "" or COST.search(line) for line in printed.err.splitlines())
        assert COST.search(printed.out) is None
        return printed.out + printed.err

    return run_command


@pytest.fixture
def fail(checkpoint: str, failing_line: Command) -> Command:
    """Runs `blockgen-hf generate`, which must fail with a single line; returns that line."""

    def run_command(*arguments: str) -> str:
        model = () if "--model" in arguments else ("--model", checkpoint)
        return failing_line("generate", *model, *arguments)

    return run_command


def results(run: Command, *arguments: str) -> list[dict[str, Any]]:
    return json.loads(run("--json", "--seed", "0", *arguments))["results"]


# what it prints


@pytest.mark.parametrize(
    ("options", "evaluations", "settings"),
    [
        (("--decoding", "ar"), 16, "ar"),
        (("--decoding", "block_diffusion"), 16, "block_diffusion, block size 8, 8 steps"),
        (("--block-size", "4", "--denoising-steps", "2"), 8, "block_diffusion, block size 4, 2 steps"),
        (ARPC, 16, "arpc, block size 8, 6 steps, 2 with ar_surprisal"),
        (
            ("--decoding", "block_diffusion", "--ar-seed-tokens", "8", "--noise-removal", "greedy"),
            16,
            "block_diffusion, block size 8, 8 steps, greedy last step, 8 AR seed tokens",
        ),
        (
            ("--temperature", "0.5", "--top-k", "3"),
            16,
            "block_diffusion, block size 8, 8 steps, temperature 0.5, top k 3",
        ),
    ],
)
def test_text_and_cost(run: Command, options: tuple[str, ...], evaluations: int, settings: str) -> None:
    text, empty, cost = run("a b c", "--seed", "5", *options).splitlines()
    assert re.fullmatch("a b c( [a-t]){16}", text)
    assert empty == ""
    match = COST.fullmatch(cost)
    assert match is not None
    count = int(match.group(2))
    # At most: a pass that changes nothing is not run.
    assert count == evaluations if settings == "ar" else 0 < count <= evaluations
    assert match.groups() == ("16", str(count), f"{16 / count:.2f}", f"{settings}, float32 weights, seed 5")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--greedy",), "block size 8, 1 draft step, greedy"),
        (("--acceptance", "rejection", "--fused-drafts"), "1 draft step, fused drafts, acceptance rejection"),
        (("--draft-steps", "3", "--ar-seed-tokens", "2"), "3 draft steps, acceptance match, 2 AR seed tokens"),
        (
            ("--draft-steps", "4", "--draft-decoding", "arpc", "--corrector", "ar_kl", "--no-fused-drafts"),
            "4 draft steps, arpc drafts with ar_kl, acceptance match",
        ),
    ],
)
def test_speculation_tells_its_settings_and_what_drafts_were_worth(
    run: Command, options: tuple[str, ...], words: str
) -> None:
    """And writes the text of `ar`, unless it keeps drafts by rejection."""
    out = run("a b", "--decoding", "speculative", "--seed", "0", *options)
    assert f"{words}, float32 weights, seed 0)" in out
    accepted, drafted = map(int, re.search(r" s, (\d+) of (\d+) drafted tokens accepted \(", out).groups())
    (result,) = results(run, "a b", "--decoding", "speculative", *options)
    assert "denoising_steps" not in result["settings"] and "function_evaluations_per_block" not in result["settings"]
    assert result["settings"]["draft_steps"] == (int(options[1]) if "--draft-steps" in options else 1)
    (sample,) = result["samples"]
    assert sample["completion"] in out and 0 <= accepted <= drafted
    for counts in (sample, result):
        assert (counts["num_accepted_tokens"], counts["num_drafted_tokens"]) == (accepted, drafted)
    number = ("--num-samples", "1" if "--greedy" in options else "2")
    (result,) = results(run, "a b", "--decoding", "speculative", *number, *options)
    for name in ("num_drafted_tokens", "num_accepted_tokens"):
        assert result[name] == sum(sample[name] for sample in result["samples"])
    if "rejection" not in options:
        greedy = [option for option in options if option == "--greedy"]
        (by_ar,) = results(run, "a b", "--decoding", "ar", *number, *greedy)
        assert [one["text"] for one in by_ar["samples"]] == [one["text"] for one in result["samples"]]
        assert "num_drafted_tokens" not in by_ar and "num_drafted_tokens" not in by_ar["samples"][0]


def test_revisions_tell_their_settings_and_take_a_number_for_each_stage(run: Command, fail: Command) -> None:
    stages = ("--revise-block-size", "4,8", "--revise-ratio", "0.5,0.25", "--revise-steps", "3")
    out = run("a b", "--decoding", "draft_revise", *stages, "--seed", "0")
    words = "then 50% revised in blocks of 4 by 3 steps, then 25% revised in blocks of 8 by 3 steps"
    assert f"(draft_revise, block size 4, 4 steps, {words}, float32 weights, seed 0)" in out
    (result,) = results(
        run, "a b", "--decoding", "draft_revise", "--draft-decoding", "arpc", "--revise-score", "random"
    )
    settings = {name: value for name, value in result["settings"].items() if "revise" in name or "draft" in name}
    assert settings == {
        "draft_decoding": "arpc",
        "revise_block_size": [8],
        "revise_ratio": [0.25],
        "revise_steps": [2],
        "revise_score": "random",
    }
    assert result["settings"]["informed_steps"] == [0, 1, 2] and result["settings"]["corrector"] == "ar_surprisal"
    options = ("--decoding", "draft_revise", "--revise-ratio")
    assert "Lists of stages must have one number" in fail("a", *options, "0.5,0.1", "--revise-steps", "1,2,3")
    assert "--revise-ratio: must be numbers between commas" in fail("a", *options, "x")


def test_a_model_may_speculate_by_its_own_settings(tmp_path: Path, run: Command) -> None:
    model = save(tmp_path, decoding="speculative", acceptance="rejection", block_size=4, fused_drafts=False)
    out = run("a", "--model", model, "--seed", "0")
    assert "(speculative, block size 4, 1 draft step, acceptance rejection, float32 weights, seed 0)" in out
    for decoding in DECODINGS:
        (result,) = results(run, "a", "--model", model, "--decoding", decoding)
        assert result["decoding"] == decoding and result["num_new_tokens"] == 16
    assert [row["decoding"] for row in results(run, "a", "--model", model, "--compare")][:2] == ["ar", "speculative"]


def test_the_models_own_settings_decide_what_is_not_passed(tmp_path: Path, run: Command) -> None:
    model = save(tmp_path, decoding="arpc", nfe_per_block=8, corrector_period=3, do_sample=True, temperature=0.7)
    out = run("--model", model, "--max-new-tokens", "4")
    assert "arpc, block size 8, 6 steps, 2 with ar_surprisal, temperature 0.7" in out
    (result,) = results(run, "--model", model, "--decoding", "ar")
    assert result["settings"] == {
        "decoding": "ar",
        "max_new_tokens": 16,
        "do_sample": True,
        "repetition_penalty": 1.0,
        "temperature": 0.7,
        "top_k": 0,
        "top_p": 1.0,
    }


def test_json(run: Command, checkpoint: str) -> None:
    out = json.loads(run("a b", "--json", "--seed", "3", *ARPC))
    (result,) = out.pop("results")
    assert out == {"model": checkpoint, "device": "cpu", "dtype": "float32", "prompt": "a b", "seed": 3}
    (sample,) = result["samples"]
    assert sample["text"] == "a b" + sample["completion"]
    assert sample["num_new_tokens"] == result["num_new_tokens"] == 16
    assert 0 < sample["num_function_evaluations"] == result["num_function_evaluations"] <= 16
    expected = pytest.approx(16 / result["num_function_evaluations"], abs=1e-4)
    assert sample["tokens_per_forward"] == expected and result["tokens_per_forward"] == expected
    assert result["seconds"] > 0 and result["tokens_per_second"] > 0
    assert result["decoding"] == "arpc" and result["settings"]["informed_steps"] == [0, 3]


def test_seeds(run: Command) -> None:
    outputs = [run("a b", "--json", "--seed", seed, *ARPC) for seed in ("1", "1", "2")]
    texts = [json.loads(out)["results"][0]["samples"][0]["text"] for out in outputs]
    assert texts[0] == texts[1] != texts[2]
    # Without one a seed is drawn, and told, so that the text can be had again.
    text, _, cost = run("a b").splitlines()
    (seed,) = re.findall(r"seed (\d+)\)", cost)
    assert run("a b", "--seed", seed).splitlines()[0] == text


def test_streamed_text_is_that_of_json(run: Command) -> None:
    (result,) = results(run, "a b", *ARPC)
    assert run("a b", "--seed", "0", *ARPC).splitlines()[0] == result["samples"][0]["text"]


def test_several_samples(run: Command) -> None:
    (result,) = results(run, "a", "--num-samples", "3")
    texts = [sample["text"] for sample in result["samples"]]
    assert len(set(texts)) == 3
    assert result["num_new_tokens"] == 48
    *lines, cost = run("a", "--num-samples", "3", "--seed", "0").splitlines()
    assert lines == [line for i, text in enumerate(texts, 1) for line in (f"[{i}] {text}", "")]
    count = result["num_function_evaluations"]
    assert count == sum(sample["num_function_evaluations"] for sample in result["samples"]) <= 48
    assert cost.startswith(
        f"3 samples: 48 new tokens, {count} function evaluations, {48 / count:.2f} tokens per forward"
    )


@pytest.mark.parametrize("options", [(), ("--decoding", "ar"), ARPC, ("--compare",), ("--num-samples", "2")])
def test_no_prompt(run: Command, options: tuple[str, ...]) -> None:
    options = (*options, "--max-new-tokens", "5")
    for prompt in ((), ("",)):
        for result in results(run, *prompt, *options):
            for sample in result["samples"]:
                assert sample["num_new_tokens"] == 5
                assert sample["text"] == sample["completion"]
    run("", *options)


def test_prompt_from_standard_input(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", StringIO("d e f\n"))
    out = json.loads(run("-", "--json"))
    assert out["prompt"] == "d e f"
    assert out["results"][0]["samples"][0]["text"].startswith("d e f ")


def test_a_prompt_ends_where_the_user_ended_it(run: Command, tmp_path: Path) -> None:
    model = save(tmp_path)
    tokenizer = spaced_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="a $A b", special_tokens=[("a", 0), ("b", 1)]
    )
    assert tokenizer("c")["input_ids"] == [0, 2, 1]
    tokenizer.save_pretrained(tmp_path)
    (result,) = results(run, "c d", "--model", model)
    assert result["samples"] == results(run, "c d")[0]["samples"]
    assert result["samples"][0]["text"].startswith("c d ")


def test_a_prompt_that_is_not_utf8(fail: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "The prompt is not valid UTF-8 text: 'caf\\udce9'" in fail("caf\udce9")
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(b"caf\xe9"), encoding="utf-8"))
    assert "standard input is not valid UTF-8 text" in fail("-")


def test_several_prompts(run: Command, capsys: pytest.CaptureFixture[str], checkpoint: str) -> None:
    single = [json.loads(run(prompt, "--json", "--seed", "0")) for prompt in ("a b", "c")]
    both = run("a b", "c", "--json", "--seed", "0")
    assert prompts_and_samples(both) == prompts_and_samples(json.dumps(single))
    texts = [one["results"][0]["samples"][0]["text"] for one in single]
    assert main(["generate", "a b", "c", "--model", checkpoint, "--seed", "0"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{texts[0]}\n\n{texts[1]}\n"
    assert len(COST.findall(printed.err)) == 2


def test_prompts_from_a_file(run: Command, fail: Command, tmp_path: Path) -> None:
    several = prompts_and_samples(run("a b", "c", "--json", "--seed", "0"))
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfa b\r\n\r\nc\n")
    assert prompts_and_samples(run("--prompt-file", str(file), "--json", "--seed", "0")) == several
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a b"}\n{"prompt": "c"}\n')
    assert prompts_and_samples(run("--prompt-file", str(lines), "--json", "--seed", "0")) == several


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9\n", ", line 1: byte 3 (0xe9) is not UTF-8"),
        (b"\n \n", ": holds no text"),
        (None, ": there is no such file"),
    ],
)
def test_prompt_files_that_hold_no_prompts(fail: Command, tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    assert f"--prompt-file {file}{message}" in fail("--prompt-file", str(file))


def test_stop(run: Command) -> None:
    options = ("Once upon a time", "--model", "tinystories-masked", "--decoding", "ar", "--max-new-tokens", "40")
    (result,) = results(run, *options)
    text = result["samples"][0]["completion"]
    assert text.count(".") > 1
    (stopped,) = results(run, *options, "--stop", ".", "--stop", "\\nnot there")
    assert stopped["samples"][0]["completion"] == text[: text.index(".") + 1]
    assert stopped["settings"]["stop_strings"] == [".", "\nnot there"]


@pytest.mark.parametrize(
    ("options", "evaluations"),
    [
        (("--sampler", "first_hitting"), 16),
        (("--sampler", "confidence", "--confidence-threshold", "0"), 2),  # a block in one pass
        (("--sampler", "entropy_bound", "--entropy-bound", "1000"), 2),
    ],
)
def test_samplers(run: Command, options: tuple[str, ...], evaluations: int) -> None:
    (result,) = results(run, "a b", "--decoding", "block_diffusion", *options)
    assert result["num_new_tokens"] == 16
    assert result["num_function_evaluations"] == evaluations


@pytest.fixture(scope="module")
def corrected_rarely(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint whose own settings hold a period that was found best at other budgets."""
    return save(tmp_path_factory.mktemp("corrected_rarely"), corrector_period=3)


@pytest.mark.parametrize(
    ("options", "steps", "informed", "evaluations"),
    [
        ((), 3, [0, 1], 5),
        (("--block-size", "16"), 5, [0, 1, 2, 3], 9),  # the budget of ten does not pay for another informed step
        (("--block-size", "16", "--corrector-period", "3"), 7, [0, 3], 9),
        (("--block-size", "2"), 2, [0], 3),
        (("--block-size", "1"), 1, [], 1),
        (("--block-size", "16", "--corrector", "random"), 10, [*range(9)], 10),
        (("--block-size", "16", "--denoising-steps", "16"), 16, [0, 3, 6, 9, 12], 21),
        (("--block-size", "16", "--nfe-per-block", "16"), 12, [0, 3, 6, 9], 16),
    ],
)
def test_arpc_without_a_budget_has_two_thirds_of_the_block(
    run: Command, corrected_rarely: str, options: tuple[str, ...], steps: int, informed: list[int], evaluations: int
) -> None:
    words = ("a", "--model", corrected_rarely, "--decoding", "arpc", "--max-new-tokens", "1")
    (result,) = results(run, *words, *options)
    settings = result["settings"]
    assert (settings["denoising_steps"], settings["informed_steps"]) == (steps, informed)
    assert settings["function_evaluations_per_block"] == evaluations


def prompts_and_samples(out: str) -> list[Any]:
    return [(one["prompt"], one["results"][0]["samples"]) for one in json.loads(out)]


def test_end_of_text(run: Command, tmp_path: Path) -> None:
    model = save(tmp_path, eos_token_id=[0, 1, 2, 3, 4], pad_token_id=PAD)  # 'a' to 'e' end a text
    (result,) = results(run, "t", "--model", model, "--num-samples", "8", "--max-new-tokens", "40")
    lengths = [sample["num_new_tokens"] for sample in result["samples"]]
    assert min(lengths) < 40
    for sample, length in zip(result["samples"], lengths, strict=True):
        assert len(sample["completion"].split()) == length
        assert length == 40 or sample["text"][-1] in "abcde"


def test_length_where_no_one_says_one(run: Command, tmp_path: Path) -> None:
    model = save(tmp_path, max_new_tokens=None)
    for prompt, length in (("", 64), ("a b c", 61)):  # of the 64 positions
        (result,) = results(run, prompt, "--model", model, "--denoising-steps", "1")
        assert result["num_new_tokens"] == length


def test_greedy(run: Command) -> None:
    texts = [
        json.loads(run("a", "--json", "--greedy", "--decoding", "ar", "--seed", seed))["results"][0]["samples"][0][
            "text"
        ]
        for seed in ("0", "1")
    ]
    assert texts[0] == texts[1]
    assert "(ar, greedy, float32 weights, seed" in run("a", "--greedy", "--decoding", "ar")


def test_dtype_and_attention(run: Command) -> None:
    out = json.loads(run("a", "--json", "--dtype", "bfloat16", "--attn-implementation", "eager", "--device", "cpu"))
    assert out["dtype"] == "bfloat16"


def test_remote_code(run: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    assert results(run, "a b", "--trust-remote-code")[0]["samples"] == results(run, "a b")[0]["samples"]


# comparison


def test_compare_shows_whole_texts_and_fits_the_terminal(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    options = ("a b", "--compare", "--max-new-tokens", "44", "--num-samples", "2", "--block-size", "4")
    out = run(*options, "--seed", "0")
    assert max(map(len, out.splitlines())) <= 80
    shown = " ".join(out.split())
    for row in results(run, *options):
        for sample in row["samples"]:
            assert len(sample["completion"]) > 80 and sample["completion"].strip() in shown


def test_compare(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    out = run("a b", "--compare", "--seed", "0")
    assert max(map(len, out.splitlines())) <= 100
    decodings = "ar|speculative|block_diffusion|arpc|draft_revise"
    rows = re.findall(rf"^({decodings}) +(.*?) +(\d+) +([\d.]+) +[\d.]+$", out, flags=re.MULTILINE)
    expected = [
        ("ar", "", 16),
        ("speculative", "block size 8, 1 draft step, acceptance match", 32),
        ("block_diffusion", "block size 8, 16 steps", 32),
        ("block_diffusion", "block size 8, 8 steps", 16),
        ("block_diffusion", "block size 8, 4 steps", 8),
        ("arpc", "block size 8, 8 steps, 7 with ar_surprisal", 32),
        ("arpc", "block size 8, 4 steps, 3 with ar_surprisal", 16),
        ("draft_revise", "block size 4, 4 steps, then 25% revised in", 32),
    ]
    assert [row[:2] for row in rows] == [row[:2] for row in expected]
    for (*_, count, ratio), (*_, most) in zip(rows, expected, strict=True):
        assert int(count) <= most and ratio == f"{16 / int(count):.2f}"
    compared = results(run, "a b", "--compare")
    assert [(row["decoding"], str(row["num_function_evaluations"])) for row in compared] == [
        (decoding, evaluations) for decoding, _, evaluations, _ in rows
    ]
    for row in compared:
        assert row["samples"][0]["completion"].strip() in out
        assert row["samples"] == results(run, "a b", *as_options(row))[0]["samples"]


def as_options(result: dict[str, Any]) -> list[str]:
    names = ("decoding", "block_size", "denoising_steps", "corrector_start", "corrector_period")
    given = {name: result["settings"][name] for name in names if name in result["settings"]}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def test_compare_takes_the_other_settings(run: Command) -> None:
    compared = results(run, "a", "--compare", "--block-size", "4", "--corrector", "ar_kl", "--top-k", "2")
    for row in compared:
        assert row["settings"]["top_k"] == 2
        assert row["settings"].get("block_size", 4) == 4
        assert row["settings"].get("corrector", "ar_kl") == "ar_kl"


def test_compare_of_a_model_without_diffusion(run: Command, tmp_path: Path) -> None:
    tiny_model(next_token_prediction=True, block_sizes=[1], adaptive_layer_norm=False).save_pretrained(tmp_path)
    spaced_tokenizer().save_pretrained(tmp_path)
    model = str(tmp_path)
    assert [row["decoding"] for row in results(run, "a b", "--compare", "--model", model)] == ["ar"]


def test_compare_leaves_out_what_a_block_causal_model_cannot(run: Command, tmp_path: Path) -> None:
    model = save(tmp_path, "block_causal")
    compared = results(run, "a b", "--compare", "--model", model)
    assert [row["decoding"] for row in compared] == ["block_diffusion"] * 3


# errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--blok-size", "4"),
            "unrecognized arguments: --blok-size 4 (see `blockgen-hf generate --help`)",
        ),
        (("--block-size", "four"), "invalid int value: 'four'"),
        (("--num-samples", "0"), "must be an integer of at least 1, but is '0'"),
        (("--seed", "-1"), "must be an integer from 0 to 4294967295, but is '-1'"),
        (("--device", "tpu"), "invalid choice: 'tpu'"),
        (("--decoding", "diffusion"), "--decoding: invalid choice: 'diffusion'"),
        (("--block-size", "0"), "`block_size` must be an integer of at least 1, but is 0."),
        (("--denoising-steps", "4", "--nfe-per-block", "4"), "contradict one another"),
        ((*ARPC, "--nfe-per-block", "1"), "`nfe_per_block=1` is too small"),
        ((*ARPC, "--corrector", "entropy"), "is not for masked models"),
        (("--compare", "--corrector", "entropy"), "is not for masked models"),
        (("--max-new-tokens", "1000"), "`max_new_tokens` must be at most 63 with a prompt of 1 tokens"),
        (("--max-new-tokens", "0"), "max_new_tokens"),
        (("--temperature", "0"), "strictly positive"),
        (("--attn-implementation", "none_such"), "cannot be loaded"),
        (("--greedy", "--temperature", "2"), "--temperature has no meaning with --greedy"),
        (("--compare", "--decoding", "ar"), "--decoding has no meaning with --compare"),
        (("--compare", "--show-denoising"), "--show-denoising has no meaning with --compare"),
        (("--stop", ""), "--stop: must be a text, but is empty"),
        (("--prompt-file", "prompts.txt"), "--prompt-file stands for the prompts"),
        (("-", "-"), "Standard input holds one prompt"),
        (("--json", "--show-denoising"), "--show-denoising has no meaning with --json"),
        (
            ("--decoding", "speculative", "--denoising-steps", "4"),
            "--denoising-steps has no meaning with --decoding speculative, which has --draft-steps",
        ),
        (
            ("--decoding", "speculative", "--draft-steps", "2", "--acceptance", "rejection"),
            "`acceptance='rejection'` needs drafts of one step",
        ),
        (("--decoding", "speculative", "--draft-steps", "0"), "`draft_steps` must be an integer of at least 1"),
        (("--num-samples", "2", "--show-denoising"), "shows a single sample"),
        (
            ("--decoding", "block_diffusion", "--revise-ratio", "0.9"),
            "--revise-ratio has no meaning with --decoding block_diffusion: it is for draft_revise.",
        ),
        ((*ARPC, "--draft-steps", "2"), "it is for speculative."),
        (("--decoding", "ar", "--corrector", "random"), "it is for arpc and speculative and draft_revise."),
    ],
)
def test_bad_options(fail: Command, arguments: tuple[str, ...], message: str) -> None:
    assert message in fail("a", *arguments)


def test_no_cuda(fail: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "torch finds no CUDA device" in fail("a", "--device", "cuda")


def test_interruption(checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("blockgen_hf.cli.sampling.Sampler.generate", interrupt)
    assert main(["generate", "--model", checkpoint]) == 130
    assert capsys.readouterr().err == "\n"


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr()
    assert "\nusage: blockgen-hf COMMAND" in printed.out and "evaluate-answers" in printed.out
    assert printed.err == ""


def test_choices_are_those_of_the_generation_config() -> None:
    accepted = {
        "decoding": DECODINGS,
        "corrector": CORRECTORS,
        "noise_removal": NOISE_REMOVALS,
        "sampler": SAMPLERS,
        "acceptance": ACCEPTANCES,
        "draft_decoding": DRAFT_DECODINGS,
        "revise_score": REVISE_SCORES,
    }
    assert accepted == CHOICES


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"blockgen-hf {blockgen_hf.__version__}\n"


def test_bad_folders(fail: Command, tmp_path: Path) -> None:
    assert "There is no folder" in fail("a", "--model", str(tmp_path / "missing"))
    assert "There is no folder ./missing" in fail("a", "--model", "./missing")
    assert "is not a model folder: it has no config.json" in fail("a", "--model", str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read" in fail("a", "--model", str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert "of type 'gpt2', but this command runs those of type 'blockgen'" in fail("a", "--model", str(tmp_path))


def test_incomplete_checkpoints(fail: Command, tmp_path: Path) -> None:
    folder = save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert f"The tokenizer of {folder} cannot be loaded: " in fail("a", "--model", folder)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert "have 2 layers, but its config.json says `num_hidden_layers=3`" in fail("a", "--model", folder)
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    assert f"The model {folder} cannot be loaded: " in fail("a", "--model", folder)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    assert f"The model {folder} cannot be loaded: " in fail("a", "--model", folder)
    (tmp_path / "model.safetensors").unlink()
    assert f"The model {folder} cannot be loaded: " in fail("a", "--model", folder)


def test_names_of_the_hub(fail: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests run offline, with an empty cache or at least without this name in it.
    assert "the Hub does not answer" in fail("a", "--model", "no-such/blockgen-model")
    assert "neither a folder here nor a model on the Hub" in fail("a", "--model", "no such name!")

    def no_revision(*args: Any, **kwargs: Any) -> None:
        response = type("Response", (), {"headers": {}, "request": None})()
        raise huggingface_hub.errors.RevisionNotFoundError("404", response=response)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_revision)
    assert "has no revision 'v0'" in fail("a", "--model", "some/model", "--revision", "v0")


def test_folders_need_no_network(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", None)
    monkeypatch.setattr("socket.socket.connect", None)
    run("a", "--max-new-tokens", "2")


def test_shipped_checkpoint_is_the_default(
    checkpoint: str, fail: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert shipped_checkpoint().parent.name == "checkpoints"
    monkeypatch.setattr("blockgen_hf.cli.loading.shipped_checkpoint", lambda: Path(checkpoint))
    assert main(["generate", "a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == checkpoint
    monkeypatch.setattr("blockgen_hf.cli.loading.shipped_checkpoint", lambda: tmp_path / "missing")
    assert main(["generate", "a"]) == 1
    assert "name another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "--model", "tinystories-masked", "--max-new-tokens", "2"),
        ("evaluate", "tinystories-masked", "--dataset", "texts.txt", "--max-rows", "1", "--sequence-length", "8"),
        ("evaluate-samples", "tinystories-masked", "--dry-run"),
        ("bench", "--model", "tinystories-masked", "--prefixes", "0", "--contenders", "none such"),
        ("finetune", "tinystories-masked", "--dataset", "pairs.jsonl", "--dry-run"),
        ("train", "laptop", "model.name_or_path=tinystories-masked", "--dry-run"),
        ("push", "tinystories-masked", "me/it", "--dry-run"),
        ("convert", "tinystories-masked", "--output", "published", "--to", "published"),
    ],
    ids=lambda words: words[0],
)
def test_the_shipped_model_by_its_name(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("Once upon a time there was a little girl.\n" * 20)
    Path("pairs.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 200)
    main(words)
    printed = capsys.readouterr()
    assert "is not a model folder" not in printed.err and "There is no folder" not in printed.err
    # The benchmark goes as far as a contender that there is not.
    expected = "there are blockgen, gpt2" if words[0] == "bench" else ""
    assert expected in printed.err and (expected or "error" not in printed.err)


def test_a_folder_of_ones_own_goes_before_the_shipped_model(
    checkpoint: str, run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tinystories-masked").symlink_to(checkpoint)
    assert re.fullmatch("a( [a-t]){16}", run("a", "--model", "tinystories-masked").splitlines()[0])


def test_verbosity_of_transformers_is_given_back(run: Command) -> None:
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    try:
        logging.set_verbosity_info()
        logging.enable_progress_bar()
        run("a", "--max-new-tokens", "2")  # and nothing on stderr
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(verbosity)
        logging.disable_progress_bar()


# the process


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    source = str(Path(blockgen_hf.__file__).parents[1])
    yield {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | {"PYTHONPATH": source}


def test_help_and_typos_import_neither_torch_nor_transformers(environment: dict[str, str]) -> None:
    """One after the other in one process, which would keep what the first of them imports."""
    lines: dict[int, list[list[str]]] = {
        0: [[], ["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)],
        2: [
            ["genrate"],
            ["generate", "--blok-size", "4"],
            ["generate", "--decoding", "diffusion"],
            ["generate", "--sampler", "gibbs"],
            ["evaluate", "./no-such-folder", "--dataset", "a.txt"],
        ],
        1: [["train", "labtop"]],
    }
    code = f"""
import sys
from blockgen_hf.cli import main
for expected, lines in {lines!r}.items():
    for words in lines:
        try:
            status = main(words)
        except SystemExit as exit:
            status = exit.code
        imported = sorted({{"torch", "transformers", "datasets", "yaml"}} & set(sys.modules))
        assert (status, imported) == (expected, []), (words, status, imported)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_begins_with_an_example_that_works_and_fits_a_screen(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In 100 columns, and in 90 lines at most."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "example:" and max(map(len, lines)) <= 100 and len(lines) <= 90
    for example in COMMANDS[command].EXAMPLE.splitlines():
        assert f"  {example}" in lines
        program, *words = shlex.split(example)
        assert program == "blockgen-hf" and words[0] == command
        make_parser().parse_args(words)


@pytest.mark.slow
def test_process(checkpoint: str, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "blockgen_hf", "generate", "a", "--model", checkpoint]
    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["results"]
    assert done.stderr == ""
    # A reader that has seen enough ends it without a traceback.
    shell = f'"{sys.executable}" -m blockgen_hf generate --compare --model "{checkpoint}" | head -n 1'
    done = subprocess.run(shell, shell=True, env=environment, capture_output=True, text=True)
    assert done.stdout == "No prompt\n" and done.stderr == ""


def test_errors_of_the_user_are_a_line_and_with_traceback_more(
    fail: Command, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "Traceback" not in fail("a", "--corrector-start", "-1")
    for words in (("--traceback", "generate"), ("generate", "--traceback")):
        assert main([*words, "a", "--model", checkpoint, "--corrector-start", "-1"]) == 1
        printed = capsys.readouterr().err
        assert printed.startswith("Traceback") and "ValueError" in printed
        assert printed.splitlines()[-1].startswith("blockgen-hf: error: `corrector_start`")


def test_mistakes_of_the_package_are_raised(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockgen_hf.cli.sampling.Sampler.generate", None)
    with pytest.raises(TypeError):
        main(["generate", "a", "--model", checkpoint])
