"""What the app does without its page: settings from its fields, and a text frame by frame while it is generated."""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from frames import FrameTexts, frames
from replay import Run
from transformers import StoppingCriteria, StoppingCriteriaList, set_seed


CORRECTORS = ["ar_surprisal", "ar_gap", "ar_entropy", "random"]
UNIFORM_CORRECTORS = ["ar_kl", "ar_reverse_kl", "ar_tv", "entropy", "confidence", "margin"]
LIKELY = 5  # most likely tokens that the replay shows for a position
_REDRAWN = 0.08  # seconds between two pictures


def decodings(config: Any) -> list[str]:
    """What a model can do, the most interesting first."""
    if config.block_sizes == [1]:
        return ["ar"]
    if 1 in config.block_sizes:
        return ["arpc", "block_diffusion", "draft_revise", "speculative", "ar"]
    return ["block_diffusion"]


def correctors(config: Any) -> list[str]:
    return CORRECTORS + (UNIFORM_CORRECTORS if config.diffusion_type == "uniform" else [])


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

    def settings(self) -> dict[str, Any]:
        """Those of `generate` that the decoding knows."""
        settings: dict[str, Any] = {"decoding": self.decoding, "max_new_tokens": int(self.max_new_tokens)}
        if self.decoding != "ar":
            settings |= {"block_size": int(self.block_size), "ar_seed_tokens": int(self.ar_seed_tokens)}
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
        words += [f"{settings['denoising_steps']} steps"] if "denoising_steps" in settings else []
        words += [f"{settings['nfe_per_block']} evaluations per block"] if "nfe_per_block" in settings else []
        words += [settings["corrector"]] if "corrector" in settings else []
        words += [f"{settings['ar_seed_tokens']} AR seed tokens"] if settings.get("ar_seed_tokens") else []
        words.append(f"temperature {self.temperature:g}" if self.temperature > 0 else "greedy")
        return ", ".join(words)


class _FrameStreamer:
    """Hands every frame on as soon as it exists."""

    def __init__(self) -> None:
        self.frames: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def put(self, value: torch.Tensor) -> None:
        pass

    def put_frame(self, row: int, frame: dict[str, Any]) -> None:
        self.frames.put(frame)

    def end(self) -> None:
        pass


class _Stopped(StoppingCriteria):
    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


class Writer:
    """
    A model that continues prompts.

    Args:
        model, tokenizer: as they are loaded.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.texts = FrameTexts(tokenizer)

    def write(self, prompt: str, fields: Fields) -> Iterator[tuple[Run, dict[str, Any]]]:
        """
        The run and its last frame, a few times a second; the last run is whole, with all frames. Who stops listening
        stops the model.

        Raises:
            ValueError: the prompt is too long, or the model does not know these settings.
        """
        input_ids = self._encode(prompt, fields)
        header: dict[str, Any] = {
            "decoding": fields.decoding,
            "mask_token": self.model.config.mask_token_id if self.model.config.diffusion_type == "masked" else None,
            "frames": [],
        }
        partial = Run(header, fields.decoding, fields.details())
        streamer, stopped = _FrameStreamer(), _Stopped()
        done: dict[str, Any] = {}
        thread = threading.Thread(
            target=self._generate, args=(input_ids, fields, streamer, stopped, done), daemon=True
        )
        thread.start()
        try:
            shown_at = 0.0
            while (frame := streamer.frames.get()) is not None:
                if time.monotonic() - shown_at >= _REDRAWN:
                    shown_at = time.monotonic()
                    yield partial, self.texts.add(frame)
        finally:
            stopped.event.set()
            thread.join()
        if "error" in done:
            raise done["error"]
        document = frames(done["outputs"], self.tokenizer)[0]
        new_tokens = int(done["outputs"].num_new_tokens[0])
        facts = {"tokens per second": round(new_tokens / done["seconds"], 1)}
        yield Run(document, fields.decoding, fields.details(), facts), document["frames"][-1]

    def _encode(self, prompt: str, fields: Fields) -> torch.Tensor:
        token_ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
        positions = self.model.config.max_position_embeddings
        if len(token_ids) + fields.max_new_tokens > positions:
            raise ValueError(
                f"The prompt has {len(token_ids)} tokens and {fields.max_new_tokens:g} new ones are asked for, but "
                f"the model takes {positions} in all. Shorten the prompt, or ask for fewer new tokens."
            )
        return torch.tensor([token_ids], dtype=torch.long, device=self.model.device)

    def _generate(
        self,
        input_ids: torch.Tensor,
        fields: Fields,
        streamer: _FrameStreamer,
        stopped: _Stopped,
        done: dict[str, Any],
    ) -> None:
        try:
            set_seed(int(fields.seed))
            started = time.perf_counter()
            done["outputs"] = self.model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                return_dict_in_generate=True,
                output_trajectory=True,
                trajectory_top_k=LIKELY,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([stopped]),
                **fields.settings(),
            )
            done["seconds"] = time.perf_counter() - started
        except Exception as error:  # raised again where the frames are read
            done["error"] = error
        finally:
            streamer.frames.put(None)
