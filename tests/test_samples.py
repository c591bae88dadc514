"""Samples of many decodings: the grid, drawing, scores, the folder, tables."""

import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import framed_tokenizer, tiny_model, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from blockgen_hf.evaluation import samples as samples_module
from blockgen_hf.evaluation.samples import (
    SampleResults,
    SampleScorer,
    SkippedCell,
    cut_texts,
    evaluate_samples,
    sample_cells,
)
from blockgen_hf.evaluation.samples_drawing import DrawnText, draw_texts, encode_prompts
from blockgen_hf.evaluation.samples_grid import SampleCell
from blockgen_hf.evaluation.samples_tables import log_axis, markdown, plain, plot
from blockgen_hf.quantization import quantize_for_cpu, readable_weights
from blockgen_hf.run_folders import FolderInUseError, lock_folder, sampled_digest


LENGTH = 24
TOKENIZER = tiny_tokenizer()


def cell_of(decoding: str, model: Any = None, length: int = LENGTH, **axes: Any) -> SampleCell:
    cells, skipped = sample_cells(model or tiny_model(), [decoding], max_new_tokens=length, **{"nfe": [4], **axes})
    assert len(cells) == 1 and not skipped
    return cells[0]


def draw(model: Any, cell: SampleCell, indices: Any = range(5), **options: Any) -> list[DrawnText]:
    texts, clocks = draw_texts(model, TOKENIZER, cell, indices, **{"max_new_tokens": LENGTH, **options})
    assert min(clocks) > 0
    return texts


@pytest.fixture(scope="module")
def scorer() -> SampleScorer:
    pytest.importorskip("evaluate")
    from blockgen_hf.metrics.generative_perplexity.generative_perplexity import Judge

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=23, n_positions=64, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5)
    return SampleScorer(TOKENIZER, Judge(GPT2LMHeadModel(config).eval(), TOKENIZER, "a tiny judge", "<end>"))


# prompts


def test_special_tokens_that_a_tokenizer_appends_are_not_in_a_prompt() -> None:
    tokenizer = framed_tokenizer()
    assert tokenizer("abc")["input_ids"] != TOKENIZER("abc")["input_ids"]
    (prompt,) = encode_prompts(tiny_model(), tokenizer, ["abc"], LENGTH)
    assert prompt.tolist() == TOKENIZER("abc", add_special_tokens=False)["input_ids"]


# the grid


def test_what_a_decoding_does_not_have_does_not_multiply_it() -> None:
    cells, skipped = sample_cells(
        tiny_model("uniform"),
        [
            *(
                "ar",
                "block_diffusion",
                "arpc:8",
                "arpc:block_size=2",
                "ar:temperature=0.5",
                "block_diffusion:4:top_p=0.5",
            ),
            *("speculative", "speculative:acceptance=rejection:block_size=6"),
        ],
        max_new_tokens=LENGTH,
        nfe=[3, 6],
        block_sizes=[4, 8],
        ar_seed_tokens=[0, 8],
        temperatures=[1.0, 0.7],
    )
    assert not skipped
    numbers: dict[str, int] = {}
    for cell in cells:
        numbers[cell.series] = numbers.get(cell.series, 0) + 1
    assert numbers == {
        "ar": 2,
        "block_diffusion": 16,
        "arpc:8": 8,
        "arpc:block_size=2": 8,
        "ar:temperature=0.5": 1,
        "block_diffusion:4:top_p=0.5": 8,
        "speculative": 4,  # block sizes and temperatures
        "speculative:acceptance=rejection:block_size=6": 2,
    }
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names) and names[0] == "ar" and "block_diffusion-3-L4-k8-T0.7" in names
    assert {cell.block_size for cell in cells if cell.series == "arpc:block_size=2"} == {2}
    assert {cell.nfe for cell in cells if cell.series == "arpc:8"} == {8}


