"""
What the documentation site needs beyond mkdocs and mkdocstrings: a hook for mkdocs and an extension for griffe.

Pages and docstrings are also read without the site, in an editor or on GitHub. So links to source files are relative
paths, docstrings follow the conventions of transformers, and the fields of argument classes are described by the help
text that the command line prints. The site is made from these.
"""

import ast
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File


ROOT = Path(__file__).resolve().parents[1]
PUBLIC = ("blockgen_hf", *(f"blockgen_hf.{name}" for name in ("training", "evaluation", "hub", "metrics")))


def on_files(files: Any, *, config: Any) -> Any:
    """The README is the home page."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    home = re.sub(r"\]\((?!\w+:)", "](../", readme).replace("](../docs/", "](")
    files.append(File.generated(config, "index.md", content=home))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Points links that leave `docs/` to the repository. If mkdocs.yml names none, only their text is shown."""
    folder = (Path(config.docs_dir) / page.file.src_uri).parent

    def replace(link: re.Match[str]) -> str:
        text, target = link.groups()
        path = (folder / target).resolve()
        if path.is_relative_to(config.docs_dir) or not path.exists():  # mkdocs reports what does not exist
            return link[0]
        return f"[{text}]({config.repo_url}/blob/main/{path.relative_to(ROOT)})" if config.repo_url else text

    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!\w+:)([^)#]+)\)", replace, markdown)


class Docstrings(griffe.Extension):
    """Turns transformers' conventions into griffe's, and describes fields by their help texts."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **_: Any) -> None:
        if help_text := _help_text(getattr(node, "value", None)):
            attr.docstring = attr.docstring or griffe.Docstring(help_text, parent=attr)
            defaults = [keyword.value for keyword in node.value.keywords if keyword.arg == "default"]
            attr.value = ast.unparse(defaults[0]) if defaults else None

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        if pkg.path != "blockgen_hf":
            return
        modules = [pkg[name.removeprefix("blockgen_hf.")] if name != "blockgen_hf" else pkg for name in PUBLIC]
        names = {name: f"{module.path}.{name}" for module in modules for name in map(str, module.exports or ())}
        _translate_docstrings(pkg, names)


def _help_text(value: ast.AST | None) -> str:
    """Of `field(metadata={"help": ...})`. What an f-string inserts is shown by its name."""
    for mapping in ast.walk(value) if value else ():
        if isinstance(mapping, ast.Dict):
            for key, text in zip(mapping.keys, mapping.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "help":
                    parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                    return "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in parts)
    return ""


def _translate_docstrings(parent: Any, names: dict[str, str]) -> None:
    """
    Links [`Name`] to its entry in the reference, and writes "name (`int`, *optional*, defaults to 1): ..." as "name
    (int): Defaults to 1. ...".
    """

    def link(reference: re.Match[str]) -> str:
        short, name = reference.groups()
        head, _, member = name.partition(".")
        shown = f"`{member or head}`" if short else f"`{name}`"
        return f"[{shown}][{names[head]}{'.' * bool(member)}{member}]" if head in names else shown

    def argument(found: re.Match[str]) -> str:
        name, kind, default = found.groups()
        kind = re.sub(r"\[?`\]?|,? ?\*optional\*", "", kind)
        return name + (f" ({kind}):" if kind else ":") + (f" Defaults to {default}." if default else "")

    for member in parent.members.values():
        if member.is_alias:
            continue
        if member.docstring:
            form = r"^(\s+[\w, ]+) \((.*?)(?:,? defaults to (.+?))?\):"
            text = re.sub(form, argument, member.docstring.value, flags=re.MULTILINE)
            member.docstring.value = re.sub(r"\[`(~?)([\w.]+)`\](?![\[(])", link, text)
        if member.is_module or member.is_class:
            _translate_docstrings(member, names)
