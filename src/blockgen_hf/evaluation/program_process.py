"""
The process in which a stranger's program runs: what a program may be written with, and what its process may do.

`programs.py` starts this file as a script, in an isolated interpreter. It reads requests, a JSON object a line, forks
a child for each, and answers with a JSON object a line. The child shuts itself in, checks the program, runs it and
dies. What it says after that is a text, whatever the program made of it, and is never parsed here. Only the standard
library is imported: this file must start quickly.
"""

import ast
import builtins
import ctypes
import decimal
import fractions
import itertools
import json
import math
import os
import platform
import resource
import select
import signal
import struct
import sys
import time
import unicodedata  # noqa: F401  the parser looks for it at names that are not ASCII, and a child cannot import it
from types import ModuleType
from typing import Any


MAX_SOURCE = 20_000  # characters
MAX_DIGITS = 400
_MAX_REPLY = 4096  # bytes

# 1. The language

_MODULES: dict[str, ModuleType] = {
    "math": math,
    "fractions": fractions,
    "decimal": decimal,
    "itertools": itertools,
}
_PUBLIC: dict[str, frozenset[str]] = {
    "math": frozenset(name for name in dir(math) if not name.startswith("_")),
    "fractions": frozenset({"Fraction"}),
    "decimal": frozenset({"Decimal", *(name for name in dir(decimal) if name.startswith("ROUND_"))}),
    "itertools": frozenset(name for name in dir(itertools) if not name.startswith("_")),
}
_METHOD_NAMES = """
append extend insert pop remove index count sort reverse copy add discard union intersection difference get items keys
values update upper lower strip split join replace startswith endswith numerator denominator quantize is_integer
from_iterable
"""
_ATTRIBUTES = frozenset(_METHOD_NAMES.split()).union(*_PUBLIC.values())
_BUILTIN_NAMES = """
abs all any bool dict divmod enumerate filter float frozenset int isinstance iter len list map max min next pow print
range reversed round set sorted str sum tuple zip
"""
_BUILTINS = frozenset(_BUILTIN_NAMES.split())
_NODES = frozenset(
    {
        *(ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Return, ast.Lambda, ast.Call, ast.keyword),
        *(ast.Assign, ast.AugAssign, ast.AnnAssign, ast.NamedExpr, ast.Name, ast.Load, ast.Store, ast.Constant),
        *(ast.For, ast.While, ast.If, ast.IfExp, ast.Break, ast.Continue, ast.Pass, ast.Expr),
        *(ast.Import, ast.ImportFrom, ast.alias, ast.Attribute, ast.Subscript, ast.Slice, ast.Starred),
        *(ast.Tuple, ast.List, ast.Set, ast.Dict, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
        *(ast.comprehension, ast.JoinedStr, ast.FormattedValue, ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp),
        *(ast.And, ast.Or, ast.Not, ast.USub, ast.UAdd, ast.Invert),
        *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow),
        *(ast.LShift, ast.RShift, ast.BitOr, ast.BitXor, ast.BitAnd),
        *(ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Is, ast.IsNot, ast.In, ast.NotIn),
    }
)


class Refused(ValueError):
    """A program that is not run."""


def check_program(source: str) -> ast.Module:
    """
    The syntax tree of a program, without annotations, if it is written in what is allowed: functions, loops, numbers,
    strings, collections, and names of an allow-list.

    Raises:
        Refused: it is not. The message says what is in the way.
    """
    if len(source) > MAX_SOURCE:
        raise Refused(f"a program of {len(source)} characters")
    try:
        tree = ast.parse(source)
        nodes = list(ast.walk(tree))
    except (SyntaxError, ValueError) as error:
        raise Refused(f"no Python: {error}") from error
    except (RecursionError, MemoryError) as error:
        raise Refused("nested too deeply") from error
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    for node in nodes:
        if type(node) not in _NODES:
            raise Refused(f"{type(node).__name__} is not allowed")
        _check_node(node, bound)
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.copy_location(ast.Constant(None), node.annotation)
    return tree


