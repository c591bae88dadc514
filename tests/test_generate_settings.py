"""`BlockGenGenerationConfig`: defaults, saving, overriding; and every wrong input with a `ValueError` of its own."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import EOS, MASK, PAD, generate, left_padded, tiny_model, words
from transformers import AutoModel, GenerationConfig

from blockgen_hf import BlockGenForDiffusionLM, BlockGenGenerationConfig


SETTINGS: dict[str, Any] = dict(
    decoding="arpc",
    block_size=4,
    nfe_per_block=5,
    ar_seed_tokens=2,
    corrector="ar_gap",
    corrector_start=1,
    corrector_period=2,
    noise_removal="greedy",
    temperature=0.7,
    top_k=5,
    max_new_tokens=9,
)


# ---- defaults
def test_defaults_are_those_of_the_contract() -> None:
    """Of every setting; and sampling from the whole distribution, where transformers would cut it to 50 tokens."""
    model = tiny_model()
    config, _ = model._prepare_generation_config(None)
    expected = dict(
        decoding="block_diffusion",
        block_size=8,
        denoising_steps=None,
        nfe_per_block=None,
        ar_seed_tokens=0,
        corrector="ar_surprisal",
        corrector_start=0,
        corrector_period=1,
        noise_removal="ancestral",
        sampler="ancestral",
        output_trajectory=False,
        do_sample=True,
        top_k=0,
    )
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.num_denoising_steps() == 8
    assert tiny_model(block_sizes=[1])._prepare_generation_config(None)[0].decoding == "ar"


def test_whole_vocabulary_is_sampled_by_default() -> None:
    """More than 50 different tokens from a flat model of 200."""
    model = BlockGenForDiffusionLM(tiny_model().config.__class__(**tiny_model(vocab_size=200).config.to_dict()))
    for decoding in ("ar", "block_diffusion", "arpc"):
        text = generate(model.eval(), torch.zeros(64, 0, dtype=torch.long), max_new_tokens=8, decoding=decoding)
        assert len(text.unique()) > 150


# ---- saving and overriding
def test_settings_survive_a_save_and_a_reload(tmp_path: Path) -> None:
    """They live in `generation_config.json`, and the reloaded model generates the same text by itself."""
    model, prompt = tiny_model(), words(2, 3)
    model.generation_config = BlockGenGenerationConfig(**SETTINGS)
    expected = generate(tiny_model(), prompt, **SETTINGS)
    assert torch.equal(generate(model, prompt), expected)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert {name: saved[name] for name in SETTINGS} == SETTINGS
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded.generation_config) is BlockGenGenerationConfig
    assert torch.equal(generate(loaded, prompt), expected)
    config = BlockGenGenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(config, name) for name in SETTINGS} == SETTINGS


def test_a_new_model_saves_and_reloads_without_settings(tmp_path: Path) -> None:
    """Nothing said stays unsaid: the defaults of a later version apply, and the class is ours."""
    tiny_model().save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded.generation_config) is BlockGenGenerationConfig
    assert loaded.generation_config.decoding is None
    assert loaded.generation_config.pad_token_id == PAD
    assert torch.equal(generate(loaded, words(1, 3)), generate(tiny_model(), words(1, 3)))


@pytest.mark.parametrize("how", ["keyword", "config", "keyword over config"])
def test_settings_of_a_call_override_those_of_the_model(how: str) -> None:
    """As in transformers: keywords first, then the given config, then the model's."""
    model, prompt = tiny_model(), words(2, 3)
    model.generation_config = BlockGenGenerationConfig(decoding="ar", max_new_tokens=6, temperature=0.5)
    wanted = dict(decoding="block_diffusion", block_size=2)
    expected = generate(tiny_model(), prompt, max_new_tokens=6, temperature=0.5, **wanted)
    call: dict[str, Any] = {
        "keyword": wanted,
        "config": dict(generation_config=BlockGenGenerationConfig(**wanted)),
        "keyword over config": dict(
            generation_config=BlockGenGenerationConfig(decoding="arpc", block_size=2), decoding="block_diffusion"
        ),
    }[how]
    assert torch.equal(generate(model, prompt, **call), expected)
    assert model.generation_config.decoding == "ar" and model.generation_config.block_size is None


def test_a_call_changes_no_configuration() -> None:
    """Neither the model's nor the one that is given."""
    model, given = tiny_model(), BlockGenGenerationConfig(decoding="arpc", max_new_tokens=4)
    before = model.generation_config.to_dict(), given.to_dict()
    generate(model, words(1, 3), generation_config=given, block_size=2, temperature=0.5)
    assert (model.generation_config.to_dict(), given.to_dict()) == before


