"""
Supervised fine-tuning on TRL's data forms: [`BlockGenSFTTrainer`].

    text, messages, prompt and completion -> TRL: template, tokens, labels, packing -> collator -> [`BlockGenTrainer`]

Needs TRL (`pip install 'blockgen-hf[trl]'`) and Python 3.11.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from trl import SFTConfig, SFTTrainer

from .arguments import BlockGenTrainingArguments
from .collator import BlockGenDataCollator
from .trainer import BlockGenTrainer


@dataclass
class BlockGenSFTConfig(SFTConfig, BlockGenTrainingArguments):
    """
    TRL's `SFTConfig`, with its defaults (learning rate 2e-5, no warm-up, bf16, gradient checkpointing), and the
    settings of the mixture of [`BlockGenTrainingArguments`] (`block_size_sampling`, `noise_level_sampling`,
    `ema_decay`, `eval_monte_carlo_samples` ...).

    Raises:
        ValueError: a value is not accepted, or a setting of TRL selects a loss other than that of the mixture.
    """

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Off: the collator picks the columns of the prepared data."}
    )
    include_num_input_tokens_seen: str = field(
        default="non_padding", metadata={"help": "Log the tokens seen: `all`, `non_padding` or `no`."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Off: a step uses all parameters, whatever it draws."}
    )

    def __post_init__(self) -> None:
        for name, accepted, instead in (
            ("loss_type", "nll", "the model's configuration chooses the loss (`training_objective`)"),
            ("padding_free", False, "`packing=True` fills rows, and keeps documents apart"),
        ):
            value = getattr(self, name)
            if value != accepted:
                raise ValueError(f"`{name}` must be {accepted!r}, but is {value!r}: {instead}.")
        super().__post_init__()


class _SFTData(SFTTrainer):
    """What of TRL's trainer is about data. Its loss is that of next tokens, and its card is not ours."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super(SFTTrainer, self).compute_loss(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super(SFTTrainer, self)._save_checkpoint(model, trial)


class BlockGenSFTTrainer(BlockGenTrainer, _SFTData):
    """
    TRL's `SFTTrainer` for [`BlockGenForDiffusionLM`]. Data works as in TRL. Training works as in [`BlockGenTrainer`],
    with its draws, average of the weights, losses by block size, likelihood bounds, checkpoints and cards.

    It takes every form of data that `SFTTrainer` takes: text, messages, prompts with completions, token ids.
    `packing`, `completion_only_loss`, `assistant_only_loss`, `max_length`, `formatting_func`, `peft_config` and chat
    templates work as in TRL. Prompts and other tokens that are not scored stay clean in the noisy half. Packed
    documents do not see one another, and their positions start at 0 (`packing_strategy="wrapped"` cuts the text up
    without regard to documents, as in TRL).

    TRL's metrics of next tokens, `mean_token_accuracy` and `entropy`, are not logged, since the loss is that of the
    whole mixture.

    The arguments are those of `SFTTrainer`, with [`BlockGenSFTConfig`] as `args`.

    Raises:
        ValueError: `args` has another class, or there is a `compute_loss_func`.
    """

    args: BlockGenSFTConfig
    arguments_class = BlockGenSFTConfig

    def __init__(
        self,
        model: Any,
        args: BlockGenSFTConfig | None = None,
        data_collator: Any = None,
        *arguments: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, data_collator, *arguments, **kwargs)
        if data_collator is None:
            config = self.model.config
            self.data_collator = BlockGenDataCollator(
                self.processing_class,
                pad_to_multiple_of=self.args.pad_to_multiple_of,
                score_first_token=not config.predicts_from_clean,
            )


__all__ = ["BlockGenSFTConfig", "BlockGenSFTTrainer"]
