"""
BlockGen models in lm-evaluation-harness, as the model `blockgen`.

Its model `hf` runs BlockGen checkpoints as causal language models. This one adds what else they are: log-likelihoods
by the ELBO of a block size or by the bound of the mixture, texts by every decoding with what they cost, and the first
token of a text, which needs no token before it.

`import blockgen_hf.evaluation.harness` makes the name known to `lm_eval.simple_evaluate(model="blockgen", ...)`, and
`python -m blockgen_hf.evaluation.harness` is `lm-eval` with the name known.
"""

import inspect
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.utils import logging as transformers_logging

from ..generation.generation_configuration_blockgen import BlockGenGenerationConfig
from ..modeling.configuration_blockgen import BlockGenConfig
from ..modeling.sampling_blockgen import CounterGenerator
from .likelihood import check_draws, checked_block_sizes, sequence_nll
from .rows import pad_rows


try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{__name__} needs lm-evaluation-harness, but {error.name} is not installed: "
        "`pip install 'blockgen-hf[harness]'`."
    ) from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


# A child of the harness's own logger, which its command line shows.
logger = logging.getLogger("lm_eval.models.blockgen")

LIKELIHOODS = ("ar", "elbo", "mixture")

# Settings of `generate` that transformers does not have.
_DECODING_SETTINGS = vars(BlockGenGenerationConfig()).keys() - vars(GenerationConfig()).keys()

# A request as the harness tokenises it: its texts, if it is one of a task, and the tokens of context and continuation.
_Request = tuple[tuple[str, str] | None, list[int], list[int]]


@dataclass(frozen=True)
class _Text:
    """Tokens, of which those from `start` on are scored."""

    tokens: tuple[int, ...]
    start: int

    @property
    def scored(self) -> tuple[int, ...]:
        return self.tokens[self.start :]


