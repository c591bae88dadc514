"""What drafts cost a row that shares its passes: more than a row alone, whose pass takes hardly longer for them."""

import time
from collections.abc import Callable

import torch

from ..generation.draft_lengths_blockgen import RoundCosts


# Of what was measured before, each time.
_MEMORY = 0.98
# Passes are told apart whose columns have so large a standard deviation, as a share of their mean.
_LEAST_SPREAD = 0.05


class _Means:
    """Moving averages of a few numbers; plain ones as long as there are few of them."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self._count = 0

    def add(self, *new: float) -> None:
        self._count += 1
        share = max(1 - _MEMORY, 1 / self._count)
        old = self.values or new
        self.values = [mean + share * (value - mean) for mean, value in zip(old, new, strict=True)]


class PassCosts:
    """
    What a row pays in a round of decoding, in seconds, with the load of the moment.

    A pass takes as long as a straight line over its columns says, padding too, which is fitted to the last passes. Its
    rows share what it takes without any column; each pays for its logits, and for its own work between passes, such
    as drawing tokens.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        # Of the engine's thread on CPUs, which requests that come in meanwhile do not disturb.
        self.clock = time.thread_time if device.type == "cpu" else time.perf_counter
        self._passes = _Means()
        self._projections = _Means()
        self._work = {False: _Means(), True: _Means()}

    def add_pass(self, rows: int, columns: int, seconds: float) -> None:
        """A pass of the trunk."""
        self._passes.add(rows, columns, seconds, columns**2, columns * seconds)

    def add_projection(self, positions: int, seconds: float) -> None:
        """A pass of the output layer."""
        self._projections.add(positions, seconds)

    def add_work(self, has_draft: bool, seconds: float) -> None:
        """What a row did in a round of its own, outside of passes."""
        self._work[has_draft].add(seconds)

    @property
    def knows_plain_round(self) -> bool:
        """Whether any row has made a round without a draft."""
        return bool(self._work[False].values)

    def of_token(self) -> float | None:
        """Of a token more in a pass, in rounds without a draft; None as long as this is not known."""
        parts = self._parts()
        return None if parts is None else parts[0] / parts[1]

    def of_draft_work(self) -> float:
        """Of what a row does for a draft outside of passes, in rounds without a draft."""
        parts, drafting = self._parts(), self._work[True].values
        if parts is None or not drafting:
            return 0.0
        return max(0.0, drafting[0] - self._work[False].values[0]) / parts[1]

    def _parts(self) -> tuple[float, float] | None:
        """Seconds of a token more, and of a round without a draft."""
        if not (self._passes.values and self._projections.values and self.knows_plain_round):
            return None
        rows, columns, seconds, squares, products = self._passes.values
        variance = squares - columns**2
        if variance <= (_LEAST_SPREAD * columns) ** 2:
            return None
        column = min(max((products - columns * seconds) / variance, 0.0), seconds / columns)
        positions, projecting = self._projections.values
        token = column + projecting / positions
        return token, (seconds - column * columns) / rows + token + self._work[False].values[0]


class SharedRoundCosts(RoundCosts):
    """
    Of a row that shares its passes with others.

    Args:
        device, draft_passes: see [`RoundCosts`].
        costs: of the passes.
        work_clock: seconds that the row has worked outside of them.
    """

    def __init__(
        self, device: torch.device, draft_passes: int, costs: PassCosts, work_clock: Callable[[], float]
    ) -> None:
        super().__init__(device, draft_passes)
        self._costs, self._work_clock = costs, work_clock
        self._started = 0.0

    @property
    def is_ready(self) -> bool:
        return self._costs.knows_plain_round

    def start(self) -> None:
        self._started = self._work_clock()

    def stop(self, passes: int, tokens: int) -> None:
        self._costs.add_work(tokens > 0, self._work_clock() - self._started)

    def of_token(self) -> float:
        found = self._costs.of_token()
        return super().of_token() if found is None else found

    def of_draft(self, length: int, accepted: float, is_fused: bool, num_rows: int) -> float:
        return super().of_draft(length, accepted, is_fused, num_rows) + self._costs.of_draft_work()


__all__ = ["PassCosts", "SharedRoundCosts"]
