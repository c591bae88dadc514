"""Where recipes lie. Apart from what reads them, since a mistyped name should be answered without torch."""

from importlib.resources import files
from pathlib import Path


def bundled_recipes() -> dict[str, Path]:
    """The recipes of the package by their names."""
    folder = Path(str(files("blockgen_hf"))) / "training" / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def find_recipe(name: str) -> Path:
    """
    The file of a bundled recipe, or of a path.

    Raises:
        FileNotFoundError: neither.
    """
    path = Path(name).expanduser()
    bundled = bundled_recipes()
    if name in bundled and not path.is_file():
        return bundled[name]
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no recipe {name!r}: it is neither a file nor one of {', '.join(bundled)}, which come with the "
            "package."
        )
    return path


__all__ = ["bundled_recipes", "find_recipe"]
