"""Perplexity of generated texts under a causal language model, the judge (BlockGen, Eq. 10)."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import evaluate
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


DEFAULT_JUDGE = "openai-community/gpt2-large"

DESCRIPTION = """
How likely a causal language model, the judge, finds generated texts: the exponential of the mean negative
log-likelihood of a token. Texts are tokenized anew with the judge's tokenizer. Low values also come from texts that
repeat themselves, so read it beside an entropy. Scores under different judges cannot be compared.
"""

INPUTS = """
Args:
    predictions (`list[str]`): the generated texts.
    model_id (`str`): the judge, on the Hub or a folder. Defaults to GPT-2 Large, the judge of the paper.
    gguf_file (`str`, *optional*): the judge's weights, a GGUF file in `model_id`.
    model, tokenizer (*optional*): a judge that is loaded already, instead of `model_id`.
    start_token (`str`, *optional*): what stands before each text. Defaults to the tokenizer's BOS, or else its EOS.
    add_start_token (`bool`): False: nothing stands before a text, and its first token is not scored.
    max_length (`int`, *optional*): tokens that the judge reads of a text. Defaults to its context.
    batch_size (`int`): texts in a forward pass. Defaults to 8. It changes the time, not the result.
    device (`str`, *optional*): where `model_id` is loaded. Defaults to `cuda` if there is one.
Returns:
    perplexity, nll (mean of a token, in nats), nlls and lengths (sum and number of scored tokens of each text),
    num_tokens, num_texts, num_empty, num_truncated, num_truncated_tokens, max_length, start_token, judge.
"""

CITATION = """
BlockGen, Eq. 10; after Lou et al. (2024), https://arxiv.org/abs/2310.16834
"""


@dataclass(frozen=True)
class Judge:
    """
    A causal language model that scores texts.

    Args:
        model (`PreTrainedModel`): in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): of `model`.
        name (`str`): for the results.
        start_token (`str`, *optional*): before each text. None: the tokenizer's BOS, or else its EOS.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    start_token: str | None = None


@dataclass(frozen=True)
class PerplexityResult:
    """
    What [`score_texts`] finds.

    Args:
        perplexity (`float`): exponential of `nll`, Eq. 10.
        nll (`float`): in nats, the mean over all scored tokens of all texts.
        nlls (`list[float]`): in nats, the sum over the scored tokens of each text. 0 where there are none.
        lengths (`list[int]`): scored tokens of each text.
        num_tokens (`int`): scored tokens.
        num_texts (`int`): texts.
        num_empty (`int`): texts without a scored token; they count for nothing in `perplexity`.
        num_truncated (`int`): texts longer than the judge reads.
        num_truncated_tokens (`int`): their tokens that were left out.
        max_length (`int`, *optional*): tokens that the judge reads at most. None: any number.
        start_token (`str`, *optional*): what stood before each text. None: nothing, and first tokens are not scored.
        judge (`str`): the name of the judge.
    """

    perplexity: float
    nll: float
    nlls: list[float]
    lengths: list[int]
    num_tokens: int
    num_texts: int
    num_empty: int
    num_truncated: int
    num_truncated_tokens: int
    max_length: int | None
    start_token: str | None
    judge: str


def load_judge(
    model_id: str = DEFAULT_JUDGE,
    *,
    gguf_file: str | None = None,
    start_token: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "auto",
) -> Judge:
    """
    A judge from the Hub or a folder, in evaluation mode.

    Args:
        model_id (`str`): a repository or a folder.
        gguf_file (`str`, *optional*): the name of a GGUF file in it, with weights and tokenizer.
        start_token (`str`, *optional*): before each text. None: the tokenizer's BOS, or else its EOS. An instruction
            model's BOS may begin a turn of a chat rather than a text.
        device (*optional*): defaults to `cuda` if there is one.
        dtype: of the weights. Defaults to that of the checkpoint; float32 for a GGUF file.

    Raises:
        ValueError: `start_token` is not a token of the judge.
        OSError: there is no such model.
    """
    source = {} if gguf_file is None else {"gguf_file": gguf_file}
    if gguf_file is not None and dtype == "auto":
        dtype = torch.float32
    tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=False, **source)
    start_token_id(tokenizer, start_token)
    model = AutoModelForCausalLM.from_pretrained(model_id, dtype=dtype, trust_remote_code=False, **source)
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    return Judge(model, tokenizer, judge_name(model_id, gguf_file), start_token)


def judge_name(model_id: str, gguf_file: str | None = None) -> str:
    """A label, not a path, as results leave this machine: the name of the GGUF file, of the folder or on the Hub."""
    if gguf_file is not None:
        return Path(gguf_file).name
    return Path(model_id).name if Path(model_id).is_dir() else model_id


def start_token_id(tokenizer: PreTrainedTokenizerBase, start_token: str | None) -> int:
    """
    The id of the token before each text: `start_token`, or the tokenizer's BOS, or else its EOS.

    Raises:
        ValueError: there is no such token.
    """
    if start_token is None:
        for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            if token_id is not None:
                return token_id
        raise ValueError("the judge's tokenizer has neither BOS nor EOS: give start_token= or add_start_token=False")
    vocabulary = tokenizer.get_vocab()
    if start_token not in vocabulary:
        raise ValueError(f"start_token={start_token!r} is not a token of the judge: give one of its vocabulary")
    return vocabulary[start_token]


