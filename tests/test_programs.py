"""Programs run, and hostile ones do no harm: by the language that is allowed, and by the process alone."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest


if sys.platform != "linux":
    pytest.skip("programs run on Linux only", allow_module_level=True)

from blockgen_hf.evaluation.program_process import Refused, check_program, is_supported
from blockgen_hf.evaluation.programs import ProgramResult, ProgramRunner, program_source, run_programs


if not is_supported():
    pytest.skip("programs do not run on this machine", allow_module_level=True)

SECONDS = 10.0  # of the wall clock: plenty for a program that ends, on a busy machine too
TINYGSM = '''def simple_math_problem() -> int:
    """
    Kyle bought last year's best-selling book for $19.50, with a 25% discount. How much was it?
    """
    discount: float = 0.25
    price = 19.50
    original_price = price / (1 - discount)
    result = original_price
    return result
'''


@pytest.fixture(scope="module")
def runner() -> Iterator[ProgramRunner]:
    with ProgramRunner(SECONDS) as runner:
        yield runner


def function(*lines: str) -> str:
    return "def f():\n" + "".join(f"    {line}\n" for line in lines)


def unchecked(runner: ProgramRunner, *lines: str) -> ProgramResult:
    """With the whole language and all builtins: what the process alone keeps from doing harm."""
    return runner._run(function(*lines), checked=False)


@pytest.mark.parametrize(
    ("source", "value"),
    [
        (TINYGSM, 26),
        (function("return 0.07 * 100"), 7),  # 7.000000000000001
        (function("return 0.1 + 0.2"), Fraction(3, 10)),
        (function("return 2 ** 100"), 2**100),
        (function("from fractions import Fraction", "return Fraction(1, 3) + 1"), Fraction(4, 3)),
        (function("import decimal as d", "return d.Decimal('1.10')"), Fraction(11, 10)),
        (function("import math", "return math.ceil(math.sqrt(17)) + math.comb(5, 2)"), 15),
        (function("total = 0", "for _ in range(4): total += 2", "print(f'{total}')", "return total"), 8),
        (function("x = [i for i in range(5) if i % 2]", "x.append(4)", "return sum(x) if x else 0"), 8),
        ("def half(x: float) -> float:\n    return x / 2\n" + function("return half(9)"), Fraction(9, 2)),
        ("def f(n=3) -> List[int]:\n    return n", 3),  # annotations name what they like
        ("import itertools\nn = len(list(itertools.permutations(range(4))))\n" + function("return n"), 24),
        (function("input = 3", "type = 4", "return input * type"), 12),  # names that are its own
        ("def input():\n    return 3\n" + function("return input()"), 3),
        (function("prix_été = 5", "return prix_été if len('\\N{BULLET}') == 1 else 0"), 5),
        (function("return 5 if 5 is 5 else 0"), 5),  # a SyntaxWarning, which nobody can be told
        ("import decimal\n" + function("return decimal.Decimal('-1E-7')"), Fraction(-1, 10**7)),
        (function("return -1e300"), -(10**300)),
        ("Here it is:\n```python\n" + function("return 5") + "```\nand ```x```", 5),
    ],
)
def test_arithmetic_runs(runner: ProgramRunner, source: str, value: int | Fraction) -> None:
    assert runner.run(source) == ProgramResult(Fraction(value), None)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (function("return 1 / 0"), "ZeroDivisionError"),
        (function("return unknown"), "NameError"),
        (function("return True"), "a bool was returned"),
        (function("return '5'"), "a str was returned"),
        (function("return float('nan')"), "a float was returned"),
        (function("return 10 ** 400"), "a int was returned"),
        (function("import decimal", "return decimal.Decimal('1e9999')"), "a Decimal was returned"),
        (function("x = 1"), "a NoneType was returned"),
        (function("return {}[10 ** 5000]"), "KeyError"),  # its message cannot be written
        ("def f(x):\n    return x", "no function"),
        ("x = 5", "no function"),
        ("", "no function"),
        ("Janet has 3 ducks.", "no Python"),
        ("def f():\n    return 5 +", "no Python"),
        (function("return 1") + "\0", "no Python"),
        ("#" * 20_001, "a program of 20001 characters"),
    ],
)
def test_what_returns_no_number_says_why(runner: ProgramRunner, source: str, error: str) -> None:
    result = runner.run(source)
    assert result.value is None
    assert error in str(result.error)


# The first layer

FORBIDDEN = [
    "__import__('os').system('true')",
    "eval('1')",
    "exec('x = 1')",
    "compile('1', '', 'eval')",
    "open('/etc/passwd').read()",
    "input()",
    "getattr(1, 'real')",
    "setattr(f, 'x', 1)",
    "globals()",
    "locals()",
    "vars()",
    "dir()",
    "type(1)",
    "object()",
    "breakpoint()",
    "memoryview(b'')",
    "().__class__.__base__.__subclasses__()",
    "ｅｖａｌ('1')",  # the parser reads plain letters
    "[(lambda: open)() for _ in range(1)]",
    "'{0}'.format_map",
    "max.__self__",
    "(1).real",
    "f.__globals__",
    "f.__code__",
    "[].append.__self__",
    "(x for x in [1]).gi_frame.f_back",
    "'{0.__class__}'.format(1)",
    "'{0.__class__}'.format_map({})",
    "f'{(1).__class__}'",
    "__builtins__",
    "__name__",
    "_hidden",
    "b'bytes'",
    "(lambda __x: 1)(2)",
    "dict(__class__=1)",
]
FORBIDDEN_LINES = [
    "import os",
    "import os.path",
    "import socket, math",
    "import math as __math",
    "from math import *",
    "from os import system",
    "from fractions import math",
    "from decimal import sys",
    "from . import math",
    "import fractions; fractions.sys.exit()",
    "import decimal; decimal.getcontext().prec = 10 ** 9",
    "try: pass\n    except: pass",
    "try: pass\n    except Exception as error: error.__traceback__.tb_frame",
    "nonlocal f",
    "x: __import__('os') = f.__globals__",
    "def g(x=open('/etc/passwd')): pass",
    "with f: pass",
    "class A: pass",
    "raise ValueError",
    "global f",
    "del f",
    "yield 1",
    "assert 0",
    "f.x = 1",
    "async def g(): pass",
    "@f\n    def g(): pass",
    "match 1:\n        case _: pass",
    "def __g(): pass",
]


def test_the_check_refuses_and_refused_programs_are_not_run(runner: ProgramRunner) -> None:
    for source in (*(f"return {one}" for one in FORBIDDEN), *FORBIDDEN_LINES):
        with pytest.raises(Refused):
            check_program(function(source))
            pytest.fail(f"not refused: {source}")
        assert str(runner.run(function(source)).error).startswith("refused: "), source


def test_the_builtins_hold_what_the_check_lets_through(runner: ProgramRunner) -> None:
    """A name that the program binds somewhere may be read elsewhere, and is not the builtin."""
    source = "def g():\n    eval = open = 1\n" + function("return open('/etc/passwd')")
    assert runner.run(source).error == "NameError: name 'open' is not defined"


# Time and memory, with and without the check


@pytest.mark.parametrize(
    ("line", "checked"),
    [
        ("while True: pass", True),
        ("while True: pass", False),
        ("return 9 ** 9 ** 9", True),
        ("return sum(x for x in iter(int, 1))", False),
    ],
)
def test_time_is_limited(runner: ProgramRunner, line: str, checked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(runner, "seconds", 0.5)
        result = runner._run(function(line), checked)
    assert result.value is None and result.error == "not done after 0.5 s"
    assert time.monotonic() - started < 10
    assert runner.run(function("return 1")).value == 1  # the next one runs


@pytest.mark.parametrize(
    ("source", "error", "checked"),
    [
        (function("x = [0] * 10 ** 10", "return 1"), "out of memory", True),
        (function("x = [0] * 10 ** 10", "return 1"), "out of memory", False),
        (function("x = []", "while True: x.append('a' * 10 ** 6)"), "out of memory", False),
        (function("return len(f'{1:1000000000}')"), "out of memory", True),
        (function("return f()"), "RecursionError", True),
        (function("return f()"), "RecursionError", False),
        (function("return 1 << 10 ** 12"), "out of memory", True),
    ],
)
def test_memory_is_limited(runner: ProgramRunner, source: str, error: str, checked: bool) -> None:
    result = runner._run(source, checked)
    assert result.value is None and error in str(result.error)
    assert runner.run(function("return 1")).value == 1  # the next one runs


@pytest.mark.parametrize(
    "source",
    [
        "-" * 19_000 + "1",
        "not " * 4_000 + "1",
        "(" * 9_000 + ")" * 9_000,
        "[" * 9_000,
        "x" + ".count" * 3_000,
        "1" + "+1" * 9_000,
        "f(" * 5_000,
        "lambda:" * 2_500 + "1",
        "1 if 1 else " * 1_500 + "1",
    ],
)
def test_deep_nesting_ends_in_an_error(runner: ProgramRunner, source: str) -> None:
    assert runner.run(function(f"return {source}")).value is None
    assert runner.run(function("return 1")).value == 1


# The second layer alone


@pytest.mark.parametrize(
    "lines",
    [
        ("import os", "return os.fork()"),
        ("import os", "while True: os.fork()"),
        ("import os", "return os.execv('/bin/true', ['true'])"),
        ("import os", "return os.posix_spawn('/bin/true', ['true'], {})"),
        ("import os", "return 1 if os.system('true') == 0 else None"),
        ("import _thread", "_thread.start_new_thread(print, ())", "return 1"),
        ("return len(open('/etc/passwd').read())",),
        ("return len(open('/proc/self/environ').read())",),
        ("import os", "return len(os.listdir('/'))"),
        ("import os", "return os.stat('/').st_size"),
        ("import os", "return os.mkdir('/tmp/blockgen-hf-hostile')"),
        ("import os", "return os.unlink('/tmp/blockgen-hf-hostile')"),
        ("import os", "return os.pipe()[0]"),
        ("import os", "return os.memfd_create('x')"),
        ("import os, signal", "os.kill(os.getppid(), signal.SIGKILL)", "return 1"),
        ("import os", "os.killpg(1, 9)", "return 1"),
        ("import os", "return os.setuid(0) or 1"),
        ("import os", "return os.chroot('/tmp') or 1"),
        ("import time", "time.sleep(60)", "return 1"),
        ("import resource", "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "return 1"),
        ("import socket", "socket.socket()", "return 1"),
        ("import subprocess", "return 1"),
        ("import sys", "sys.exit(0)"),
        ("import os", "os._exit(0)"),
        ("import os", "os.abort()"),
        ("import ctypes", "ctypes.string_at(0)", "return 1"),
    ],
    ids="; ".join,
)
def test_the_process_can_only_calculate(runner: ProgramRunner, lines: tuple[str, ...]) -> None:
    assert unchecked(runner, *lines).value is None
    assert unchecked(runner, "return 6 * 7").value == 42


@pytest.mark.parametrize(
    "call", ["socket(2, 1, 0)", "fork()", "kill(1, 0)", "open(b'/etc/passwd', 0)", "ptrace(0, 0)"]
)
def test_the_kernel_refuses_calls_of_the_c_library(runner: ProgramRunner, call: str) -> None:
    """Beneath all of Python."""
    lines = ("import ctypes", "libc = ctypes.CDLL(None, use_errno=True)", f"if libc.{call} != -1: return 0")
    assert unchecked(runner, *lines, "return ctypes.get_errno()").value == 1  # EPERM


def test_no_descriptor_and_no_environment_is_left(runner: ProgramRunner) -> None:
    with open(__file__) as file:  # of the parent, not inherited
        lines = ("import os", "found = 0", "for fd in range(100):", "    try: os.read(fd, 1)")
        more = ("    except PermissionError: found += 1000", "    except OSError as error: found += error.errno != 9")
        assert file.fileno() > 0
        assert unchecked(runner, *lines, *more, "return found").value == 0  # EBADF everywhere
    assert unchecked(runner, "import os", "return len(set(os.environ) - {'LC_CTYPE'})").value == 0  # Python's own


def test_huge_output_is_cut(runner: ProgramRunner) -> None:
    flood = ("import os", "for fd in range(50):", "    while True:", "        try: os.write(fd, b'9' * 10 ** 6)")
    result = unchecked(runner, *flood, "        except OSError: break")
    assert result.value is None
    assert runner.run(function("for i in range(10 ** 4): print('a' * 1000)", "return 2")).value == 2


@pytest.mark.parametrize(
    "said",
    [
        b"number 1e999999999\n",  # hours, for whom takes it for a fraction
        b"number 1/0\n",
        b"number 5",
        b"number 5\nnumber 6\n",
        b"unsupported here\n",
        b'{"unsupported": "here"}',
        b'{"number": "1e999999999"}\n',
        b"number " + b"[" * 4000 + b"\n",
        "number 5\n".encode("utf-16-le"),
        b"error \xff\n",
    ],
)
def test_what_a_process_says_by_itself_harms_nobody(runner: ProgramRunner, said: bytes) -> None:
    lines = ("import os", "for fd in range(64):", f"    try: os.write(fd, {said!r})", "    except OSError: pass")
    started = time.monotonic()
    assert unchecked(runner, *lines, "os._exit(0)").value is None
    assert runner.run(function("return 6 * 7")).value == 42
    assert time.monotonic() - started < 10


def test_a_late_reply_is_not_taken_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with ProgramRunner(SECONDS) as runner:
        monkeypatch.setattr("blockgen_hf.evaluation.programs._GRACE", -SECONDS)  # nobody is waited for
        with pytest.raises(OSError, match="does not answer"):
            runner.run(function("return 1"))
        monkeypatch.undo()
        with pytest.raises(OSError, match="killed"):
            runner.run(function("return 2"))


def test_no_process_is_left_behind() -> None:
    with ProgramRunner(0.3) as runner:
        pid = runner._process.pid
        assert "not done" in str(unchecked(runner, "while True: pass").error)
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        assert children == ""
    assert not Path(f"/proc/{pid}").exists()


def test_many_programs_in_their_order() -> None:
    texts = [function(f"return {number}") for number in range(60)] + ["nothing"]
    started = time.monotonic()
    results = run_programs(texts, num_workers=3)
    assert [result.value for result in results] == [*range(60), None]
    assert time.monotonic() - started < 30  # some 10 ms each, on a quiet machine
    assert run_programs([]) == []


def test_an_interruption_does_not_wait_for_programs_in_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes while the main thread waits for the results."""
    started: list[str] = []
    is_interrupted = threading.Event()

    def run_slowly(runner: ProgramRunner, text: str) -> ProgramResult:
        started.append(text)
        is_interrupted.wait(30)
        return ProgramResult(None, "late")

    def interrupted_results(pool: Any, *args: Any) -> Any:
        futures = real_map(pool, *args)
        while len(started) < 2:
            time.sleep(0.01)

        def results() -> Iterator[Any]:
            threading.Timer(0.2, is_interrupted.set).start()
            raise KeyboardInterrupt
            yield from futures

        return results()

    real_map = ThreadPoolExecutor.map
    monkeypatch.setattr(ProgramRunner, "run", run_slowly)
    monkeypatch.setattr(ThreadPoolExecutor, "map", interrupted_results)
    with pytest.raises(KeyboardInterrupt):
        run_programs([f"program {number}" for number in range(50)], num_workers=2)
    assert started == ["program 0", "program 1"] or started == ["program 1", "program 0"]


def test_a_killed_process_raises() -> None:
    with ProgramRunner() as runner:
        os.kill(runner._process.pid, 9)
        runner._process.wait()
        with pytest.raises(OSError, match="killed"):
            runner.run(TINYGSM)


def test_unsupported_systems_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockgen_hf.evaluation.program_process.is_supported", lambda: False)
    with pytest.raises(OSError, match="Linux .* only"):
        ProgramRunner()


def test_bad_limits() -> None:
    for limits in ({"seconds": 0}, {"memory": -1}):
        with pytest.raises(ValueError, match="`seconds` and `memory` must be positive"):
            ProgramRunner(**limits)


def test_program_source() -> None:
    assert program_source("x = 1") == "x = 1"
    assert program_source("text\n```py\nx = 1\n```\nmore") == "x = 1\n"
    assert program_source("```\nx = 1") == "x = 1"
    assert program_source("```x = 1```") == "x = 1"
