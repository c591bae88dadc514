"""Licences: the identifiers that the Hub knows, and what a folder says of its own."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


# https://huggingface.co/docs/hub/repositories-licenses, without "unknown", which is no licence. The Hub checks again.
LICENSES = (
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0", "bigcode-openrail-m",
    "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear",
    "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0",
    "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0",
    "cdla-sharing-1.0", "creativeml-openrail-m", "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0",
    "etalab-2.0", "eupl-1.1", "eupl-1.2", "gemma", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "h-research", "intel-research",
    "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4",
    "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "open-mdw", "openrail", "openrail++",
    "osl-3.0", "other", "pddl", "postgresql", "unlicense", "wtfpl", "zlib",
)  # fmt: skip
_LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")


@dataclass(frozen=True)
class License:
    """
    What a card's metadata say of the licence.

    Args:
        identifier (`str`): one of the Hub's, such as `"apache-2.0"`; `"other"` for a text of one's own.
        name (`str`, *optional*): of a text of one's own.
        link (`str`, *optional*): to it: an address, or the file's name in the repository.
    """

    identifier: str
    name: str | None = None
    link: str | None = None

    def metadata(self) -> dict[str, str]:
        values = {"license": self.identifier, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in values.items() if value}


def check_license(identifier: str) -> str:
    """
    Raises:
        ValueError: it is none of the identifiers that the Hub knows.
    """
    if identifier in LICENSES:
        return identifier
    near = difflib.get_close_matches(identifier.lower(), LICENSES, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? Else see" if near else "see"
    raise ValueError(
        f"`license` is {identifier!r}, which is no licence that the Hub knows: {hint} "
        "https://huggingface.co/docs/hub/repositories-licenses. For a text of your own put it into a file LICENSE, "
        "and name no identifier."
    )


def find_license(folder: Path, metadata: dict[str, Any], given: str | None) -> License:
    """
    The licence of a folder: what the caller says, else the metadata of its card, else its file LICENSE.

    Args:
        metadata: of the folder's README.md; empty if there is none.
        given: the caller's identifier.

    Raises:
        ValueError: there is none, the Hub does not know it, or the caller and the card say different things.
    """
    stated = metadata.get("license")
    if isinstance(stated, list):
        if len(stated) != 1:
            raise ValueError(f"README.md names the licences {stated!r} in its metadata: name one.")
        stated = stated[0]
    if stated is not None:
        check_license(str(stated))
        if given is not None and given != stated:
            raise ValueError(
                f"`license` is {given!r}, but README.md says {stated!r} in its metadata: change one of them."
            )
        license = License(str(stated), metadata.get("license_name"), metadata.get("license_link"))
    elif given is not None:
        license = License(check_license(given))
    else:
        license = License("other")
    if license.identifier != "other" or (license.name and license.link):
        return license
    file = next((name for name in _LICENSE_FILES if (folder / name).is_file()), None)
    if file is None:
        if stated is None and given is None:
            raise ValueError(
                f"{folder} says nothing of its licence: name one that the Hub knows (--license apache-2.0, in Python "
                "`license=`), write `license: ...` into the metadata of README.md, or add a file LICENSE."
            )
        raise ValueError("`license: other` needs the licence's text: add a file LICENSE to the folder.")
    return License("other", license.name or _name_of_text(folder / file), license.link or file)


def _name_of_text(file: Path) -> str:
    """The first line of a licence as the Hub wants names: in small letters, digits and hyphens."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    name = re.sub(r"[^a-z0-9.]+", "-", next(filter(None, lines), "").lower())[:60].strip("-.")
    if not name:
        raise ValueError(f"{file} is empty: put the licence's text there.")
    return name


__all__ = ["LICENSES", "License", "check_license", "find_license"]
