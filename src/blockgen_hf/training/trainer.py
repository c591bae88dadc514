"""
Training on the mixture of block sizes with transformers' Trainer (BlockGen, Sec. 3.2 and Suppl. A.4).

    dataset -> collator -> get_batch_samples (block sizes, noise levels, noise) -> model -> loss -> EMA -> checkpoint
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import logging

from ..evaluation.acceptance import accepted_draft_tokens, greedy_texts
from ..evaluation.columns import model_columns
from ..evaluation.figures import likelihood_metrics, mixture_weights
from ..evaluation.likelihood import sequence_nll
from ..evaluation.rows import iterate_rows
from ..hub.files import README, move_model
from ..modeling.diffusion_blockgen import diffusion_from_config
from ..modeling.objective_blockgen import drawn_block_sizes
from .arguments import BlockGenTrainingArguments
from .checkpointing import (
    UNFINISHED,
    keep_checkpoint,
    missing_file,
    read_state,
    reading,
    replace_folder,
    rotate_checkpoints,
)
from .collator import BlockGenDataCollator
from .draws import WHOLE_INTERVAL, NoiseInterval, StepDraws, corrupt_batch
from .ema import TRAINING_WEIGHTS, EMACallback
from .losses import LossesBySize
from .noise_intervals import choose_intervals
from .publishing import PublishingTrainer


logger = logging.get_logger(__name__)

# Of the texts whose drafts are measured.
_PROMPT_LENGTH, _NEW_TOKENS = 16, 48
_INTERVALS = "noise_intervals"  # in the state of the training


class BlockGenTrainer(PublishingTrainer):
    """
    [`Trainer`] for [`BlockGenForDiffusionLM`]. In addition to what Trainer does:

    - Block sizes are stratified over the slots of an optimizer step, that is over ranks and accumulation steps
      (Algorithm 2), and noise levels over the global batch. All draws depend on the seed, the step and the place in
      the global batch only.
    - The average of the weights (EMA) is evaluated and saved. A checkpoint has the weights too, so that a resumed run
      continues as if it had never stopped.
    - The loss is logged for each block size. If a loss is not finite, the run ends before it writes a checkpoint.
    - `evaluate` returns the likelihood bounds of [`evaluate_likelihood`].
    - Checkpoints and models are always complete, even if the process is killed while it writes them.
    - A push to the Hub uploads what `blockgen-hf push` would upload, including the card: see [`PublishingTrainer`].

    The arguments are those of [`Trainer`], with [`BlockGenTrainingArguments`] as `args`. The default collator is
    [`BlockGenDataCollator`].

    Raises:
        ValueError: `args` has another class, there is a `compute_loss_func`, or with a setting the bounds cannot be
            evaluated or the average of the weights cannot be saved.
    """

    args: BlockGenTrainingArguments
    arguments_class: type[BlockGenTrainingArguments] = BlockGenTrainingArguments

    def __init__(
        self,
        model: nn.Module | None = None,
        args: BlockGenTrainingArguments | None = None,
        data_collator: Any = None,
        *arguments: Any,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = self.arguments_class(output_dir="trainer_output")
        if not isinstance(args, self.arguments_class):
            name = self.arguments_class.__name__
            raise ValueError(
                f"`args` must be a `{name}`, which takes all that `{name.removeprefix('BlockGen')}` does, but is a "
                f"`{type(args).__name__}`."
            )
        super().__init__(model, args, data_collator, *arguments, **kwargs)
        if self.compute_loss_func is not None:
            raise ValueError("`compute_loss_func` must be None: the loss is that of the mixture (Eq. 7).")
        if data_collator is None:
            config = self.model.config
            self.data_collator = BlockGenDataCollator(
                self.processing_class,
                default_pad_token_id=config.pad_token_id or 0,
                score_first_token=not config.predicts_from_clean,
            )
        self._loss_shifts_labels = False  # labels stand where they are scored
        self._check_evaluation()
        self.compute_metrics: Any = self.compute_metrics or self._likelihood_metrics
        self.diffusion = diffusion_from_config(self.model.config)
        self.losses = LossesBySize(self.model.config.block_sizes)
        self._check_noise_intervals()
        self.ema = EMACallback(self.args.ema_decay)
        if self.args.ema_decay > 0:
            self._check_ema()
            self.add_callback(self.ema)
        self._is_saving_checkpoint = False
        self.num_steps_trained = 0

    def _check_evaluation(self) -> None:
        if self.preprocess_logits_for_metrics is not None:
            raise ValueError(
                "`preprocess_logits_for_metrics` must be None: what `compute_metrics` gets are bounds [rows, block "
                "sizes, draws], and no logits."
            )
        if self.compute_metrics is not None:
            return
        for name, accepted in (("batch_eval_metrics", False), ("eval_do_concat_batches", True)):
            if getattr(self.args, name) != accepted:
                raise ValueError(
                    f"`{name}` must be {accepted}, but is {not accepted}: the bounds of a data set are computed from "
                    "all its rows at once. A `compute_metrics` of your own may take them in other ways."
                )

    def _check_noise_intervals(self) -> None:
        args = self.args
        if args.noise_level_interval is None and args.noise_interval_steps == 0:
            return
        name = "noise_interval_steps" if args.noise_interval_steps > 0 else "noise_level_interval"
        if max(self.model.config.block_sizes) == 1:
            raise ValueError(
                f"`{name}` needs a block size above 1, but the model has {self.model.config.block_sizes}."
            )
        if args.noise_interval_steps > 0 and (self.eval_dataset is None or isinstance(self.eval_dataset, dict)):
            raise ValueError(
                "`noise_interval_steps` needs an `eval_dataset`, on which the variance of the loss is measured: one, "
                f"not {'several' if self.eval_dataset else 'none'}."
            )
        if 0 < args.max_steps <= args.noise_interval_steps and args.noise_level_interval is None:
            logger.warning(
                f"No noise levels will be chosen: the run has {args.max_steps} steps, and `noise_interval_steps` is "
                f"{args.noise_interval_steps}. Set it to a part of the steps to clip them."
            )

    @property
    def noise_intervals(self) -> dict[int, NoiseInterval]:
        """The interval of the noise levels for each block size above 1: those chosen last, or the first."""
        low, high = self.args.noise_level_interval or WHOLE_INTERVAL
        chosen = self.state.stateful_callbacks.get(_INTERVALS, {})
        sizes = [size for size in self.model.config.block_sizes if size > 1]
        return {size: tuple(chosen.get(str(size), (low, high))) for size in sizes}

    def _choose_noise_intervals(self) -> None:
        """By the weights that are trained, on the first validation rows, so that a resumed run finds the same."""
        found = choose_intervals(
            self.model,
            islice(iterate_rows(self.eval_dataset), self.args.noise_interval_rows),
            self.model.config.block_sizes,
            noise_level_sampling=self.args.noise_level_sampling,
            batch_size=self.args.eval_batch_size,
            seed=self.args.seed,
            data_collator=self.data_collator,
        )
        # In the state that Trainer saves, and restores before a resumed run begins.
        self.state.stateful_callbacks[_INTERVALS] = {
            str(size): list(interval) for size, (interval, _) in found.items()
        }
        logs = {}
        for size, ((low, high), variance) in found.items():
            logs[f"noise_level_low_block_size_{size}"] = low
            logs[f"noise_level_high_block_size_{size}"] = high
            logs[f"loss_variance_block_size_{size}"] = variance
        self.log(logs)

    def _check_ema(self) -> None:
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type):
            raise ValueError(
                f"`fsdp_state_dict_type` is {plugin.state_dict_type}, but the average of the weights is saved as a "
                "whole: use FULL_STATE_DICT, or `ema_decay=0`."
            )
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise ValueError(
                "`ema_decay` needs the weights, which DeepSpeed's ZeRO-3 keeps to itself: use ZeRO-2 or FSDP2, or "
                "`ema_decay=0`."
            )

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        As [`Trainer`] does; nothing is left of a training that was interrupted, or of another model. A run that is
        resumed after its last step is not trained further.
        """
        self.num_steps_trained = 0
        self.ema.stop()
        self.losses = LossesBySize(self.model.config.block_sizes)
        return super().train(*args, **kwargs)

    # The draws of a step

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The micro-batches of an optimizer step, with block sizes, noise levels and noisy tokens."""
        if 0 < self.state.max_steps <= self.state.global_step:  # Trainer looks only after a step
            self.control.should_training_stop = True
            return [], None
        epoch_iterator = map(self._checked_batch, epoch_iterator)
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        copies = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()  # ranks that work on the same rows
        num_ranks, rank = self.accelerator.num_processes // copies, self.accelerator.process_index // copies
        num_slots = num_ranks * len(batches)
        rows = self._train_batch_size
        draws = StepDraws(self.args.seed, self.state.global_step, num_slots * rows)
        config, args = self.model.config, self.args
        per_row = args.block_size_unit == "sequence" and not config.next_token_prediction
        sizes: list[int] = []
        if torch.is_tensor(num_items_in_batch):  # a step without a scored token has a loss of zero
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        if batches:
            every = args.noise_interval_steps
            if every > 0 and self.state.global_step > 0 and self.state.global_step % every == 0:
                self._choose_noise_intervals()
            self.num_steps_trained += 1
            sizes = draws.block_sizes(
                *self._drawn_block_sizes(),
                num_slots * rows if per_row else num_slots,
                args.block_size_sampling,
            )
        intervals = self.noise_intervals
        for step, batch in enumerate(batches):
            slot = step * num_ranks + rank
            first, count = slot * rows, len(batch["input_ids"])
            places = first + torch.arange(count, device=batch["input_ids"].device)
            batch["block_size"] = block_size = tuple(sizes[first : first + count]) if per_row else sizes[slot]
            if not config.next_token_prediction:
                sampling = args.noise_level_sampling
                noise = corrupt_batch(
                    batch, self.diffusion, draws, places, block_size, sampling, intervals, config.is_anchored
                )
                batch.update(noise)
        return batches, num_items_in_batch

    def _drawn_block_sizes(self) -> tuple[list[int], list[float]]:
        """The block sizes of a step and their weights: of a curriculum those that have joined by now."""
        sizes, weights = drawn_block_sizes(self.model.config)
        share = self.args.block_size_curriculum
        if share == 0 or self.state.max_steps <= 0:
            return sizes, weights
        larger = sorted(size for size in sizes if size > 1)
        stage = int(self.state.global_step / (share * self.state.max_steps) * len(larger))
        joined = [1, *larger[: stage + 1]]
        pairs = [(size, weight) for size, weight in zip(sizes, weights, strict=True) if size in joined]
        return [size for size, _ in pairs], [weight for _, weight in pairs]

    def _checked_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch of any collator, with the columns that the model knows: see [`model_columns`]."""
        if isinstance(self.data_collator, BlockGenDataCollator):  # which has checked its rows
            self._refuse_mask_token(batch)
            return dict(batch)
        columns: dict[str, Any] = model_columns(batch, "The batch of `data_collator`")
        if columns["input_ids"].ndim != 2 or not any(batch.get(name) is not None for name in ("labels", "label_ids")):
            raise ValueError(
                "`data_collator` must return `input_ids` and `labels` of the shape [rows, length], -100 where a token "
                f"is not scored, but returned {list(batch)}, `input_ids` of the shape "
                f"{list(columns['input_ids'].shape)}. `BlockGenDataCollator`, the default, makes labels where there "
                "are none."
            )
        self._refuse_mask_token({**batch, **columns})
        if columns["attention_mask"].all():
            del columns["attention_mask"]
        return {**columns, "source": batch["source"]} if "source" in batch else columns

    def _refuse_mask_token(self, batch: Mapping[str, Any]) -> None:
        config = self.model.config
        if config.diffusion_type != "masked":
            return
        rows = (batch["labels"] == config.mask_token_id).any(-1).nonzero().flatten()
        if len(rows):
            documents = f", documents {batch['source'][rows].tolist()} of the data" if "source" in batch else ""
            raise ValueError(
                f"Rows {rows.tolist()} of a batch{documents} have the mask token {config.mask_token_id} among their "
                "scored tokens: a masked model never predicts it. Take it out of the data, or set its labels to -100."
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The mixture loss by the draws in `inputs`; the losses of tokens are kept to be logged."""
        source = inputs.pop("source", None)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and "block_size" in inputs:  # else a batch of the user's, whose block size the model drew
            labels, step = inputs["labels"], self.state.global_step
            self.losses.add(inputs["block_size"], outputs["token_losses"], labels, step, source)
            if outputs.get("ar_token_losses") is not None:
                self.losses.add(1, outputs["ar_token_losses"], labels, step, source)
        return (loss, outputs) if return_outputs else loss

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if "attention_mask" not in inputs:  # nothing is padding, also where the tokenizer pads with a token of texts
            inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
        super()._track_num_input_tokens(inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the loss of each block size to the training loss."""
        if "loss" in logs:
            logs.update(self.losses.drain(self.accelerator))
        super().log(logs, start_time)

    # Evaluation

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """
        Returns:
            the mean loss of the batch (Eq. 7), negative log-likelihoods `[B, block sizes, draws]` in nats a sequence,
            and numbers of scored tokens `[B]`.
        """
        inputs = self._checked_batch(self._prepare_inputs(inputs))
        inputs.pop("source", None)
        samples = self.args.eval_monte_carlo_samples
        nll = sequence_nll(model, inputs, self.model.config.block_sizes, samples, seed=self.args.seed)
        num_tokens = (inputs["labels"] != -100).sum(-1)
        gamma = torch.tensor(self._weights, dtype=nll.dtype, device=nll.device)
        loss = (nll.mean(-1) @ (gamma / gamma.sum())).sum() / num_tokens.sum().clamp(min=1)
        return loss, nll, num_tokens

    @property
    def _weights(self) -> list[float]:
        config = self.model.config
        return mixture_weights(config.block_sizes, config.block_size_weights, config.block_sizes)

    def _likelihood_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The bounds of [`evaluate_likelihood`]; `loss` is Jensen's (Eq. 7), of which training takes samples."""
        result = likelihood_metrics(
            prediction.predictions, prediction.label_ids, self.model.config.block_sizes, self._weights
        )
        metrics = result.metrics()
        return {"loss": metrics["nll_jensen"], **metrics}

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Of the averaged weights; with how many tokens of its drafts the model accepts, if that is asked for."""
        with self.ema.applied(self.model):
            output = super().evaluation_loop(*args, **kwargs)
            if self.args.eval_accepted_rows > 0 and output.metrics is not None:
                prefix = kwargs.get("metric_key_prefix", "eval")
                found = self._accepted_tokens()
                output.metrics.update({f"{prefix}_accepted_block_size_{size}": mean for size, mean in found.items()})
        return output

    def _accepted_tokens(self) -> dict[int, float]:
        """By [`accepted_draft_tokens`], on continuations of the first validation rows."""
        rows = (torch.as_tensor(row["input_ids"])[:_PROMPT_LENGTH] for row in iterate_rows(self.eval_dataset))
        prompts = list(islice((row for row in rows if len(row) == _PROMPT_LENGTH), self.args.eval_accepted_rows))
        if not prompts:
            return {}
        new_tokens = min(_NEW_TOKENS, self.model.config.max_position_embeddings - _PROMPT_LENGTH)
        texts = greedy_texts(self.model, torch.stack(prompts), new_tokens)
        sizes = [size for size in self.model.config.block_sizes if size > 1]
        return accepted_draft_tokens(self.model, texts, _PROMPT_LENGTH, sizes)

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._is_saving_checkpoint else folder

    @contextmanager
    def _saving_checkpoint(self) -> Iterator[None]:
        self._is_saving_checkpoint = True
        try:
            yield
        except Exception:
            shutil.rmtree(self._get_output_dir(None), ignore_errors=True)  # on a disk that may be full
            raise
        finally:
            self._is_saving_checkpoint = False

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.losses.check(self.accelerator)
        self._check_weights()
        folder = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        unfinished, checkpoint = folder / UNFINISHED / name, folder / name
        if self.args.local_process_index == 0:
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with self._saving_checkpoint():
            super()._save_checkpoint(model, trial)
        best = self.state.best_global_step
        if best and (best == self.state.global_step or (folder / f"checkpoint-{best}").exists()):
            self.state.best_model_checkpoint = str(folder / f"checkpoint-{best}")
        if self.args.should_save:
            self.state.save_to_json(str(unfinished / "trainer_state.json"))  # with the right path of the best one
        # The main process first: nodes may share the folder, or each have one of its own.
        for is_mine in (self.args.process_index == 0, self.args.local_process_index == 0):
            self.accelerator.wait_for_everyone()
            if is_mine and unfinished.exists():
                replace_folder(unfinished, checkpoint)
                rotate_checkpoints(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
                shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _check_weights(self) -> None:
        """Raises a `ValueError` for weights that are not finite: a bad gradient spoils them before a loss tells."""
        bad = [
            name
            for name, weight in self.model.named_parameters()
            if not (weight.to_local() if isinstance(weight, DTensor) else weight).isfinite().all()
        ]
        num_bad = torch.tensor(len(bad), device=self.accelerator.device)
        if self.accelerator.reduce(num_bad, reduction="sum") > 0:
            where = f" after step {self.state.global_step}: {bad[0]}" if bad else " on another rank"
            raise ValueError(
                f"Weights are not finite{where}. They were not saved. A smaller learning rate, more warm-up, or bf16 "
                "instead of fp16 may help; or the data."
            )

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> TrainOutput:
        """As [`Trainer`] does, which would delete the last checkpoint, if another is the best one, file by file."""
        self.losses.check(self.accelerator)
        best, folder = self.state.best_model_checkpoint, Path(self._get_output_dir(trial))
        if best is not None and self.args.save_total_limit == 1 and self.args.should_save:
            keep_checkpoint(folder, best)
        return super()._finalize_training(trial, *args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_saving_checkpoint:  # it is pushed when it is complete
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the averaged weights."""
        with self.ema.applied(self.model):
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._is_saving_checkpoint:
            super()._save(output_dir, state_dict)
            return
        target = Path(output_dir if output_dir is not None else self.args.output_dir)
        source = target / UNFINISHED / "model"
        super()._save(str(source), state_dict)
        if self.args.should_save:
            (source / README).unlink(missing_ok=True)  # PEFT's empty card, which would replace one that was written
            move_model(source, target)
            shutil.rmtree(target / UNFINISHED, ignore_errors=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        # FSDP keeps the weights among its own files.
        if self.ema.averages and not self.is_fsdp_enabled and self.args.should_save:
            self.ema.save(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        read_state(resume_from_checkpoint)  # in words, if it cannot be read
        with reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            model = self.model if model is None else model
            if self.is_fsdp_enabled:
                if self.args.ema_decay > 0:
                    self.ema.load_averages(resume_from_checkpoint, model)
            elif (Path(resume_from_checkpoint) / TRAINING_WEIGHTS).exists():
                self.ema.load(resume_from_checkpoint, model)
                if self.args.ema_decay == 0:
                    self.ema.stop()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if missing := missing_file(checkpoint, has_average=self.args.ema_decay > 0):
            logger.warning("The checkpoint %s has no %s: training goes on, but not as it was.", checkpoint, missing)
        if isinstance(self.lr_scheduler, LambdaLR):  # the schedule of this run, which may be longer than before
            schedule = self.lr_scheduler
            factors = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            schedule._last_lr = [rate * factor(schedule.last_epoch) for rate, factor in factors]
            for group, rate in zip(self.optimizer.param_groups, schedule.get_last_lr(), strict=True):
                group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with reading(checkpoint):
                super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.is_fsdp_enabled and self.args.ema_decay > 0:  # FSDP has loaded the weights, not their average
            self.ema.load_averages(str(self.state.best_model_checkpoint), self.model)
            self.ema.finish(self.model)
        self.ema.stop()


__all__ = ["BlockGenTrainer"]
