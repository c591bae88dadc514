"""From the body of a request to requests to the engine: prompts, limits and settings."""

import json
import secrets
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..generation.generation_configuration_blockgen import BlockGenGenerationConfig
from ..modeling.configuration_blockgen import BlockGenConfig
from ..prompts import PromptEncoder
from .errors import ApiError, bad_request
from .protocol import ChatBody, CompletionBody, GenerationBody
from .requests import GenerationRequest


_NUM_SEEDS = 2**32  # as everywhere in this package
_STEPS = ("denoising_steps", "nfe_per_block", "draft_steps", "revise_steps")  # of a block


@dataclass(frozen=True)
class Limits:
    """
    What one request may ask for.

    Args:
        body_bytes: size of its body.
        body_seconds: time to send it.
        prompt_tokens: tokens of a prompt. None: as many as the model has positions.
        new_tokens: tokens of an answer. None: as many as the model has positions.
        choices: prompts of the body times `n`.
        steps_per_block: denoising steps or function evaluations of a block, unless the model's own are more.
        cached_tokens: of prompt and answer. None: as many as the model has positions.
    """

    body_bytes: int = 1 << 20
    body_seconds: float = 30.0
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    choices: int = 16
    steps_per_block: int = 256
    cached_tokens: int | None = None


@dataclass(frozen=True)
class ModelFacts:
    """What the server needs to know of a model: its configuration and its generation config."""

    config: BlockGenConfig
    generation_config: GenerationConfig

    @property
    def positions(self) -> int:
        return int(self.config.max_position_embeddings)

    def description(self) -> dict[str, Any]:
        """For clients that offer its decodings to somebody, such as the page of `blockgen-hf demo`."""
        is_masked = self.config.diffusion_type == "masked"
        return {
            "block_sizes": sorted(self.config.block_sizes),
            "diffusion_type": self.config.diffusion_type,
            "mask_token": self.config.mask_token_id if is_masked else None,
            "generation_config": json.loads(self.generation_config.to_json_string(use_diff=True)),
        }


