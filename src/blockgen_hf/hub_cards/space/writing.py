"""What the app does without its page: settings from its fields, and a text frame by frame while it is generated."""

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from frames import FrameTexts
from replay import Run
from transformers import StoppingCriteria, StoppingCriteriaList, set_seed


CORRECTORS = ["ar_surprisal", "ar_gap", "ar_entropy", "random"]
UNIFORM_CORRECTORS = ["ar_kl", "ar_reverse_kl", "ar_tv", "entropy", "confidence", "margin"]
LIKELY = 5  # most likely tokens that the replay shows for a position
_REDRAWN = 0.08  # seconds between two pictures


@dataclass(frozen=True)
class ModelFacts:
    """
    What the page needs to know of a model.

    Args:
        block_sizes, positions, diffusion_type: of its configuration.
        mask_token: id of the mask token of a masked model.
        settings: its generation config.
    """

    block_sizes: list[int]
    positions: int
    diffusion_type: str
    mask_token: int | None
    settings: dict[str, Any]

    @property
    def decodings(self) -> list[str]:
        """What the model can do, the most interesting first."""
        if self.block_sizes == [1]:
            return ["ar"]
        if 1 in self.block_sizes:
            return ["arpc", "block_diffusion", "draft_revise", "speculative", "ar"]
        return ["block_diffusion"]

    @property
    def correctors(self) -> list[str]:
        return CORRECTORS + (UNIFORM_CORRECTORS if self.diffusion_type == "uniform" else [])

    def setting(self, name: str, otherwise: Any, offered: list[Any] | None = None) -> Any:
        """The model's own, where its generation config says something, and the page offers it."""
        value = self.settings.get(name)
        return otherwise if value is None or (offered is not None and value not in offered) else value


