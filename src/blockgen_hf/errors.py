"""What other libraries' errors say, in a line."""

import errno


# How libraries say that a disk is full that do not hand on the error of the operating system: safetensors, pyarrow;
# torch.
_FULL = ("no space left on device", "os error 28", "pytorchstreamwriter failed", "inline_container.cc")


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says anything, or the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def full_disk_error(error: BaseException | None) -> BaseException | None:
    """Of an error and those that it came from, the one of a disk that is full."""
    while error is not None:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if is_full or any(words in str(error).lower() for words in _FULL):
            return error
        error = error.__cause__ or error.__context__
    return None


__all__ = ["first_line", "full_disk_error"]