def test_budget_and_steps_replace_one_another() -> None:
    """The one that is said later counts; said together they contradict one another."""
    model = tiny_model("uniform_time_conditional")
    kwargs = dict(max_new_tokens=8, block_size=8, decoding="block_diffusion", return_dict_in_generate=True)
    model.generation_config.nfe_per_block = 5
    assert generate(model, words(1, 3), **kwargs).num_function_evaluations.item() == 5
    assert generate(model, words(1, 3), denoising_steps=3, **kwargs).num_function_evaluations.item() == 3
    given = BlockGenGenerationConfig(denoising_steps=2)
    assert generate(model, words(1, 3), generation_config=given, **kwargs).num_function_evaluations.item() == 2
    model.generation_config.nfe_per_block, model.generation_config.denoising_steps = None, 4
    assert generate(model, words(1, 3), nfe_per_block=7, **kwargs).num_function_evaluations.item() == 7
    assert generate(model, words(1, 3), denoising_steps=None, **kwargs).num_function_evaluations.item() == 8


def test_a_plain_generation_config_is_upgraded() -> None:
    """transformers' own class, given to the call or put on the model."""
    model, prompt = tiny_model(), words(2, 3)
    expected = generate(model, prompt, max_new_tokens=5, temperature=0.5)
    plain = GenerationConfig(max_new_tokens=5, temperature=0.5)
    assert torch.equal(generate(model, prompt, generation_config=plain), expected)
    assert generate(model, prompt, generation_config=plain, decoding="ar").shape == (2, 8)
    model.generation_config = GenerationConfig(max_new_tokens=5, temperature=0.5, pad_token_id=PAD)
    assert torch.equal(generate(model, prompt), expected)
    assert torch.equal(
        generate(model, prompt, decoding="arpc"),
        generate(tiny_model(), prompt, max_new_tokens=5, temperature=0.5, decoding="arpc"),
    )


def test_a_stock_file_of_a_checkpoint_is_upgraded(tmp_path: Path) -> None:
    """`generation_config.json` as transformers would have written it."""
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 5, "pad_token_id": PAD}))
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded.generation_config) is BlockGenGenerationConfig
    assert generate(loaded, words(1, 3), decoding="arpc", block_size=4).shape == (1, 8)


def test_no_sampling_is_deterministic_where_nothing_else_is_drawn() -> None:
    """Greedy AR, and ARPC of a masked model whose steps are all informed: any seed gives the same text."""
    model = tiny_model()
    for settings in (dict(decoding="ar"), dict(decoding="arpc", block_size=4)):
        texts = [
            generate(model, words(2, 3), seed, max_new_tokens=8, do_sample=False, **settings) for seed in range(3)
        ]
        assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


# ---- wrong input
VALUES: list[tuple[str, Any]] = [
    ("decoding", "diffusion"),
    ("decoding", "revise_draft"),
    ("decoding", 1),
    ("block_size", 0),
    ("block_size", -4),
    ("block_size", 2.5),
    ("block_size", "16"),
    ("block_size", True),
    ("denoising_steps", 0),
    ("denoising_steps", 1.5),
    ("nfe_per_block", 0),
    ("nfe_per_block", "8"),
    ("ar_seed_tokens", -1),
    ("ar_seed_tokens", 0.5),
    ("corrector", "surprisal"),
    ("corrector_start", -1),
    ("corrector_period", 0),
    ("noise_removal", "argmax"),
    ("sampler", "gibbs"),
    ("sampler", "euler"),
    ("output_trajectory", "yes"),
    ("cache_window", 0),
    ("cache_window", 2.5),
]


@pytest.mark.parametrize("name, value", VALUES, ids=[f"{name}={value!r}" for name, value in VALUES])
def test_a_value_that_is_not_accepted_is_refused_by_its_name(name: str, value: Any) -> None:
    """By the call and by the config alike; the message says what was given."""
    with pytest.raises(ValueError, match=f"`{name}`.*{value!r}"):
        generate(tiny_model(), words(1, 3), max_new_tokens=4, **{name: value})
    with pytest.raises(ValueError, match=f"`{name}`.*{value!r}"):
        BlockGenGenerationConfig(**{name: value})


@pytest.mark.parametrize("decoding", ["ar", "block_diffusion", "arpc"])
def test_prompts_that_do_not_fit_are_refused(decoding: str) -> None:
    """Longer than the positions allow, alone or with what is to come; the message has the numbers."""
    model = tiny_model(max_position_embeddings=16)
    with pytest.raises(ValueError, match=r"(?s)`inputs`.*17.*16"):
        generate(model, words(1, 17), max_new_tokens=1, decoding=decoding)
    with pytest.raises(ValueError, match=r"(?s)`inputs`.*16.*16"):
        generate(model, words(1, 16), max_new_tokens=1, decoding=decoding)
    with pytest.raises(ValueError, match=r"(?s)`max_new_tokens`.*6.*7"):
        generate(model, words(1, 10), max_new_tokens=7, decoding=decoding)
    with pytest.raises(ValueError, match=r"(?s)`max_(new_tokens|length)`.*6.*16"):
        generate(model, words(1, 10), max_length=17, decoding=decoding)
    assert generate(model, words(1, 10), max_new_tokens=6, decoding=decoding).shape == (1, 16)


