"""What a training run prints while it runs: a bar, and a line where something is logged."""

import sys
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


_BY_SIZE = "loss_block_size_"
_PERPLEXITY = "eval_perplexity_block_size_"


class TrainingBar(ProgressCallback):
    """The bars of Trainer, without its lines."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


class TrainingLog(TrainerCallback):
    """A line on standard output, from the main process, for each entry of the log."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        line = None
        if state.is_world_process_zero and logs:
            line = (
                training_line(logs) if "loss" in logs else evaluation_line(logs) if "eval_loss" in logs else None
            ) or interval_line(logs)
        if line is not None:
            tqdm.write(f"step {state.global_step:{len(str(state.max_steps))}}/{state.max_steps}  {line}")
            sys.stdout.flush()  # files and pipes get it now, too


def training_line(logs: dict[str, float]) -> str:
    """Loss, in all and by block size, gradient norm, learning rate, tokens seen."""
    words = [f"loss {logs['loss']:.4f}"]
    sizes = _by_size(logs, _BY_SIZE, ".3f")
    if sizes:
        words.append(f"({sizes})")
    for name, label, form in (("grad_norm", "gradient", ".3g"), ("learning_rate", "lr", ".2e")):
        if name in logs:
            words.append(f"{label} {logs[name]:{form}}")
    if "num_input_tokens_seen" in logs:
        words.append(f"{logs['num_input_tokens_seen']:,} tokens")
    return "  ".join(words)


def evaluation_line(logs: dict[str, float]) -> str:
    """Perplexities by block size, and of the mixture: Jensen's bound, as the log-sum-exp of few draws is too low."""
    words = ["validation perplexity", _by_size(logs, _PERPLEXITY, ".2f")]
    if "eval_perplexity_jensen" in logs:
        words.append(f"mixture {logs['eval_perplexity_jensen']:.2f}")
    return "  ".join(words)


def interval_line(logs: dict[str, float]) -> str | None:
    """The noise levels that were chosen by block size, if any were."""
    low, high = (_of_sizes(logs, f"noise_level_{end}_block_size_") for end in ("low", "high"))
    words = [f"{size}: {low[size]:g} to {high[size]:g}" for size in sorted(low)]
    return f"noise levels  {', '.join(words)}" if words else None


def _by_size(logs: dict[str, float], prefix: str, form: str) -> str:
    found = _of_sizes(logs, prefix)
    return ", ".join(f"{size}: {found[size]:{form}}" for size in sorted(found))


def _of_sizes(logs: dict[str, float], prefix: str) -> dict[int, float]:
    return {int(name.removeprefix(prefix)): value for name, value in logs.items() if name.startswith(prefix)}