def read_length(model: PreTrainedModel, max_length: int | None) -> int | None:
    """
    How many tokens the judge reads: `max_length`, or its context, or None where it has no limit.

    Raises:
        ValueError: `max_length` is below 1 or above the judge's context.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if max_length is None:
        return context
    if max_length < 1 or (context is not None and max_length > context):
        raise ValueError(f"max_length={max_length} must be at least 1 and no more than the judge's context, {context}")
    return max_length


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, prefix: list[int]) -> list[list[int]]:
    """
    Token ids of each text behind `prefix`, without what the tokenizer would add.

    Raises:
        ValueError: `texts` are not a list of strings, or there are none.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError("texts must be a list of strings")
    if len(texts) == 0:
        raise ValueError("texts are empty: give at least one")
    return [prefix + ids for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]


def batch_nll(model: PreTrainedModel, rows: list[list[int]]) -> list[float]:
    """Negative log-likelihood in nats of each row behind its first token; rows have two tokens or more."""
    width = max(len(row) for row in rows) - 1  # the last token is predicted, not read
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)  # padded behind: a causal model does not look there
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        input_ids[index, : len(row) - 1] = torch.tensor(row[:-1])
        attention_mask[index, : len(row) - 1] = 1
    device = model.device
    logits = model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False).logits
    sums = []
    for row, row_logits in zip(rows, logits, strict=True):  # one by one: float32 logits of a batch would be large
        targets = torch.tensor(row[1:], device=row_logits.device)
        losses = F.cross_entropy(row_logits[: len(targets)].float(), targets, reduction="none")
        sums.append(losses.double().sum().item())
    return sums


@torch.no_grad()
def all_nlls(model: PreTrainedModel, rows: list[list[int]], batch_size: int) -> list[float]:
    """[`batch_nll`] of rows of any length, 0 where nothing is scored, with the model in evaluation mode meanwhile."""
    order = sorted((index for index, row in enumerate(rows) if len(row) > 1), key=lambda index: -len(rows[index]))
    nlls = [0.0] * len(rows)
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for index, nll in zip(batch, batch_nll(model, [rows[index] for index in batch]), strict=True):
                nlls[index] = nll
    finally:
        model.train(training)
    return nlls


def score_texts(
    texts: Sequence[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    add_start_token: bool = True,
    start_token: str | None = None,
    judge: str | None = None,
) -> PerplexityResult:
    """
    Generative perplexity of texts under a causal language model (Eq. 10), a token at a time:
    `exp(-sum_i sum_t log p(x_t | start, x_<t) / sum_i L_i)`, L_i being the scored tokens of text i.

    Texts are tokenized with `tokenizer`, so that those of any generator can be scored. Behind the start token every
    token of a text is scored, the first and whatever stands behind an end of text included. The judge reads at most
    `max_length` tokens, the start token among them, and never the last token that it scores: so `max_length` tokens of
    a text are scored, and the rest is left out and counted.

    Args:
        texts (`Sequence[str]`): of any length; empty ones are counted and score nothing.
        model, tokenizer: the judge.
        batch_size (`int`): texts in a forward pass. It does not change the result, up to rounding.
        max_length (`int`, *optional*): defaults to the judge's context.
        add_start_token (`bool`): False: the first token of each text is not scored, as it has nothing before it.
        start_token (`str`, *optional*): defaults to the tokenizer's BOS, or else its EOS.
        judge (`str`, *optional*): the judge's name in the result. Defaults to what `model` was loaded from.

    Raises:
        ValueError: there is no text, or no scored token in any; or an argument is out of its range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    limit = read_length(model, max_length)
    prefix = [start_token_id(tokenizer, start_token)] if add_start_token else []
    sequences = tokenize(texts, tokenizer, prefix)
    rows = [sequence if limit is None else sequence[: limit + 1] for sequence in sequences]
    lengths = [max(len(row) - 1, 0) for row in rows]
    if sum(lengths) == 0:
        raise ValueError("no text has a token to score: all are empty, or have one token and add_start_token=False")
    nlls = all_nlls(model, rows, batch_size)
    left_out = [len(sequence) - len(row) for sequence, row in zip(sequences, rows, strict=True)]
    mean = math.fsum(nlls) / sum(lengths)
    return PerplexityResult(
        perplexity=torch.tensor(mean, dtype=torch.float64).exp().item(),
        nll=mean,
        nlls=nlls,
        lengths=lengths,
        num_tokens=sum(lengths),
        num_texts=len(rows),
        num_empty=lengths.count(0),
        num_truncated=sum(1 for count in left_out if count),
        num_truncated_tokens=sum(left_out),
        max_length=limit,
        start_token=tokenizer.convert_ids_to_tokens(prefix[0]) if prefix else None,
        judge=judge or (judge_name(model.name_or_path) if model.name_or_path else type(model).__name__),
    )


class GenerativePerplexity(evaluate.Metric):
    """[`score_texts`] for `evaluate.load`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=["https://huggingface.co/docs/transformers/perplexity"],
        )

    def _compute(
        self,
        predictions: Sequence[str],
        model_id: str = DEFAULT_JUDGE,
        gguf_file: str | None = None,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        start_token: str | None = None,
        device: str | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        if (model is None) != (tokenizer is None):
            raise ValueError("model and tokenizer come together: give both, or model_id instead")
        if model is not None and tokenizer is not None:
            return asdict(score_texts(predictions, model, tokenizer, start_token=start_token, **settings))
        judge = load_judge(model_id, gguf_file=gguf_file, start_token=start_token, device=device)
        settings = {"judge": judge.name, **settings}
        return asdict(score_texts(predictions, judge.model, judge.tokenizer, start_token=start_token, **settings))
