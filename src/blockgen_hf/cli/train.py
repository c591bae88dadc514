"""Train a BlockGen model from a recipe: a YAML file, or one that comes with the package."""

import argparse
import json
import os
from collections.abc import Sequence

from ..presets import PRESETS
from ..recipe_files import find_recipe
from .parsing import CommandError, add_run_arguments, integer


EXAMPLE = (
    "blockgen-hf train laptop data.dataset=my.txt --output-dir runs/mine\n"
    "blockgen-hf train laptop --preset mdlm --output-dir runs/mdlm"
)
USAGE = "recipe [section.key=value ...]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", help="a YAML file, or a recipe of the package: laptop, owt, lm1b, lm1b-wrapped or tinygsm"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="change the recipe: data.dataset=my.txt, training.learning_rate=1e-3, model.block_sizes=[1,16] ...",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        metavar="NAME",
        help=f"train a model of the papers by this recipe: {', '.join(PRESETS)}",
    )
    parser.add_argument("--output-dir", metavar="DIR", help="folder for the model; short for training.output_dir=DIR")
    parser.add_argument(
        "--max-steps", type=integer(1), metavar="N", help="optimizer steps; short for training.max_steps=N"
    )
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    overrides = list(args.overrides)
    if args.output_dir is not None:
        overrides.append(f"training.output_dir={json.dumps(args.output_dir)}")
    if args.max_steps is not None:
        overrides.append(f"training.max_steps={args.max_steps}")
    return run_recipe(args.recipe, overrides, args.resume, args.overwrite, args.dry_run, preset=args.preset)


def run_recipe(
    recipe: str,
    overrides: Sequence[str],
    resume: bool,
    overwrite: bool,
    is_dry: bool,
    source: str | None = None,
    preset: str | None = None,
) -> int:
    """Trains, or says what it would take, and returns the exit status."""
    process = int(os.environ.get("RANK", "0"))

    try:
        find_recipe(recipe)
    except FileNotFoundError as error:
        if process > 0:
            return 1  # the main process says it
        raise CommandError(error) from error

    from .loading import quiet_transformers

    try:
        from .dry_run import dry_run
        from .training import prepare, train
    except ImportError as error:
        raise CommandError(f"Training needs more packages: pip install 'blockgen-hf[train]' ({error}).") from error

    with quiet_transformers():
        try:
            prepared = prepare(recipe, overrides, resume, overwrite, source, preset)
        except CommandError:
            if process > 0:
                return 1  # the main process says it: all find the same
            raise
        try:
            if is_dry:
                dry_run(prepared)
            else:
                train(prepared)
        except CommandError as error:
            raise CommandError(f"process {process}: {error}" if process > 0 else error) from error
    return 0
