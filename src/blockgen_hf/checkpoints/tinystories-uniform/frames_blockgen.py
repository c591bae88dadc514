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
"""
What a denoising looks like: the frames of a text, one after each step, while it is generated (docs/replay.md).

A frame is plain data that `json` can write. It says what the step was and what it cost so far, and for every token of
the text what is known of it. Frames have token ids; `blockgen_hf.generation.frames` adds the texts of the tokens.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from transformers.generation.configuration_utils import GenerationConfig

from .decoding_state_blockgen import DecodingState
from .logits_blockgen import Prediction


FORMAT, VERSION = "blockgen-frames", 1

# What a token can be: of the prompt, drawn by block size 1, part of a block in work, or of a finished block.
GIVEN, AR, DRAFT, COMMITTED = "given", "ar", "draft", "committed"
STATES = (GIVEN, AR, DRAFT, COMMITTED)
# What a step did to a token: speculation accepts or rejects it, ARPC and revisions send it back to noise.
MARKS = ("accepted", "rejected", "renoised", "revised")
EVENTS = ("prompt", "noise", "denoise", "propose", "correct", "commit", "ar", "draft", "verify", "revise", "end")

Position = dict[str, Any]
Frame = dict[str, Any]


class RowFrames:
    """
    The frames of one text.

    Args:
        prompt (`list[int]`): its tokens.
        listener (`Callable`, *optional*): is called with each frame.
        keeps_all (`bool`, defaults to `True`): whether `frames` has all of them, or the last alone, where they are for
            the listener only.
    """

    def __init__(
        self, prompt: list[int], listener: Callable[[Frame], None] | None = None, keeps_all: bool = True
    ) -> None:
        self.positions: list[Position] = [{"token": token, "state": GIVEN, "renoised": 0} for token in prompt]
        self.num_given = len(prompt)
        self.frames: list[Frame] = []
        self.listener = listener
        self.keeps_all = keeps_all
        self._facts: dict[int, Position] = {}
        self._put("prompt", 0, 0, 0)

    def note(self, offset: int, **facts: Any) -> None:
        """What a pass says of the new token `offset`; the next frame shows it."""
        self._facts.setdefault(offset, {}).update(facts)

    def new_token(self, offset: int) -> Position:
        """What stands there, or nothing."""
        index = self.num_given + offset
        return self.positions[index] if self.num_given <= index < len(self.positions) else {}

    def show(
        self,
        event: str,
        block: int,
        step: int,
        num_function_evaluations: int,
        changes: dict[int, Position],
        length: int | None = None,
    ) -> None:
        """
        The frame after a step, unless the step neither changed nor cost anything.

        Args:
            changes: what is new of the new tokens, by their index.
            length: how many new tokens the text has, where it ends.
        """
        self.positions = [
            {name: value for name, value in position.items() if name not in ("mark", "was")}
            for position in self.positions
            if position.get("mark") != "rejected" or position["state"] != DRAFT
        ]
        # What goes back to noise was judged before, what is drawn is judged as it is now.
        judged_before = event in ("correct", "revise")
        if judged_before:
            self._take_facts()
        for offset, change in sorted(changes.items()):
            if offset >= 0:  # a block on a grid begins with tokens of the prompt
                self._change(offset, change)
        if not judged_before:
            self._take_facts()
        if length is not None:
            del self.positions[self.num_given + length :]
        self._put(event, block, step, num_function_evaluations)

    def _change(self, offset: int, change: Position) -> None:
        index = self.num_given + offset
        if index == len(self.positions):
            self.positions.append({"renoised": 0})
        before = self.positions[index]
        after = {**before, **change}
        if "was" in change and "surprisal" in before and "surprisal" not in change["was"]:
            after["was"] = {**change["was"], "surprisal": before["surprisal"]}
        if after["token"] != before.get("token") or after.get("noise"):
            after.pop("surprisal", None)
            after |= {name: value for name, value in change.items() if name == "surprisal"}
        if after.get("noise") and before and not before.get("noise") and "token" in before:
            after["renoised"] += 1
        if not after.get("noise"):
            after.pop("noise", None)
        self.positions[index] = after

    def _take_facts(self) -> None:
        for offset, facts in self._facts.items():
            index = self.num_given + offset
            if self.num_given <= index < len(self.positions):
                self.positions[index] = {**self.positions[index], **facts}
        self._facts = {}

    def _put(self, event: str, block: int, step: int, num_function_evaluations: int) -> None:
        decided = sum(position["state"] in (AR, COMMITTED) for position in self.positions)
        frame = {
            "event": event,
            "block": block,
            "step": step,
            "function_evaluations": num_function_evaluations,
            "new_tokens": decided,
            "positions": self.positions,
        }
        if self.frames:
            last = self.frames[-1]
            if all(last[name] == frame[name] for name in ("function_evaluations", "positions")):
                return
        if not self.keeps_all:
            self.frames.clear()
        self.frames.append(frame)
        if self.listener is not None:
            self.listener(frame)


class FrameRecorder:
    """
    The frames of all rows of a call of `generate`.

    Args:
        input_ids (`torch.LongTensor` of shape `[B, W]`): prompts, left padded.
        padding (`torch.LongTensor` of shape `[B]`): columns of padding before each of them.
        generation_config ([`BlockGenGenerationConfig`]): `trajectory_top_k` says how many likely tokens are told of
            each position that a pass predicts. Without `output_trajectory`, frames are told and not kept.
        mask_token_id (`int`, *optional*): of a masked model.
        listener (`Callable`, *optional*): is called with row and frame as soon as there is one.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        padding: torch.Tensor,
        generation_config: GenerationConfig,
        mask_token_id: int | None,
        listener: Callable[[int, Frame], None] | None = None,
    ) -> None:
        self.mask_token_id = mask_token_id
        self.top_k = int(generation_config.trajectory_top_k or 0)
        self.block = 0
        prompts = [prompt[skipped:] for prompt, skipped in zip(input_ids.tolist(), padding.tolist(), strict=True)]
        self.rows = [
            RowFrames(
                prompt, None if listener is None else partial(listener, row), bool(generation_config.output_trajectory)
            )
            for row, prompt in enumerate(prompts)
        ]

    def documents(self, settings: GenerationConfig) -> tuple[dict[str, Any], ...]:
        """For each row its frames, and what `generate` was asked for."""
        return tuple(
            {
                "format": FORMAT,
                "version": VERSION,
                "decoding": settings.decoding,
                "block_size": 1 if settings.decoding == "ar" else settings.block_size,
                "mask_token": self.mask_token_id,
                "prompt_tokens": row.num_given,
                "frames": row.frames,
            }
            for row in self.rows
        )

    # what passes say

    def judge(self, state: DecodingState, tokens: torch.Tensor, prediction: Prediction) -> None:
        """The AR prediction of the next tokens `[A, n]`: their surprisal, and what is likely instead."""
        surprisal = -prediction.log_prob(tokens.flatten()).view(tokens.shape)
        for place, row, offsets in _rows(state, tokens.shape[1]):
            for offset, value in zip(offsets, surprisal[place].tolist(), strict=True):
                self.rows[row].note(offset, surprisal=round(value, 4) if math.isfinite(value) else None)
        self.predict("ar", state, torch.ones_like(tokens, dtype=torch.bool), prediction)

    def predict(self, source: str, state: DecodingState, where: torch.Tensor, prediction: Prediction) -> None:
        """The `trajectory_top_k` likeliest tokens at the positions of the prediction, `[A, n]`."""
        if not self.top_k:
            return
        log_probs, tokens = prediction.log_probs().topk(self.top_k, dim=-1)
        offsets = (state.columns(where.shape[1]) - state.prompt_width)[where].tolist()
        rows = state.active[:, None].expand_as(where)[where].tolist()
        for row, offset, likely, probs in zip(rows, offsets, tokens.tolist(), log_probs.exp().tolist(), strict=True):
            pairs = zip(likely, probs, strict=True)
            found = [{"token": token, "probability": round(prob, 5)} for token, prob in pairs if prob > 0]
            self.rows[row].note(offset, **{source: found})

    # what steps do

    def canvas(
        self,
        event: str,
        state: DecodingState,
        tokens: torch.Tensor,
        step: int | torch.Tensor = 0,
        rows: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        free: torch.Tensor | None = None,
    ) -> None:
        """
        The block in work, `[A, n]`, after a step.

        Args:
            step (`int` or `torch.LongTensor` of shape `[A]`): denoising steps so far.
            rows (`torch.BoolTensor` of shape `[A]`, *optional*): which rows the step was one of; default: all.
            noise (`torch.BoolTensor` of shape `[A, n]`, *optional*): what is noise. Default: masks; and where there
                are none, what was noise and is still the same token.
            free (`torch.BoolTensor` of shape `[A, n]`, *optional*): what is not held fixed; default: all.
        """
        if noise is None and self.mask_token_id is not None:
            noise = tokens == self.mask_token_id
        for place, row, offsets in _rows(state, tokens.shape[1]):
            if rows is not None and not rows[place]:
                continue
            changes = {}
            for index, (offset, token) in enumerate(zip(offsets, tokens[place].tolist(), strict=True)):
                if offset < state.max_new_tokens and (free is None or free[place, index]):
                    is_noise = None if noise is None else bool(noise[place, index])
                    changes[offset] = self._draft(row, event, offset, token, is_noise)
            done = int(step[place]) if isinstance(step, torch.Tensor) else step
            self._show(state, row, event, done, changes)

    def _draft(self, row: int, event: str, offset: int, token: int, noise: bool | None) -> Position:
        before = self.rows[row].new_token(offset)
        if noise is None:
            noise = bool(before.get("noise")) and before.get("token") == token
        change: Position = {"token": token, "state": DRAFT, "noise": noise}
        if event == "correct" and noise and not before.get("noise"):
            change |= {"mark": "renoised", "was": {"token": before["token"]}}
        return change

    def take(self, state: DecodingState, rows: torch.Tensor, columns: torch.Tensor, event: str) -> None:
        """
        Tokens that were accepted, after [`DecodingState.accept`].

        Args:
            rows (`torch.LongTensor` of shape `[A]`): the rows that were not done before.
            columns (`torch.LongTensor` of shape `[A, n]`): where the tokens stand.
        """
        going_on = _unfinished(state)
        kind = AR if event == "ar" else COMMITTED
        tokens = state.tokens[rows[:, None], columns]
        for row, offsets, new in zip(
            rows.tolist(), (columns - state.prompt_width).tolist(), tokens.tolist(), strict=True
        ):
            length = None if row in going_on else int(state.num_new_tokens[row])
            changes: dict[int, Position] = {
                offset: {"token": token, "state": kind, "noise": False}
                for offset, token in zip(offsets, new, strict=True)
                if length is None or offset < length
            }
            self._show(state, row, event, self._last_step(row), changes, length)
        self.block += 1

    def _last_step(self, row: int) -> int:
        last = self.rows[row].frames[-1]
        return int(last["step"]) if last["block"] == self.block else 0

    def verified(
        self,
        state: DecodingState,
        rows: list[int],
        draft: torch.Tensor,
        verified: list[int],
        accepted: list[int],
        taken: list[int],
    ) -> None:
        """
        A round of speculation, after [`DecodingState.accept`]: of each row so many drafted tokens were `verified`,
        so many of them `accepted`, and so many new tokens `taken`.
        """
        going_on = _unfinished(state)
        for row, drafted, proposed, kept, count in zip(rows, draft.tolist(), verified, accepted, taken, strict=True):
            if count == 0:  # done before
                continue
            end = int(state.num_new_tokens[row])
            start = end - count
            new = state.tokens[row, state.prompt_width + start : state.prompt_width + end].tolist()
            changes: dict[int, Position] = {}
            for index in range(max(count, proposed)):
                if index < kept:
                    change: Position = {"token": new[index], "state": COMMITTED, "mark": "accepted"}
                elif index < count:
                    change = {"token": new[index], "state": AR}
                    if index < proposed:
                        change |= {"mark": "rejected", "was": {"token": drafted[index]}}
                else:
                    change = {"token": drafted[index], "state": DRAFT, "mark": "rejected"}
                changes[start + index] = {**change, "noise": False}
            event = "verify" if proposed else "ar"
            self._show(state, row, event, self._last_step(row) + bool(proposed), changes, start + max(count, proposed))
            if row not in going_on:  # what was rejected last has no later frame to be gone in
                self._show(state, row, "end", self._last_step(row), {}, end)
        self.block += 1

    def revise(self, state: DecodingState, revised: torch.Tensor) -> None:
        """The new tokens that a revision puts back to noise, `[B, n]`."""
        for row, chosen in enumerate(revised.tolist()):
            changes: dict[int, Position] = {}
            for offset, is_revised in enumerate(chosen):
                if is_revised:
                    token = self.rows[row].new_token(offset)["token"]
                    noise = token if self.mask_token_id is None else self.mask_token_id
                    change = {"token": noise, "state": DRAFT, "noise": True}
                    changes[offset] = {**change, "mark": "revised", "was": {"token": token}}
            if changes:
                self._show(state, row, "revise", 0, changes)

    def _show(self, state: DecodingState, row: int, event: str, step: int, *changes: Any) -> None:
        self.rows[row].show(event, self.block, step, int(state.num_function_evaluations[row]), *changes)


def _unfinished(state: DecodingState) -> set[int]:
    """The rows that are not done: none when the last of them has left."""
    return set(state.active[~state.done].tolist()) if state.active.numel() else set()


def _rows(state: DecodingState, length: int) -> Iterator[tuple[int, int, list[int]]]:
    """
    The rows that are not done: their place among the active ones, in the batch, and the indices of their next tokens
    among the new ones.
    """
    offsets = (state.columns(length) - state.prompt_width).tolist()
    for place, (row, is_done) in enumerate(zip(state.active.tolist(), state.done.tolist(), strict=True)):
        if not is_done:
            yield place, row, offsets[place]


__all__ = ["EVENTS", "FORMAT", "MARKS", "STATES", "VERSION", "FrameRecorder", "RowFrames"]