@dataclass(frozen=True)
class Fields:
    """
    What the fields of the page say.

    Raises:
        ValueError: a field is empty or out of range.
    """

    decoding: str
    block_size: int
    budget_kind: str  # "steps" or "evaluations"
    budget: int
    corrector: str
    ar_seed_tokens: int
    max_new_tokens: int
    temperature: float
    seed: int

    def __post_init__(self) -> None:
        for name, label, least in (
            ("block_size", "Block size", 1),
            ("budget", "The budget", 1),
            ("ar_seed_tokens", "AR seed tokens", 0),
            ("max_new_tokens", "New tokens", 1),
            ("temperature", "Temperature", 0),
            ("seed", "Seed", 0),
        ):
            value = getattr(self, name)
            if value is None or value < least:
                raise ValueError(f"{label} must be a number of at least {least}.")
        if self.seed >= 2**32:
            raise ValueError(f"Seed must be below {2**32:,}.")

    @classmethod
    def first(cls, facts: ModelFacts) -> "Fields":
        """What the page begins with: the model's own settings, as far as its generation config has some."""
        sizes = facts.block_sizes
        steps, evaluations = facts.setting("denoising_steps", None), facts.setting("nfe_per_block", sizes[-1] // 2)
        return cls(
            decoding=facts.setting("decoding", facts.decodings[0], facts.decodings),
            block_size=facts.setting("block_size", sizes[-1], sizes),
            budget_kind="steps" if steps else "evaluations",
            budget=steps or max(1, evaluations),
            corrector=facts.setting("corrector", "ar_surprisal", facts.correctors),
            ar_seed_tokens=facts.setting("ar_seed_tokens", 0),
            max_new_tokens=min(facts.setting("max_new_tokens", 64), facts.positions // 2),
            temperature=facts.setting("temperature", 1.0) if facts.setting("do_sample", True) else 0.0,
            seed=0,
        )

    def settings(self) -> dict[str, Any]:
        """Those of `generate` that the decoding knows."""
        settings: dict[str, Any] = {"decoding": self.decoding, "max_new_tokens": int(self.max_new_tokens)}
        if self.decoding != "ar":
            # A draft has small blocks, and is revised in large ones.
            name = "revise_block_size" if self.decoding == "draft_revise" else "block_size"
            settings |= {name: int(self.block_size), "ar_seed_tokens": int(self.ar_seed_tokens)}
        if self.decoding in ("arpc", "block_diffusion"):
            name = "denoising_steps" if self.budget_kind == "steps" else "nfe_per_block"
            settings[name] = int(self.budget)
        if self.decoding == "arpc":
            settings["corrector"] = self.corrector
        if self.temperature > 0:
            return settings | {"do_sample": True, "temperature": float(self.temperature)}
        return settings | {"do_sample": False}

    def details(self) -> str:
        """The same in words."""
        settings = self.settings()
        words = [f"block size {settings['block_size']}"] if "block_size" in settings else []
        words += [f"revised in blocks of {self.block_size:g}"] if "revise_block_size" in settings else []
        words += [f"{settings['denoising_steps']} steps"] if "denoising_steps" in settings else []
        words += [f"{settings['nfe_per_block']} evaluations per block"] if "nfe_per_block" in settings else []
        words += [settings["corrector"]] if "corrector" in settings else []
        words += [f"{settings['ar_seed_tokens']} AR seed tokens"] if settings.get("ar_seed_tokens") else []
        words.append(f"temperature {self.temperature:g}" if self.temperature > 0 else "greedy")
        return ", ".join(words)


class Writer(ABC):
    """Continues prompts."""

    facts: ModelFacts
    at_once = 1  # texts

    @abstractmethod
    def produce(
        self, prompt: str, fields: Fields, put: Callable[[dict[str, Any]], None], stopped: threading.Event
    ) -> None:
        """
        Puts every frame as soon as it exists, until the text ends or `stopped` is set. Runs in a thread of its own.

        Raises:
            ValueError: the prompt is too long, or the model does not know these settings.
        """

    def with_texts(self, frame: dict[str, Any]) -> dict[str, Any]:
        """A frame with the texts of its tokens."""
        return frame

    def write(self, prompt: str, fields: Fields) -> Iterator[tuple[Run, dict[str, Any]]]:
        """
        The run and its last frame, a few times a second; the last run is whole, with all frames. Who stops listening
        stops the model.

        Raises:
            ValueError: as `produce`.
        """
        document: dict[str, Any] = {"decoding": fields.decoding, "mask_token": self.facts.mask_token, "frames": []}
        partial = Run(document, fields.decoding, fields.details())
        arrived: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        stopped = threading.Event()
        seconds: list[float] = []
        errors: list[Exception] = []

        def work() -> None:
            try:
                started = time.perf_counter()
                self.produce(prompt, fields, arrived.put, stopped)
                seconds.append(time.perf_counter() - started)
            except Exception as error:  # raised again where the frames are read
                errors.append(error)
            finally:
                arrived.put(None)

        thread = threading.Thread(target=work, name="writing", daemon=True)
        thread.start()
        found = []
        try:
            shown_at = 0.0
            while (frame := arrived.get()) is not None:
                found.append(frame)
                if time.monotonic() - shown_at >= _REDRAWN:
                    shown_at = time.monotonic()
                    yield partial, self.with_texts(frame)
        finally:
            stopped.set()
            thread.join()
        if errors:
            raise errors[0]
        whole = [self.with_texts(frame) for frame in found]
        facts = {"tokens per second": round(whole[-1]["new_tokens"] / seconds[0], 1)}
        yield Run({**document, "frames": whole}, fields.decoding, fields.details(), facts), whole[-1]


class ModelWriter(Writer):
    """
    With a model in this process.

    Args:
        model, tokenizer: as they are loaded.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        config = model.config
        self.facts = ModelFacts(
            block_sizes=sorted(config.block_sizes),
            positions=config.max_position_embeddings,
            diffusion_type=config.diffusion_type,
            mask_token=config.mask_token_id if config.diffusion_type == "masked" else None,
            settings=model.generation_config.to_dict(),
        )
        self.texts = FrameTexts(tokenizer)

    def with_texts(self, frame: dict[str, Any]) -> dict[str, Any]:
        return self.texts.add(frame)

    def produce(
        self, prompt: str, fields: Fields, put: Callable[[dict[str, Any]], None], stopped: threading.Event
    ) -> None:
        input_ids = self._encode(prompt, fields)
        set_seed(int(fields.seed))
        self.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            trajectory_top_k=LIKELY,
            streamer=_FrameStreamer(put),
            stopping_criteria=StoppingCriteriaList([_Stopped(stopped)]),
            **fields.settings(),
        )

    def _encode(self, prompt: str, fields: Fields) -> torch.Tensor:
        encoded = self.tokenizer(prompt, add_special_tokens=False, verbose=False) if prompt else {"input_ids": []}
        token_ids = encoded["input_ids"]
        positions = self.facts.positions
        if len(token_ids) + fields.max_new_tokens > positions:
            raise ValueError(
                f"The prompt has {len(token_ids)} tokens and {fields.max_new_tokens:g} new ones are asked for, but "
                f"the model takes {positions} in all. Shorten the prompt, or ask for fewer new tokens."
            )
        return torch.tensor([token_ids], dtype=torch.long, device=self.model.device)


class _FrameStreamer:
    """Hands every frame on as soon as it exists."""

    def __init__(self, put: Callable[[dict[str, Any]], None]) -> None:
        self.hand_on = put

    def put(self, value: torch.Tensor) -> None:
        pass

    def put_frame(self, row: int, frame: dict[str, Any]) -> None:
        self.hand_on(frame)

    def end(self) -> None:
        pass


class _Stopped(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)