def test_drafts_have_the_block_size_of_generate_unless_one_is_asked_for() -> None:
    """A draft as large as its revision would be no draft."""
    model, decodings = tiny_model(), ["draft_revise", "block_diffusion:2", "draft_revise:block_size=2"]
    cells, _ = sample_cells(model, decodings, max_new_tokens=LENGTH)
    assert [(cell.name, cell.block_size) for cell in cells] == [
        ("draft_revise-k0", 4),
        ("block_diffusion-2-L8-k0", 8),
        ("draft_revise-block_size=2-k0", 2),
    ]
    cells, _ = sample_cells(model, ["draft_revise"], max_new_tokens=LENGTH, block_sizes=[2, 8])
    assert [cell.block_size for cell in cells] == [2, 8]


def test_first_hitting_has_no_number_of_evaluations() -> None:
    cells, _ = sample_cells(
        tiny_model(), ["block_diffusion:sampler=first_hitting"], max_new_tokens=LENGTH, nfe=[2, 4], ar_seed_tokens=[4]
    )
    assert [(cell.nfe, cell.max_evaluations) for cell in cells] == [(None, LENGTH)]
    assert {text.num_function_evaluations for text in draw(tiny_model(), cells[0])} == {LENGTH}


@pytest.mark.parametrize(
    ("decoding", "axes", "reason"),
    [
        ("arpc", {"nfe": [2]}, "too small for a single informed step"),
        ("arpc:corrector=entropy", {}, "not for masked models"),
        ("block_diffusion", {"ar_seed_tokens": [20]}, "of the text's 24 tokens 4 are left"),
        ("block_diffusion", {"block_sizes": [32]}, "A block has 32 tokens"),
    ],
)
def test_cells_that_cannot_be_are_named_with_the_reason(decoding: str, axes: dict[str, Any], reason: str) -> None:
    axes = {"nfe": [4], **axes}
    cells, skipped = sample_cells(tiny_model(), ["ar", decoding], max_new_tokens=LENGTH, **axes)
    assert [cell.name for cell in cells] == ["ar"]
    assert len(skipped) == 1 and reason in skipped[0].reason
    with pytest.raises(ValueError, match="`decodings` must have a cell"):
        sample_cells(tiny_model(), [decoding], max_new_tokens=LENGTH, **axes)


def test_a_block_causal_model_has_no_ar_cells() -> None:
    cells, skipped = sample_cells(tiny_model("block_causal"), ["ar", "block_diffusion"], max_new_tokens=24, nfe=[4])
    assert [cell.series for cell in cells] == ["block_diffusion"]
    assert "clean_attention='causal'" in skipped[0].reason


