# Copyright 2026 The blockgen-hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""How much speculation drafts: by what was accepted lately, and by what a draft costs."""

import time

import torch


class RoundCosts:
    """
    What tokens cost that a pass has beyond those of decoding autoregressively: hardly anything on accelerators; on
    CPUs more, the more rows there are. Everything is counted in rounds of autoregressive decoding.

    These are guesses that depend on nothing but the device, for rows whose text depends on what is drafted.

    Args:
        device (`torch.device`): where the model is.
        draft_passes (`int`): passes that make a draft and give no token; 0 where drafts are made by passes that do.
    """

    # What a token costs as long as nothing is known (docs/speed.md).
    _TOKEN_ON_CPU, _TOKEN_ELSEWHERE = 0.06, 0.001

    def __init__(self, device: torch.device, draft_passes: int = 0) -> None:
        self.draft_passes = draft_passes
        self._default = self._TOKEN_ON_CPU if device.type == "cpu" else self._TOKEN_ELSEWHERE

    @property
    def is_ready(self) -> bool:
        """Whether enough is known for drafts."""
        return True

    def start(self) -> None:
        """Before a round."""

    def stop(self, passes: int, tokens: int) -> None:
        """After a round with so many passes and tokens of all rows more than an autoregressive one."""

    def forget(self) -> None:
        """The rows of the batch have changed."""

    def of_token(self) -> float:
        """What a token costs."""
        return self._default

    def of_draft(self, length: int, accepted: float, is_fused: bool, num_rows: int) -> float:
        """
        What a draft of this length costs, with its verification and the tokens that are accepted and wait for the next
        pass, beyond the rounds whose tokens are certain.
        """
        if self.draft_passes:
            tokens = accepted + (self.draft_passes + 2) * length
        elif is_fused:  # a block behind each of `length + 1` prefixes
            tokens = accepted + length + (length + 1) ** 2 - 1
        else:
            tokens = accepted + 3 * length
        return self.draft_passes + self.of_token() * num_rows * tokens


class MeasuredRoundCosts(RoundCosts):
    """
    As a clock says, where the text does not depend on what is drafted.

    Args:
        device, draft_passes: see [`RoundCosts`].
    """

    _MEMORY = 0.8

    def __init__(self, device: torch.device, draft_passes: int = 0) -> None:
        super().__init__(device, draft_passes)
        # Of the process on CPUs, which other jobs on the machine disturb less; every round waits for its tokens.
        self._clock = time.process_time if device.type == "cpu" else time.perf_counter
        self._started = 0.0
        self.forget()

    def forget(self) -> None:
        """Of other rows only how much a token costs is known, until it is measured again."""
        self._plain: float | None = None
        self._drafting: tuple[float, float, float] | None = None  # seconds, passes and tokens of a round
        self._is_warm = False

    @property
    def is_ready(self) -> bool:
        """Whether it is known how long a round without a draft takes."""
        return self._plain is not None

    def start(self) -> None:
        self._started = self._clock()

    def stop(self, passes: int, tokens: int) -> None:
        seconds = self._clock() - self._started
        if tokens == 0:
            self._plain = seconds if self._plain is None else self._mixed(self._plain, seconds)
        elif not self._is_warm:  # the first pass of a kind takes longer
            self._is_warm = True
        else:
            new = (seconds, float(passes), float(tokens))
            old = self._drafting or new
            self._drafting = (self._mixed(old[0], new[0]), self._mixed(old[1], new[1]), self._mixed(old[2], new[2]))
            self._default = self.of_token()

    def _mixed(self, old: float, new: float) -> float:
        return self._MEMORY * old + (1 - self._MEMORY) * new

    def of_token(self) -> float:
        if not self._plain or self._drafting is None:
            return self._default
        seconds, passes, tokens = self._drafting
        return max(0.0, (seconds / self._plain - 1 - passes) / tokens)


class Acceptance:
    """
    How often a token of a draft is accepted if those before it are, by its place in the draft: moving averages.

    Args:
        longest (`int`): bound of a draft.
    """

    _MEMORY, _AT_FIRST = 0.9, 0.6

    def __init__(self, longest: int) -> None:
        self.rates = [self._AT_FIRST] * longest

    def record(self, drafted: list[int], accepted: list[int]) -> None:
        """How many tokens were drafted and accepted in a round, of one row or of several."""
        for place in range(max(drafted)):
            tried = [kept > place for kept, length in zip(accepted, drafted, strict=True) if kept >= place < length]
            if not tried:
                break
            share = len(tried) / len(drafted)
            self.rates[place] += (1 - self._MEMORY) * share * (sum(tried) / len(tried) - self.rates[place])


class DraftLength:
    """
    How long the next draft of a row is, or of a batch: as long as gives most tokens in a given time.

    Where drafts do not pay, there is none for the next 16 tokens, then for 32 after another failure, and so on up to
    256.

    Args:
        longest (`int`): bound of a draft.
        costs ([`RoundCosts`]): what drafts cost.
        ways (`tuple[bool, ...]`): whether drafts may be fused with the verification, or apart, or either.
    """

    _MEMORY = 0.9
    _FIRST_WAIT, _LONGEST_WAIT = 16, 256
    # Four failures in a row stop a row that never drafted before, and one failure a row that has waited.
    _CREDIT, _CREDIT_LATER = 0.5, 0.1
    # Rounds that drafts have to give beyond their cost, which leaves out that rows end at different times.
    _MARGIN = 0.05

    def __init__(self, longest: int, costs: RoundCosts, ways: tuple[bool, ...]) -> None:
        self.longest = longest
        self.costs = costs
        self.ways = ways
        self.acceptance = Acceptance(longest)
        self.waiting = 0
        self.next_wait = self._FIRST_WAIT
        self.balance: float | None = None  # what drafts give more than they cost, a moving average

    def best(self, num_rows: int = 1) -> tuple[int, bool]:
        """The length of the next draft and whether it is fused with a verification; 0: no draft."""
        if self.waiting > 0:
            return 0, False
        found, largest = (1, self.ways[0]), 0.0
        for is_fused in self.ways:
            certain = 1 if is_fused or self.costs.draft_passes else 2
            accepted, chance, last = 0.0, 1.0, 0.0
            for length, rate in enumerate(self.acceptance.rates, start=1):
                chance *= rate
                accepted += chance
                cost = self.costs.of_draft(length, accepted, is_fused, num_rows)
                speed = (certain + accepted) / (certain + cost)
                if speed > largest:
                    found, largest = (length, is_fused), speed
                if speed < last:
                    break
                last = speed
        return found

    def wait(self, num_tokens: int = 1) -> None:
        """After so many tokens without a draft."""
        self.waiting = max(0, self.waiting - num_tokens)

    def record(self, drafted: list[int], accepted: list[int], is_fused: bool) -> None:
        """After the verification of drafts, of one row or of several."""
        self.acceptance.record(drafted, accepted)
        mean = sum(accepted) / len(accepted)
        cost = self.costs.of_draft(max(drafted), mean, is_fused, len(accepted))
        if self.balance is None:
            self.balance = self._CREDIT * cost
        self.balance = self._MEMORY * self.balance + (1 - self._MEMORY) * (mean - cost - self._MARGIN)
        if self.balance < 0:
            self.waiting = self.next_wait
            self.next_wait = min(2 * self.next_wait, self._LONGEST_WAIT)
            self.balance = self._CREDIT_LATER * cost
        elif mean > cost + self._MARGIN:
            self.next_wait = self._FIRST_WAIT


__all__ = ["Acceptance", "DraftLength", "MeasuredRoundCosts", "RoundCosts"]
