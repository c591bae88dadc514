"""The bodies of requests: OpenAI's fields, and those of BlockGen's decodings beside them."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .errors import ApiError


MOST_STOPS = 4
MOST_TOP_LOGPROBS = 20
_MOST_BIASES = 1024
_LEAST_TEMPERATURE = 1e-6  # logits that are divided by much less are no longer numbers

_MOST_STAGES = 16

StopText = Annotated[str, Field(min_length=1, max_length=256)]  # the engine compares each with the whole vocabulary
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
# Everything that clients may send and that changes nothing here.
_IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "prompt_cache_options"),
)
# Fields of OpenAI's that are not served, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}


# The same of messages, which clients send back as they got them.
_UNSUPPORTED_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": ("",),
    "tool_calls": ([],),
}


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # changes nothing here


class DecodingSettings(BaseModel):
    """
    Settings of `BlockGenGenerationConfig`, which checks their values. OpenAI's Python client sends them in
    `extra_body`.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    decoding: str | None = None
    block_size: int | None = None
    denoising_steps: int | None = None
    nfe_per_block: int | None = None
    ar_seed_tokens: int | None = None
    corrector: str | None = None
    corrector_start: int | None = None
    corrector_period: int | None = None
    noise_removal: str | None = None
    sampler: str | None = None
    confidence_threshold: float | None = None
    entropy_bound: float | None = None
    acceptance: str | None = None
    draft_steps: int | None = None
    draft_decoding: str | None = None
    fused_drafts: bool | None = None
    revise_block_size: int | Annotated[list[int], Field(max_length=_MOST_STAGES)] | None = None
    revise_ratio: float | Annotated[list[float], Field(max_length=_MOST_STAGES)] | None = None
    revise_steps: int | Annotated[list[int], Field(max_length=_MOST_STAGES)] | None = None
    revise_score: str | None = None
    trajectory_top_k: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)

    def decoding_settings(self) -> dict[str, Any]:
        """Those that were given."""
        values = {name: getattr(self, name) for name in DecodingSettings.model_fields}
        return {name: value for name, value in values.items() if value is not None}


class GenerationBody(DecodingSettings):
    """What completions and chat completions have in common."""

    limit_fields: ClassVar[tuple[str, ...]] = ("max_tokens",)  # the first that is given says how many tokens
    prompt_field: ClassVar[str] = "prompt"

    model: str
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1)
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None
    ) = Field(None, max_length=_MOST_BIASES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Ours: drafts of the block in work, and frames (docs/replay.md), as events of other names.
    stream_drafts: bool | None = None
    stream_frames: bool | None = None

    @model_validator(mode="after")
    def check_values(self) -> "GenerationBody":
        if self.temperature and self.temperature < _LEAST_TEMPERATURE:
            raise ValueError(f"`temperature` must be 0 or at least {_LEAST_TEMPERATURE}, but is {self.temperature}")
        for name in ("stream_options", "stream_drafts", "stream_frames"):
            if getattr(self, name) and not self.stream:
                raise ValueError(f"`{name}` needs `stream`: true")
        if self.trajectory_top_k and not self.stream_frames:
            raise ValueError("`trajectory_top_k` needs `stream_frames`: true")
        return self

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def asks_for_sampling(self) -> bool:
        """Whether a field is given that means something only where tokens are drawn."""
        drawing = (self.temperature, self.top_p, self.top_k, self.min_p, self.seed)
        return self.num_choices > 1 or any(value is not None for value in drawing)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def is_echoed(self) -> bool:
        """Whether an answer begins with its prompt."""
        return False

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives beside each token; None: no log-probabilities at all."""
        raise NotImplementedError

    def check_extra_fields(self) -> None:
        """
        Raises:
            ApiError: a field that is not known, or asks for what is not served.
        """
        given = {name: value for name, value in (self.model_extra or {}).items() if name not in _IGNORED}
        _check_extra_fields(given, _UNSUPPORTED)


def _check_extra_fields(given: dict[str, Any], unsupported: dict[str, tuple[Any, ...]], place: str = "") -> None:
    """
    Args:
        given: fields and their values; null asks for nothing.
        unsupported: fields of OpenAI's, with the values that ask for nothing.
        place: where they stand in the body.
    """
    for name, value in given.items():
        if value is None:
            continue
        path = place + name
        if name not in unsupported:
            raise ApiError(400, f"Unknown field `{path}`.", path, "unknown_parameter")
        if not any(value == neutral and type(value) is type(neutral) for neutral in unsupported[name]):
            kind = f" of type {value['type']!r}" if isinstance(value, dict) and "type" in value else ""
            raise ApiError(400, f"`{path}`{kind} is not supported by this server.", path, "unsupported_parameter")


class CompletionBody(GenerationBody):
    """`/v1/completions`."""

    prompt: str | TokenIds | Annotated[list[str | TokenIds], Field(min_length=1)] | None = None
    max_tokens: int | None = Field(None, ge=0)  # 0 to score a prompt
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)

    @model_validator(mode="after")
    def check_max_tokens(self) -> "CompletionBody":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("`max_tokens` must be at least 1, or 0 with `echo`: true")
        return self

    @property
    def is_echoed(self) -> bool:
        return bool(self.echo)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt = self.prompt or ""
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


class TextPart(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Any = None  # changes nothing here


class ChatMessage(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        message = {"role": self.role, "content": text}
        return message if self.name is None else {**message, "name": self.name}


class ChatBody(GenerationBody):
    """`/v1/chat/completions`."""

    limit_fields: ClassVar[tuple[str, ...]] = ("max_completion_tokens", "max_tokens")
    prompt_field: ClassVar[str] = "messages"

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)

    def check_extra_fields(self) -> None:
        super().check_extra_fields()
        for number, message in enumerate(self.messages):
            _check_extra_fields(message.model_extra or {}, _UNSUPPORTED_IN_MESSAGES, f"messages.{number}.")
            if message.content is None:  # as beside calls of tools, which are refused above
                place = f"messages.{number}.content"
                raise ApiError(
                    400, f"`{place}` must be a text, or a list of text parts, but is null or missing.", place
                )

    @model_validator(mode="after")
    def check_top_logprobs(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs`: true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


FIELDS = frozenset(
    name for model in (CompletionBody, ChatBody, ChatMessage, TextPart, StreamOptions) for name in model.model_fields
)

__all__ = ["FIELDS", "ChatBody", "CompletionBody", "GenerationBody"]