def _check_node(node: ast.AST, bound: set[str]) -> None:
    if isinstance(node, ast.Name):
        _check_name(node.id)
        is_read = isinstance(node.ctx, ast.Load) and node.id not in bound
        if is_read and hasattr(builtins, node.id) and node.id not in _BUILTINS:
            raise Refused(f"`{node.id}` is not allowed")
    elif isinstance(node, ast.Attribute):
        if node.attr not in _ATTRIBUTES or not isinstance(node.ctx, ast.Load):
            raise Refused(f"the attribute `{node.attr}` is not allowed")
    elif isinstance(node, ast.FunctionDef):
        _check_name(node.name)
        if node.decorator_list:
            raise Refused("decorators are not allowed")
    elif isinstance(node, (ast.arg, ast.keyword)):
        _check_name(node.arg or "_")
    elif isinstance(node, ast.Import):
        for alias in node.names:
            _check_name(alias.asname or "_")
            if alias.name not in _MODULES:
                raise Refused(f"`import {alias.name}` is not allowed")
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
            _check_name(alias.asname or "_")
            if node.level or alias.name not in _PUBLIC.get(node.module or "", ()):
                raise Refused(f"`from {node.module} import {alias.name}` is not allowed")
    elif isinstance(node, ast.Constant) and not isinstance(node.value, (int, float, str, type(None))):
        raise Refused(f"a constant of type {type(node.value).__name__} is not allowed")


def _check_name(name: str) -> None:
    if name.startswith("_") and name != "_":
        raise Refused(f"`{name}` is not allowed")


def _limited_import(name: str, *_: Any) -> ModuleType:
    if name not in _MODULES:
        raise ImportError(f"`import {name}` is not allowed")
    return _MODULES[name]


def _limited_builtins() -> dict[str, Any]:
    allowed = {name: getattr(builtins, name) for name in _BUILTINS}
    return {**allowed, "print": lambda *values, **options: None, "__import__": _limited_import}


# 2. What a program returns


def evaluate(source: str, checked: bool) -> str:
    """
    The number, as text, that the last function returns which needs no argument.

    Args:
        checked: whether to refuse what is not in the allow-lists. Tests alone leave that out.

    Raises:
        Refused: a program that may not be run, has no such function, or returns no number.
        Exception: whatever the program raises.
    """
    tree = check_program(source) if checked else ast.parse(source)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and _needs_nothing(node.args)]
    if not functions:
        raise Refused("no function that needs no argument")
    variables: dict[str, Any] = {"__name__": "program"}
    variables["__builtins__"] = _limited_builtins() if checked else builtins
    exec(compile(tree, "program", "exec"), variables)
    return number_text(variables[functions[-1].name]())


def _needs_nothing(arguments: ast.arguments) -> bool:
    positional = len(arguments.posonlyargs) + len(arguments.args)
    return positional == len(arguments.defaults) and None not in arguments.kw_defaults


def number_text(value: object) -> str:
    """
    A number as `Fraction` reads it. A float, which is not exact, is rounded to 12 digits: 0.07 * 100 is 7.

    Raises:
        Refused: no number, or one of more than 400 digits.
    """
    most = 10**MAX_DIGITS
    if type(value) is int and abs(value) < most:
        return str(value)
    if type(value) is float and math.isfinite(value):
        return format(value, ".12g")
    if type(value) is fractions.Fraction and max(abs(value.numerator), value.denominator) < most:
        return f"{value.numerator}/{value.denominator}"
    if type(value) is decimal.Decimal and value.is_finite():
        text = str(value)
        if len(text) <= MAX_DIGITS and abs(value.adjusted()) <= MAX_DIGITS:
            return text
    raise Refused(f"a {type(value).__name__} was returned, not a number of at most {MAX_DIGITS} digits")


# 3. The process

# Of the system calls, those of an interpreter that calculates: memory, locks, time, the result, the end.
_ARCHITECTURES: dict[str, tuple[int, tuple[int, ...]]] = {
    # read write mmap mprotect munmap brk sigprocmask sigreturn sched_yield mremap madvise exit gettimeofday futex
    # clock_gettime exit_group getrandom
    "x86_64": (0xC000003E, (0, 1, 9, 10, 11, 12, 14, 15, 24, 25, 28, 60, 96, 202, 228, 231, 318)),
    "aarch64": (0xC00000B7, (63, 64, 222, 226, 215, 214, 135, 139, 124, 216, 233, 93, 169, 98, 113, 94, 278)),
}
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 1, 22, 38, 2
_KILL, _REFUSE, _ALLOW = 0x80000000, 0x00050001, 0x7FFF0000  # the process; with EPERM; the call
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06