@pytest.mark.parametrize(
    ("decodings", "axes", "message"),
    [
        (["arp"], {}, "arp"),
        (["ar:colour=red"], {}, "does not know"),
        (["ar", "ar"], {}, "must differ"),
        (["ar"], {"nfe": [0]}, "`nfe` must be integers of at least 1"),
        (["ar"], {"block_sizes": []}, "`block_sizes` must be"),
        (["ar"], {"ar_seed_tokens": [-1]}, "`ar_seed_tokens` must be"),
    ],
)
def test_mistakes_are_refused(decodings: list[str], axes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_cells(tiny_model(), decodings, max_new_tokens=LENGTH, **axes)


# drawing


@pytest.mark.parametrize(
    ("decoding", "variant"),
    [
        ("ar", "masked"),
        ("block_diffusion", "masked"),
        ("block_diffusion", "uniform"),
        ("arpc", "uniform"),
        ("arpc:7:ar_seed_tokens=8", "masked"),
    ],
)
def test_no_text_takes_more_evaluations_than_planned(decoding: str, variant: str) -> None:
    """Some take as many: steps that change nothing are left out, by chance."""
    model = tiny_model(variant)
    cell = cell_of(decoding, model)
    texts = draw(model, cell, range(60))
    assert max(text.num_function_evaluations for text in texts) == cell.max_evaluations
    assert {len(text.token_ids) for text in texts} == {LENGTH}


@pytest.mark.parametrize(
    ("decoding", "most"),
    [
        ("speculative", 2),
        ("speculative:fused_drafts=true", 1),
        ("speculative:draft_steps=4:draft_decoding=arpc", 1 + 4 + 3),
    ],
)
def test_speculation_draws_the_texts_of_ar_and_has_no_blocks(decoding: str, most: int) -> None:
    model = tiny_model()
    cell = cell_of(decoding, model, block_sizes=[32])
    assert (cell.nfe, cell.num_blocks, cell.block_size) == (None, 0, 32)
    assert cell.max_evaluations == most * LENGTH
    texts = draw(model, cell, range(8))
    assert [text.token_ids for text in texts] == [text.token_ids for text in draw(model, cell_of("ar"), range(8))]
    assert max(text.num_function_evaluations for text in texts) <= cell.max_evaluations


@pytest.mark.parametrize("settings", ["", ":revise_score=ar_surprisal", ":draft_decoding=arpc:revise_steps=4"])
def test_drafts_are_revised_with_the_keys_of_their_rows(settings: str) -> None:
    """Each text is the same whoever is drawn beside it, and not the draft."""
    model = tiny_model()
    cell = cell_of(f"draft_revise:block_size=4:revise_ratio=0.5{settings}", model)
    texts = draw(model, cell, range(6))
    torch.manual_seed(5)
    assert texts == draw(model, cell, range(2)) + draw(model, cell, range(2, 6))
    drafts = draw(model, cell_of(f"draft_revise:block_size=4:revise_ratio=0{settings}", model), range(6))
    for text, draft in zip(texts, drafts, strict=True):
        assert text.token_ids != draft.token_ids
        assert draft.num_function_evaluations < text.num_function_evaluations <= cell.max_evaluations


@pytest.mark.parametrize(
    ("variant", "decoding", "prompts"),
    [  # every two of the three together
        ("masked", "ar", []),
        ("uniform", "ar", ["abc", "d", "efghij"]),
        ("masked", "block_diffusion", ["abc", "d", "efghij"]),
        ("uniform", "block_diffusion", []),
        ("masked", "arpc", ["abc", "d", "efghij"]),
        ("uniform", "arpc", []),
    ],
)
def test_a_text_does_not_depend_on_the_others(variant: str, decoding: str, prompts: list[str]) -> None:
    model = tiny_model(variant)
    cell = cell_of(decoding, model)
    together = draw(model, cell, range(7), prompts=prompts, batch_size=7)
    assert [text.index for text in together] == list(range(7)) and len({text.text for text in together}) == 7
    assert draw(model, cell, range(7), prompts=prompts, batch_size=3) == together
    assert draw(model, cell, range(1, 7, 2), prompts=prompts) == together[1::2]
    assert draw(model, cell, range(7), prompts=prompts, seed=1) != together
    if prompts:
        assert [text.prompt for text in together[:4]] == ["abc", "d", "efghij", "abc"]


def test_cells_of_a_seed_share_the_random_numbers() -> None:
    """AR seed tokens are those of the AR text of the same number."""
    model = tiny_model()
    texts = draw(model, cell_of("ar"))
    seeded = draw(model, cell_of("arpc", ar_seed_tokens=[8]))
    assert [text.token_ids[:8] for text in seeded] == [text.token_ids[:8] for text in texts]
    assert [text.token_ids for text in seeded] != [text.token_ids for text in texts]


def test_the_random_state_is_left_alone() -> None:
    model, cell = tiny_model(), cell_of("block_diffusion")
    state = torch.get_rng_state()
    draw(model, cell)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_models_own_temperature_does_not_count() -> None:
    model, cold = tiny_model(), tiny_model()
    cold.generation_config.temperature = 0.1
    assert draw(cold, cell_of("ar", cold)) == draw(model, cell_of("ar"))
    assert draw(model, cell_of("ar", temperatures=[0.1])) != draw(model, cell_of("ar"))


@pytest.mark.parametrize(
    "setting",
    [
        {"min_p": 0.9},
        {"typical_p": 0.1},
        {"no_repeat_ngram_size": 1},
        {"stop_strings": ["a"]},
        {"num_return_sequences": 2},
    ],
)
def test_nothing_else_of_the_models_generation_config_cuts_its_distribution(setting: dict[str, Any]) -> None:
    model = tiny_model()
    model.generation_config.update(**setting)
    assert draw(model, cell_of("ar", model)) == draw(tiny_model(), cell_of("ar"))


def test_prompts_are_checked() -> None:
    cell = cell_of("ar")
    with pytest.raises(ValueError, match="prompt 1 is"):
        draw(tiny_model(), cell, prompts=["abc", ""])
    with pytest.raises(ValueError, match="at most 54 behind prompts of up to 10 tokens"):
        draw(tiny_model(), cell, prompts=["abcdefghij"], max_new_tokens=60)


def fingerprint(model: Any) -> str:
    return sampled_digest(model, readable_weights(model))


def test_the_fingerprint_tells_weights_and_settings_apart() -> None:
    found = fingerprint(tiny_model())
    assert fingerprint(tiny_model()) == found
    others = [tiny_model(seed=1), tiny_model("uniform"), tiny_model()]
    others[-1].generation_config.corrector = "ar_kl"
    assert len({found, *map(fingerprint, others)}) == 4


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="only x86 CPUs pack weights")
def test_the_fingerprint_tells_packed_weights_apart() -> None:
    """Also where only one matrix differs, as behind a merged adapter, and from the weights as they were."""
    models = [tiny_model(), tiny_model()]
    with torch.no_grad():
        models[1].model.layers[1].mlp.up_proj.weight += 1e-3
    packed = [quantize_for_cpu(model, "float32") for model in models]
    assert len({fingerprint(tiny_model()), *map(fingerprint, packed)}) == 3


