"""
Forward passes that rows share.

A generation of one row asks for a pass of the trunk, or of the output layer, and waits. Passes that wait are joined to
one batch: tokens are padded, positions and blocks say who sees whom, and each row gets back what a pass of its own
would have given. So the rows may be anything: at other steps, in other blocks, of other decodings and settings.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..modeling.releases_blockgen import named_cache
from .cache_slots import CacheSlots, RowCache
from .pass_costs import PassCosts


# Logits are large: so many positions are projected to the vocabulary at once.
_MOST_PROJECTED = 512
# Passes are joined where that costs at most half more than their tokens alone, and as much as a pass of 64 tokens.
_MOST_PADDING = 0.5
_COST_OF_A_PASS = 64
_NO_BLOCK = -1


@dataclass
class TrunkCall:
    """
    A pass of the trunk for one row: the arguments of [`BlockGenModel.forward`] for a batch of one.

    Args:
        cache: of the row.
        arguments: all others.
        result: hidden states, when the pass is done.
        turn: when it began to wait.
    """

    cache: RowCache
    arguments: dict[str, Any]
    result: Any = None
    turn: int = 0

    @property
    def num_clean(self) -> int:
        return self.arguments["input_ids"].shape[1]

    @property
    def num_noisy(self) -> int:
        return self.arguments["noisy_input_ids"].shape[1]

    @property
    def num_committed(self) -> int:
        if not self.arguments["use_cache"]:
            return 0
        count = self.arguments["num_committed"]
        return self.num_clean if count is None else count

    @property
    def num_kept(self) -> int:
        """How many hidden states are asked for, of the last of the clean and noisy tokens."""
        count = self.arguments["num_kept"]
        return self.num_noisy if count is None else count

    @property
    def has_anchors(self) -> bool:
        return self.arguments["anchor_rows"] is not None

    def noisy_blocks(self) -> torch.Tensor:
        """The block of each noisy token, `[1, N]`, from 0 on."""
        blocks = self.arguments["noisy_block_ids"]
        positions = self.arguments["noisy_position_ids"]
        if blocks is not None or not self.num_noisy:
            return positions if blocks is None else blocks
        return (positions - positions.amin()) // self.arguments["block_size"]

    def first_part(self, num_tokens: int) -> "TrunkCall":
        """A pass that only commits the first so many tokens."""
        first = {name: self.arguments[name][:, :num_tokens] for name in ("input_ids", "position_ids")}
        none = {name: self.arguments[name][:, :0] for name in ("noisy_input_ids", "noisy_position_ids")}
        others = dict(
            noisy_block_ids=None,
            isolate_first=False,
            anchor_rows=None,
            num_committed=None,
            num_kept=None,
            is_full=False,
        )
        return TrunkCall(self.cache, {**self.arguments, **first, **none, **others}, turn=self.turn)

    def drop_first_part(self, num_tokens: int) -> None:
        """They are committed now."""
        count = self.num_committed - num_tokens
        rest = {name: self.arguments[name][:, num_tokens:] for name in ("input_ids", "position_ids")}
        self.arguments = {**self.arguments, **rest, "num_committed": count}


@dataclass
class HeadCall:
    """Hidden states `[..., d]` of one row that ask for their logits `[..., V]`."""

    hidden_states: torch.Tensor
    result: Any = None
    turn: int = 0

    @property
    def num_positions(self) -> int:
        return self.hidden_states.shape[:-1].numel()


Call = TrunkCall | HeadCall


@dataclass
class PassCounts:
    """What the passes of a model were: of the trunk, the rows in them, their tokens, and padding beside these."""

    passes: int = 0
    rows: int = 0
    tokens: int = 0
    padding: int = 0


@dataclass
class SharedPasses:
    """
    The forward passes of a model, for many rows at once.

    Args:
        model: it computes them.
        prefill_chunk: longer prompts are committed in passes of so many tokens, between which others have their turn.
    """

    model: PreTrainedModel
    prefill_chunk: int
    counts: PassCounts = field(default_factory=PassCounts)

    def __post_init__(self) -> None:
        config = self.model.config
        self.trunk, self.head = self.model.base_model, self.model.get_output_embeddings()
        self.slots = CacheSlots(config.num_hidden_layers)
        self.costs = PassCosts(self.model.device)
        # Tokens of a block see one another under block-causal attention: they are committed together.
        grid = config.block_sizes[0] if config.clean_attention == "block_causal" else 1
        self.prefill_chunk += -self.prefill_chunk % grid

    def choose(self, calls: Sequence[Call]) -> list[Call]:
        """Of the calls that wait, those that take part in the next pass."""
        calls = sorted(calls, key=lambda call: call.turn)
        projections = [call for call in calls if isinstance(call, HeadCall)]
        if projections:  # what is half done goes first
            return list(choose_projections(projections))
        trunk_calls = [call for call in calls if isinstance(call, TrunkCall)]
        parts = [self._next_part(call) for call in trunk_calls]
        return list(choose_together(trunk_calls, parts, self.model.config.hidden_size))

    def run(self, calls: Sequence[Call]) -> None:
        """
        One pass over calls of one kind. They have their `result` then, but for a prompt of which only a part is read.
        """
        projections = [call for call in calls if isinstance(call, HeadCall)]
        if projections:
            self._project(projections)
        trunk_calls = [call for call in calls if isinstance(call, TrunkCall)]
        if trunk_calls:
            self._run_trunk(trunk_calls)

    def _project(self, calls: list[HeadCall]) -> None:
        started = self.costs.clock()
        logits = self.head(torch.cat([call.hidden_states.flatten(0, -2) for call in calls]))
        self.costs.add_projection(len(logits), self.costs.clock() - started)
        parts = logits.split([call.num_positions for call in calls])
        for call, part in zip(calls, parts, strict=True):
            call.result = part.unflatten(0, call.hidden_states.shape[:-1])

    def _run_trunk(self, calls: list[TrunkCall]) -> None:
        calls = sorted(calls, key=lambda call: call.cache.slot)
        parts = [self._next_part(call) for call in calls]
        for call, part, states in zip(calls, parts, self._forward(parts), strict=True):
            if part is call:
                call.result = BaseModelOutputWithPast(last_hidden_state=states, **named_cache(call.cache))
            else:
                call.drop_first_part(part.num_clean)

    def _next_part(self, call: TrunkCall) -> TrunkCall:
        return call.first_part(self.prefill_chunk) if call.num_committed > self.prefill_chunk else call

    def _forward(self, calls: list[TrunkCall]) -> list[torch.Tensor]:
        """One pass: the hidden states of each row, `[1, n, d]`."""
        num_clean, num_noisy = max(call.num_clean for call in calls), max(call.num_noisy for call in calls)
        started = self.costs.clock()
        rows = [call.cache for call in calls]
        cache, start = self.slots.for_pass(rows, num_clean + num_noisy)
        arguments = calls[0].arguments if len(calls) == 1 else joined_arguments(calls, start, num_clean, num_noisy)
        states = self.trunk(cache=cache, **arguments).last_hidden_state
        self.slots.store(cache, rows, [call.num_committed for call in calls], start)
        columns = len(calls) * (num_clean + num_noisy)
        self.costs.add_pass(len(calls), columns, self.costs.clock() - started)
        tokens = sum(call.num_clean + call.num_noisy for call in calls)
        self.counts.passes += 1
        self.counts.rows += len(calls)
        self.counts.tokens += tokens
        self.counts.padding += columns - tokens
        if len(calls) == 1:
            return [with_length(states, calls[0].num_kept)]
        return [kept_states(states[index], call, num_noisy) for index, call in enumerate(calls)]


def kept_states(states: torch.Tensor, call: TrunkCall, num_noisy: int) -> torch.Tensor:
    """
    What a call asked for, `[1, kept, d]`, of the hidden states of its row in a joined pass: of N noisy columns, or of
    the clean ones before them too.
    """
    num_clean = len(states) - num_noisy
    noisy = states[num_clean:][: call.num_noisy]
    if num_clean == 0 or call.num_kept <= call.num_noisy:
        return noisy[None]
    return with_length(torch.cat([states[: call.num_clean], noisy])[None], call.num_kept)


def with_length(states: torch.Tensor, length: int) -> torch.Tensor:
    """The last so many states `[1, n, d]`; zeros for those of the first part of a prompt, which nobody looks at."""
    missing = length - states.shape[1]
    return torch.nn.functional.pad(states, (0, 0, missing, 0)) if missing > 0 else states[:, -missing:]


def choose_projections(calls: list[HeadCall]) -> list[HeadCall]:
    """As many as may be projected at once, and one at least."""
    chosen, room = calls[:1], _MOST_PROJECTED - calls[0].num_positions
    for call in calls[1:]:
        if call.num_positions <= room:
            chosen.append(call)
            room -= call.num_positions
    return chosen


def choose_together(calls: list[TrunkCall], parts: list[TrunkCall], hidden_size: int) -> list[TrunkCall]:
    """
    The call that waits longest, and with it those whose padding costs less than passes of their own.

    Args:
        calls: all that wait, the first for the longest time.
        parts: what each of them needs next.
        hidden_size: of the model. For a token, 6 d keys cost as much as all products with weights.
    """
    if not calls:
        return []

    def cost(part: TrunkCall) -> float:
        return (part.num_clean + part.num_noisy) * (1 + part.cache.length / (6 * hidden_size))

    first = parts[0]
    num_clean, num_noisy, length = first.num_clean, first.num_noisy, first.cache.length
    chosen: list[TrunkCall] = []
    sum_of_costs = 0.0
    # By how they differ from the first, which comes first itself.
    for index in sorted(range(len(calls)), key=lambda index: abs(cost(parts[index]) - cost(first))):
        part = parts[index]
        clean, noisy = max(num_clean, part.num_clean), max(num_noisy, part.num_noisy)
        longest = max(length, part.cache.length)
        joined = (len(chosen) + 1) * (clean + noisy) * (1 + longest / (6 * hidden_size))
        apart = sum_of_costs + cost(part)
        is_too_much = joined > (1 + _MOST_PADDING) * apart + _COST_OF_A_PASS
        if chosen and (is_too_much or part.has_anchors != first.has_anchors):
            continue
        chosen.append(calls[index])
        num_clean, num_noisy, length, sum_of_costs = clean, noisy, longest, apart
    return chosen


def joined_arguments(calls: list[TrunkCall], num_cached: int, num_clean: int, num_noisy: int) -> dict[str, Any]:
    """
    The arguments of one pass over several rows.

    Args:
        num_cached: columns of the cache of the pass: each row has its tokens in the first of them.
        num_clean, num_noisy: columns of clean and of noisy tokens: of each row in the first of them.
    """
    arguments = [call.arguments for call in calls]

    def column_wise(name: str, length: int) -> torch.Tensor:
        return padded([each[name] for each in arguments], length)

    def valid(lengths: list[int], length: int) -> torch.Tensor:
        return torch.arange(length, device=device) < torch.tensor(lengths, device=device)[:, None]

    device = arguments[0]["input_ids"].device
    cached = valid([call.cache.length for call in calls], num_cached)
    clean = valid([call.num_clean for call in calls], num_clean)
    levels = [each["noise_level"] for each in arguments]
    noise_level = None
    if all(level is not None for level in levels):  # where the model looks at it, it is always given
        levels = [
            torch.as_tensor(level, dtype=torch.float64, device=device).view(1, -1).expand(1, call.num_noisy)
            for level, call in zip(levels, calls, strict=True)
        ]
        noise_level = padded(levels, num_noisy, 1.0)
    isolated = [each["isolate_first"] for each in arguments]
    commits = any(call.num_committed for call in calls)
    keeps_clean = any(call.num_kept > call.num_noisy for call in calls)
    return dict(
        input_ids=column_wise("input_ids", num_clean),
        noisy_input_ids=column_wise("noisy_input_ids", num_noisy),
        position_ids=column_wise("position_ids", num_clean),
        noisy_position_ids=column_wise("noisy_position_ids", num_noisy),
        noisy_block_ids=(padded([call.noisy_blocks() for call in calls], num_noisy, _NO_BLOCK) if num_noisy else None),
        isolate_first=torch.tensor(isolated, device=device)[:, None] if any(isolated) else False,
        noisy_mask=valid([call.num_noisy for call in calls], num_noisy),
        attention_mask=torch.cat([cached, clean], dim=1) if num_cached + num_clean else None,
        # Those that a row does not keep are overwritten by its next ones.
        use_cache=commits,
        num_committed=num_clean if commits else None,
        noise_level=noise_level,
        num_kept=num_clean + num_noisy if keeps_clean else None,
        anchor_rows=padded([each["anchor_rows"] for each in arguments], num_noisy) if calls[0].has_anchors else None,
        modulations=arguments[0].get("modulations"),
    )


def padded(rows: list[torch.Tensor], length: int, value: float = 0) -> torch.Tensor:
    """`[1, n]` each, to `[B, length]`."""
    return torch.cat([torch.nn.functional.pad(row, (0, length - row.shape[1]), value=value) for row in rows])


__all__ = ["Call", "HeadCall", "PassCounts", "SharedPasses", "TrunkCall", "choose_together"]