def is_supported() -> bool:
    """Whether this module knows how to shut in a process on this machine."""
    return sys.platform == "linux" and platform.machine() in _ARCHITECTURES and sys.maxsize > 2**32


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def shut_in(result: int, seconds: float, memory: int, parent: int) -> None:
    """
    Takes from this process, for ever, everything but memory, a clock and the file descriptor `result`. It dies with
    the process `parent`.

    Raises:
        OSError: the kernel does not do so.
    """
    os.closerange(0, result)
    os.closerange(result + 1, 4096)
    libc = ctypes.CDLL(None, use_errno=True)
    _prctl(libc, _PR_SET_PDEATHSIG, signal.SIGKILL, 0)
    if os.getppid() != parent:  # it died before
        raise OSError("the parent process is dead")
    cpu_seconds = math.ceil(seconds) + 1
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: 0,
    }
    for name, limit in limits.items():
        resource.setrlimit(name, (limit, limit))
    architecture, calls = _ARCHITECTURES[platform.machine()]
    # seccomp_data: the number of the call at 0, the architecture at 4.
    program = [(_LOAD, 0, 0, 4), (_JUMP_IF_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    program += [(_JUMP_IF_EQUAL, len(calls) - place, 0, call) for place, call in enumerate(calls)]
    program += [(_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)]
    instructions = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    _prctl(libc, _PR_SET_NO_NEW_PRIVS, 1, 0)
    bpf = _Filter(len(program), instructions)
    _prctl(libc, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(bpf))


def _prctl(libc: ctypes.CDLL, option: int, value: int, more: int) -> None:
    longs = [ctypes.c_ulong(number) for number in (value, more, 0, 0)]
    if libc.prctl(ctypes.c_int(option), *longs) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def _child(result: int, request: dict[str, Any], parent: int) -> None:
    try:
        os.setsid()
        try:
            shut_in(result, request["seconds"], request["memory"], parent)
        except (OSError, ValueError) as error:
            os.write(result, b"-" + _line("unsupported", str(error)))
        else:
            os.write(result, b"+")  # before the program can write anything
            os.write(result, _line(*_answer(request)))
    finally:
        os._exit(0)


def _line(kind: str, text: str) -> bytes:
    return f"{kind} {text}\n".encode("utf-8", errors="backslashreplace")


def _answer(request: dict[str, Any]) -> tuple[str, str]:
    try:
        return "number", evaluate(request["source"], request["checked"])
    except Refused as error:
        return "error", f"refused: {error}"[:500]
    except MemoryError:
        return "error", "out of memory"
    except BaseException as error:  # of the program, SystemExit too
        return "error", _message(error)


def _message(error: BaseException) -> str:
    name = type(error).__name__[:100]
    try:
        return f"{name}: {str(error)[:300]}"
    except Exception:  # such as a KeyError of an integer of more digits than Python writes
        return name


def _run(request: dict[str, Any]) -> dict[str, str]:
    """What a child says: a `number`, an `error`, or why it is `unsupported` to shut it in. All are any text."""
    readable, writable = os.pipe()
    deadline = time.monotonic() + request["seconds"]
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.close(readable)
        _child(writable, request, parent)
    os.close(writable)
    reply, is_late = b"", False
    while len(reply) <= _MAX_REPLY:
        ready, _, _ = select.select([readable], [], [], max(0.0, deadline - time.monotonic()))
        chunk = os.read(readable, _MAX_REPLY + 1) if ready else b""
        is_late = not ready
        reply += chunk
        if not chunk:
            break
    os.close(readable)
    os.kill(pid, signal.SIGKILL)  # it cannot have left children, nor its session
    _, status = os.waitpid(pid, 0)
    if is_late:
        return {"error": f"not done after {request['seconds']:g} s"}
    if reply.endswith(b"\n") and len(reply) <= _MAX_REPLY:
        kind, _, text = reply[1:-1].decode("utf-8", errors="replace").partition(" ")
        if reply[:1] == b"-" or kind in ("number", "error"):
            return {kind: text}
    cause = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "no reply"
    return {"error": f"the process ended: {cause}"}


def main() -> None:
    """Answers requests `{"source", "seconds", "memory", "checked"}` until there are no more."""
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(_run(json.loads(line))).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
