"""Ctrl-C while a model is trained."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


_NOTICE = b"\nStopping after this step to save a checkpoint. Press Ctrl-C again to stop at once.\n"


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C ends the training after the current step, with a checkpoint; a second one ends it at once."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, SIGINT is a request. Only the main thread of a process hears signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        process = os.getpid()

        def handle(*_: Any) -> None:
            if os.getpid() != process:
                return  # a worker that loads data, which a terminal interrupts too
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True
            os.write(2, _NOTICE)  # whatever Python is writing at this moment

        before = signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.requested:
            control.should_evaluate = False
            self._stop(control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.requested:
            self._stop(control)

    def _stop(self, control: TrainerControl) -> None:
        control.should_save = control.should_training_stop = True


__all__ = ["StopOnInterrupt"]
