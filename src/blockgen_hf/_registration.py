"""
Registration with transformers' Auto classes, as soon as this package and transformers are both imported.

`import blockgen_hf` imports neither torch nor transformers, which take seconds: the command line answers without them.
Importing `blockgen_hf.modeling` registers the classes. Where transformers comes later, its import does that.
"""

import sys
from importlib import import_module, util
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


_MODELING = f"{__package__}.modeling"


def register_with_transformers() -> None:
    """Registers the classes now if transformers is imported, else when it is."""
    if "transformers" in sys.modules:
        import_module(_MODELING)
    else:
        sys.meta_path.insert(0, _RegisteringFinder())


class _RegisteringFinder(MetaPathFinder):
    """Finds transformers as the other finders do. Once the module is executed, it is followed by ours."""

    def __init__(self) -> None:
        self._is_asking = False

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "transformers" or self._is_asking:
            return None
        self._is_asking = True
        try:
            spec = util.find_spec(fullname)
        finally:
            self._is_asking = False
        if spec is None or spec.loader is None:
            return spec
        loader = spec.loader
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            loader.exec_module = execute  # type: ignore[method-assign]
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            import_module(_MODELING)

        loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


__all__ = ["register_with_transformers"]
