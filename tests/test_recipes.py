"""Recipes: reading, checking, overriding; vocabulary and accumulation; what a run is estimated to take."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import TINY, save_tokenizer, sentences, stand_ins, write_rows
from tiny import tiny_config, tiny_model, tiny_tokenizer
from transformers import AutoTokenizer

from blockgen_hf import BlockGenConfig, BlockGenForDiffusionLM
from blockgen_hf.training.estimates import count_parameters, estimate_memory, estimate_seconds, step_operations
from blockgen_hf.training.recipe import Recipe, bundled_recipes, find_recipe, load_recipe
from blockgen_hf.training.recipe_building import build_trainer, load_tokenizer, make_config, make_model
from blockgen_hf.training.recipe_values import convert


GPT2 = {"eos_token": "<end>"}  # neither mask nor padding
RECIPE = """
model: {hidden_size: 16, num_attention_heads: 2, num_hidden_layers: 1, cond_dim: 8}
tokenizer: {name_or_path: TOKENIZER}
data: {dataset: DATA, sequence_length: 16, cache_dir: CACHE}
training: {output_dir: OUT, max_steps: 5, per_device_train_batch_size: 2, use_cpu: true}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small recipe of one's own, on data and a tokenizer that are there."""
    places = {
        "TOKENIZER": save_tokenizer(tmp_path / "tokenizer", **GPT2),
        "DATA": write_rows(tmp_path / "data.jsonl", [{"text": text} for text in sentences()]),
        "CACHE": str(tmp_path / "cache"),
        "OUT": str(tmp_path / "run"),
    }
    text = RECIPE
    for name, place in places.items():
        text = text.replace(name, place)
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def load(file: Path, *overrides: str) -> Recipe:
    return load_recipe(str(file), overrides)


def built(file: Path, *overrides: str) -> tuple[Any, BlockGenConfig]:
    """Tokenizer and configuration."""
    recipe = load(file, *overrides)
    tokenizer = load_tokenizer(recipe, recipe.training_arguments())
    return tokenizer, make_config(recipe, tokenizer)


# reading


def test_bundled_recipes() -> None:
    assert list(bundled_recipes()) == ["laptop", "lm1b", "lm1b-wrapped", "owt", "tinygsm"]
    assert find_recipe("owt").name == "owt.yaml"
    with pytest.raises(FileNotFoundError, match="There is no recipe 'nonsense'"):
        find_recipe("nonsense")


@pytest.mark.parametrize("name", ["owt", "lm1b", "lm1b-wrapped", "tinygsm"])
def test_the_papers_settings(name: str) -> None:
    """Suppl. A: 170M parameters but for the vocabulary, batch 512, Adam without decay, warm-up and then constant."""
    recipe = load_recipe(name)
    args = recipe.training_arguments()
    assert args.gradient_accumulation_steps * args.train_batch_size == 512
    assert (args.learning_rate, args.warmup_steps, str(args.lr_scheduler_type.value)) == (
        3e-4,
        2500,
        "constant_with_warmup",
    )
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay, args.max_grad_norm) == (0.9, 0.999, 0, 1)
    assert args.bf16 and args.ema_decay == 0.9999 and args.block_size_sampling == "stratified"
    assert args.max_steps == (250_000 if name == "tinygsm" else 1_000_000)
    config = BlockGenConfig(**recipe.config_fields())
    length = {"owt": 1024, "tinygsm": 512}.get(name, 128)
    assert recipe.data.sequence_length == config.max_position_embeddings == length
    default = BlockGenConfig(vocab_size=config.vocab_size, max_position_embeddings=length)
    assert config.to_dict() == default.to_dict()
    assert recipe.data.packing == ("packed" if name in ("owt", "lm1b-wrapped") else "none")
    assert not recipe.data.train_on_prompt