# scores


def drawn(*texts: str, prompt: str = "") -> list[DrawnText]:
    return [DrawnText(i, prompt, text, TOKENIZER(text)["input_ids"], 1) for i, text in enumerate(texts)]


def judge_loss(scorer: SampleScorer, text: str, prompt: str = "") -> tuple[float, int]:
    """Sum and number by transformers' own loss."""
    assert scorer.judge is not None
    ids = TOKENIZER("<end>" + prompt + text)["input_ids"]
    labels = torch.tensor([ids])
    labels[0, : 1 + len(TOKENIZER(prompt)["input_ids"])] = -100
    count = int((labels != -100).sum())
    return float(scorer.judge.model(torch.tensor([ids]), labels=labels).loss.detach()) * count, count


@pytest.mark.parametrize("prompt", ["", "tsr"])
def test_perplexity_is_that_of_the_judges_loss(scorer: SampleScorer, prompt: str) -> None:
    texts = ["abcabc", "ddddefgh", "tab<end>cab"]
    found = scorer.score(drawn(*texts, prompt=prompt))
    losses, counts = zip(*(judge_loss(scorer, text, prompt) for text in texts), strict=True)
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / sum(counts)), rel=1e-5)
    assert found["num_judge_tokens"] == sum(counts) == 6 + 8 + 7
    assert found["judge"] == "a tiny judge" and found["judge_start_token"] == "<end>"
    assert found["perplexity_standard_error"] > 0


def test_a_judge_that_reads_no_further_than_the_prompt_is_refused(scorer: SampleScorer) -> None:
    with pytest.raises(ValueError, match="`max_length` must be more than the prompts' tokens"):
        replace(scorer, max_length=3).score(drawn("abc", prompt="tsr"))