def encode_prompts(body: GenerationBody, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> list[list[int]]:
    """
    Token ids of the prompts of a body. This takes a while for long ones, and tokenizers change while they encode: it
    has to run in one thread, with a tokenizer of its own.

    Raises:
        ApiError: there are too many of them, or they cannot be encoded.
    """
    prompts: list[Any] = [[message.for_template() for message in body.messages]] if isinstance(body, ChatBody) else []
    if isinstance(body, CompletionBody):
        prompts = body.prompts
    if len(prompts) * body.num_choices > limits.choices:
        asked = f"`n` = {body.num_choices}" + (f" for each of {len(prompts)} prompts" if len(prompts) > 1 else "")
        raise ApiError(400, f"A request may have {limits.choices} choices at most, but has {asked}.", "n")
    if isinstance(body, ChatBody):
        return [_encode_chat(prompts[0], tokenizer)]
    encoder = PromptEncoder(tokenizer)
    try:
        return [encoder(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    except ValueError as error:
        raise ApiError(400, str(error), "prompt") from error


def _encode_chat(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ApiError(
            400,
            "This model has no chat template: it was not trained on conversations. Use /v1/completions.",
            "messages",
            "no_chat_template",
        )
    try:
        return PromptEncoder(tokenizer)(messages)
    except (ValueError, TemplateError) as error:
        message = f"The model's chat template refuses these messages: {error}"
        raise ApiError(400, message, "messages") from error


def make_requests(
    body: GenerationBody, prompts: list[list[int]], facts: ModelFacts, limits: Limits
) -> list[GenerationRequest]:
    """
    A request to the engine for each choice. Choice i of a prompt has the seed `seed` + i: it is what that seed gives
    alone.

    Raises:
        ApiError: a setting that is not accepted, or too many tokens.
    """
    _check_steps(body, facts, limits)
    settings = _settings(body, facts.config.vocab_size)
    first_seed = secrets.randbelow(_NUM_SEEDS) if body.seed is None else body.seed
    requests = []
    for prompt in prompts:
        num_new_tokens = _num_new_tokens(body, len(prompt), facts, limits)
        try:
            config = BlockGenGenerationConfig(**settings, max_new_tokens=max(1, num_new_tokens))
        except ValueError as error:
            raise bad_request(error) from error
        for number in range(body.num_choices):
            requests.append(
                GenerationRequest(
                    input_ids=tuple(prompt),
                    generation_config=config,
                    seed=(first_seed + number) % _NUM_SEEDS,
                    stop=body.stops,
                    num_logprobs=body.num_logprobs,
                    scores_prompt=body.is_echoed and body.num_logprobs is not None,
                    is_generated=num_new_tokens > 0,
                    stream_drafts=bool(body.stream_drafts),
                    stream_frames=bool(body.stream_frames),
                )
            )
    return requests


def _check_steps(body: GenerationBody, facts: ModelFacts, limits: Limits) -> None:
    for name in _STEPS:
        asked = _largest(getattr(body, name))
        most = max(limits.steps_per_block, _largest(getattr(facts.generation_config, name, None)))
        if asked > most:
            raise ApiError(400, f"`{name}` must be {most} at most on this server, but is {asked}.", name)


def _largest(steps: int | list[int] | None) -> int:
    return max(steps if isinstance(steps, list) else [steps or 0], default=0)


def _settings(body: GenerationBody, vocab_size: int) -> dict[str, Any]:
    settings = body.decoding_settings()
    if body.temperature == 0:
        settings["do_sample"] = False
    else:
        if body.asks_for_sampling:  # whatever the model's own generation config says
            settings["do_sample"] = True
        settings |= {name: value for name in ("temperature", "top_p") if (value := getattr(body, name)) is not None}
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(body, name):
            settings[name] = getattr(body, name)
    if body.logit_bias:
        biases = {int(token): bias for token, bias in body.logit_bias.items()}
        if max(biases) >= vocab_size:
            raise ApiError(
                400,
                f"`logit_bias` must name tokens from 0 to {vocab_size - 1}, but names {max(biases)}.",
                "logit_bias",
            )
        settings["sequence_bias"] = [[[token], bias] for token, bias in biases.items()]
    return settings


def _num_new_tokens(body: GenerationBody, num_prompt_tokens: int, facts: ModelFacts, limits: Limits) -> int:
    """As many as were asked for; else as many as the model's own config says, or fit."""
    field = next((name for name in body.limit_fields if getattr(body, name) is not None), None)
    where = body.prompt_field
    longest = facts.positions if limits.cached_tokens is None else min(facts.positions, limits.cached_tokens)
    room = longest - num_prompt_tokens
    most = longest - 1 if limits.prompt_tokens is None else min(limits.prompt_tokens, longest - 1)
    if num_prompt_tokens > most:
        message = f"`{where}` has {num_prompt_tokens} tokens, but may have {most} at most."
        raise ApiError(400, message, where, "context_length_exceeded")
    most = longest if limits.new_tokens is None else limits.new_tokens
    if field is None:
        own = facts.generation_config.max_new_tokens
        return min(most if own is None else own, most, room)
    asked: int = getattr(body, field)
    if asked > most:
        raise ApiError(400, f"`{field}` must be {most} at most, but is {asked}.", field)
    if asked > room:
        has = f"The model has {longest} positions"
        if longest < facts.positions:
            has = f"The cache of this server has room for {longest} tokens"
        message = (
            f"{has}. Your request has {num_prompt_tokens + asked} tokens: {num_prompt_tokens} in the prompt, "
            f"`{field}` = {asked}."
        )
        raise ApiError(400, message, field, "context_length_exceeded")
    return asked


__all__ = ["Limits", "ModelFacts", "encode_prompts", "make_requests"]
