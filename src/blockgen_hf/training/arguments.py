"""The arguments of [`BlockGenTrainer`]."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .draws import BLOCK_SIZE_SAMPLINGS, NOISE_LEVEL_SAMPLINGS, check_interval


BLOCK_SIZE_UNITS = ("micro_batch", "sequence")
# The setting that trades time for memory, as the installed transformers calls it: 5.20 knows the second name only.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)


@dataclass
class BlockGenTrainingArguments(TrainingArguments):
    """
    [`TrainingArguments`] with the settings of the mixture. The defaults are the paper's (Suppl. A.4): Adam (0.9,
    0.999) without weight decay, learning rate 3e-4 after 2500 steps of warm-up, gradients clipped to norm 1, EMA of
    0.9999. Batch size, steps and precision depend on the machine; the paper's are 512, one million, and bf16.

    Raises:
        ValueError: a value that is not accepted.
    """

    learning_rate: float = field(default=3e-4, metadata={"help": "The initial learning rate of the optimizer."})
    lr_scheduler_type: str = field(
        default="constant_with_warmup", metadata={"help": "Learning-rate schedule, as named in transformers."}
    )
    warmup_steps: float = field(
        default=2500, metadata={"help": "Steps of linear warm-up; a number below 1 is a share of all steps."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Off: the collator selects the columns and keeps the source of each row."}
    )
    include_num_input_tokens_seen: str = field(  # `str | bool` is a flag for HfArgumentParser, which takes no words
        default="non_padding", metadata={"help": "Log the tokens seen: `all`, `non_padding` or `no`."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Off: every step uses all parameters."}
    )
    block_size_sampling: str = field(
        default="stratified",
        metadata={
            "help": "Block sizes of the slots of an optimizer step: `stratified` (Algorithm 2), `independent` draws, "
            "or one draw `shared` by all."
        },
    )
    block_size_unit: str = field(
        default="micro_batch",
        metadata={
            "help": "A slot is a `micro_batch` (a rank and accumulation step, the paper), or every `sequence` of the "
            "global batch. `sequence` gives finer strata, the same for every accumulation, but reuses no mask."
        },
    )
    block_size_curriculum: float = field(
        default=0.0,
        metadata={
            "help": "Share of the steps over which block sizes above 1 join the mixture one after the other, the "
            "smallest first. 0: all from the beginning."
        },
    )
    noise_level_sampling: str = field(
        default="sequence", metadata={"help": "One noise level per `sequence` (the paper) or per `block` (BD3-LM)."}
    )
    noise_level_interval: list[float] | None = field(
        default=None,
        metadata={
            "help": "Noise levels of block sizes above 1 are uniform between these two numbers, such as 0.3 and 0.8 "
            "(BD3-LM's clipped schedule). Default: 0.001 and 1, the whole bound."
        },
    )
    noise_interval_steps: int = field(
        default=0,
        metadata={
            "help": "Every so many steps choose the interval of each block size anew: the one with the least variance "
            "of the loss on validation data (BD3-LM: 5000). 0: never."
        },
    )
    noise_interval_rows: int = field(
        default=128, metadata={"help": "Validation rows that the variance of the loss is measured on."}
    )
    ema_decay: float = field(
        default=0.9999,
        metadata={"help": "Decay of the average of the weights, which is saved and evaluated; 0 for no average."},
    )
    eval_monte_carlo_samples: int = field(
        default=8, metadata={"help": "Monte-Carlo draws of noise per sequence in evaluation (Eq. 19)."}
    )
    eval_accepted_rows: int = field(
        default=0,
        metadata={
            "help": "Validation rows whose beginnings are continued greedily to measure how many tokens of its drafts "
            "the model accepts, for each block size. 0: not measured."
        },
    )
    hub_license: str | None = field(
        default=None, metadata={"help": "Licence of a model that is pushed to the Hub, such as apache-2.0."}
    )

    def __post_init__(self) -> None:
        for name, accepted in (
            ("block_size_sampling", BLOCK_SIZE_SAMPLINGS),
            ("block_size_unit", BLOCK_SIZE_UNITS),
            ("noise_level_sampling", NOISE_LEVEL_SAMPLINGS),
        ):
            value = getattr(self, name)
            if value not in accepted:
                raise ValueError(f"`{name}` must be one of {', '.join(accepted)}, but is {value!r}.")
        if self.noise_level_interval is not None:
            check_interval("noise_level_interval", self.noise_level_interval)
        for name, smallest in (("noise_interval_steps", 0), ("noise_interval_rows", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < smallest:
                raise ValueError(f"`{name}` must be an integer of at least {smallest}, but is {value!r}.")
        if not 0 <= self.block_size_curriculum <= 1:
            raise ValueError(
                f"`block_size_curriculum` must be from 0 to 1, a share of the steps, but is "
                f"{self.block_size_curriculum!r}."
            )
        if self.eval_accepted_rows < 0:
            raise ValueError(f"`eval_accepted_rows` must not be negative, but is {self.eval_accepted_rows!r}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1), but is {self.ema_decay!r}.")
        if self.eval_monte_carlo_samples < 1:
            raise ValueError(f"`eval_monte_carlo_samples` must be positive, but is {self.eval_monte_carlo_samples!r}.")
        if self.label_smoothing_factor != 0:
            raise ValueError(
                f"`label_smoothing_factor` must be 0, but is {self.label_smoothing_factor!r}: the bounds are those of "
                "the labels as they are."
            )
        if self.prediction_loss_only:
            raise ValueError(
                "`prediction_loss_only` must be False: the loss is made of the bounds of sequences, a few numbers "
                "each, and no logits are kept."
            )
        if self.label_names not in (None, ["labels"]):
            raise ValueError(
                f"`label_names` must be ['labels'], but is {self.label_names!r}: these are what the model scores."
            )
        super().__post_init__()


__all__ = ["BlockGenTrainingArguments"]
