"""Samples of prompts by several decodings: in batches, in several processes, each sample the same in all of them."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..modeling.sampling_blockgen import CounterGenerator
from .generation_log import GenerationLog, Row
from .processes import Processes
from .rows import left_padded
from .throughput_contenders import Decoding


@dataclass(frozen=True)
class Task:
    """
    A sample to be drawn.

    Args:
        question: its number.
        sample: which of the question's samples.
        occurrence: how many questions before it have the same prompt.
        token_ids: the prompt.
        room: new tokens at most.
    """

    question: int
    sample: int
    occurrence: int
    token_ids: tuple[int, ...]
    room: int


def make_tasks(prompts: Sequence[list[int]], num_samples: int, max_new_tokens: int, positions: int) -> list[Task]:
    """All samples of all prompts, in models of so many positions."""
    seen: Counter[tuple[int, ...]] = Counter()
    tasks = []
    for question, prompt in enumerate(map(tuple, prompts)):
        room = max(0, min(max_new_tokens, positions - len(prompt)))
        tasks += [Task(question, sample, seen[prompt], prompt, room) for sample in range(num_samples)]
        seen[prompt] += 1
    return tasks


def make_batches(tasks: Iterable[Task], batch_size: int) -> list[list[Task]]:
    """
    Batches of one random seed and one length of new text each, prompts of like length together, the longest first. No
    prompt is twice in a batch: a row's random numbers depend on how many rows before it have the same prompt.
    """
    groups: dict[tuple[int, int, int], list[Task]] = defaultdict(list)
    for task in tasks:
        groups[task.sample, task.occurrence, task.room].append(task)
    batches = []
    for key in sorted(groups):
        members = sorted(groups[key], key=lambda task: (-len(task.token_ids), task.question))
        batches += [members[start : start + batch_size] for start in range(0, len(members), batch_size)]
    return batches


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: those of the model's own generation config, else the tokenizer's."""
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


class AnswerSampler:
    """
    Generates the samples of a batch.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: that of the model.
        seed: of all samples.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.seed = seed
        self.eos_token_ids = end_token_ids(model, tokenizer)
        pads = (tokenizer.pad_token_id, model.generation_config.pad_token_id, *self.eos_token_ids, 0)
        self.pad_token_id = next(int(pad) for pad in pads if pad is not None)

    def generate(self, batch: Sequence[Task], decoding: Decoding) -> list[Row]:
        """Rows of a batch of [`make_batches`], for the log."""
        room = batch[0].room
        if room == 0:  # no position is left
            return [self._row(task, decoding, [], 0, 0.0) for task in batch]
        width = max(len(task.token_ids) for task in batch)
        inputs = left_padded([task.token_ids for task in batch], self.model.device, self.pad_token_id)
        started = time.perf_counter()
        with self._seeded(batch[0]):
            outputs = self.model.generate(
                **inputs,
                **{"eos_token_id": self.eos_token_ids or None, "pad_token_id": self.pad_token_id, **decoding.settings},
                max_new_tokens=room,
                return_dict_in_generate=True,
            )
        sequences = outputs.sequences[:, width:].tolist()  # waits for the device
        seconds = (time.perf_counter() - started) / len(batch)
        counts, evaluations = outputs.num_new_tokens.tolist(), outputs.num_function_evaluations.tolist()
        return [
            self._row(task, decoding, sequence[:count], passes, seconds)
            for task, sequence, count, passes in zip(batch, sequences, counts, evaluations, strict=True)
        ]

    def _row(self, task: Task, decoding: Decoding, tokens: list[int], evaluations: int, seconds: float) -> Row:
        ends = decoding.settings.get("eos_token_id", self.eos_token_ids)
        has_end = bool(tokens) and tokens[-1] in ([ends] if isinstance(ends, int) else ends or [])
        return {
            "decoding": decoding.name,
            "question": task.question,
            "sample": task.sample,
            "text": self.tokenizer.decode(tokens, skip_special_tokens=True),
            "truncated": not has_end,
            "num_new_tokens": len(tokens),
            "num_function_evaluations": evaluations,
            "seconds": seconds,
        }

    @contextmanager
    def _seeded(self, task: Task) -> Iterator[None]:
        """`generate` takes its seed from torch's default generator, which is the user's again afterwards."""
        with torch.random.fork_rng(devices=[]):
            key = CounterGenerator.from_seed(self.seed, "cpu").fold_in(task.occurrence, task.sample).keys
            torch.default_generator.manual_seed(int(key))
            yield


def generate_missing(
    log: GenerationLog,
    sampler: AnswerSampler,
    decodings: Sequence[Decoding],
    tasks: Sequence[Task],
    batch_size: int,
    processes: "Processes",
    progress: bool,
) -> None:
    """Generates what the merged log does not have; each process its share, into a part of the log."""
    done = {(row["decoding"], row["question"], row["sample"]) for row in log.rows()}
    work = [
        (decoding, batch)
        for decoding in decodings
        for batch in make_batches(
            [task for task in tasks if (decoding.name, task.question, task.sample) not in done], batch_size
        )
    ]
    if not work:
        return
    part = log.open_part(processes.rank)
    total = sum(len(batch) for _, batch in work)
    with logging.tqdm(total=total, unit="sample", disable=not progress) as bar:
        for number, (decoding, batch) in enumerate(work):
            if number % processes.count == processes.rank:
                part.append(sampler.generate(batch, decoding))
            bar.update(len(batch))
    part.close()


__all__ = ["AnswerSampler", "Task", "end_token_ids", "generate_missing", "make_batches", "make_tasks"]
