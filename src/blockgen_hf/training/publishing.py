"""Pushing from a running Trainer: the folder, and the card, that `blockgen-hf push` would upload."""

import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress, logging

from ..hub.cards import model_card, read_metadata
from ..hub.files import README, move_model
from ..hub.folders import is_model_file
from ..hub.licenses import find_license
from ..hub.portable import make_tokenizer_portable
from ..hub.push import PushPlan, plan_push
from ..hub.secrets import is_secret
from ..places import is_hub_id
from ..whole_files import write_whole
from .arguments import BlockGenTrainingArguments
from .checkpointing import UNFINISHED


logger = logging.get_logger(__name__)


class PublishingTrainer(Trainer):
    """
    [`Trainer`] whose `push_to_hub`, also that of `push_to_hub=True`, uploads the saved weights, the modeling code, the
    tokenizer and a card of [`model_card`], and nothing else of `output_dir`: no pickles, no state, no logs.

    The card's licence is `hub_license` of the arguments, that of README.md or of a file LICENSE in `output_dir`, or
    `push_to_hub(license=...)`.

    Raises:
        ValueError: `push_to_hub=True` with a model that may not be published: without a licence, or an adapter of a
            model that is on this machine only.
    """

    args: BlockGenTrainingArguments
    push_in_progress: PushInProgress | None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As [`Trainer`] does, after a look at what can be known before the training."""
        if private is not None:  # an argument of Trainer's from transformers 5.23 on, which does the same
            self.args.hub_private_repo = private
        if self.is_world_process_zero() and self.args.push_to_hub:
            self._check_license(self.args.hub_license)
            for name, adapter in (getattr(self.model, "peft_config", None) or {}).items():
                if not is_hub_id(adapter.base_model_name_or_path):
                    raise ValueError(
                        f"`push_to_hub=True`: the adapter {name!r} is for {adapter.base_model_name_or_path!r}, which "
                        "nobody else can load. Push that model first, and load it by its name on the Hub."
                    )
        super().init_hf_repo(token)

    def _check_license(self, license: str | None) -> None:
        folder = Path(self.args.output_dir)
        try:
            find_license(folder, read_metadata(folder), license)
        except ValueError as error:
            raise ValueError(
                f"The model cannot be pushed: {error} For a Trainer that is `hub_license` of its arguments, or "
                f"README.md or LICENSE in its `output_dir` ({folder}), before it trains."
            ) from error

    def create_model_card(
        self,
        language: str | Sequence[str] | None = None,
        license: str | None = None,
        tags: str | Sequence[str] = (),
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset_tags: str | Sequence[str] | None = None,
    ) -> None:
        """
        Writes README.md into `output_dir`, where the model must have been saved. What an earlier README.md says of
        licence, language, data sets and base model is kept where the arguments do not say it.

        Raises:
            ValueError: no licence, or no model.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        args = self.args
        global_batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        card = model_card(
            folder,
            repo_id=self.hub_model_id or model_name or folder.absolute().name,
            title=model_name,
            license=license or self.args.hub_license,
            language=language,
            tags=[*_as_list(tags), *_as_list(getattr(self.model, "model_tags", None) or ())],
            base_model=finetuned_from,
            datasets=_as_list(dataset_tags or ()),
            training_arguments={**vars(args), "world_size": args.world_size, "global_batch_size": global_batch_size},
            trainer_state=vars(self.state),
        )
        write_whole(folder / README, str(card))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """
        As [`Trainer.push_to_hub`]: `kwargs` are those of [`~PublishingTrainer.create_model_card`].

        Raises:
            ValueError, OSError: see [`push_folder`].
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()
        self.save_model(_internal_call=True)  # on every process
        if not self.is_world_process_zero():
            return None
        self._check_license(kwargs.get("license") or self.args.hub_license)
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.create_model_card(**kwargs)
        plan = self._plan(commit_message, revision, private)
        return plan.upload(token=token) if blocking else plan.upload_in_background(token=token)

    def _plan(self, commit_message: str | None, revision: str | None = None, private: bool | None = None) -> PushPlan:
        plan = plan_push(
            self.args.output_dir,
            self.hub_model_id,
            revision=revision or self.args.hub_revision,
            private=private if private is not None else self.args.hub_private_repo,
            commit_message=commit_message,
            strict=False,
        )
        logger.info(f"Pushing {len(plan.files)} files; left out: {', '.join(path for path, _ in plan.left_out)}")
        return plan

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """
        As [`Trainer`] does, without secrets (`hub_token`) in the arguments that it saves, and with a tokenizer that
        other releases open too.
        """
        secrets = {name: value for name, value in vars(self.args).items() if is_secret(name, value)}
        for name in secrets:
            setattr(self.args, name, None)
        try:
            super()._save(output_dir, state_dict)
        finally:
            for name, value in secrets.items():
                setattr(self.args, name, value)
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        make_tokenizer_portable(folder, self.model.config.max_position_embeddings)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        running = self.push_in_progress
        is_pushing = running is not None and not running.is_done()
        if is_pushing and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._copy_model(Path(checkpoint_folder))
        self.create_model_card()
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [self._plan(message).upload_in_background(token=self.args.hub_token)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):  # to resume from: all of it
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else Path(checkpoint_folder).name
            job = HfApi(token=self.args.hub_token).upload_folder(
                repo_id=self.hub_model_id,
                folder_path=checkpoint_folder,
                path_in_repo=name,
                commit_message=f"{message}, checkpoint",
                revision=self.args.hub_revision,
                run_as_future=True,
            )
            jobs.append(job)
        if running is not None and is_pushing:
            jobs = [*running.jobs, *jobs]
        self.push_in_progress = PushInProgress(jobs)

    def _copy_model(self, checkpoint: Path) -> None:
        """To `output_dir`, as the checkpoint may be deleted before it is uploaded."""
        target = Path(self.args.output_dir)
        source = target / UNFINISHED / "model"
        shutil.rmtree(source, ignore_errors=True)
        for path in checkpoint.rglob("*"):
            name = path.relative_to(checkpoint)
            if path.is_file() and is_model_file(name.as_posix()):
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, source / name)
        move_model(source, target)
        shutil.rmtree(target / UNFINISHED, ignore_errors=True)


def _as_list(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


__all__ = ["PublishingTrainer"]