def test_without_a_length_the_text_ends_where_positions_do() -> None:
    """transformers' default of 20 new tokens is no reason to refuse a prompt near the end of the positions."""
    model = tiny_model(max_position_embeddings=16)
    assert generate(model, words(1, 3)).shape[1] <= 16


@pytest.mark.parametrize("decoding", ["ar", "block_diffusion", "arpc"])
@pytest.mark.parametrize("token", [-1, 23, 50_000])
def test_ids_outside_of_the_vocabulary_are_refused(token: int, decoding: str) -> None:
    """Instead of an index error somewhere inside, or a crash of the GPU."""
    prompt = words(2, 3)
    prompt[1, 1] = token
    with pytest.raises(ValueError, match=rf"(?s)`inputs`.*22.*{token}"):
        generate(tiny_model(), prompt, max_new_tokens=4, decoding=decoding)


def test_a_mask_token_in_a_prompt_is_refused() -> None:
    """Prompts are clean text. Behind a zero of the attention mask anything may stand, and uniform models have none."""
    prompt = words(2, 3)
    prompt[1, 1] = MASK
    for decoding in ("ar", "block_diffusion", "arpc"):
        with pytest.raises(ValueError, match="`inputs`.*mask token"):
            generate(tiny_model(), prompt, max_new_tokens=4, decoding=decoding)
    assert generate(tiny_model("uniform"), prompt, max_new_tokens=4).shape == (2, 7)
    batch = left_padded([words(3), words(1)])
    expected = generate(tiny_model(), None, max_new_tokens=4, **batch)
    batch["input_ids"][1, :2] = MASK
    assert torch.equal(generate(tiny_model(), None, max_new_tokens=4, **batch)[:, 3:], expected[:, 3:])


def test_prompts_that_are_no_ids_are_refused() -> None:
    """A vector, floating point numbers, embeddings."""
    model = tiny_model()
    with pytest.raises(ValueError, match="`inputs`"):
        generate(model, words(3), max_new_tokens=4)
    with pytest.raises(ValueError, match="`inputs`"):
        generate(model, torch.rand(1, 3), max_new_tokens=4)
    with pytest.raises(ValueError, match="inputs"):
        generate(model, None, inputs_embeds=torch.rand(1, 3, 16), max_new_tokens=4)


@pytest.mark.parametrize("decoding", ["ar", "block_diffusion", "arpc"])
def test_an_attention_mask_of_the_wrong_shape_is_refused(decoding: str) -> None:
    with pytest.raises(ValueError, match="`attention_mask`"):
        generate(
            tiny_model(), words(2, 5), attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]), max_new_tokens=4,
            decoding=decoding,
        )  # fmt: skip


@pytest.mark.parametrize("decoding", ["ar", "block_diffusion", "arpc"])
def test_prompts_padded_on_the_right_give_the_text_of_left_padded_ones(decoding: str) -> None:
    """transformers warns of them; positions decide here, so that the new tokens are the same."""
    model, settings = tiny_model(), dict(max_new_tokens=7, decoding=decoding)
    left = left_padded([words(3), words(2)])
    right = {name: torch.stack([rows[0], rows[1].roll(-1)]) for name, rows in left.items()}
    expected = generate(model, None, **left, **settings)[:, 3:]
    assert torch.equal(generate(model, None, **right, **settings)[:, 3:], expected)


@pytest.mark.parametrize("budget", [1, 2])
def test_a_budget_without_an_informed_step_is_refused(budget: int) -> None:
    """ARPC needs two steps and an AR pass; the message says how many evaluations are needed."""
    with pytest.raises(ValueError, match=f"`nfe_per_block={budget}`.*3"):
        generate(tiny_model(), words(1, 3), max_new_tokens=4, decoding="arpc", nfe_per_block=budget)
    with pytest.raises(ValueError, match="`nfe_per_block=8`.*11"):
        generate(tiny_model(), words(1, 3), max_new_tokens=4, decoding="arpc", nfe_per_block=8, corrector_start=8)
    assert generate(tiny_model(), words(1, 3), max_new_tokens=4, nfe_per_block=budget).shape == (1, 7)