def test_values_are_read_as_their_types(file: Path) -> None:
    recipe = load(
        file,
        "training.learning_rate=3e-4",  # a text in YAML 1.1
        "training.max_steps=1e3",
        "training.save_strategy=no",  # False in YAML
        "training.warmup_steps=0.1",
        "data.dataset_config=null",
        "model.rope_parameters.rope_type=default",
        "model.rope_parameters.rope_theta=5000.0",
        "model.block_size_weights=[0.5, 0.5]",
        "model.block_sizes=[1, 4]",
    )
    args = recipe.training_arguments()
    assert args.learning_rate == 3e-4 and args.max_steps == 1000 and isinstance(args.max_steps, int)
    assert args.save_strategy == "no" and args.warmup_steps == 0.1
    config = BlockGenConfig(**recipe.config_fields())
    assert config.rope_parameters["rope_theta"] == 5000 and config.block_sizes == [1, 4]
    assert recipe.values["training"]["max_steps"] == "1e3"  # as it was written


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, float, 3.0),
        ("1e-3", float | None, 1e-3),
        (None, float | None, None),
        (1.0, int, 1),
        ("x", str | list[str], "x"),
        (["x"], str | list[str], ["x"]),
        ([1, "2"], list[float], [1.0, 2.0]),
        (False, bool | str, False),
        ({"a": 1}, dict | str | None, {"a": 1}),
    ],
)
def test_conversions(value: Any, hint: Any, expected: Any) -> None:
    converted = convert(value, hint, "here")
    assert converted == expected and type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ("x", int, "here must be a whole number, but is 'x'."),
        (1.5, int, "here must be a whole number, but is 1.5."),
        (True, int | None, "here must be a whole number or null, but is True."),
        (1, str, "here must be a text, but is 1."),
        (1, bool, "here must be true or false, but is 1."),
        ([1, "a"], list[int], "here must be a list of whole numbers, but is [1, 'a']."),
        ("x", dict | None, "here must be a mapping or null, but is 'x'."),
        (None, str, "here must be a text, but is None."),
    ],
)
def test_refused_conversions(value: Any, hint: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        convert(value, hint, "here")
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.hiden_size=8"], "mine.yaml, section `model`: there is no key `hiden_size`. Did you mean `hidden_siz"),
        (["data.datset=x"], "section `data`: there is no key `datset`. Did you mean `dataset`? Accepted: add_bos_"),
        (["training.do_train=true"], "section `training`: there is no key `do_train`"),
        (["modle.hidden_size=8"], "there is no section `modle`. Did you mean `model`? Accepted: adapter, data"),
        (["model=8"], "'model=8' is no override"),
        (["model.hidden_size"], "'model.hidden_size' is no override"),
        (["model.hidden_size=[8"], "has a value that is not YAML"),
        (["model.hidden_size=big"], "mine.yaml: `model.hidden_size` must be a whole number or null, but is 'big'"),
        (["model.hidden_size=15"], "mine.yaml, `model`: `num_attention_heads` must divide `hidden_size` (15)"),
        (["model.revision=main"], "`model.revision` is that of `model.name_or_path`, which is missing"),
        (["data.packing=tight"], "mine.yaml, `data`: `packing` is one of 'packed', 'none', not 'tight'"),
        (["data.dataset=null"], "`data.dataset` must be a list of texts or a text, but is None"),
        (["data.dataset=missing.txt"], "mine.yaml: `data.dataset`: there is no file 'missing.txt'"),
        (["data.streaming=true", "training.max_steps=-1"], "set `training.max_steps`"),
        (["model.max_position_embeddings=8"], "`data.sequence_length` 16 is more than the 8 positions"),
        (["tokenizer.name_or_path=null"], "`tokenizer` needs `name_or_path`, or `train` with a `vocab_size`"),
        (["tokenizer.train.vocab_size=300"], "`name_or_path` and `train` contradict one another"),
        (["tokenizer.name_or_path=null", "tokenizer.train.size=300"], "there is no key `size`"),
        (["tokenizer.name_or_path=null", "tokenizer.train.vocab_size=0"], "`train.vocab_size` must be positive"),
        (["tokenizer.name_or_path=a/b/c"], "There is no folder a/b/c"),
        (["training.output_dir=null"], "`training.output_dir` is missing"),
        (["training.eval_strategy=steps"], "`training.eval_strategy` needs validation data"),
        (["training.noise_interval_steps=5"], "`training.noise_interval_steps` needs validation data"),
        (["training.eval_strategy=often"], "`training.eval_strategy` must be one of no, steps, epoch, but is 'often'"),
        (["training.global_batch_size=0"], "`training.global_batch_size` must be positive"),
        (["training.global_batch_size=8", "training.gradient_accumulation_steps=2"], "set one of them"),
    ],
)
def test_refused_recipes(file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(file, *overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.ema_decay=2"], "mine.yaml, `training`: `ema_decay` must be in [0, 1), but is 2.0."),
        (["training.lr_scheduler_type=wild"], "mine.yaml, `training`: wild is not a valid SchedulerType"),
        (["training.global_batch_size=3"], "3 is no multiple of the 2 rows that 1 processes take at once, 2 each"),
    ],
)
def test_refused_training_arguments(file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        load(file, *overrides).training_arguments()
    assert message in str(error.value)


def test_the_global_batch_is_that_of_any_number_of_processes(file: Path) -> None:
    recipe = load(file, "training.global_batch_size=64")
    assert [recipe.accumulation_steps(4, processes) for processes in (1, 2, 16)] == [16, 8, 1]
    assert recipe.training_arguments().gradient_accumulation_steps == 32
    with pytest.raises(ValueError, match="no multiple of the 12 rows that 3 processes"):
        recipe.accumulation_steps(4, 3)
    assert load(file, "training.gradient_accumulation_steps=3").accumulation_steps(4, 3) == 3


# vocabulary


def test_a_mask_token_is_added_behind_the_vocabulary(file: Path) -> None:
    """As GPT-2's 50,257 tokens make 50,258 rows with the mask last."""
    tokenizer, config = built(file)
    assert (config.vocab_size, config.mask_token_id, config.eos_token_id) == (22, 21, 20)
    assert len(tokenizer) == 22 and tokenizer.mask_token_id == 21 and tokenizer("<|mask|>")["input_ids"] == [21]
    assert config.max_position_embeddings == 16


def test_a_tokenizers_own_mask_token(file: Path, tmp_path: Path) -> None:
    """As BERT's, in the middle; the end of text is named by the recipe."""
    bert = save_tokenizer(tmp_path / "bert", mask_token="[MASK]", cls_token="[CLS]", sep_token="[SEP]")
    named = f"tokenizer.name_or_path={bert}"
    _, config = built(file, named, "tokenizer.eos_token='[SEP]'", "tokenizer.bos_token='[CLS]'")
    assert (config.vocab_size, config.mask_token_id, config.bos_token_id, config.eos_token_id) == (23, 20, 21, 22)
    with pytest.raises(ValueError, match="`tokenizer.eos_token` '</s>' is no token of"):
        built(file, named, "tokenizer.eos_token=</s>")


def test_uniform_models_have_a_pad_token(file: Path) -> None:
    """As the published ones: GPT-2's 50,257 tokens and [PAD]."""
    tokenizer, config = built(file, "model.diffusion_type=uniform")
    assert (config.vocab_size, config.mask_token_id, config.pad_token_id) == (22, None, 21)
    assert tokenizer.pad_token == "[PAD]" and tokenizer.mask_token is None


def test_a_vocabulary_that_is_given_is_checked(file: Path) -> None:
    assert built(file, "model.vocab_size=22")[1].mask_token_id == 21
    larger = built(file, "model.vocab_size=64")[1]
    assert larger.vocab_size == 64 and larger.mask_token_id == 21  # rows that are never used
    for overrides in (
        ["model.vocab_size=21"],
        ["model.mask_token_id=20"],
        ["model.vocab_size=64", "model.diffusion_type=uniform"],  # whose noise would draw them
    ):
        with pytest.raises(ValueError, match="but the tokenizer makes it"):
            built(file, *overrides)


def test_a_tokenizer_is_trained_once(file: Path, tmp_path: Path) -> None:
    overrides = ["tokenizer.name_or_path=null", "tokenizer.train.vocab_size=265", "data.validation_documents=10"]
    recipe = load(file, *overrides)
    args = recipe.training_arguments()
    tokenizer = load_tokenizer(recipe, args)
    assert 259 < len(tokenizer) <= 265 and tokenizer.mask_token_id == len(tokenizer) - 1
    kept = tmp_path / "run" / "tokenizer" / "tokenizer.json"
    before = kept.stat().st_mtime_ns
    assert load_tokenizer(recipe, args, keep_tokenizer=True).get_vocab() == tokenizer.get_vocab()
    assert kept.stat().st_mtime_ns == before
    load_tokenizer(recipe, args)
    assert kept.stat().st_mtime_ns > before


@pytest.mark.parametrize("index", [0, 1])
def test_one_process_of_a_machine_makes_the_cache_anew(
    file: Path, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    """The others would delete what it maps."""
    found = []

    def load_datasets(data: Any, *args: Any, **options: Any) -> Any:
        found.append(data.overwrite_cache)
        raise InterruptedError

    monkeypatch.setattr("blockgen_hf.training.recipe_building.load_datasets", load_datasets)
    monkeypatch.setattr("transformers.TrainingArguments.local_process_index", index)
    monkeypatch.setattr("transformers.TrainingArguments.main_process_first", lambda *args, **options: nullcontext())
    with pytest.raises(InterruptedError):
        build_trainer(load(file, "data.overwrite_cache=true"))
    assert found == [index == 0]


def test_the_tokenizer_knows_the_training_documents_only(file: Path, tmp_path: Path) -> None:
    rows = [{"text": "one one one"}] * 5 + [{"text": "zwei zwei zwei"}] * 5
    data = write_rows(tmp_path / "two.jsonl", rows)
    common = [f"data.dataset={data}", "tokenizer.name_or_path=null", "tokenizer.train.vocab_size=300"]
    for held_out in ("data.validation_documents=5", "data.max_documents=5", "tokenizer.train.max_documents=5"):
        recipe = load(file, *common, held_out)
        words = load_tokenizer(recipe, recipe.training_arguments()).get_vocab()
        assert "one" in words and "zwei" not in words


def test_conversations_have_no_text_to_train_a_tokenizer_on(file: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data = write_rows(tmp_path / "chat.jsonl", [{"messages": messages}])
    overrides = [f"data.dataset={data}", "tokenizer.name_or_path=null", "tokenizer.train.vocab_size=300"]
    recipe = load(file, *overrides)
    with pytest.raises(ValueError, match="needs texts, and these data are conversations"):
        load_tokenizer(recipe, recipe.training_arguments())


# checkpoints to go on from


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    folder = tmp_path / "checkpoint"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


NO_MODEL = [f"model.{name}=null" for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "cond_dim")]


def test_going_on_from_a_checkpoint(file: Path, checkpoint: str) -> None:
    overrides = [*NO_MODEL, f"model.name_or_path={checkpoint}", "tokenizer.name_or_path=null"]
    recipe = load(file, *overrides, "model.block_sizes=[1,4]", "model.hidden_dropout=0.5")
    trainer = build_trainer(recipe)
    trained, model = trainer.model, tiny_model()
    assert trained.config.block_sizes == [1, 4] and trained.config.hidden_dropout == 0.5
    assert trained.config.max_position_embeddings == 64 and trained.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained.get_parameter(name))
    trainer.train()
    assert trainer.state.global_step == 5


@pytest.mark.parametrize(
    ("sizes", "decoding"), [("[1,4]", "arpc"), ("[4]", "block_diffusion"), ("[1]", "ar"), ("[2,4]", "block_diffusion")]
)
def test_a_trained_model_names_its_decoding(
    file: Path, checkpoint: str, tmp_path: Path, sizes: str, decoding: str
) -> None:
    """As `convert` does: in a new model, and in one whose checkpoint names none or one that it no longer has."""

    def named_by(*overrides: str) -> Any:
        recipe = load(file, *overrides, f"model.block_sizes={sizes}")
        tokenizer = load_tokenizer(recipe, recipe.training_arguments())
        make_model(recipe, make_config(recipe, tokenizer)).save_pretrained(tmp_path / "trained")
        return json.loads((tmp_path / "trained" / "generation_config.json").read_text())

    settings = named_by()
    assert (settings["decoding"], settings["do_sample"], settings["top_k"]) == (decoding, True, 0)
    goes_on = [*NO_MODEL, f"model.name_or_path={checkpoint}", "tokenizer.name_or_path=null"]
    assert named_by(*goes_on)["decoding"] == decoding
    model = tiny_model()
    model.generation_config.update(decoding="block_diffusion" if decoding == "ar" else "arpc")
    model.save_pretrained(checkpoint)
    assert named_by(*goes_on)["decoding"] == decoding
    model.generation_config.update(decoding="block_diffusion")
    model.save_pretrained(checkpoint)
    assert named_by(*goes_on)["decoding"] == ("ar" if decoding == "ar" else "block_diffusion")
    model.generation_config.update(decoding="speculative", acceptance="rejection")
    model.save_pretrained(checkpoint)
    kept = named_by(*goes_on)
    assert kept["decoding"] == ("speculative" if sizes == "[1,4]" else decoding)
    assert kept["acceptance"] == "rejection"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "it is not the model's"),  # the recipe's tokenizer has another mask
        (["tokenizer.name_or_path=null", "data.sequence_length=65"], "is more than the 64 positions"),
        (["tokenizer.name_or_path=null", "model.hidden_size=15"], "The model"),
        (["tokenizer.name_or_path=null", "model.hidden_size=32"], "The model"),
    ],
)
def test_checkpoints_that_do_not_fit(file: Path, checkpoint: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        recipe = load(file, *NO_MODEL, f"model.name_or_path={checkpoint}", *overrides)
        if not overrides:
            AutoTokenizer.from_pretrained(checkpoint).save_pretrained(recipe.tokenizer.name_or_path)
            other = tiny_tokenizer()
            other.mask_token = "a"
            other.save_pretrained(str(recipe.tokenizer.name_or_path))
        tokenizer = load_tokenizer(recipe, recipe.training_arguments())
        make_model(recipe, make_config(recipe, tokenizer))
    assert message in str(error.value)


def test_other_models_are_no_checkpoints(file: Path, tmp_path: Path) -> None:
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="gpt2 is a model of type 'gpt2', not 'blockgen'"):
        load(file, f"model.name_or_path={tmp_path / 'gpt2'}")
    with pytest.raises(ValueError, match="holds no model: it has no config.json"):
        load(file, f"model.name_or_path={tmp_path / 'tokenizer'}")


# running, from Python


def test_recipes_run_from_python(tmp_path: Path) -> None:
    overrides = [*TINY, *stand_ins("tinygsm", tmp_path), f"training.output_dir={tmp_path / 'run'}"]
    recipe = load_recipe("tinygsm", overrides)
    trainer = build_trainer(recipe)
    row = trainer.train_dataset[0]
    assert -100 in row["labels"] and row["labels"][-1] == trainer.processing_class.eos_token_id
    assert trainer.args.gradient_accumulation_steps == 2 and trainer.args.use_cpu
    trainer.train()
    assert trainer.state.global_step == 5


# estimates


@pytest.mark.parametrize("settings", [{}, {"adaptive_layer_norm": False}, {"diffusion_type": "uniform"}])
def test_counted_parameters(settings: dict[str, Any]) -> None:
    config = tiny_config(**settings)
    model = BlockGenForDiffusionLM(config)
    count = count_parameters(config)
    assert count.total == model.num_parameters() and count.head == model.lm_head.weight.numel()
    assert count.layers == sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if ".layers." in name and "modulation" not in name
    )


def test_estimates_grow_as_they_should() -> None:
    config = BlockGenConfig()
    parameters = count_parameters(config)
    assert parameters.total == 169_627_218
    small, large = (estimate_memory(config, parameters, rows, 1024) for rows in (4, 8))
    assert large.activations == 2 * small.activations and large.weights == small.weights
    shared = estimate_memory(config, parameters, 8, 1024, shards=4)
    assert shared.optimizer * 4 == large.optimizer == 8 * parameters.total
    assert estimate_memory(config, parameters, 8, 1024, ema=False).average == 0
    assert estimate_memory(config, parameters, 8, 1024, checkpointing=True).activations < large.activations / 3
    assert estimate_memory(config, parameters, 8, 1024, bytes_per_value=2).activations < 0.6 * large.activations
    one, two = (step_operations(config, parameters, rows, 1024) for rows in (1, 2))
    assert two == 2 * one
    # 6 N an autoregressive model's token; the layers see every token twice.
    assert 6 * parameters.layers * 2 * 1024 < one < 6 * (2 * parameters.total) * 1024
    assert estimate_seconds(one, 1e12, 2, "cpu") == estimate_seconds(one, 1e12, 1, "cpu") / 2


MEASURE = """
import json, re, torch
from pathlib import Path
from blockgen_hf import BlockGenConfig, BlockGenForDiffusionLM
from blockgen_hf.training.estimates import count_parameters, estimate_memory

config = BlockGenConfig(
    vocab_size=8000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=256
)
model = BlockGenForDiffusionLM(config).train()
ids = torch.randint(0, 7999, (8, 256))
# Not `ru_maxrss`, in which the process that started this one lives on.
peak = lambda: 1024 * int(re.search("VmHWM:[^0-9]*([0-9]+)", Path("/proc/self/status").read_text())[1])
before = peak()
model(input_ids=ids, labels=ids, block_size=4).loss.backward()
memory = estimate_memory(config, count_parameters(config), 8, 256)
print(json.dumps([peak() - before, memory.gradients + memory.activations + memory.head]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the memory from /proc")
def test_estimated_memory_is_that_of_a_step() -> None:
    """Within a factor of 2, on this machine, weights, optimizer and average left out."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    measured, estimated = (float(number) for number in done.stdout.strip("[]\n").split(","))
    assert estimated / 2 < measured < estimated * 2
