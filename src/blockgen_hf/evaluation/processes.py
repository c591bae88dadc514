"""Several processes that evaluate together: `accelerate launch`, `torchrun`, or those of an `Accelerator`."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..run_folders import lock_folder


# Processes wait for the slowest one, whose texts may take hours.
_PATIENCE = timedelta(days=1)


def launched_process(on_cpu: bool) -> Any:
    """
    Which of several processes this is, accelerate's `PartialState`, each on a device of its own; None if it is the
    only one.

    Args:
        on_cpu: whether the model is on the CPU. Without being told so, accelerate takes the processes of a machine
            without accelerators for single ones, each of which would do all the work.

    Raises:
        ValueError: several were launched, but do not find one another.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    is_initialized = dist.is_available() and dist.is_initialized()
    if count < 2 and not is_initialized:
        return None
    from accelerate import PartialState

    state = PartialState() if is_initialized else PartialState(cpu=on_cpu, timeout=_PATIENCE)
    if state.num_processes < count:
        raise ValueError(
            f"{count} processes were launched, but accelerate makes {state.num_processes} of them: launch them with "
            "torchrun, or `accelerate launch` with a configuration whose `distributed_type` is MULTI_CPU or MULTI_GPU."
        )
    return state


class Processes:
    """
    Who takes part, and how all learn of what one has.

    Args:
        accelerator (`Accelerator` or `PartialState`, *optional*): default: the processes of the launch, if any.
        on_cpu (`bool`): whether the model is on the CPU.
    """

    def __init__(self, accelerator: Any = None, on_cpu: bool = False) -> None:
        self._state = launched_process(on_cpu) if accelerator is None else accelerator
        self.rank: int = 0 if self._state is None else self._state.process_index
        self.count: int = 1 if self._state is None else self._state.num_processes

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            self._state.wait_for_everyone()

    def broadcast(self, value: Any) -> Any:
        """What the main process has."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    @contextmanager
    def locking(self, folder: Path | str) -> Iterator[None]:
        """
        Keeps others from writing to a folder, the `output_dir` of an evaluation, in the name of all processes.

        Raises:
            ValueError: in every process; it is a file, or another process writes to it.
            OSError: in every process, see [`lock_folder`].
        """
        error: Exception | None = None
        with ExitStack() as stack:
            if self.is_main:
                try:
                    if Path(folder).exists() and not Path(folder).is_dir():
                        raise ValueError(f"`output_dir` must be a folder, but {folder} is a file.")
                    stack.enter_context(lock_folder(folder))
                except (ValueError, OSError) as refusal:
                    error = refusal
            error = self.broadcast(error)
            if error is not None:
                raise error
            yield

    def gather(self, value: Any) -> list[Any]:
        """What each process has, in their order."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        found: list[Any] = gather_object([value])
        return found


__all__ = ["Processes", "launched_process"]