def test_contradictory_settings_are_refused() -> None:
    """`denoising_steps` with `nfe_per_block`, in a call, in a config, and half in each."""
    both = dict(denoising_steps=4, nfe_per_block=8)
    match = "`denoising_steps`.*`nfe_per_block`"
    with pytest.raises(ValueError, match=match):
        generate(tiny_model(), words(1, 3), max_new_tokens=4, **both)
    with pytest.raises(ValueError, match=match):
        BlockGenGenerationConfig(**both)
    with pytest.raises(ValueError, match=match):
        generate(tiny_model(), words(1, 3), generation_config=BlockGenGenerationConfig(), **both)


@pytest.mark.parametrize(
    "unknown",
    [dict(decodng="ar"), dict(steps=4), dict(revise_part=0.5), dict(blocksize=4), dict(noise_level=0.5)],
    ids=str,
)
@pytest.mark.parametrize("with_config", [False, True])
def test_unknown_settings_are_refused(unknown: dict[str, Any], with_config: bool) -> None:
    """A misspelt setting is not ignored; the message repeats it. Nor is an argument that only `forward` takes."""
    kwargs = dict(generation_config=BlockGenGenerationConfig()) if with_config else {}
    for decoding in ("ar", "block_diffusion"):
        with pytest.raises(ValueError, match=next(iter(unknown))):
            generate(tiny_model(), words(1, 3), max_new_tokens=4, decoding=decoding, **kwargs, **unknown)
    if unknown != dict(noise_level=0.5):
        with pytest.raises(ValueError, match=next(iter(unknown))):
            config = BlockGenGenerationConfig(**unknown)
            generate(tiny_model(), words(1, 3), max_new_tokens=4, generation_config=config)


def test_ranks_that_would_wait_for_each_other_are_refused() -> None:
    """`synced_gpus` (FSDP, ZeRO-3) goes with AR only: blocks end after different numbers of forward passes."""
    with pytest.raises(ValueError, match="`synced_gpus=True`"):
        generate(tiny_model(), words(1, 3), max_new_tokens=4, synced_gpus=True, decoding="arpc")


# ---- silence
@pytest.mark.usefixtures("loud_transformers")
@pytest.mark.parametrize(
    "settings",
    [
        dict(decoding="ar"),
        dict(decoding="ar", do_sample=False),
        dict(decoding="ar", num_beams=2, do_sample=False),
        dict(decoding="block_diffusion", block_size=4),
        dict(decoding="block_diffusion", block_size=4, do_sample=False),
        dict(decoding="arpc", nfe_per_block=5),
        dict(decoding="arpc", temperature=0.8, top_p=0.9, top_k=10),
        dict(decoding="arpc", cache_implementation="static"),
        dict(decoding="block_diffusion", use_cache=False),
    ],
    ids=str,
)
def test_normal_use_says_nothing(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """No stray warning from saving, loading or generating, prompts padded, empty and plain, with EOS."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tiny_model(eos_token_id=EOS)
        model.save_pretrained(tmp_path)
        model = AutoModel.from_pretrained(tmp_path)
        generate(model, words(2, 3), max_new_tokens=5, **settings)
        generate(model, None, max_new_tokens=5, **left_padded([words(3), words(1)]), **settings)
        generate(model, torch.zeros(2, 0, dtype=torch.long), max_new_tokens=5, **settings)
    assert [record.getMessage() for record in caplog.records] == []
    assert capsys.readouterr().err.replace("Loading weights", "").strip().count("\n") <= 1


@pytest.mark.usefixtures("loud_transformers")
@pytest.mark.parametrize("decoding", ["ar", "block_diffusion", "arpc"])
def test_greedy_does_not_warn_of_the_models_own_temperature(
    decoding: str, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    model, prompt = tiny_model(), words(2, 3)
    settings: dict[str, Any] = dict(max_new_tokens=8, decoding=decoding, do_sample=False)
    torch.manual_seed(0)
    expected = generate(model, prompt, **settings)
    model.generation_config.update(temperature=0.8, top_k=5, top_p=0.9, do_sample=True)
    own = model.generation_config
    config = BlockGenGenerationConfig(**settings)
    copied = BlockGenGenerationConfig.from_dict(own.to_dict())
    caplog.clear()
    recwarn.clear()
    for given in (settings, {"generation_config": config}, {"generation_config": copied, **settings}):
        torch.manual_seed(0)
        assert torch.equal(generate(model, prompt, **given), expected)
    ours = [record.message for record in caplog.records if "generation flags" in record.message]
    assert not ours and not [warning for warning in recwarn if "temperature" in str(warning.message)]
    assert (own.temperature, own.top_k, own.top_p, own.do_sample) == (0.8, 5, 0.9, True)
    assert model._prepare_generation_config(None)[0].temperature == 0.8
    with caplog.at_level("WARNING"):
        generate(model, prompt, temperature=0.5, **settings)  # asked for both: still told
    assert any("temperature" in record.message for record in caplog.records) or any(
        "temperature" in str(warning.message) for warning in recwarn
    )