def test_the_end_of_a_text_is_the_judges(scorer: SampleScorer) -> None:
    """Its start token stands where the generator wrote its end of text."""
    assert scorer.judge is not None
    other = replace(scorer, judge=replace(scorer.judge, start_token="t"))
    assert other.score(drawn("ab<end>c"))["nll"] == other.score(drawn("abtc"))["nll"]
    assert scorer.score(drawn("ab<end>c"))["nll"] != scorer.score(drawn("abtc"))["nll"]


def test_other_scores_are_on_the_models_tokens(scorer: SampleScorer) -> None:
    found = replace(scorer, judge=None).score(drawn("aabb", "cccc"))
    assert found["entropy"] == pytest.approx(math.log(2) / 2)
    assert found["distinct_1"] == pytest.approx(3 / 8) and found["rep_1"] == pytest.approx(5 / 8)
    assert "perplexity" not in found and found["settings"]["judge"] is None


def test_mauve_with_references(scorer: SampleScorer) -> None:
    pytest.importorskip("mauve")
    texts = draw(tiny_model(), cell_of("ar"), range(30))
    same = replace(scorer, references=[text.text for text in texts])
    others = replace(scorer, references=["ab" * 12] * 30)
    assert same.score(texts)["mauve"] > 0.9 > others.score(texts)["mauve"]
    assert same.settings["references"] != others.settings["references"]
    with pytest.raises(ValueError, match="need a `judge`"):
        replace(same, judge=None)


def test_references_are_cut_to_the_length_of_the_texts() -> None:
    assert cut_texts(TOKENIZER, ["abcdef", "ab"], 3) == ["abc", "ab"]


# the folder

Evaluation = Callable[..., SampleResults]


@pytest.fixture
def run(tmp_path: Path, scorer: SampleScorer) -> Evaluation:
    """An evaluation of four cells, as a function of what differs."""

    def evaluate(folder: str = "samples", decodings: Any = ("ar", "block_diffusion", "arpc"), **options: Any) -> Any:
        axes = {"nfe": options.pop("nfe", [2, 4]), "block_sizes": options.pop("block_sizes", None)}
        axes["ar_seed_tokens"] = options.pop("k", [0])
        cells, skipped = sample_cells(tiny_model(), decodings, max_new_tokens=LENGTH, **axes)
        model = options.pop("model", tiny_model())
        settings = {"num_samples": 6, "max_new_tokens": LENGTH, "scorer": scorer, "skipped": skipped, **options}
        return evaluate_samples(model, TOKENIZER, cells, tmp_path / folder, **settings)

    return evaluate


def without_time(results: SampleResults) -> dict[str, Any]:
    found = results.to_dict()
    for figures in found["cells"]:
        for name in ("seconds", "cpu_seconds", "tokens_per_second", "tokens_per_cpu_second"):
            assert figures.pop(name) > 0
    return json.loads(json.dumps(found))


def test_figures_of_a_cell(run: Evaluation, tmp_path: Path) -> None:
    results = run(k=[0, 8])
    by_name = {figures["cell"]["name"]: figures for figures in results.cells}
    assert by_name["ar"]["evaluations_per_token"] == 1 and by_name["ar"]["evaluations_per_block"] is None
    seeded = by_name["arpc-4-L8-k8"]
    lines = (tmp_path / "samples" / "texts" / "arpc-4-L8-k8.jsonl").read_text().splitlines()
    total = sum(json.loads(line)["num_function_evaluations"] for line in lines)
    assert len(lines) == seeded["num_texts"] == 6
    assert seeded["evaluations_per_text"] == pytest.approx(total / 6)
    assert seeded["evaluations_per_block"] == pytest.approx((total / 6 - 8) / 2)
    assert [cell.name for cell in results.skipped] == ["arpc-2-L8-k0", "arpc-2-L8-k8"]
    assert json.loads((tmp_path / "samples" / "results.json").read_text()) == json.loads(json.dumps(results.to_dict()))


