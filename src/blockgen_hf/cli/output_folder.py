"""The folder that a training run writes to: what is in it, and whether it may be used."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from ..hub.files import ADAPTER_CONFIG, CONFIG, CONVERSION, INDEX, RECIPE, WEIGHTS, read_json, yaml_text
from ..hub.layouts import CAUSAL_LM
from ..hub.secrets import without_secrets
from ..training.checkpointing import missing_file
from ..training.recipe import Recipe, read_recipe
from ..training.resuming import compare_recipes
from ..whole_files import write_json, write_whole
from .parsing import CommandError


_CHECKPOINTS = "checkpoint-*"
_MODEL_FILES = (CONFIG, WEIGHTS, INDEX, ADAPTER_CONFIG)


@dataclass(frozen=True)
class OutputFolder:
    path: Path

    @property
    def checkpoints(self) -> list[str]:
        """Names, oldest first."""
        found = [path.name for path in self.path.glob(_CHECKPOINTS) if path.is_dir()]
        return sorted(found, key=lambda name: (len(name), name))

    @property
    def has_model(self) -> bool:
        return any((self.path / name).exists() for name in _MODEL_FILES)

    @property
    def contents(self) -> str:
        """What a run would overwrite, in words; empty if there is nothing."""
        names = self.checkpoints
        words = [f"checkpoints up to {names[-1]}" if len(names) > 1 else names[0]] if names else []
        words += ["a model"] if self.has_model else []
        return " and ".join(words)

    def check(self, recipe: Recipe, resume: bool, overwrite: bool) -> str | None:
        """
        The checkpoint to go on from, None to begin.

        Args:
            recipe: to be compared with that of the run that is resumed.

        Raises:
            CommandError: the folder cannot be written, or holds what is not to be overwritten or gone on from.
        """
        if overwrite or not self.contents:
            return None
        if not resume:
            raise CommandError(
                f"The output folder {self.path} holds {self.contents}: go on from there with --resume, replace it "
                "with --overwrite, or name another with --output-dir."
            )
        checkpoint: str | None = get_last_checkpoint(str(self.path))
        if checkpoint is None:
            raise CommandError(
                f"The output folder {self.path} holds a model, but no checkpoint to resume from. To train it further, "
                f"start anew with model.name_or_path={self.path} and another --output-dir."
            )
        self.changes(recipe)
        missing = missing_file(checkpoint, has_average=recipe.training_setting("ema_decay") > 0)
        if missing:
            raise CommandError(
                f"The checkpoint {checkpoint} has no {missing}, without which the run would not go on as it was. "
                "Delete that folder to resume from an earlier checkpoint, or start anew in another --output-dir, from "
                f"its weights with model.name_or_path={checkpoint}."
            )
        return checkpoint

    def changes(self, recipe: Recipe) -> list[str]:
        """
        What is another than in the run so far, in words.

        Raises:
            CommandError: a setting that cannot change on the way, or a damaged file.
        """
        file = self.path / RECIPE
        if not file.is_file():
            return []
        try:
            before = read_recipe(file)
        except (ValueError, OSError) as error:
            raise CommandError(
                f"{file} is damaged, or was written by another version: {error} If you delete it, the run is resumed "
                "unchecked."
            ) from error
        try:
            return compare_recipes(before, recipe)
        except ValueError as error:
            raise CommandError(f"The run in {self.path} {error}") from error

    def save_recipe(self, values: dict[str, Any]) -> None:
        """
        Writes the sections, without secrets such as `training.hub_token`.

        Raises:
            ValueError: another value looks like one.
        """
        values = without_secrets(values)
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / RECIPE, yaml_text(values))

    def save_conversion(self, source: Path) -> None:
        """
        Of a causal language model that was converted and is now trained: what its way back, and its card, need.

        Args:
            source: the folder of the model that is trained further.
        """
        file = self.path / CONVERSION
        values = read_json(source / CONVERSION) if (source / CONVERSION).is_file() else {}
        if values.get("family") == CAUSAL_LM:
            values.pop("files", None)  # those of the other folder
            write_json(file, {**values, "trained": True})
        else:
            file.unlink(missing_ok=True)  # of a run before

    def clear(self) -> None:
        """Deletes the checkpoints of a former run. Its model is overwritten, all else stays."""
        for name in self.checkpoints:
            shutil.rmtree(self.path / name)
