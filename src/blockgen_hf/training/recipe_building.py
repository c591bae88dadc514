"""From a recipe to a trainer: tokenizer, configuration, rows, model."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase, set_seed

from ..default_decoding import default_decoding
from ..errors import first_line
from ..hub.files import TOKENIZER
from ..hub.model_checks import check_loaded_model, check_model_folder, fetch_model
from ..hub.portable import make_tokenizer_portable
from ..modeling.configuration_blockgen import BlockGenConfig
from ..modeling.modeling_blockgen import BlockGenForDiffusionLM
from ..places import local_folder
from ..tokenizer_loading import add_special_tokens, pretrained_tokenizer
from .arguments import BlockGenTrainingArguments
from .data import load_datasets
from .data_arguments import DataArguments
from .recipe import Recipe, checkpoint_config
from .recipe_adapter import add_adapter
from .sources import Documents, hold_out, load_documents, with_whole_cache
from .tokenizers import train_tokenizer
from .trainer import BlockGenTrainer


if TYPE_CHECKING:
    from peft import PeftModel

TOKENIZER_FOLDER = "tokenizer"  # of one that is trained, in `output_dir`
_TRAINED_DOCUMENTS = 100_000


def build_trainer(
    recipe: Recipe,
    args: BlockGenTrainingArguments | None = None,
    *,
    keep_tokenizer: bool = False,
    **trainer_options: Any,
) -> BlockGenTrainer:
    """
    The trainer that a recipe describes, with its data and a new model, or one that goes on from a checkpoint.

    Args:
        recipe: from [`load_recipe`].
        args: default: `recipe.training_arguments()`.
        keep_tokenizer: do not train a tokenizer if `output_dir` has one, as when a run is resumed.
        trainer_options: of [`BlockGenTrainer`].

    Raises:
        FileNotFoundError, ValueError, OSError, ImportError: what is missing or does not fit; in words.
    """
    args = recipe.training_arguments() if args is None else args
    with args.main_process_first(desc="training the tokenizer"):
        tokenizer = load_tokenizer(recipe, args, keep_tokenizer)
    config = make_config(recipe, tokenizer)
    with args.main_process_first(desc="preparing the data"):
        # What the first process of a machine made anew, the others read.
        data = recipe.data if args.local_process_index == 0 else replace(recipe.data, overwrite_cache=False)
        train, validation = load_datasets(data, tokenizer, seed=args.seed)
    set_seed(args.seed)  # of the weights, the same in every process
    return BlockGenTrainer(
        make_model(recipe, config),
        args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        **trainer_options,
    )


# Tokenizer


def load_tokenizer(
    recipe: Recipe, args: BlockGenTrainingArguments, keep_tokenizer: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer, with the special tokens that data and diffusion need."""
    name, arguments = recipe.tokenizer_name, recipe.tokenizer
    revision = arguments.revision
    if arguments.train:
        folder = Path(str(args.output_dir)) / TOKENIZER_FOLDER
        is_there = keep_tokenizer and (folder / TOKENIZER).is_file()
        if args.local_process_index == 0 and not is_there:
            limit = arguments.train.get("max_documents", _TRAINED_DOCUMENTS)
            texts = training_texts(recipe.data, limit)
            trained = train_tokenizer(texts, arguments.train["vocab_size"], recipe.data.sequence_length)
            trained.save_pretrained(folder)
            make_tokenizer_portable(folder, None)
        name, revision = str(folder), None
    elif arguments.name_or_path is None:
        revision = recipe.model.get("revision")
    tokenizer = _from_pretrained(pretrained_tokenizer, str(name), "tokenizer", revision=revision or "main")
    special = {key: getattr(arguments, key) for key in ("bos_token", "eos_token", "pad_token", "mask_token")}
    for key, token in special.items():
        if token is None:
            continue
        if token not in tokenizer.get_vocab():
            raise ValueError(f"{recipe.source}: `tokenizer.{key}` {token!r} is no token of {name}.")
        setattr(tokenizer, key, token)
    if recipe.checkpoint is None:
        add_special_tokens(tokenizer, recipe.config_fields().get("diffusion_type", "masked"))
    return tokenizer


def training_texts(data: DataArguments, limit: int) -> Iterator[str]:
    """
    The first documents of the training data as texts; of a long one the first piece counts as one.

    Raises:
        ValueError: they are conversations.
    """
    documents = training_documents(data)
    if documents.form.conversational:
        raise ValueError(
            "`tokenizer.train` needs texts, and these data are conversations, which need a tokenizer with a chat "
            "template: name one with `tokenizer.name_or_path`."
        )
    columns = documents.form.columns
    return (
        data.prompt_separator.join(row[column] or "" for column in columns) for row in islice(documents.rows, limit)
    )


def training_documents(data: DataArguments) -> Documents:
    """The training data as they are read, without what is held out of them."""
    return with_whole_cache(data, _training_documents)


