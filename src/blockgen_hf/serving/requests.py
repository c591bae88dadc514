"""What the generation engine is asked for, and what it answers: requests, and the events of their texts."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ..generation.generation_configuration_blockgen import BlockGenGenerationConfig


@dataclass(frozen=True)
class GenerationRequest:
    """
    One text to generate. Its answer is that of `torch.manual_seed(seed)` and then `model.generate` with this prompt
    alone and these settings, whatever else the engine works on.

    Args:
        input_ids: token ids of the prompt; none for a text without a prompt.
        generation_config: the settings, with `max_new_tokens`. What it leaves unset is the model's own.
        seed: of the random numbers.
        stop: the text ends with the token that completes one of these strings. They are looked for in the new tokens
            only, as OpenAI's API does; `stop_strings` of `generate` also match strings that begin in the prompt.
        num_logprobs: None: no log-probabilities. Otherwise those of the tokens, and of so many most likely
            alternatives at each place.
        scores_prompt: whether a [`PromptEvent`] comes first; needs `num_logprobs`.
        is_generated: False: nothing but that, whatever `max_new_tokens` is, which cannot be 0.
        stream_drafts: whether to tell drafts of the block in work.
        stream_frames: whether to tell frames (docs/replay.md), with the `trajectory_top_k` of the settings.
    """

    input_ids: tuple[int, ...]
    generation_config: BlockGenGenerationConfig
    seed: int
    stop: tuple[str, ...] = ()
    num_logprobs: int | None = None
    scores_prompt: bool = False
    is_generated: bool = True
    stream_drafts: bool = False
    stream_frames: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """
    What the model gives a token by block size 1, `log p_AR(token | text before)`, without temperature and logits
    processors: by the chain rule they add up to the log-probability of the text, whichever decoding made it.

    Args:
        token_id: the token.
        logprob: its log-probability, in nats.
        top: the most likely tokens at its place, and their log-probabilities.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """
    What a text cost.

    Args:
        prompt_tokens: tokens of the prompt.
        completion_tokens: new tokens, with the one that ended the text.
        function_evaluations: denoiser and AR passes, as `generate` counts them. Log-probabilities may cost one more
            for each `TokensEvent`, and those of a prompt cost one for each chunk of it.
        accepted_draft_tokens, rejected_draft_tokens: of `decoding="speculative"`.
    """

    prompt_tokens: int
    completion_tokens: int = 0
    function_evaluations: int = 0
    accepted_draft_tokens: int = 0
    rejected_draft_tokens: int = 0


@dataclass(frozen=True)
class PromptEvent:
    """The log-probabilities of all tokens of the prompt but the first, before any other event."""

    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class TokensEvent:
    """The next tokens of the text, and their log-probabilities where the request asks for them."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class DraftEvent:
    """
    What the model makes of the block in work: tokens that may still change.

    Args:
        token_ids: the draft.
        start: index of its first token among the new tokens.
    """

    token_ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class FrameEvent:
    """A frame of the text, with its prompt and without the texts of tokens; `RowFrames` makes it."""

    frame: dict[str, Any]


@dataclass(frozen=True)
class FinishedEvent:
    """
    The last event of a text.

    Args:
        reason: `"stop"`: at an end-of-text token or a stop string; `"length"`: after `max_new_tokens`; `"cancelled"`.
        usage: what it cost.
    """

    reason: Literal["stop", "length", "cancelled"]
    usage: Usage


@dataclass(frozen=True)
class FailedEvent:
    """The last event of a text that could not be generated."""

    error: BaseException = field(compare=False)


Event = PromptEvent | TokensEvent | DraftEvent | FrameEvent | FinishedEvent | FailedEvent

__all__ = [
    "DraftEvent",
    "Event",
    "FailedEvent",
    "FinishedEvent",
    "FrameEvent",
    "GenerationRequest",
    "PromptEvent",
    "TokenLogprob",
    "TokensEvent",
    "Usage",
]
