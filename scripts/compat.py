#!/usr/bin/env python3
"""
Tests the oldest and the newest releases that pyproject.toml allows, one dependency at a time: `python3 run.py compat`.

Each environment sees what is pinned in .venv, with one package in another release over it. The table is printed and
written to docs/compatibility.md; `--short` tries the oldest and the newest transformers only, and writes nothing.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import run  # noqa: E402


FOLDER = ROOT / ".venv-compat"
PAGE = ROOT / "docs" / "compatibility.md"
TABLE = "<!-- written by `python3 run.py compat` -->"
OTHERS = "other releases that it brings"

PARTS = {  # the test files of each, in one string
    "generate": "tests/test_generate.py",
    "processors": "tests/test_generate_processors.py",
    "speculation": "tests/test_speculation.py",
    "cache": "tests/test_cache.py",
    "cache names": "tests/test_cache_names.py",
    "forward": "tests/test_forward.py",
    "remote code": "tests/test_remote_code.py",
    "any causal model": "tests/test_causal_lm.py",
    "trainer": "tests/test_trainer.py",
    "push": "tests/test_push.py",
    "PEFT": "tests/test_peft.py",
    "TRL": "tests/test_trl_sft.py",
    "lm-eval": "tests/test_lm_eval.py",
    "data": "tests/test_data.py",
    "command line": "tests/test_cli.py tests/test_cli_train.py",
}
SHORT = ("generate", "cache names")  # a minute: what generates, and what releases call differently
PARTS_OF = {  # what a dependency can break
    "transformers": tuple(PARTS),
    "torch": ("generate", "speculation", "cache", "cache names", "forward", "remote code", "trainer", "PEFT"),
    "huggingface-hub": ("remote code", "trainer", "push", "data", "command line"),
    "accelerate": ("trainer", "push", "PEFT", "TRL"),
    "datasets": ("trainer", "TRL", "data", "command line"),
    "peft": ("PEFT", "TRL"),
    "trl": ("TRL",),
    "lm-eval": ("lm-eval",),
}


def window(name: str) -> tuple[str, str]:
    """The requirements that stand for the oldest and for the newest release of what pyproject.toml allows."""
    extras, oldest, rest = re.findall(rf'"{name}(\[\w+\])?>=([\d.]+)([^";]*)', run.PROJECT)[0]
    return f"{name}{extras}=={oldest}", f"{name}{extras}>={oldest}{rest}"


def try_release(
    name: str, requirement: str, parts: tuple[str, ...], short: bool = False, default_torch: bool = False
) -> dict[str, str]:
    """A row of the table."""
    venv = FOLDER / re.sub(r"\W+", "-", requirement.replace(">=", "-from-"))
    run.lay_over(venv)
    pinned = run.releases(run.VENV)
    kept = [f"{other}=={pinned[other]}" for other in ("torch", "transformers") if other != name]
    if name == "torch" and not default_torch and run.takes_cpu_torch():
        installed = install_cpu_torch(venv, requirement)
    else:
        installed = run.pip_install(venv, "--upgrade", requirement, *kept)
    if not installed:
        return {"package": name, "release": requirement, OTHERS: "not installed here"}
    if name == "torch":  # quanto compiles its kernels beside itself, for the torch that it meets: not those of .venv
        run.pip_install(venv, "--no-deps", "--ignore-installed", f"optimum-quanto=={pinned['optimum-quanto']}")
    found = run.releases(venv)
    others = [
        f"{other} {release}"
        for other, release in found.items()
        if other != name and pinned.get(other) != release and not other.startswith(("nvidia-", "cuda-"))
    ]
    row = {"package": name, "release": found[name], OTHERS: ", ".join(sorted(others))}
    if found[name] == pinned[name]:
        row["release"] += " (pinned)"
        if short:  # the tests have had it
            return row
    return row | {part: run_tests(venv, PARTS[part]) for part in parts}


def install_cpu_torch(venv: Path, requirement: str) -> bool:
    """Only PyTorch's own index has CPU builds; the default build is gigabytes."""
    has_index = run.answers(run.CPU_INDEX)
    if requirement.startswith("torch>"):
        return has_index and run.pip_install(venv, "--upgrade", requirement, "--index-url", run.CPU_INDEX)
    return run.pip_install(venv, f"{requirement}+cpu", *(("--extra-index-url", run.CPU_INDEX) if has_index else ()))


def run_tests(venv: Path, paths: str) -> str:
    """`ok`, or what failed."""
    options = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider"]
    command = [run.python_of(venv), "-m", "pytest", *options, *paths.split()]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    status = {0: "ok", 5: "none"}.get(done.returncode, "FAILS")
    print(f"   {paths}: {status} in {time.monotonic() - started:.0f} s", flush=True)
    if status == "FAILS":
        print(done.stdout[-4000:], done.stderr[-1000:], flush=True)
    return status


def as_table(rows: list[dict[str, str]]) -> str:
    columns = ["package", "release", *PARTS, OTHERS]
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rows_of(table: str) -> list[dict[str, str]]:
    """What `as_table` wrote, perhaps with other columns."""
    titles, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines())
    return [dict(zip(titles, line, strict=True)) for line in lines]


def write_page(rows: list[dict[str, str]]) -> None:
    """Puts the rows into the page's table, in place of earlier ones of the same packages."""
    text, table = PAGE.read_text(encoding="utf-8").split(TABLE)
    names = {row["package"] for row in rows}
    rows = [*rows, *(row for row in rows_of(table) if row["package"] not in names)]
    rows.sort(key=lambda row: list(PARTS_OF).index(row["package"]))
    PAGE.write_text(f"{text}{TABLE}\n\n{as_table(rows)}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="run.py compat", description=__doc__)
    parser.add_argument("--short", action="store_true", help="transformers and a few tests only; writes nothing")
    parser.add_argument(
        "--default-torch",
        action="store_true",
        help="install PyTorch's default build, which is gigabytes, where PyTorch's own index cannot be reached",
    )
    parser.add_argument("packages", nargs="*", help=f"of {', '.join(PARTS_OF)}; all by default")
    options = parser.parse_args()
    names = options.packages or (["transformers"] if options.short else list(PARTS_OF))
    unknown = set(names) - set(PARTS_OF)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}. Known: {', '.join(PARTS_OF)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows: list[dict[str, str]] = []
    for name in names:
        for requirement in window(name):
            print(f"== {requirement}", flush=True)
            parts = SHORT if options.short else PARTS_OF[name]
            rows.append(try_release(name, requirement, parts, options.short, options.default_torch))
        if rows[-1]["release"] == rows[-2]["release"]:
            rows[-2:] = [rows[-1] | {"release": f"{rows[-1]['release']}, oldest and newest"}]
    print(as_table(rows))
    if not options.short:
        write_page(rows)
    sys.exit(any("FAILS" in row.values() for row in rows))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
