"""The folder that a training run writes to: what is in it, and whether it may be used."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from transformers.trainer_utils import get_last_checkpoint

from ..hub.secrets import without_secrets
from .parsing import CommandError


RECIPE = "recipe.yaml"
_CHECKPOINTS = "checkpoint-*"
_MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json", "adapter_config.json")
# What may change when a run goes on, since the rows stay the same.
_FREE_DATA_KEYS = ("num_proc", "cache_dir", "overwrite_cache")


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

    def check(self, values: dict[str, Any], resume: bool, overwrite: bool) -> str | None:
        """
        The checkpoint to go on from, None to begin.

        Args:
            values: the recipe's sections, to be compared with those of the run that is resumed.

        Raises:
            CommandError: the folder cannot be written, or holds what is not to be overwritten or gone on from.
        """
        if self.path.exists() and not self.path.is_dir():
            raise CommandError(f"The output folder {self.path} is a file.")
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
        self._compare(values)
        return checkpoint

    def _compare(self, values: dict[str, Any]) -> None:
        """Refuses to go on with another model, tokenizer or other data; `training` may change, as to train longer."""
        file = self.path / RECIPE
        if not file.is_file():
            return
        try:
            before = yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise CommandError(f"{file} is damaged: {error}. Without it, runs are resumed unchecked.") from error
        for section in ("model", "adapter", "tokenizer", "data"):
            old, new = (_without_free(found.get(section) or {}) for found in (before, values))
            for key in sorted({*old, *new}):
                if old.get(key) != new.get(key):
                    raise CommandError(
                        f"The run in {self.path} cannot be resumed with another `{section}.{key}`: it was "
                        f"{old.get(key)!r}, and is {new.get(key)!r} now. Begin anew in another --output-dir."
                    )

    def save_recipe(self, values: dict[str, Any]) -> None:
        """
        Writes the sections, without secrets such as `training.hub_token`.

        Raises:
            ValueError: another value looks like one.
        """
        values = without_secrets(values)
        self.path.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
        (self.path / RECIPE).write_text(text, encoding="utf-8")

    def clear(self) -> None:
        """Deletes the checkpoints of a former run. Its model is overwritten, all else stays."""
        for name in self.checkpoints:
            shutil.rmtree(self.path / name)


def _without_free(section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in _FREE_DATA_KEYS}
