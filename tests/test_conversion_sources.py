"""What a published checkpoint is taken for, what is refused and in which words, and what is left of a failure."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError
from published_reference import LENGTH, ROWS, settings, weights, write
from test_conversion import BLOCK_DIT, SINGLE, SOURCES, convert, ids
from tiny import LETTERS, VOCAB_SIZE, generate, tiny_tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from blockgen_hf.hub import conversion
from blockgen_hf.hub.conversion import ConversionReport, convert_checkpoint


RELEASE = "blockgen/multi_block_size/16/owt"
# Place in the release, what of config.json differs, and what the place tells.
PLACES: list[tuple[str, str, dict[str, Any], tuple[str | None, list[int], list[float] | None]]] = [
    ("blockgen/single_block_size/16/owt/absorb", "block-dit", {"x0_causal": False}, ("masked", [16], None)),
    ("blockgen/single_block_size/8/tinygsm/uniform", "block-dit", {"x0_causal": False}, ("uniform", [8], None)),
    (f"{RELEASE}/0.05_0.95/absorb", "block-dit", {}, ("masked", [1, 16], [0.05, 0.95])),
    (f"{RELEASE}/uniform/uniform", "block-dit", {}, ("uniform", [1, 2, 4, 8, 16], None)),
    ("baselines/owt/mdlm", "dense-dit", {}, ("masked", [LENGTH], None)),
    ("baselines/tinygsm/duo", "dense-dit", {}, ("uniform", [LENGTH], None)),
    ("baselines/owt/ar", "ar", {}, ("uniform", [1], None)),
]


@pytest.mark.parametrize(("place", "family", "changes", "told"), PLACES, ids=[place for place, *_ in PLACES])
def test_the_place_in_the_release_tells_what_the_files_do_not(
    tmp_path: Path,
    place: str,
    family: str,
    changes: dict[str, Any],
    told: tuple[str | None, list[int], list[float] | None],
) -> None:
    source = write(tmp_path / place, settings(family, **changes), weights(family))
    report = convert_checkpoint(source, tmp_path / "out")
    config = report.config
    assert report.family == family
    assert (config.diffusion_type, config.block_sizes, config.block_size_weights) == told


@pytest.mark.parametrize(
    ("family", "changes", "adaptive", "found"),
    [
        ("block-dit", {"type": None}, True, "block-dit"),  # by x0_causal
        ("block-dit", {"type": "Block_DiT"}, True, "block-dit"),
        ("block-dit", {"type": None, "name": "small-block-dit"}, False, "block-dit"),
        ("block-dit", {"type": "ddit"}, True, "dense-dit"),
        ("dense-dit", {"type": None}, True, "dense-dit"),
        ("ar", {"type": None}, False, "ar"),
        ("ar", {"type": "dit", "x0_causal": False}, False, "ar"),
    ],
)
def test_the_family_is_recognised(
    tmp_path: Path, family: str, changes: dict[str, Any], adaptive: bool, found: str
) -> None:
    source = write(tmp_path / "source", settings(family, **changes), weights(family, adaptive=adaptive))
    told = {"ar": {}, "dense-dit": {"diffusion_type": "masked"}, "block-dit": BLOCK_DIT}[found]
    assert convert_checkpoint(source, tmp_path / "out", **told).family == found


def test_bd3lm_has_defaults_of_its_own(tmp_path: Path) -> None:
    config = settings("bd3lm", time_conditioning=None, dropout=None)
    source = write(tmp_path / "source", config, weights("bd3lm"))
    found = convert_checkpoint(source, tmp_path / "out").config
    assert found.time_conditioning is False and found.hidden_dropout == 0.1
    back = convert_checkpoint(tmp_path / "out", tmp_path / "back", to="published").output
    assert json.loads((back / "config.json").read_text()) == config


def test_a_named_family_wins_over_the_words_of_the_config(tmp_path: Path) -> None:
    source = write(tmp_path / "source", settings("block-dit"), weights("block-dit"))
    report = convert_checkpoint(source, tmp_path / "out", family="dense-dit", diffusion_type="masked")
    assert report.config.block_sizes == [LENGTH]


def test_whether_a_full_sequence_model_knows_the_time_can_be_said(tmp_path: Path) -> None:
    for name, timed in (("duo", False), ("mdlm", True)):
        config = AutoModelForCausalLM.from_pretrained(convert(tmp_path / name, name, time_conditioning=timed)).config
        assert config.time_conditioning is timed


# Source, what its user says, the refusal.
REFUSALS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "no diffusion type": ("block-dit", {}, {"block_sizes": [1, 4]}, "`diffusion_type` (--diffusion-type) must be"),
    "no diffusion type of a dense": ("dense-dit", {}, {}, "`diffusion_type` (--diffusion-type) must be"),
    "unknown diffusion type": ("block-dit", {}, {**BLOCK_DIT, "diffusion_type": "absorb"}, "`diffusion_type` must be"),
    "no block sizes": ("block-dit", {}, {"diffusion_type": "masked"}, "`block_sizes` (--block-sizes) must be given"),
    "block-causal mixture": ("block-dit", {"x0_causal": False}, BLOCK_DIT, "(--block-sizes) must be a single one"),
    "weights": ("block-dit", {}, {**BLOCK_DIT, "block_size_weights": [1.0]}, "`block_size_weights` must hold one"),
    "block DiT with time": ("block-dit", {}, {**BLOCK_DIT, "time_conditioning": True}, "`time_conditioning` is True"),
    "dense with blocks": (
        "dense-dit", {}, {"diffusion_type": "masked", "block_sizes": [4]}, "`block_sizes` is [4], but the checkpoint"
    ),
    "AR with noise": ("ar", {}, {"diffusion_type": "masked"}, "`diffusion_type` has no meaning"),
    "AR with blocks": ("ar", {}, {"block_sizes": [1, 4]}, "`block_sizes` is [1, 4]"),
    "uniform BD3-LM": ("bd3lm", {}, {"diffusion_type": "uniform"}, "`diffusion_type` is 'uniform', but"),
    "other blocks of BD3-LM": ("bd3lm", {}, {"block_sizes": [8]}, "`block_sizes` is [8]"),
    "unknown family": ("block-dit", {}, {"family": "gpt"}, "`family` must be one of"),
    "adaLN is no AR": ("dense-dit", {}, {"family": "ar"}, "'ar' contradicts the tensors"),
    "no BD3-LM": ("dense-dit", {}, {"family": "bd3lm"}, "'bd3lm' contradicts the tensors, whose names do not begin"),
    "BD3-LM": ("bd3lm", {}, {"family": "block-dit"}, "'block-dit' contradicts the tensors, whose names begin"),
    "missing settings": (
        "block-dit", {"length": None, "n_heads": None}, BLOCK_DIT, "config.json lacks `length`, `n_heads`"
    ),
    "longer blocks than texts": ("block-dit", {}, {**BLOCK_DIT, "block_sizes": [1, LENGTH + 1]}, "is 24 tokens long"),
    "missing x0_causal": ("block-dit", {"x0_causal": None}, BLOCK_DIT, "lacks `x0_causal`"),
    "x0_causal": ("block-dit", {"x0_causal": "no"}, BLOCK_DIT, "`x0_causal` of the checkpoint's config.json must be"),
    "tied": ("dense-dit", {"tie_word_embeddings": True}, {"diffusion_type": "masked"}, "`tie_word_embeddings`"),
    "heads": ("block-dit", {"n_heads": 3}, BLOCK_DIT, "`num_attention_heads` must divide"),
    "more layers": ("block-dit", {"n_blocks": 3}, BLOCK_DIT, "missing: blocks.2.norm1.weight, blocks.2."),
    "fewer layers": ("block-dit", {"n_blocks": 1}, BLOCK_DIT, "unknown: blocks.1."),
    "another width": ("block-dit", {"cond_dim": 16}, BLOCK_DIT, "mlp.0.weight is [8, 256] instead of [16, 256]"),
    "another vocabulary": ("bd3lm", {"vocab_size": 50258}, {}, "`vocab_size` of the checkpoint's config.json is"),
    "adaln": ("bd3lm", {"adaln": False}, {}, "`adaln` of the checkpoint's config.json is False"),
    "causal BD3-LM": ("bd3lm", {"causal": True}, {}, "`causal` of the checkpoint's config.json is true"),
    "BD3-LM without clean half": ("bd3lm", {"cross_attn": False}, {}, "`cross_attn` of the checkpoint's config.json"),
    "tokenizer of a published folder": ("ar", {}, {"to": "published"}, "is no checkpoint of this package"),
    "target": ("ar", {}, {"to": "gguf"}, "`to` must be one of ['transformers', 'published', 'causal-lm']"),
    "dtype": ("ar", {}, {"dtype": "int8"}, "`dtype` must be one of"),
    "revision": ("ar", {}, {"revision": "main"}, "`revision` is for sources on the Hub"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_right_is_refused(tmp_path: Path, case: str) -> None:
    """A ValueError that names what is wrong, and nothing is written."""
    family, changes, told, message = REFUSALS[case]
    source = write(tmp_path / "source", settings(family, **changes), weights(family))
    with pytest.raises(ValueError) as error:
        convert_checkpoint(source, tmp_path / "out", **told)
    assert message in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("place", "told", "message"),
    [
        (f"{RELEASE}/uniform/absorb", {"diffusion_type": "uniform"}, "`diffusion_type` is 'uniform', but"),
        (f"{RELEASE}/0.05_0.95/absorb", {"block_sizes": [1, 2, 16]}, "`block_sizes` is [1, 2, 16], but"),
        (f"{RELEASE}/0.05_0.95/absorb", {"block_size_weights": [0.5, 0.5]}, "`block_size_weights` is [0.5, 0.5], but"),
        ("baselines/owt/mdlm", {"family": "block-dit"}, "`family` is 'block-dit', but"),
        (
            "baselines/owt/mdlm",
            {},
            "config.json is that of 'block-dit', and its place in the release that of 'dense-dit'",
        ),
    ],
)
def test_what_contradicts_the_place_in_the_release_is_refused(
    tmp_path: Path, place: str, told: dict[str, Any], message: str
) -> None:
    source = write(tmp_path / place, settings("block-dit"), weights("block-dit"))
    with pytest.raises(ValueError) as error:
        convert_checkpoint(source, tmp_path / "out", **told)
    assert message in str(error.value)


def test_tensors_that_are_not_those_of_the_layout_are_refused(tmp_path: Path) -> None:
    tensors = weights("block-dit")
    tensors["lm_head.scale"] = tensors.pop("output_layer.linear.bias")
    source = write(tmp_path / "unknown", settings("block-dit"), tensors)
    with pytest.raises(ValueError, match="missing: output_layer.linear.bias; unknown: lm_head.scale"):
        convert_checkpoint(source, tmp_path / "out", **BLOCK_DIT)
    tensors = weights("block-dit")
    del tensors["vocab_embed.embedding"]
    source = write(tmp_path / "headless", settings("block-dit"), tensors)
    with pytest.raises(ValueError, match="have no vocab_embed.embedding"):
        convert_checkpoint(source, tmp_path / "out", **BLOCK_DIT)


def test_other_rotary_embeddings_are_refused(tmp_path: Path) -> None:
    half_of_the_head = 1 / 10000 ** (torch.arange(0, 4, 2).float() / 4)
    for number, frequencies in enumerate((torch.tensor([1.0, 0.7, 0.1, 0.01]), half_of_the_head)):
        tensors = {**weights("block-dit"), "rotary_emb.inv_freq": frequencies}
        source = write(tmp_path / str(number), settings("block-dit"), tensors)
        with pytest.raises(ValueError, match="not that of a rotary embedding on the whole head"):
            convert_checkpoint(source, tmp_path / "out", **BLOCK_DIT)


@pytest.mark.parametrize(("dtype", "words"), [(torch.bfloat16, "bfloat16 and float32"), (torch.int8, "quantised")])
def test_mixed_and_quantised_weights_are_refused(tmp_path: Path, dtype: torch.dtype, words: str) -> None:
    tensors = weights("block-dit")
    tensors["blocks.0.mlp.0.weight"] = tensors["blocks.0.mlp.0.weight"].to(dtype)
    source = write(tmp_path / "source", settings("block-dit"), tensors)
    with pytest.raises(ValueError, match=words):
        convert_checkpoint(source, tmp_path / "out", **BLOCK_DIT)
    if dtype is torch.bfloat16:
        assert convert_checkpoint(source, tmp_path / "out", dtype="float32", **BLOCK_DIT).dtype == torch.float32


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["model.ckpt", "pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_refused_and_not_opened(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Canary(tmp_path / "opened")))
    (folder / "config.json").write_text(json.dumps(settings("block-dit")))
    for source in (folder, folder / name):
        with pytest.raises(ValueError, match=f"{name} is a pickle.*weights_only=True"):
            convert_checkpoint(source, tmp_path / "out", **BLOCK_DIT)
    assert not (tmp_path / "opened").exists()


def test_sources_that_are_not_there_or_not_whole_are_refused(tmp_path: Path) -> None:
    def refusal(source: Any) -> str:
        with pytest.raises(ValueError) as error:
            convert_checkpoint(source, tmp_path / "out", **BLOCK_DIT)
        return str(error.value)

    assert "there is no such folder" in refusal(tmp_path / "nowhere")
    assert "There is no config.json in" in refusal(write(tmp_path / "bare", None, weights("block-dit")))
    (tmp_path / "empty").mkdir()
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(tmp_path / "empty")
    source = write(tmp_path / "source", settings("block-dit"), weights("block-dit"))
    (source / "config.json").write_text("{")
    assert "config.json cannot be read as JSON" in refusal(source)
    (source / "config.json").write_text("[]")
    assert "must hold a JSON object" in refusal(source)
    (source / "config.json").write_text(json.dumps(settings("block-dit")))
    (source / "config.json").write_text(json.dumps({**settings("block-dit"), "length": None}))
    assert "config.json lacks `length`" in refusal(source)
    (source / "config.json").write_text(json.dumps(settings("block-dit")))
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in refusal(source)
    sharded = write(tmp_path / "sharded", settings("block-dit"), weights("block-dit"), shards=2)
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refusal(sharded)
    ours = convert(tmp_path / "ours", "mixture")
    assert "is a checkpoint of this package already" in refusal(ours)
    assert not (tmp_path / "out").exists()


# Tokenizers


def letters(*, mask: bool = False, pad: bool = False, words: int = 20) -> PreTrainedTokenizerFast:
    """A token a letter and an end of text; a mask and a pad if wanted."""
    tokens = [*LETTERS[:words], "<end>", *(["<mask>"] if mask else []), *(["<pad>"] if pad else [])]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = (
        {"eos_token": "<end>"} | ({"mask_token": "<mask>"} if mask else {}) | ({"pad_token": "<pad>"} if pad else {})
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def convert_with(tmp_path: Path, name: str, rows: int, tokenizer: PreTrainedTokenizerFast) -> ConversionReport:
    family, changes, told = SOURCES[name]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    vocabulary = {"vocab_size": rows} if family == "bd3lm" else {}
    source = write(tmp_path / "source", settings(family, **changes, **vocabulary), weights(family, rows=rows))
    return convert_checkpoint(source, tmp_path / "out", tokenizer=tmp_path / "tokenizer", **told)


@pytest.mark.parametrize("name", ["mixture", "mdlm", "bd3lm"])
def test_a_masked_model_gets_a_tokenizer_with_the_last_row_as_mask(tmp_path: Path, name: str) -> None:
    """As GPT-2: 50,257 tokens, 50,258 rows. Padding is the end of text then, on the left."""
    report = convert_with(tmp_path, name, 22, letters())
    tokenizer = AutoTokenizer.from_pretrained(report.output)
    assert report.wrote_tokenizer and len(tokenizer) == 22
    assert tokenizer.mask_token_id == report.config.mask_token_id == 21
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == report.config.pad_token_id == 20
    assert tokenizer.padding_side == "left" and tokenizer.model_max_length == LENGTH
    assert AutoModelForCausalLM.from_pretrained(report.output).generation_config.eos_token_id == 20


def test_a_tokenizer_with_a_mask_keeps_it(tmp_path: Path) -> None:
    """As BERT: the mask is any token, and no row is added."""
    report = convert_with(tmp_path, "mixture", 23, letters(mask=True, pad=True))
    assert report.config.mask_token_id == 21 and report.config.pad_token_id == 22


def test_a_uniform_model_gets_a_tokenizer_with_a_pad(tmp_path: Path) -> None:
    """As SmolLM-135M: 49,152 tokens, 49,153 rows."""
    report = convert_with(tmp_path, "duo", 22, letters())
    tokenizer = AutoTokenizer.from_pretrained(report.output)
    assert tokenizer.pad_token == "[PAD]" and tokenizer.pad_token_id == report.config.pad_token_id == 21
    assert report.config.mask_token_id is None


def test_a_uniform_model_without_a_row_for_a_pad_pads_with_the_end_of_text(tmp_path: Path) -> None:
    report = convert_with(tmp_path, "uniform_mixture", 21, letters())
    assert report.config.pad_token_id == report.config.eos_token_id == 20


@pytest.mark.parametrize(("rows", "suppressed"), [(21, None), (22, [21])])
def test_an_autoregressive_model_may_have_a_row_too_many(
    tmp_path: Path, rows: int, suppressed: list[int] | None
) -> None:
    """Published ones keep a row for a mask token that no text holds: generation never takes it."""
    report = convert_with(tmp_path, "ar", rows, letters())
    model = AutoModelForCausalLM.from_pretrained(report.output).eval()
    assert model.generation_config.suppress_tokens == suppressed
    assert any("is that of no token" in note for note in report.notes) == (suppressed is not None)
    if suppressed:
        torch.nn.init.constant_(model.lm_head.bias[-1:], 100.0)
        assert (generate(model, ids(2, 4) % 20, max_new_tokens=8, eos_token_id=None) < 21).all()


@pytest.mark.parametrize(
    ("name", "rows", "tokenizer", "words"),
    [
        (
            "mixture",
            23,
            letters(),
            "has 21 tokens and 22 with a mask token, but the model has 23 rows",
        ),
        ("mixture", 21, letters(), "has 21 tokens and 22 with a mask token, but the model has 21 rows"),
        ("mixture", 20, letters(mask=True), "has 22 tokens, but the model has 20 rows"),
        ("mixture", 23, letters(mask=True), "has 22 tokens"),
        ("duo", 23, letters(), "has 21 tokens, but the model has 23 rows"),
        ("duo", 23, letters(pad=True), "has 22 tokens"),
        ("ar", 23, letters(), "has 21 tokens, but the model has 23 rows"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(
    tmp_path: Path, name: str, rows: int, tokenizer: PreTrainedTokenizerFast, words: str
) -> None:
    with pytest.raises(ValueError, match="it is not the tokenizer that the model was trained with") as error:
        convert_with(tmp_path, name, rows, tokenizer)
    assert words in str(error.value)
    assert not (tmp_path / "out").exists()


def test_without_a_tokenizer_it_says_so(tmp_path: Path) -> None:
    source = write(tmp_path / "source", settings("block-dit"), weights("block-dit"))
    report = convert_checkpoint(source, tmp_path / "out", **BLOCK_DIT)
    assert not report.wrote_tokenizer and not list(report.output.glob("tokenizer*"))
    assert report.notes[0].startswith("No tokenizer was written")
    with pytest.raises(ValueError, match="`tokenizer` .* cannot be loaded: there are no files of a tokenizer. Name"):
        convert_checkpoint(source, tmp_path / "other", tokenizer=tmp_path / "source", **BLOCK_DIT)


def test_a_tokenizer_of_the_hub_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.append(repo)
        return str(tmp_path / "tokenizer")

    monkeypatch.setattr("blockgen_hf.hub.sources.snapshot_download", snapshot_download)
    letters().save_pretrained(tmp_path / "tokenizer")
    source = write(tmp_path / "source", settings("block-dit"), weights("block-dit", rows=22))
    report = convert_checkpoint(source, tmp_path / "out", tokenizer="someone/letters", **BLOCK_DIT)
    assert asked == ["someone/letters"] and report.wrote_tokenizer
    assert "local_files_only" not in (report.output / "tokenizer_config.json").read_text()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere", "There is no folder ./nowhere"),
        ("a/b/c", "There is no folder a/b/c"),
        ("someone/nothing", "'someone/nothing' cannot be loaded: The Hub does not answer"),
    ],
)
def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path, name: str, words: str) -> None:
    source = write(tmp_path / "source", settings("block-dit"), weights("block-dit"))
    with pytest.raises(ValueError, match="`tokenizer` ") as error:
        convert_checkpoint(source, tmp_path / "out", tokenizer=name, **BLOCK_DIT)
    assert words in str(error.value)
    assert not (tmp_path / "out").exists()


# The folder that is written


def test_a_folder_with_something_in_it_is_not_touched(tmp_path: Path) -> None:
    source = write(tmp_path / "source", settings("block-dit"), weights("block-dit"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "diary.txt").write_text("dear diary")
    with pytest.raises(ValueError, match="is not empty.*--overwrite"):
        convert_checkpoint(source, out, **BLOCK_DIT)
    with pytest.raises(ValueError, match="is a file"):
        convert_checkpoint(source, out / "diary.txt", **BLOCK_DIT)
    with pytest.raises(ValueError, match="is the source"):
        convert_checkpoint(source, source, overwrite=True, **BLOCK_DIT)
    assert [path.name for path in out.iterdir()] == ["diary.txt"]


def test_overwriting_replaces_the_model_and_nothing_else(tmp_path: Path) -> None:
    """Sharded by whole, with a tokenizer by without one; nothing of the old model stays, everything else does."""
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    source = write(tmp_path / "source", settings("block-dit"), weights("block-dit"))
    other = write(tmp_path / "other", settings("block-dit", x0_causal=False), weights("block-dit", seed=1))
    assert ROWS == VOCAB_SIZE
    out = tmp_path / "out"
    convert_checkpoint(source, out, tokenizer=tmp_path / "tokenizer", max_shard_size="20KB", **BLOCK_DIT)
    (out / "diary.txt").write_text("dear diary")
    convert_checkpoint(other, out, overwrite=True, **SINGLE)
    convert_checkpoint(other, tmp_path / "fresh", **SINGLE)
    fresh = {path.name: path.read_bytes() for path in (tmp_path / "fresh").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {**fresh, "diary.txt": b"dear diary"}


@pytest.mark.parametrize(
    "entry", ["..", ".", "../precious.txt", "folder", "diary.txt", "README.md", 7, None, ["config.json"]]
)
def test_the_list_of_a_converted_folder_deletes_no_file_of_another_name(entry: Any, tmp_path: Path) -> None:
    """conversion.json travels with published models, so that anybody may have written it."""
    source = write(tmp_path / "source", settings("block-dit"), weights("block-dit"))
    out = tmp_path / "parent" / "out"
    convert_checkpoint(source, out, **BLOCK_DIT)
    (tmp_path / "parent" / "precious.txt").write_text("precious")
    (out / "folder").mkdir()
    for name in ("diary.txt", "README.md", "folder/model.safetensors"):
        (out / name).write_text("mine")
    notes = json.loads((out / "conversion.json").read_text())
    (out / "conversion.json").write_text(json.dumps({**notes, "files": [*notes["files"], entry]}))
    before = set((tmp_path / "parent").rglob("*"))
    convert_checkpoint(source, out, overwrite=True, **BLOCK_DIT)
    assert set((tmp_path / "parent").rglob("*")) == before
    for name in ("diary.txt", "README.md", "folder/model.safetensors"):
        assert (out / name).read_text() == "mine"


@pytest.mark.parametrize("files", [None, 5, "config.json", {"..": 1}])
def test_a_list_of_another_shape_deletes_nothing(files: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "source", settings("block-dit"), weights("block-dit"))
    convert_checkpoint(source, tmp_path / "out", **BLOCK_DIT)
    (tmp_path / "out" / "conversion.json").write_text(json.dumps({"files": files}))
    (tmp_path / "out" / "vocab.txt").write_text("mine")
    convert_checkpoint(source, tmp_path / "out", overwrite=True, **BLOCK_DIT)
    assert (tmp_path / "out" / "vocab.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "layers_blockgen.py"])
@pytest.mark.parametrize("kind", ["link", "folder"])
def test_a_link_or_a_folder_is_not_replaced_by_a_file_of_the_model(name: str, kind: str, tmp_path: Path) -> None:
    source = write(tmp_path / "source", settings("block-dit"), weights("block-dit"))
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (elsewhere / "precious.txt").write_text("precious")
    if kind == "link":
        (out / name).symlink_to(elsewhere)
    else:
        (out / name).mkdir()
        (out / name / "precious.txt").write_text("precious")
    with pytest.raises(ValueError, match=rf"{name} is a {kind}, which is not replaced"):
        convert_checkpoint(source, out, overwrite=True, **BLOCK_DIT)
    assert (out / name / "precious.txt").read_text() == "precious"
    assert [path.name for path in out.iterdir()] == [name]


def test_an_output_that_cannot_be_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(output: Any) -> str:
        with pytest.raises(ValueError) as error:
            convert_checkpoint(tmp_path / "nowhere", output, **BLOCK_DIT)
        return str(error.value)

    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file" / "out") == f"`output` must be a folder, but {tmp_path / 'file'} is a file."
    assert "`output` must be the name of a folder, but is empty" in refusal("")
    with pytest.raises(ValueError, match="`source` must be the name of a folder, but is empty"):
        convert_checkpoint("", tmp_path / "out")
    asked: list[Path] = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append(path))
    assert "you have no permission" in refusal(tmp_path / "new" / "out")
    assert asked == [tmp_path]
    (tmp_path / "mounted").mkdir()
    assert "you have no permission" in refusal(tmp_path / "mounted")
    assert asked[1:] == [tmp_path / "mounted"]  # not of the folder above


def test_an_output_that_was_filled_in_the_meantime_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "source", settings("block-dit"), weights("block-dit"))
    save = conversion.BlockGenForDiffusionLM.save_pretrained

    def save_beside_another(self: Any, folder: str, **options: Any) -> None:
        save(self, folder, **options)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("another's")

    monkeypatch.setattr(conversion.BlockGenForDiffusionLM, "save_pretrained", save_beside_another)
    with pytest.raises(ValueError, match="is not empty"):
        convert_checkpoint(source, tmp_path / "out", **BLOCK_DIT)
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["another's"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_an_output_may_be_a_link_or_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "source", settings("block-dit"), weights("block-dit"))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert_checkpoint(source, tmp_path / "link", **BLOCK_DIT)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").is_file()
    (tmp_path / "here" / "_unfinished-1").mkdir(parents=True)  # of a conversion that was killed
    monkeypatch.chdir(tmp_path / "here")
    convert_checkpoint("../source", ".", **BLOCK_DIT)
    assert (tmp_path / "here" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link", "real", "source"]


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk while the weights are written; the model that was there before is still there."""
    source = write(tmp_path / "source", settings("block-dit"), weights("block-dit"))
    convert_checkpoint(source, tmp_path / "out", **BLOCK_DIT)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full_disk(self: Any, folder: str, **options: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion.BlockGenForDiffusionLM, "save_pretrained", full_disk)
    for output, overwrite in (("new", False), ("out", True)):
        with pytest.raises(OSError, match="No space left"):
            convert_checkpoint(source, tmp_path / output, overwrite=overwrite, **BLOCK_DIT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


KILLED = """
import os, sys
from blockgen_hf.hub import conversion
conversion.BlockGenForDiffusionLM.save_pretrained = lambda *args, **options: os._exit(9)
conversion.convert_checkpoint(sys.argv[1], sys.argv[2], diffusion_type="masked", block_sizes=[4])
"""


@pytest.mark.slow
def test_a_killed_conversion_leaves_no_output_and_does_not_stand_in_the_way(tmp_path: Path) -> None:
    source = write(tmp_path / "source", settings("block-dit"), weights("block-dit"))
    run = subprocess.run([sys.executable, "-c", KILLED, str(source), str(tmp_path / "out")])
    assert run.returncode == 9
    assert not (tmp_path / "out").exists()
    convert_checkpoint(source, tmp_path / "out", **BLOCK_DIT)
    assert (tmp_path / "out" / "config.json").is_file()


# The Hub


def cache_repository(cache: Path, repo: str, commit: str = "c" * 40) -> Path:
    """The folder of a snapshot, as huggingface_hub keeps it."""
    root = cache / ("models--" + repo.replace("/", "--"))
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    return root / "snapshots" / commit


def test_a_folder_of_a_repository_is_found_in_the_cache(tmp_path: Path) -> None:
    """Offline; the place in the release is that in the repository."""
    assert constants.HF_HUB_OFFLINE
    snapshot = cache_repository(tmp_path / "cache", "someone/blockgen")
    write(snapshot / RELEASE / "0.05_0.95" / "absorb", settings("block-dit"), weights("block-dit"))
    report = convert_checkpoint(
        f"hf:someone/blockgen/{RELEASE}/0.05_0.95/absorb", tmp_path / "out", cache_dir=tmp_path / "cache"
    )
    assert report.config.block_sizes == [1, 16] and report.config.block_size_weights == [0.05, 0.95]
    notes = json.loads((report.output / "conversion.json").read_text())
    assert notes["source"] == f"hf:someone/blockgen/{RELEASE}/0.05_0.95/absorb"
    assert notes["revision"] == "c" * 40


def test_only_the_files_of_the_folder_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr("blockgen_hf.hub.sources.snapshot_download", snapshot_download)
    write(tmp_path / "a" / "b", settings("block-dit"), weights("block-dit"))
    convert_checkpoint("hf:someone/thing/a/b", tmp_path / "out", revision="v2", **BLOCK_DIT)
    assert asked["repo"] == "someone/thing" and asked["revision"] == "v2"
    assert all(pattern.startswith("a/b/") for pattern in asked["allow_patterns"])
    assert {"a/b/config.json", "a/b/model.safetensors"} < set(asked["allow_patterns"])
    with pytest.raises(ValueError, match="no such folder in the repository"):
        convert_checkpoint("hf:someone/thing/a/c", tmp_path / "other", **BLOCK_DIT)


def test_a_download_that_breaks_off_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> str:
        raise HTTPError("timed out")

    monkeypatch.setattr("blockgen_hf.hub.sources.snapshot_download", broken)
    with pytest.raises(ValueError, match="The download of someone/thing broke off.*timed out"):
        convert_checkpoint("hf:someone/thing", tmp_path / "out", **BLOCK_DIT)


@pytest.mark.parametrize("source", ["hf:", "hf:gpt2", "hf:someone//x", "hf:someone/thing/../other"])
def test_names_that_are_no_repository_are_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(ValueError, match="`source` must have the form hf:org/repo"):
        convert_checkpoint(source, tmp_path / "out", **BLOCK_DIT)


def test_a_repository_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="The Hub does not answer, and its cache does not hold someone/nothing"):
        convert_checkpoint("hf:someone/nothing", tmp_path / "out", cache_dir=tmp_path / "cache", **BLOCK_DIT)

    def missing(*args: Any, **options: Any) -> str:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr("blockgen_hf.hub.sources.snapshot_download", missing)
    with pytest.raises(ValueError, match="There is no repository 'someone/nothing' on the Hub"):
        convert_checkpoint("hf:someone/nothing", tmp_path / "out", **BLOCK_DIT)
