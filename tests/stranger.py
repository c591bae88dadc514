"""A process that knows nothing of the package: what a user of a checkpoint has."""

# Code that makes the import of blockgen_hf fail, whatever is installed.
WITHOUT_THE_PACKAGE = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "blockgen_hf":
            raise ImportError("blockgen_hf is not here")

sys.meta_path.insert(0, Refusing())
"""
