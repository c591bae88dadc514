"""
Runs programs that a model wrote as its answers (TinyGSM), each in a process that can do nothing but calculate.

What is promised, on Linux (x86_64; aarch64 is there and untested):

- A program cannot read or write files, open sockets, start processes or threads, or send signals. Its process has no
  file descriptor but the pipe of its result, limits of zero for files and processes, and a seccomp filter under which
  the kernel refuses every system call but those for memory, locks, time, reading, writing and the end.
- It ends: at the wall-clock limit it is killed, and it cannot leave children. Its memory is limited (address space),
  as is its CPU time. What it says is taken for text, of a number in a fixed
  form or of an error, and is refused beyond 4 KB.
- It is written in a small part of Python, by an allow-list of syntax, names and attributes, with an allow-list of
  builtins and the modules `math`, `fractions`, `decimal` and `itertools`. That is the first line of defence; the
  process holds without it.

What is not: it may take all of its CPU time and memory, and reads what memory the fork inherits: an interpreter with
an empty environment and modules of the standard library. Errors of the kernel or the processor are not guarded
against.

Elsewhere nothing is run: an `OSError` says so.
"""

import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any


_FENCE = "```"
_MAX_TEXT = 20_000
# What a process may give as a number. Beyond that, `1e999999999` is a number that takes hours and all memory.
_NUMBER = re.compile(r"-?[0-9]{1,401}(?:/[1-9][0-9]{0,400}|(?:\.[0-9]{1,401})?(?:[eE][+-]?[0-9]{1,3})?)")
_GRACE = 30.0  # seconds for a busy machine, beyond the limit of the program


@dataclass(frozen=True)
class ProgramResult:
    """
    Args:
        value (`Fraction`, *optional*): what the program returned; a float rounded to 12 digits. None if it did not.
        error (`str`, *optional*): why not.
    """

    value: Fraction | None
    error: str | None


def program_source(text: str) -> str:
    """A program in what a model wrote: the first block between fences of Markdown, or the text itself."""
    _, fence, rest = text.partition(_FENCE)
    if not fence:
        return text
    first, _, following = rest.partition("\n")
    body = following if first.strip().lower() in ("", "python", "py", "python3") else rest
    return body.partition(_FENCE)[0]


class ProgramRunner:
    """
    A process that runs programs, one after the other, each in a child of its own. To be used in a `with` statement.

    Args:
        seconds (`float`): wall-clock limit of a program.
        memory (`int`): bytes of address space of a program, the interpreter's some 40 MB among them.

    Raises:
        ValueError: limits that are not positive.
        OSError: this is no machine where programs can be shut in.
    """

    def __init__(self, seconds: float = 5.0, memory: int = 2**28) -> None:
        if not seconds > 0 or not memory > 0:
            raise ValueError(f"`seconds` and `memory` must be positive, but are {seconds!r} and {memory!r}.")
        self.seconds = seconds
        self.memory = memory
        if sys.platform != "linux":  # elsewhere the other module cannot even be imported
            raise OSError(_unsupported(sys.platform))
        from . import program_process

        if not program_process.is_supported():
            raise OSError(_unsupported(f"{sys.platform}, {os.uname().machine}"))
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(program_process.__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,
        )

    def __enter__(self) -> "ProgramRunner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()  # its child, if there is one, dies with it
        self._process.communicate()

    def run(self, text: str) -> ProgramResult:
        """
        Runs a program and calls its last function that needs no argument.

        Raises:
            OSError: the kernel does not shut processes in, or the process died from outside.
        """
        return self._run(program_source(text), checked=True)

    def _run(self, source: str, checked: bool) -> ProgramResult:
        if len(source) > _MAX_TEXT:
            return ProgramResult(None, f"refused: a program of {len(source)} characters")
        request = {"source": source, "seconds": self.seconds, "memory": self.memory, "checked": checked}
        reply = self._ask(request)
        if "unsupported" in reply:
            raise OSError(_unsupported(str(reply["unsupported"])))
        if "number" not in reply:
            return ProgramResult(None, str(reply.get("error")))
        number = str(reply["number"])
        if _NUMBER.fullmatch(number) is None:
            return ProgramResult(None, "no number was returned")
        return ProgramResult(Fraction(number), None)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise OSError("The process that runs programs has no pipes.")
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
            deadline = time.monotonic() + self.seconds + _GRACE
            line = b""
            while not line.endswith(b"\n"):
                ready, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
                chunk = os.read(stdout.fileno(), 2**16) if ready else b""
                if not chunk:
                    raise OSError("The process that runs programs does not answer, or was killed.")
                line += chunk
        except BrokenPipeError as error:
            raise OSError("The process that runs programs was killed.") from error
        except BaseException:
            self._process.kill()  # a late reply would be taken for that to the next program
            raise
        reply: dict[str, Any] = json.loads(line)
        return reply


def run_programs(
    texts: Sequence[str], *, seconds: float = 5.0, memory: int = 2**28, num_workers: int | None = None
) -> list[ProgramResult]:
    """
    Runs the programs of many texts, several at a time.

    Args:
        texts: programs, also between fences of Markdown.
        seconds, memory: limits of each, see [`ProgramRunner`].
        num_workers (`int`, *optional*): how many run at a time. Default: as many as this process has CPU cores.

    Raises:
        ValueError: limits that are not positive.
        OSError: this is no machine where programs can be shut in.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    workers = max(1, min(num_workers or cores, len(texts)))

    is_stopped = Event()

    def run_some(some: Sequence[str]) -> list[ProgramResult]:
        results = []
        with ProgramRunner(seconds, memory) as runner:
            for text in some:
                if is_stopped.is_set():
                    break
                results.append(runner.run(text))
        return results

    with ThreadPoolExecutor(workers) as pool:
        try:
            shares = list(pool.map(run_some, [texts[worker::workers] for worker in range(workers)]))
        except BaseException:  # Ctrl-C, or a machine that runs no programs: only those that run now are waited for
            is_stopped.set()
            raise
    return [shares[number % workers][number // workers] for number in range(len(texts))]


def _unsupported(what: str) -> str:
    return f"Programs can be run on Linux (x86_64, aarch64) with seccomp only, and not here ({what}): nothing was run."


__all__ = ["ProgramResult", "ProgramRunner", "program_source", "run_programs"]