def _training_documents(data: DataArguments) -> Documents:
    if not data.validation_documents:
        return load_documents(data, "dataset", data.dataset, data.dataset_split, data.max_documents)
    documents = load_documents(data, "dataset", data.dataset, data.dataset_split, None)
    rows, _ = hold_out(documents.rows, data.validation_documents, data.max_documents, documents.where)
    return documents._replace(rows=rows)


# Model


def make_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> BlockGenConfig:
    """
    The configuration, whose vocabulary is the tokenizer's.

    Raises:
        ValueError: fields that the tokenizer contradicts.
    """
    if recipe.checkpoint is not None:
        config = checkpoint_config(recipe)
        _check_tokenizer(recipe, config, tokenizer)
        return config
    fields = recipe.config_fields()
    special = vocabulary(tokenizer, fields.get("diffusion_type", "masked"))
    for name, value in special.items():
        given = fields.get(name, value)
        is_larger = name == "vocab_size" and given > value and fields.get("diffusion_type", "masked") == "masked"
        if given != value and not is_larger:  # rows of a masked model that are never used cost nothing but memory
            raise ValueError(
                f"{recipe.source}: `model.{name}` is {given!r}, but the tokenizer makes it {value!r}: leave it out "
                f"(model.{name}=null)."
            )
    try:
        return BlockGenConfig(**{**special, **fields})
    except ValueError as error:
        raise ValueError(f"{recipe.source}, `model`: {error}") from error


def vocabulary(tokenizer: PreTrainedTokenizerBase, diffusion_type: str) -> dict[str, Any]:
    """Number of rows and ids of the special tokens. The mask of a masked model is a token of the tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "mask_token_id": tokenizer.mask_token_id if diffusion_type == "masked" else None,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _check_tokenizer(recipe: Recipe, config: BlockGenConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    mask = tokenizer.mask_token_id
    if len(tokenizer) > config.vocab_size:
        problem = f"has {len(tokenizer)} tokens, and the model {config.vocab_size}"
    elif config.has_mask_row and mask is not None and mask != config.mask_token_id:
        problem = f"has the mask token {mask}, and the model {config.mask_token_id}"
    else:
        return
    raise ValueError(f"{recipe.source}: the tokenizer {tokenizer.name_or_path} {problem}: it is not the model's.")


def make_model(recipe: Recipe, config: BlockGenConfig) -> "BlockGenForDiffusionLM | PeftModel":
    """A new model, or the checkpoint to go on from, in float32, with the adapter that the recipe describes."""
    attention = recipe.model.get("attn_implementation")
    if recipe.checkpoint is None:
        model = BlockGenForDiffusionLM._from_config(config, attn_implementation=attention)
        model.generation_config.update(decoding=default_decoding(config), do_sample=True, top_k=0, temperature=1.0)
        return model
    revision = recipe.model.get("revision")
    model = _from_pretrained(
        _load_checked,
        recipe.checkpoint,
        "model",
        trust_remote_code=False,
        config=config,
        revision=revision or "main",
        attn_implementation=attention,
        dtype="float32",
    )
    _adapt_settings_of_generation(model, recipe.config_fields())
    return add_adapter(model, recipe.adapter, recipe.checkpoint, revision) if recipe.adapter else model


def _adapt_settings_of_generation(model: BlockGenForDiffusionLM, changed: dict[str, Any]) -> None:
    """Settings of the checkpoint's own that are for other block sizes or another noise become those by default."""
    settings, sizes = model.generation_config, model.config.block_sizes
    lost_ar = settings.decoding in ("ar", "arpc", "speculative") and 1 not in sizes
    if settings.decoding is None or ("block_sizes" in changed and (lost_ar or max(sizes) == 1)):
        settings.decoding = default_decoding(model.config)
    if "block_sizes" in changed and settings.block_size not in model.config.block_sizes:
        settings.block_size = None
    if "diffusion_type" in changed:
        for name, check in (("corrector", model._validate_corrector), ("sampler", model._validate_sampler)):
            try:
                check(settings)
            except ValueError:
                setattr(settings, name, None)


def _load_checked(name: str, **options: Any) -> BlockGenForDiffusionLM:
    folder = fetch_model(name, options["revision"])
    tensors = check_model_folder(folder)
    model = BlockGenForDiffusionLM.from_pretrained(name, **options)
    check_loaded_model(model, folder, tensors)
    return model


def _from_pretrained(load: Callable[..., Any], name: str, what: str, **options: Any) -> Any:
    try:
        folder = local_folder(name)
        if folder is not None:
            name, options = str(folder), {**options, "local_files_only": True}
        return load(name, **options)
    except Exception as error:  # transformers, tokenizers, safetensors and the Hub's client raise all kinds
        raise ValueError(f"The {what} {name} cannot be loaded: {first_line(error)}") from error


__all__ = [
    "build_trainer",
    "load_tokenizer",
    "make_config",
    "make_model",
    "training_documents",
    "training_texts",
    "vocabulary",
]
