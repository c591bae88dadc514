"""Model and tokenizer from the shipped checkpoint, a folder or the Hub, with errors of one line."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import enable_progress_bars
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_datasets_available, logging

from ..checkpoints import shipped_checkpoint
from ..errors import first_line
from ..hub.files import CONFIG, read_json
from ..hub.model_checks import check_loaded_model, check_model_folder, fetch_model
from ..modeling.configuration_blockgen import BlockGenConfig
from ..places import local_folder
from ..quantization import gains_from_packing, quantize_for_cpu
from ..tokenizer_loading import pretrained_tokenizer
from .parsing import CommandError


# Models of fewer parameters run on one thread: their matrices are too small to share, and threads that wait for one
# another on a busy machine are many times slower than one. OMP_NUM_THREADS says otherwise.
_SINGLE_THREADED = 20_000_000


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, advice and warnings of transformers; errors only. Those of this package are shown."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="transformers")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What a user can mend ends as a `CommandError`; what is a mistake of ours as it is."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        from ..training.arguments import CHECKPOINTING

        raise CommandError(
            "The device has not enough memory. In training: a smaller training.per_device_train_batch_size (the "
            f"global batch stays as it is), training.{CHECKPOINTING}=true or training.bf16=true; else a "
            "smaller --batch-size."
        ) from error
    except BrokenPipeError:  # of the reader of what is printed
        raise
    except (ValueError, OSError, ImportError) as error:
        raise CommandError(error) from error
    except HTTPError as error:  # of the Hub's client: no connection, or none in time
        raise CommandError(f"The Hub does not answer: {error}") from error
    except Exception as error:
        if type(error).__module__.startswith("datasets."):  # which is slow to import, and may not be installed
            raise CommandError(f"The data cannot be read: {error.__cause__ or error}") from error
        raise


def show_bars_of_datasets(shown: bool) -> None:
    if not is_datasets_available():
        return  # whoever needs it says so
    from datasets import disable_progress_bars, enable_progress_bars

    (enable_progress_bars if shown else disable_progress_bars)()


def resolve_device(name: str) -> str:
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise CommandError("`--device cuda`: torch finds no CUDA device here; take `--device cpu`.")
    return name if name != "auto" else "cuda" if has_cuda else "cpu"


def load(
    name: str | None,
    *,
    revision: str | None,
    device: str,
    dtype: str,
    attn_implementation: str | None,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    The model, in evaluation mode on its device, and its tokenizer.

    Args:
        name: a folder or a model on the Hub, as [`parsing.model_name`] gives it; None: the shipped checkpoint.

    Raises:
        CommandError: no BlockGen model can be loaded from there.
    """
    device = resolve_device(device)
    source = _shipped_checkpoint() if name is None else name
    options: dict[str, Any] = {"local_files_only": True}
    if local_folder(source) is None:
        options = {"local_files_only": not _is_on_hub(source, revision), "revision": revision or "main"}
    _check_model_type(source, options)
    try:
        folder = fetch_model(source, revision)
        tensors = check_model_folder(folder, own_code=trust_remote_code, with_adapter=True)
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            source,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            **options,
        )
        check_loaded_model(model, folder, tensors)
    except Exception as error:  # transformers, safetensors and torch raise all kinds for damaged files
        raise CommandError(f"The model {source} cannot be loaded: {first_line(error)}") from error
    for kind in ("missing", "unexpected"):  # which only code of the folder's own comes to
        if names := loading_info[f"{kind}_keys"]:
            raise CommandError(
                f"The weights of {source} are not those of its config.json: {len(names)} tensors are {kind}, for "
                f"example {min(names)}."
            )
    try:
        tokenizer = pretrained_tokenizer(source, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # tokenizers too
        raise CommandError(f"The tokenizer of {source} cannot be loaded: {first_line(error)}") from error
    if len(tokenizer) > model.config.vocab_size:
        raise CommandError(
            f"The tokenizer of {source} has {len(tokenizer):,} tokens, but the model has {model.config.vocab_size:,}: "
            "it is that of another model. Take the tokenizer files that were saved with the model."
        )
    set_num_threads(device, model.num_parameters())
    return model.to(device).eval(), tokenizer


def pack_weights(model: PreTrainedModel, cpu_weights: str, is_single: bool = False) -> None:
    """
    Does what `--cpu-weights` says. `auto` packs float32 weights where that makes `generate` faster.

    Args:
        is_single: only one token is computed at a time, which packing does not make faster.

    Raises:
        CommandError: they cannot be packed as the user said.
    """
    if cpu_weights == "auto":
        cpu_weights = "float32" if gains_from_packing(model) and not is_single else "none"
    if cpu_weights == "none":
        return
    try:
        quantize_for_cpu(model, cpu_weights)
    except ValueError as error:
        raise CommandError(f"--cpu-weights: {error}") from error


def set_num_threads(device: str, num_parameters: int) -> None:
    """One thread for a small model on the CPU, unless the user has said how many."""
    if device == "cpu" and num_parameters < _SINGLE_THREADED and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def _shipped_checkpoint() -> str:
    folder = shipped_checkpoint()
    if not folder.is_dir():
        raise CommandError(f"The checkpoint of this package is not there ({folder}): name another model.")
    return str(folder)


def _is_on_hub(name: str, revision: str | None) -> bool:
    """
    Whether the Hub has the model; False if it does not answer, and its cache has to do. Asked first, because every
    file that transformers looks for would be tried again for half a minute.
    """
    try:
        HfApi().model_info(name, revision=revision, timeout=5)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CommandError(
            f"{name!r} is neither a folder here nor a model on the Hub that you have access to."
        ) from error
    except RevisionNotFoundError as error:
        raise CommandError(f"The model {name!r} has no revision {revision!r} on the Hub.") from error
    except Exception:  # the errors of a network depend on the client that huggingface_hub was installed with
        return False
    if sys.stderr.isatty():
        enable_progress_bars()  # of downloads
    return True


def _check_model_type(source: str, options: dict[str, Any]) -> None:
    """Looks into config.json before anything large is read, and before any code of the checkpoint could run."""
    is_folder = "revision" not in options
    if is_folder and not (Path(source) / CONFIG).is_file():
        raise CommandError(f"The folder {source} holds no model: it has no config.json.")
    try:
        config = (
            read_json(Path(source) / CONFIG) if is_folder else PreTrainedConfig.get_config_dict(source, **options)[0]
        )
    except Exception as error:  # as above
        if not is_folder and options["local_files_only"]:
            message = f"{source!r} is no folder here, the Hub does not answer, and its cache does not hold the model."
            raise CommandError(message) from error
        raise CommandError(f"The configuration of {source} cannot be read: {first_line(error)}") from error
    model_type = config.get("model_type")
    if model_type != BlockGenConfig.model_type:
        raise CommandError(
            f"{source} is a model of type {model_type!r}, but this command runs those of type "
            f"{BlockGenConfig.model_type!r} only."
        )