def test_an_interrupted_run_goes_on_to_the_same_figures(run: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = without_time(run("uninterrupted"))
    drawn_cells: list[str] = []

    def draw_or_stop(model: Any, tokenizer: Any, cell: SampleCell, *args: Any, **kwargs: Any) -> Any:
        if len(drawn_cells) == 2:
            drawn_cells.append("stopped")
            raise KeyboardInterrupt
        drawn_cells.append(cell.name)
        return draw_texts(model, tokenizer, cell, *args, **kwargs)

    monkeypatch.setattr(samples_module, "draw_texts", draw_or_stop)
    with pytest.raises(KeyboardInterrupt):
        run("interrupted")
    assert without_time(run("interrupted")) == expected
    assert drawn_cells == ["ar", "block_diffusion-2-L8-k0", "stopped", "block_diffusion-4-L8-k0", "arpc-4-L8-k0"]
    assert without_time(run("interrupted")) == expected  # nothing is left to be done
    assert len(drawn_cells) == 5


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda file: file.write_text(file.read_text()[:-20]),
        lambda file: file.write_text(file.read_text().replace("0", "1", 1)),
        lambda file: file.write_text("".join(file.read_text().splitlines(True)[1:])),
        lambda file: (file.parents[1] / "cells" / "ar.json").write_text('{"cell":'),
        lambda file: (file.parents[1] / "cells" / "ar.json").write_text("[]"),
    ],
    ids=["missing", "cut", "changed", "a line less", "figures cut", "figures of another shape"],
)
def test_damaged_texts_are_drawn_anew(run: Evaluation, tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    expected = without_time(run(decodings=["ar"]))
    texts = tmp_path / "samples" / "texts" / "ar.jsonl"
    whole = texts.read_text()
    damage(texts)
    assert without_time(run(decodings=["ar"])) == expected
    assert texts.read_text() == whole


def test_one_process_at_a_time_writes_samples(run: Evaluation, tmp_path: Path) -> None:
    with lock_folder(tmp_path / "samples"), pytest.raises(FolderInUseError, match="Another process is writing"):
        run()
    run()


def test_a_text_file_alone_is_no_cell(run: Evaluation, tmp_path: Path) -> None:
    expected = without_time(run())
    figures = tmp_path / "samples" / "cells" / "ar.json"
    figures.unlink()
    (tmp_path / "samples" / "texts" / "ar.jsonl").write_text('{"index": 0')
    assert without_time(run()) == expected and figures.is_file()


def test_the_grid_may_grow(run: Evaluation) -> None:
    first = run(decodings=["ar"])
    second = run()
    assert second.cells[0] == first.cells[0] and len(second.cells) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "`seed` was 0, and is 1 now"),
        ({"num_samples": 7}, "`num_samples` was 6, and is 7 now"),
        ({"batch_size": 2}, "`batch_size` was 32, and is 2 now"),
        ({"prompts": ["abc"]}, "`num_prompts` was 0, and is 1 now"),
        ({"model": tiny_model(seed=1)}, "`weights` was "),
        ({"scorer": None}, "`judge` was 'a tiny judge', and is None now"),
    ],
)
def test_other_settings_are_refused_or_overwrite(run: Evaluation, options: dict[str, Any], message: str) -> None:
    run(decodings=["ar"])
    with pytest.raises(ValueError, match=message):
        run(decodings=["ar"], **options)
    overwritten = without_time(run(decodings=["ar"], overwrite=True, **options))
    assert overwritten == without_time(run("another", decodings=["ar"], **options))