class _StopStrings(StoppingCriteria):
    """Ends each row whose new text ends in a stop string, or has it in its last token: `[B]`, bool."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt_length: int) -> None:
        self.tokenizer = tokenizer
        self.stop = [string for string in stop if string]
        self.prompt_length = prompt_length
        # A token is a byte at least. One more, as decoders drop the space before a text.
        self.window = max((len(string.encode()) for string in self.stop), default=0) + 1

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        tails = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :][:, -self.window :])
        found = [any(string in tail for string in self.stop) for tail in tails]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)


@register_model("blockgen")
class BlockGenLM(HFLM):
    r"""
    A BlockGen model, for lm-evaluation-harness.

    `is_greedy`, by which some tasks count hits, tells with every `likelihood` whether greedy autoregressive decoding
    gives the continuation: block diffusion has no one greedy text, as it is random which positions come first. For
    models with block-causal clean attention it is always False.

    Noise and random tokens are keyed by the seed and by what a request says: results do not depend, but for rounding,
    on the batch size or on other requests.

    Args:
        pretrained (`str` or [`BlockGenForDiffusionLM`]): a folder, a model on the Hub, or a model.
        likelihood (`str`): what a log-likelihood is.

            - `"ar"`: that of `forward(input_ids)`, the exact autoregressive one. For uniform models that of their
              fixed queries, while `generate` draws queries anew.
            - `"elbo"`: the bound of `block_size`, Eq. 15 to 17, by Monte Carlo; the context is clean.
            - `"mixture"`: the bound of all block sizes, Eq. 20, a request: log sum_s gamma_s exp(-NLL_s).
        block_size (`int`, *optional*): of the ELBO (default: the largest trained), and of generation.
        monte_carlo_samples (`int`): K, draws of noise a request and block size.
        seed (`int`): of the noise, and of generated texts.
        max_gen_toks (`int`): new tokens where a task does not say how many.
        kwargs: settings of decodings (`decoding`, `denoising_steps`, `nfe_per_block`, `corrector` ...), which a task's
            generation kwargs and `--gen_kwargs` override; and everything that the harness's `hf` takes.

    Attributes:
        num_function_evaluations (`int`): spent on the texts generated so far, in this process.
        num_new_tokens (`int`): of these texts.

    Raises:
        ValueError: a model of another kind, or settings that it does not have.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        *,
        likelihood: str = "ar",
        block_size: int | None = None,
        monte_carlo_samples: int = 8,
        seed: int = 0,
        max_gen_toks: int = 256,
        **kwargs: Any,
    ) -> None:
        settings = {name: kwargs.pop(name) for name in sorted(_DECODING_SETTINGS & kwargs.keys())}
        if block_size is not None:
            settings["block_size"] = block_size
        BlockGenGenerationConfig(**settings)  # raises for bad ones before a large model is loaded in vain
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"`likelihood` must be one of {list(LIKELIHOODS)}, but is {likelihood!r}.")
        check_draws(monte_carlo_samples, 0.0)
        if not isinstance(pretrained, str):
            _check_model_type(pretrained.config, pretrained.name_or_path)
            unknown = sorted(kwargs.keys() - inspect.signature(HFLM.__init__).parameters.keys())
            if unknown:  # with a name, they would go to `from_pretrained`
                raise ValueError(f"Unknown settings {unknown} for a model that is loaded already.")
        super().__init__(pretrained, backend="causal", **kwargs)
        self.likelihood = likelihood
        self.monte_carlo_samples = monte_carlo_samples
        self.seed = seed
        self.decoding_settings = settings
        self.num_function_evaluations = 0
        self.num_new_tokens = 0
        self._max_gen_toks = max_gen_toks
        self._copy = 0  # of the prompts that are being continued
        config: BlockGenConfig = self.model.config
        self._has_ar = config.clean_attention == "causal" or config.block_sizes[0] == 1
        gamma = torch.tensor(config.block_size_weights or [1.0] * len(config.block_sizes), dtype=torch.float64)
        self._log_gamma = (gamma / gamma.sum()).log()
        self._sizes = list(config.block_sizes)
        if likelihood == "elbo":
            self._sizes = checked_block_sizes(config, [block_size or max(config.block_sizes)])
        self._check_ar()

    def _check_ar(self) -> None:
        if self._has_ar:
            return
        if self.likelihood == "ar":
            raise ValueError(
                "`likelihood='ar'` needs a model with `clean_attention='causal'`: with 'block_causal' clean tokens "
                "reveal those to be predicted. Take `likelihood='elbo'`."
            )
        if self.batch_size == "auto":
            raise ValueError(
                "`batch_size='auto'` is found by autoregressive passes, which a model with "
                "`clean_attention='block_causal'` does not have: give a number."
            )

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        super()._get_config(pretrained, **kwargs)
        _check_model_type(self._config, pretrained)

    @property
    def max_gen_toks(self) -> int:
        return self._max_gen_toks

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results: of BlockGen's own, the likelihood and the cost of the texts."""
        info = {**super().get_model_info(), "likelihood": self.likelihood}
        if self.num_function_evaluations:
            info["num_function_evaluations"] = self.num_function_evaluations
            info["num_new_tokens"] = self.num_new_tokens
            info["tokens_per_forward"] = self.num_new_tokens / self.num_function_evaluations
        return info

    # 1. log-likelihoods

    def loglikelihood(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """
        As [`HFLM.loglikelihood`], but a continuation without context is the beginning of a text: nothing stands before
        it unless the tokenizer or `prefix_token_id` says so, or the model is of the kind that needs it
        (`ar_prediction="clean"`, `next_token_prediction`).
        """
        encoded: list[_Request] = []
        for context, continuation in (request.args for request in requests):
            if context:
                pair = self._encode_pair(context, continuation)
            else:
                pair = [], self.tok_encode(continuation, add_special_tokens=False)
            encoded.append(((context, continuation), pair[0] or self._prefix(), pair[1]))
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[float]:
        """
        Log-likelihoods of whole texts, each cut into windows as long as the model's positions allow. The first window
        begins as [`loglikelihood`] without context; each other has all the context that fits, a token at least.
        """
        windows: list[_Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            # With one token less than fits, the harness's windows leave room for the token that they add in front.
            rolling = get_rolling_token_windows(tokens, prefix_token=0, max_seq_len=self.max_length - 1, context_len=1)
            for number, (context, predicted) in enumerate(map(make_disjoint_window, rolling)):
                windows.append((None, context if number else self._prefix(), predicted))
                owners.append(owner)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (log_likelihood, _) in zip(owners, scores, strict=True):
            totals[owner] += log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (request.args[0],), total)
        return totals

    def _prefix(self) -> list[int]:
        """What stands before a text."""
        if self.custom_prefix_token_id is not None:
            return [self.custom_prefix_token_id]
        begin: list[int] = self.tok_encode("")
        return begin or ([self.prefix_token_id] if self.model.config.predicts_from_clean else [])

    def _fit(self, context: list[int], continuation: list[int]) -> _Text:
        """As many tokens as the model has positions: contexts are cut on the left."""
        longest = self.max_length - (1 if self.model.config.predicts_from_clean else 0)
        if len(continuation) > longest:
            raise ValueError(
                f"A continuation of {len(continuation)} tokens cannot be scored: the model takes {longest} at most."
            )
        tokens = (*context, *continuation)[-self.max_length :]
        return _Text(tokens, len(tokens) - len(continuation))

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: list[_Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        texts = [self._fit(context, continuation) for _, context, continuation in requests]
        cut = sum(len(context) > text.start for (_, context, _), text in zip(requests, texts, strict=True))
        if cut:
            logger.warning(
                "%d of %d contexts are cut on the left: the model takes %d tokens.", cut, len(texts), self.max_length
            )
        # Requests of equal keys share a row. Autoregressive predictions do not depend on a text's last token.
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, text in enumerate(texts):
            seen = text.tokens[:-1] if self.likelihood == "ar" else text.tokens
            groups.setdefault((seen, len(text.tokens), text.start), []).append(index)
        members = sorted(groups.values(), key=lambda group: (-len(texts[group[0]].tokens), texts[group[0]].tokens))
        batch_size = override_bs or self._batch_size_for(requests, members)
        answers: dict[int, tuple[float, bool]] = {}
        hidden = disable_tqdm or self.rank != 0
        with transformers_logging.tqdm(total=len(requests), disable=hidden, desc="Log-likelihoods") as bar:
            for start in range(0, len(members), batch_size):
                batch = members[start : start + batch_size]
                answers |= self._score([[(index, texts[index]) for index in group] for group in batch])
                for index in (index for group in batch for index in group):
                    if (strings := requests[index][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", strings, answers[index])
                bar.update(sum(map(len, batch)))
        return [answers[index] for index in range(len(requests))]

    def _batch_size_for(self, requests: list[_Request], members: list[list[int]]) -> int:
        if self.batch_size != "auto":
            return int(self.batch_size)
        return int(self._detect_batch_size([requests[members[0][0]]])) if members else 1

    def _score(self, groups: list[list[tuple[int, _Text]]]) -> dict[int, tuple[float, bool]]:
        """Answers by the number of the request, for groups of requests that share a row each."""
        rows = [group[0][1] for group in groups]
        with self._autocast():
            bounds = None if self.likelihood == "ar" else self._bounds(rows).tolist()
            predictions = self._predictions(rows) if self._has_ar else None
        answers = {}
        for row, group in enumerate(groups):
            for index, text in group:
                log_likelihood, is_greedy = 0.0, False
                if predictions is not None:
                    target = torch.tensor(text.scored, dtype=torch.long, device=self.device)[:, None]
                    log_likelihood = predictions[row].gather(-1, target).sum(dtype=torch.float64).item()
                    is_greedy = bool((predictions[row].argmax(-1, keepdim=True) == target).all())
                answers[index] = (log_likelihood if bounds is None else bounds[row], is_greedy)
        return answers

    def _predictions(self, rows: list[_Text]) -> list[torch.Tensor]:
        """Autoregressive log-probabilities of the scored tokens of each row, `[scored, V]`, float32 at least."""
        inputs = [torch.tensor(text.tokens[:-1], dtype=torch.long, device=self.device) for text in rows]
        input_ids = pad_sequence(inputs, batch_first=True)  # the right is not seen from the left
        length = input_ids.shape[1]
        first = min(text.start for text in rows)
        logits = []
        if first == 0:
            logits.append(self.model(input_ids[:1, :0], use_cache=False).logits.expand(len(rows), -1, -1))
        if length:
            kept = length - max(first - 1, 0)
            logits.append(self.model(input_ids, use_cache=False, logits_to_keep=kept).logits)
        scored = torch.cat(logits, dim=1)
        dtype = self.softmax_dtype or torch.promote_types(scored.dtype, torch.float32)
        return [
            scored[row, text.start - first : len(text.tokens) - first].log_softmax(-1, dtype=dtype)
            for row, text in enumerate(rows)
        ]

    def _bounds(self, rows: list[_Text]) -> torch.Tensor:
        """Lower bounds of the log-likelihood, `[rows]`, by draws of noise."""
        batch = pad_rows([{"input_ids": text.tokens, "labels": (-100,) * text.start + text.scored} for text in rows])
        nll = sequence_nll(self.model, batch, self._sizes, self.monte_carlo_samples, seed=self.seed).mean(-1)
        # Masked models never predict their mask token, for which the bound has no term.
        nll[[self._is_impossible(text) for text in rows]] = torch.inf
        if self.likelihood == "elbo":
            return -nll[:, 0]
        return torch.logsumexp(self._log_gamma.to(nll.device) - nll, dim=-1)

    def _is_impossible(self, text: _Text) -> bool:
        config: BlockGenConfig = self.model.config
        return config.diffusion_type == "masked" and config.mask_token_id in text.scored

    def _autocast(self) -> torch.autocast:
        dtype = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None)

    # 2. texts

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """
        Continuations, cut before the first stop string. The harness asks for several of one prompt by asking again:
        the first of each prompt are made together, then the second, so that the texts do not depend on the batches.
        """
        copies: list[list[int]] = []
        seen: Counter[str] = Counter()
        for index, request in enumerate(requests):
            context = request.args[0]
            if seen[context] == len(copies):
                copies.append([])
            copies[seen[context]].append(index)
            seen[context] += 1
        texts: dict[int, str] = {}
        for copy, indices in enumerate(copies):
            self._copy = copy
            found = super().generate_until([requests[index] for index in indices], disable_tqdm)
            texts |= zip(indices, found, strict=True)
        if self.num_function_evaluations:
            logger.info(
                "%d new tokens in %d function evaluations so far, %.2f tokens per forward",
                self.num_new_tokens,
                self.num_function_evaluations,
                self.num_new_tokens / self.num_function_evaluations,
            )
        return [texts[index] for index in range(len(requests))]

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """Prompts and what follows, `[B, length]`. `generation_kwargs` come normalised: greedy has temperature 0."""
        settings = {**self.decoding_settings, **generation_kwargs}
        if not settings.get("do_sample"):
            settings["do_sample"] = False
            settings.pop("temperature", None)
        with self._autocast(), self._seeded():
            outputs = self.model.generate(
                input_ids=context.long(),  # of empty prompts alone, tokenizers make floats
                max_new_tokens=max_length - context.shape[1],
                stopping_criteria=[_StopStrings(self.tokenizer, stop, context.shape[1])],
                pad_token_id=self.tokenizer.pad_token_id,
                return_dict_in_generate=True,
                **settings,
            )
        if "num_function_evaluations" in outputs:  # not with beams
            self.num_function_evaluations += int(outputs.num_function_evaluations.sum())
            self.num_new_tokens += int(outputs.num_new_tokens.sum())
        return outputs.sequences

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """`generate` takes its seed from torch's default generator, which is the user's again afterwards."""
        with torch.random.fork_rng(devices=[]):
            key = CounterGenerator.from_seed(self.seed, "cpu").fold_in(self._copy).keys
            torch.default_generator.manual_seed(int(key))
            yield


def _check_model_type(config: Any, name: str) -> None:
    if config.model_type != BlockGenConfig.model_type:
        raise ValueError(
            f"`pretrained` must be a BlockGen model, but {name} is of type {config.model_type!r}: take the model `hf`."
        )


def main() -> None:
    """`lm-eval`, which knows the model `blockgen`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()

__all__ = ["BlockGenLM"]
