"""Tokens, passwords and keys, which no file holds that this package writes or publishes."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml  # type: ignore[import-untyped]


# Names of values that are secret. Tokens of a vocabulary (`eos_token`) and counts (`num_tokens`) are not.
_SECRET_KEY = re.compile(
    r"(hub|hf|push_to_hub|auth|use_auth|access|refresh|api|bearer|session|wandb)_?token|token"
    r"|(.*_)?(password|passwd|secret|secret_key|api_?key|access_key|private_key)",
    re.IGNORECASE,
)
# How common secrets look: of the Hub, OpenAI, GitHub, AWS, and private keys.
_SECRET_TEXT = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|hf_oauth_[\w.-]{16,}|sk-[A-Za-z0-9_-]{20,}"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16})\b|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_MASKED = re.compile(r"<[A-Z_]+>|\*+")  # what transformers writes in the place of a token


def without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """
    Nested settings, to be written to a file, without those that are secret by name (`hub_token`).

    Raises:
        ValueError: another one holds what looks like a token of the Hub or of another service.
    """
    kept = _kept(values)
    for path, value in _strings(kept):
        if _SECRET_TEXT.search(value):
            raise ValueError(
                f"`{path}` holds what looks like a token, and would be written to a file: give tokens by the "
                "environment (HF_TOKEN), or `hf auth login`."
            )
    return kept


def _kept(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _kept(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if not is_secret(key, value)
    }


def find_secret(name: str, text: str) -> str | None:
    """
    The place of a secret in the text of a file, in words that do not tell it; None if there is none.

    Args:
        name: of the file. JSON and YAML are searched for values that are secret by name too.
    """
    found = _SECRET_TEXT.search(text)
    if found is not None:
        return f"line {text.count(chr(10), 0, found.start()) + 1} looks like a token ({found.group()[:3]}...)"
    try:
        if name.endswith(".json"):
            values = json.loads(text)
        elif name.endswith((".yaml", ".yml")):
            values = yaml.safe_load(text)
        else:
            return None
        return next((f"`{path}`" for path, value in _strings(values) if is_secret(path.split(".")[-1], value)), None)
    except (ValueError, yaml.YAMLError, RecursionError):
        return None  # whoever reads it says so


def is_secret(key: Any, value: Any) -> bool:
    """Whether a value of this name is a secret that is set."""
    is_set = isinstance(value, str) and value != "" and not _MASKED.fullmatch(value)
    return is_set and isinstance(key, str) and _SECRET_KEY.fullmatch(key) is not None


def _strings(values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """All texts in nested values, with the keys that lead there."""
    if isinstance(values, str):
        yield path, values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from _strings(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _strings(value, path)


__all__ = ["find_secret", "is_secret", "without_secrets"]