def test_another_judge_reads_the_same_texts(
    run: Evaluation, scorer: SampleScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(decodings=["ar"])
    monkeypatch.setattr(samples_module, "draw_texts", None)
    assert scorer.judge is not None
    other = replace(scorer, judge=replace(scorer.judge, name="another judge", start_token="a"))
    second = run(decodings=["ar"], scorer=other, overwrite=True)
    assert second.cells[0]["seconds"] == first.cells[0]["seconds"]
    assert second.cells[0]["scores"]["judge"] == "another judge"
    assert second.cells[0]["scores"]["nll"] != first.cells[0]["scores"]["nll"]


def test_a_folder_of_other_things_is_refused(run: Evaluation, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="holds other things"):
        run("thesis", overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        run("file")


def test_numbers_are_checked(run: Evaluation, tmp_path: Path) -> None:
    for name in ("num_samples", "batch_size"):
        with pytest.raises(ValueError, match=f"`{name}` must be positive, but is 0"):
            run(**{name: 0})
    assert not (tmp_path / "samples").exists()


# tables


def rows_of(page: str, title: str) -> list[list[str]]:
    """Cells of the first table behind a title."""
    lines = page[page.index(title) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    return [[word.strip() for word in line.strip("|").split("|")] for line in lines[start:end]]


def test_tables(run: Evaluation) -> None:
    results = run(k=[0, 8])
    page = markdown(results)
    head, _, *rows = rows_of(page, "# Samples")
    assert len(rows) == len(results.cells) == 7 and {len(row) for row in rows} == {len(head)}
    assert "gen. PPL (a tiny judge)" in head and "entropy" in head and "tokens/s" in head
    assert "T" not in head and "MAUVE" not in head
    row = dict(zip(head, rows[-1], strict=True))
    scores = results.cells[-1]["scores"]
    assert row["decoding"] == "`arpc`" and (row["L'"], row["k"], row["NFE a block"]) == ("8", "8", "4")
    assert row["gen. PPL (a tiny judge)"].startswith(f"{scores['perplexity']:.1f} ± ")
    assert row["entropy"].startswith(f"{scores['entropy']:.2f} ± ")
    head, _, *rows = rows_of(page, "## By AR seed tokens k")
    assert head[3:] == [
        "k = 0: gen. PPL (a tiny judge) (entropy)", "tokens/CPU s",
        "k = 8: gen. PPL (a tiny judge) (entropy)", "tokens/CPU s",
    ]  # fmt: skip
    assert len(rows) == 3 and rows[-1][5] == f"{scores['perplexity']:.1f} ({scores['entropy']:.2f})"
    assert "- `arpc-2-L8-k0`, `arpc-2-L8-k8`: `nfe_per_block=2` is too small" in page


def test_the_table_of_speculation_has_evaluations_per_token_only(run: Evaluation) -> None:
    pytest.importorskip("matplotlib")
    results = run("speculative", decodings=["ar", "speculative"], block_sizes=[4, 8], k=[0, 8])
    page = markdown(results)
    head, _, ar, *rows = rows_of(page, "# Samples")
    assert "By AR seed" not in page and len(rows) == 2
    for row, block_size in zip(rows, "48", strict=True):
        cells = dict(zip(head, row, strict=True))
        assert (cells["decoding"], cells["L'"]) == ("`speculative`", block_size)
        assert cells["k"] == cells["NFE a block"] == cells["run"] == dict(zip(head, ar, strict=True))["run"]
        assert float(cells["NFE a token"]) > 0
        assert f"speculative L'={block_size}".encode() in plot(results)


def test_tables_without_a_judge(run: Evaluation) -> None:
    page = markdown(run(scorer=None))
    assert "PPL" not in page and "By AR seed" not in page and "entropy" in page


def test_the_plot_is_an_image_of_every_series(run: Evaluation) -> None:
    pytest.importorskip("matplotlib")
    results = run()
    image = plot(results)
    assert image.startswith(b"<?xml") and plot(results) == image
    for label in (b"a tiny judge", b"block_diffusion L'=8 k=0", b"tokens/CPU s", b"unigram entropy"):
        assert label in image
    assert b"generative perplexity" not in plot(run("without", scorer=None))


@pytest.mark.parametrize(
    ("low", "high", "doubling", "expected"),
    [
        (0.3, 9, True, ["0.5", "1", "2", "4", "8"]),
        (0.9, 1.1, True, ["0.5", "1", "2"]),
        (30, 900, False, ["50", "100", "200", "500"]),
        (57, 63, False, ["50", "100"]),
        (2, 2e6, True, ["10", "100", "1000", "10000", "100000", "1e+06"]),
        (1e-3, 1e14, False, ["0.01", "1", "100", "10000", "1e+06", "1e+08", "1e+10", "1e+12", "1e+14"]),
    ],
)
def test_log_axes_have_plain_numbers(low: float, high: float, doubling: bool, expected: list[str]) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    panel = Figure().subplots()
    panel.set_xlim(low, high)
    log_axis(panel.xaxis, doubling=doubling)
    left, right = panel.get_xlim()
    shown = [tick for tick in panel.xaxis.get_ticklocs() if left <= tick <= right]
    assert [panel.xaxis.get_major_formatter()(tick) for tick in shown] == expected
    assert not len(panel.xaxis.get_minorticklocs()) and panel.get_xscale() == "log"


def test_the_plot_says_log_and_has_error_bars(run: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    bars: list[Any] = []
    real = Axes.errorbar

    def errorbar(panel: Axes, *args: Any, **options: Any) -> Any:
        bars.append(options["yerr"])
        return real(panel, *args, **options)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    results = run(decodings=["ar"])
    image = plot(results)
    for label in (b"a token (log scale)", b"s (log scale)", b"generative perplexity (log scale)", b"a standard error"):
        assert label in image
    scores = results.cells[0]["scores"]
    errors = [scores["perplexity_standard_error"]] * 2 + [scores["entropy_standard_error"]] * 2
    assert bars == [[error] for error in errors] and min(errors) > 0


def test_cells_of_a_larger_grid_stay_in_the_results(run: Evaluation) -> None:
    large = run(decodings=["ar", "arpc"], nfe=[8, 4], block_sizes=[8, 4])
    small = run(decodings=["arpc"], nfe=[4], block_sizes=[8])
    names = ["arpc-4-L4-k0", "arpc-8-L4-k0", "arpc-4-L8-k0", "arpc-8-L8-k0"]
    assert [figures["cell"]["name"] for figures in large.cells] == ["ar", *names]
    assert [figures["cell"]["name"] for figures in small.cells] == [*names, "ar"]
    assert sorted(map(str, small.cells)) == sorted(map(str, large.cells))
    assert markdown(small).count("`arpc`") == 4


def test_a_page_for_a_terminal_fits(run: Evaluation) -> None:
    text = plain(run(k=[0, 8]), 100)
    assert max(map(len, text.splitlines())) <= 100 and not set("|`#") & set(text)
    assert re.search(r"^arpc +8 +8 +4 ", text, re.M) and "By AR seed tokens k" in text


def test_skipped_cells_stand_in_the_result(run: Evaluation) -> None:
    assert run().to_dict()["skipped"][0]["name"] == "arpc-2-L8-k0"
    assert isinstance(run().skipped[0], SkippedCell)


# processes


def evaluate_here(folder: Path) -> None:
    cells, _ = sample_cells(tiny_model(), ["ar", "arpc:4"], max_new_tokens=LENGTH)
    evaluate_samples(tiny_model(), TOKENIZER, cells, folder, num_samples=5, max_new_tokens=LENGTH, batch_size=2)


@pytest.mark.slow
def test_two_processes_draw_the_texts_of_one(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    evaluate_here(tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "two")], check=True, timeout=240, env=environment)
    for name in ("ar", "arpc-4-L8-k0"):
        one, two = ((tmp_path / folder / "texts" / f"{name}.jsonl").read_text() for folder in ("one", "two"))
        assert one == two and one.count("\n") == 5
    assert json.loads((tmp_path / "two" / "results.json").read_text())["settings"]["processes"] == 2


if __name__ == "__main__":
    evaluate_here(Path(sys.argv[1]))
