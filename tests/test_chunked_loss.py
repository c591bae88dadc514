"""The loss without logits: the same numbers and gradients as with them, in little memory, and when it is used."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import MASK, VOCAB_SIZE, tiny_model, words
from torch.utils._python_dispatch import TorchDispatchMode

from blockgen_hf import BlockGenForDiffusionLM, BlockGenOutput
from blockgen_hf.modeling import objective_blockgen
from blockgen_hf.modeling.layers_blockgen import BlockGenLayerNorm
from blockgen_hf.modeling.objective_blockgen import chunked_loss


by_hypothesis = settings(max_examples=40)
exactly = dict(atol=1e-9, rtol=1e-9)

Gradients = dict[str, torch.Tensor]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer norms in the dtype of their input: those of the model round to float32, which would hide a difference."""

    def forward(
        self: BlockGenLayerNorm, hidden_states: Any, shift: Any = None, scale: Any = None, weight: None = None
    ) -> Any:
        normed = torch.nn.functional.layer_norm(hidden_states, self.weight.shape, self.weight, eps=self.eps)
        return normed if shift is None else normed * (1 + scale) + shift

    monkeypatch.setattr(BlockGenLayerNorm, "forward", forward)


@pytest.fixture
def chunks_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many tokens a chunk of the loss has."""

    def set_size(size: int) -> None:
        monkeypatch.setattr(objective_blockgen, "chunked_loss", partial(chunked_loss, chunk_size=size))

    return set_size


def batch(model: BlockGenForDiffusionLM, block_size: int | list[int], num_rows: int = 3) -> dict[str, Any]:
    """Rows of 9 tokens with a prompt and a hole, at different noise levels, noised for their block sizes."""
    text = words(num_rows, 9)
    labels = text.clone()
    labels[0, :3] = -100
    labels[1, 5] = -100
    t = torch.tensor([0.9, 0.6, 0.95], dtype=torch.float64)[:num_rows]
    sizes = torch.tensor(block_size).expand(num_rows)
    alpha_t = torch.where(sizes == 1, 0.0, model.diffusion.schedule.alpha(t))[:, None]
    noisy = model.diffusion.corrupt(text, alpha_t, torch.Generator().manual_seed(5), keep=labels == -100)
    return dict(input_ids=text, noisy_input_ids=noisy, labels=labels, noise_level=t, block_size=block_size)


def differentiate(model: BlockGenForDiffusionLM, factor: float = 1.0, **kwargs: Any) -> tuple[Any, Gradients]:
    """Outputs, and the gradients of all parameters of the loss times `factor`."""
    model.zero_grad()
    outputs = model(**kwargs)
    (outputs.loss * factor).backward()
    return outputs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(model: BlockGenForDiffusionLM, **kwargs: Any) -> tuple[BlockGenOutput, Gradients]:
    """A training step with and without logits gives the same, in float64."""
    model.double().train()
    expected, expected_gradients = differentiate(model, **kwargs, skip_logits=False)
    outputs, gradients = differentiate(model, **kwargs, skip_logits=True)
    assert expected.logits is not None
    assert outputs.logits is None
    torch.testing.assert_close(outputs.loss, expected.loss, **exactly)
    torch.testing.assert_close(outputs.token_losses, expected.token_losses, **exactly)
    assert not outputs.token_losses.requires_grad
    assert not expected.token_losses.requires_grad
    torch.testing.assert_close(gradients, expected_gradients, **exactly)
    return outputs, gradients


# ---- the same numbers
# variant, training objective, block size
STEPS = {
    "masked_cross_entropy": ("masked", "cross_entropy", 4),
    "masked_elbo": ("masked", "elbo", 4),
    "masked_block_1": ("masked", "elbo", 1),
    "masked_rows": ("masked", "elbo", [2, 1, 8]),
    "uniform_cross_entropy": ("uniform", "cross_entropy", 4),
    "uniform_elbo": ("uniform", "elbo", 4),
    "uniform_block_1": ("uniform", "elbo", 1),
    "uniform_rows": ("uniform", "elbo", [1, 8, 1]),
    "block_causal": ("block_causal", "cross_entropy", 4),
    "time_conditional": ("uniform_time_conditional", "elbo", [4, 1, 2]),
    "without_adaln": ("without_adaln", "cross_entropy", 2),
}


@pytest.mark.parametrize("step", STEPS)
def test_the_loss_without_logits_is_the_loss_with_logits(step: str, exact: None, chunks_of: Any) -> None:
    """Loss, loss of each token and gradient of each parameter, with chunks that do not divide the tokens."""
    variant, objective, block_size = STEPS[step]
    chunks_of(4)
    model = tiny_model(variant, training_objective=objective)
    inputs = batch(model, block_size)
    outputs, gradients = assert_same_step(model, **inputs)
    scored = inputs["labels"] != -100
    assert outputs.loss.item() > 0
    torch.testing.assert_close(outputs.token_losses.sum() / scored.sum(), outputs.loss, **exactly)
    assert (outputs.token_losses[~scored] == 0).all()
    assert outputs.token_losses.shape == scored.shape
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    assert set(gradients) == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 23, 28])
@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_no_number_of_tokens_a_chunk_changes_the_loss(
    variant: str, chunk_size: int, exact: None, chunks_of: Any
) -> None:
    """One, fewer than the scored tokens, as many, more."""
    chunks_of(chunk_size)
    model = tiny_model(variant)
    inputs = batch(model, 4)
    assert int((inputs["labels"] != -100).sum()) == 23
    assert_same_step(model, **inputs)


@pytest.mark.parametrize("head", ["tied", "without_bias"])
@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_other_heads_get_the_same_gradients(variant: str, head: str, exact: None, chunks_of: Any) -> None:
    """A head that is the embedding collects the gradients of both uses; one without a bias has none for it."""
    chunks_of(4)
    model = tiny_model(variant, tie_word_embeddings=head == "tied")
    if head == "tied":
        assert model.lm_head.weight is model.model.embed_tokens.weight
    else:
        model.lm_head.bias = None
    _, gradients = assert_same_step(model, **batch(model, [4, 1, 2]))
    assert ("lm_head.bias" in gradients) == (head == "tied")


@pytest.mark.parametrize("items", [100, torch.tensor(100)])
def test_the_number_of_items_divides_the_loss_without_logits(items: Any, exact: None, chunks_of: Any) -> None:
    """Micro-batches: a number or a tensor, for the loss and for its gradients."""
    chunks_of(4)
    model = tiny_model()
    inputs = batch(model, 4)
    outputs, _ = assert_same_step(model, **inputs, num_items_in_batch=items)
    torch.testing.assert_close(outputs.loss, outputs.token_losses.sum() / 100, **exactly)


@pytest.mark.parametrize("block_size", [4, 1, [4, 1, 2]])
@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_a_batch_without_a_scored_token_has_zero_gradients(
    variant: str, block_size: int | list[int], exact: None
) -> None:
    """Zeros for every parameter, not None: data-parallel workers wait for them."""
    model = tiny_model(variant)
    text = words(3, 9)
    inputs = dict(input_ids=text, noisy_input_ids=text, noise_level=0.5, block_size=block_size)
    outputs, gradients = assert_same_step(model, **inputs, labels=torch.full_like(text, -100))
    assert outputs.loss.item() == 0.0
    assert set(gradients) == dict(model.named_parameters()).keys()
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_a_masked_batch_without_a_mask_costs_nothing(exact: None) -> None:
    """All tokens scored, all carried over."""
    model, text = tiny_model(), words(2, 8)
    outputs, _ = assert_same_step(
        model, input_ids=text, noisy_input_ids=text, labels=text, noise_level=0.5, block_size=4
    )
    assert outputs.loss.item() == 0.0


def test_drawn_noise_is_the_same_with_and_without_logits(exact: None) -> None:
    """Block size, noise level and noise are drawn before the head: a seed gives one loss."""
    model = tiny_model("uniform").double().train()
    losses = []
    for skip_logits in (False, True):
        torch.manual_seed(3)
        losses.append(model(words(4, 8), labels=words(4, 8), skip_logits=skip_logits).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


# ---- head and loss alone
def dense_loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, token_loss: Any) -> torch.Tensor:
    return token_loss(torch.nn.functional.linear(hidden, weight, bias), slice(None))


@by_hypothesis
@given(
    num_tokens=st.integers(0, 40),
    vocab_size=st.integers(1, 9),
    hidden_size=st.integers(1, 5),
    chunk_size=st.integers(1, 45),
    has_bias=st.booleans(),
    needed=st.sampled_from([(True, True, True), (True, False, False), (False, True, False), (False, True, True)]),
    factor=st.sampled_from([1.0, -2.5, 0.0]),
    seed=st.integers(0, 99),
)
def test_chunks_give_the_gradients_of_the_whole(
    num_tokens: int,
    vocab_size: int,
    hidden_size: int,
    chunk_size: int,
    has_bias: bool,
    needed: tuple[bool, bool, bool],
    factor: float,
    seed: int,
) -> None:
    """Any shape, with and without bias, whatever of it is frozen, scaled by what comes after the loss."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_tokens, hidden_size), (vocab_size, hidden_size), (vocab_size,)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    inputs = [tensor.requires_grad_(need) for tensor, need in zip(tensors, needed, strict=True)][: 2 + has_bias]
    hidden, weight, bias = (*inputs, None)[:3]
    target = torch.randint(vocab_size, (num_tokens,), generator=generator)
    importance = torch.rand(num_tokens, generator=generator, dtype=torch.float64)

    def token_loss(logits: torch.Tensor, chunk: slice) -> torch.Tensor:
        return importance[chunk] * torch.nn.functional.cross_entropy(logits, target[chunk], reduction="none")

    expected = dense_loss(hidden, weight, bias, token_loss)
    total, losses = chunked_loss(hidden, weight, bias, token_loss, chunk_size)
    torch.testing.assert_close(losses, expected.detach(), **exactly)
    torch.testing.assert_close(total, expected.sum(), **exactly)
    differentiable = [tensor for tensor in inputs if tensor.requires_grad]
    torch.testing.assert_close(
        torch.autograd.grad(factor * total, differentiable),
        torch.autograd.grad(factor * expected.sum(), differentiable),
        **exactly,
    )


@pytest.mark.parametrize("frozen", ["head", "bias", "trunk"])
def test_frozen_parameters_stay_without_gradient(frozen: str, exact: None, chunks_of: Any) -> None:
    """A frozen head lets the gradient through; with a frozen trunk only the head learns."""
    chunks_of(4)
    model = tiny_model("uniform")
    parts = {"head": model.lm_head.parameters(), "bias": [model.lm_head.bias], "trunk": model.model.parameters()}
    for parameter in parts[frozen]:
        parameter.requires_grad_(False)
    _, gradients = assert_same_step(model, **batch(model, 4))
    assert set(gradients) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


# ---- one backward pass
def test_a_factor_on_the_loss_scales_its_gradients(exact: None) -> None:
    """As loss scaling and gradient accumulation put it there."""
    model = tiny_model("uniform").double().train()
    inputs = batch(model, 4)
    _, gradients = differentiate(model, **inputs)
    _, tripled = differentiate(model, factor=3.0, **inputs)
    torch.testing.assert_close(tripled, {name: 3 * gradient for name, gradient in gradients.items()}, **exactly)


def test_gradients_of_micro_batches_add_up(exact: None) -> None:
    """Two losses in flight, each with its own gradients, and sums in `.grad`."""
    model = tiny_model().double().train()
    inputs = batch(model, 4)
    _, whole = differentiate(model, **inputs, num_items_in_batch=23)
    model.zero_grad()
    parts = [
        {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        for rows in (slice(0, 1), slice(1, 3))
    ]
    losses = [model(**part, num_items_in_batch=23).loss for part in parts]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, whole, **exactly)


def test_a_second_backward_pass_is_refused() -> None:
    """The gradients are used up: an error that says what to do, instead of wrong numbers."""
    model = tiny_model().train()
    inputs = batch(model, 4)
    loss = model(**inputs).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once, and only once.*`skip_logits=False`"):
        loss.backward()
    kept = model(**inputs, skip_logits=False).loss
    kept.backward(retain_graph=True)
    kept.backward()


def test_second_derivatives_are_refused() -> None:
    """A penalty on gradients would take those of hidden states and head for constants: an error instead."""
    model = tiny_model(attn_implementation="eager").train()
    loss = model(**batch(model, 4)).loss
    with pytest.raises(RuntimeError):
        gradients = torch.autograd.grad(loss, [*model.parameters()], create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()


def test_token_losses_cannot_be_differentiated() -> None:
    """They are for looking at; a loss made of them would train nothing."""
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    total, losses = chunked_loss(hidden, weight, None, lambda logits, chunk: logits.logsumexp(-1), 2)
    assert total.requires_grad
    assert not losses.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_loss_is_the_same_and_none_are_computed(mode: Any, exact: None) -> None:
    """Evaluation without logits: forward only."""
    model = tiny_model("uniform").double().train()
    inputs = batch(model, 4)
    expected = model(**inputs)
    with mode(), recorded_operations() as operations:
        outputs = model(**inputs)
    assert outputs.logits is None
    assert not outputs.loss.requires_grad
    torch.testing.assert_close(outputs.loss, expected.loss, **exactly)
    torch.testing.assert_close(outputs.token_losses, expected.token_losses, **exactly)
    assert not any("backward" in name for name, _ in operations)
    # the trunk's parameters are no new tensors; a gradient of the head would be one
    assert model.lm_head.weight.shape not in [output.shape for name, output in operations if "zeros" in name]


def test_no_gradient_is_computed_that_nobody_asked_for() -> None:
    """Everything frozen: the logits of a chunk are differentiated only for hidden states or head."""
    differentiated = []

    def token_loss(logits: torch.Tensor, chunk: slice) -> torch.Tensor:
        differentiated.append(logits.requires_grad)
        return logits.logsumexp(-1)

    hidden, weight = torch.randn(5, 4), torch.randn(7, 4)
    total, _ = chunked_loss(hidden, weight, None, token_loss, 2)
    assert not total.requires_grad
    assert differentiated == [False] * 3
    with torch.no_grad():
        chunked_loss(hidden.requires_grad_(), weight, None, token_loss, 2)
    assert differentiated == [False] * 6
    chunked_loss(hidden, weight, None, token_loss, 2)
    assert differentiated == [False] * 6 + [True] * 3


# ---- precision
def distance(gradients: Gradients, expected: Gradients) -> float:
    """The largest relative distance of a parameter's gradient, by norm."""
    assert gradients.keys() == expected.keys()
    return max(
        float((gradients[name].double() - expected[name].double()).norm() / expected[name].double().norm())
        for name in expected
    )


@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_autocast_gives_float32_gradients_of_bfloat16_products(variant: str, chunks_of: Any) -> None:
    """As with logits, the head is multiplied in bfloat16; loss and gradients are float32, and near the exact ones."""
    chunks_of(4)
    model = tiny_model(variant).train()
    inputs = batch(model, 4)
    exact_outputs, exact_gradients = differentiate(model, **inputs)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        with recorded_operations() as operations:
            outputs = model(**inputs)
        with_logits = model(**inputs, skip_logits=False)
    outputs.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    products = {output.dtype for name, output in operations if is_head_product(name, output, VOCAB_SIZE)}
    assert products == {torch.bfloat16}
    assert outputs.loss.dtype == outputs.token_losses.dtype == torch.float32
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    torch.testing.assert_close(outputs.loss, with_logits.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.loss, exact_outputs.loss, atol=0, rtol=0.02)
    assert distance(gradients, exact_gradients) < 0.15


@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_a_bfloat16_model_trains_without_logits(variant: str, chunks_of: Any) -> None:
    """Parameters and gradients in bfloat16, losses in float32: those with logits up to rounding."""
    chunks_of(4)
    model = tiny_model(variant).bfloat16().train()
    inputs = batch(model, 4)
    expected, expected_gradients = differentiate(model, **inputs, skip_logits=False)
    outputs, gradients = differentiate(model, **inputs)
    assert outputs.logits is None
    assert outputs.loss.dtype == outputs.token_losses.dtype == torch.float32
    assert {gradient.dtype for gradient in gradients.values()} == {torch.bfloat16}
    torch.testing.assert_close(outputs.token_losses, expected.token_losses)
    torch.testing.assert_close(outputs.loss, expected.loss)
    assert distance(gradients, expected_gradients) < 0.05


def test_gradients_of_many_chunks_are_summed_in_float32() -> None:
    """A sum of 2,000 like terms in bfloat16 would stop growing at 256 of them."""
    hidden = torch.ones(2000, 2, dtype=torch.bfloat16)
    weight = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    total, _ = chunked_loss(hidden, weight, bias, lambda logits, chunk: logits.sum(-1).float(), 1)
    total.backward()
    assert weight.grad.dtype == bias.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad.float(), torch.full((3, 2), 2000.0))
    torch.testing.assert_close(bias.grad.float(), torch.full((3,), 2000.0))


# ---- memory
class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for output in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(output, torch.Tensor):
                # a stand-in without memory
                self.seen.append((str(func), torch.empty(output.shape, dtype=output.dtype, device="meta")))
        return result


@contextmanager
def recorded_operations() -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Every operation within the block, with shape and dtype of what it returns."""
    mode = _Operations()
    with mode:
        yield mode.seen


def is_head_product(name: str, output: torch.Tensor, vocab_size: int) -> bool:
    """Whether this is the product of hidden states and head, with or without the bias."""
    is_product = any(name.startswith(f"aten.{product}.") for product in ("mm", "addmm", "bmm", "linear"))
    return is_product and output.shape[-1] == vocab_size


LARGE_VOCABULARY = 1000


def large_step(variant: str, skip_logits: bool) -> tuple[list[tuple[str, torch.Tensor]], int]:
    """Forward and backward pass of 64 tokens with a vocabulary of 1,000; and how many tokens are masked."""
    overrides = {} if variant == "uniform" else {"mask_token_id": LARGE_VOCABULARY - 1}
    model = tiny_model(variant, vocab_size=LARGE_VOCABULARY, **overrides).train()
    text = words(4, 16)
    noisy = model.diffusion.corrupt(text, 0.4, torch.Generator().manual_seed(0))
    inputs = dict(input_ids=text, noisy_input_ids=noisy, labels=text, noise_level=0.6, block_size=4)
    model(**inputs, skip_logits=skip_logits)  # what is built once
    with recorded_operations() as operations:
        model(**inputs, skip_logits=skip_logits).loss.backward()
    return operations, int((noisy == LARGE_VOCABULARY - 1).sum())


@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_logits_of_all_tokens_never_stand_in_memory(variant: str, chunks_of: Any) -> None:
    """64 tokens and 1,000 words in chunks of 8: nothing is larger than the head itself, and no chunk than 8 rows."""
    chunks_of(8)
    operations, _ = large_step(variant, skip_logits=True)
    assert max(output.numel() for _, output in operations) <= 16 * LARGE_VOCABULARY  # the head and its gradient
    logits = {output.shape[0] for _, output in operations if output.ndim == 2 and output.shape[-1] == LARGE_VOCABULARY}
    assert max(logits - {16}) == 8  # 16: the head, transposed
    operations, _ = large_step(variant, skip_logits=False)
    assert max(output.numel() for _, output in operations) == 64 * LARGE_VOCABULARY


@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_the_head_is_computed_where_tokens_cost_something(variant: str, chunks_of: Any) -> None:
    """Masked models: at masked positions only, the others being carried over; uniform ones: everywhere. And once."""
    chunks_of(8)
    operations, num_masked = large_step(variant, skip_logits=True)
    rows = [output.shape[0] for name, output in operations if is_head_product(name, output, LARGE_VOCABULARY)]
    assert sum(rows) == (num_masked if variant == "masked" else 64)
    assert 0 < num_masked < 64 or variant == "uniform"
    assert rows[:-1] == [8] * (len(rows) - 1)


def test_masks_that_are_not_scored_cost_no_head(chunks_of: Any) -> None:
    """Prompts with a mask token in them, and rows of both objectives: scored and masked are counted."""
    chunks_of(100)
    model = tiny_model(training_objective="elbo").train()
    inputs = batch(model, [4, 1, 2])
    inputs["noisy_input_ids"][0, :3] = MASK
    costs = (inputs["noisy_input_ids"] == MASK) & (inputs["labels"] != -100)
    with recorded_operations() as operations:
        outputs = model(**inputs)
    rows = [output.shape[0] for name, output in operations if is_head_product(name, output, VOCAB_SIZE)]
    assert sorted(rows) == sorted([int(costs[1].sum()), int(costs[[0, 2]].sum())])
    assert ((outputs.token_losses > 0) == costs).all()


# ---- when it is used
def test_training_skips_the_logits_and_evaluation_keeps_them() -> None:
    """The default by mode; `skip_logits` decides otherwise."""
    model = tiny_model()
    inputs = batch(model, 4)
    for training in (False, True):
        model.train(training)
        default, kept, skipped = (model(**inputs, skip_logits=skip) for skip in (None, False, True))
        assert (default.logits is None) == training
        assert kept.logits.shape == (3, 9, VOCAB_SIZE)
        assert skipped.logits is None
        torch.testing.assert_close(skipped.loss, kept.loss)
        torch.testing.assert_close(default.loss, kept.loss)
    assert model(inputs["input_ids"], use_cache=False).logits is not None  # without labels, in training mode


def replaced_head(model: BlockGenForDiffusionLM, kind: str) -> tuple[torch.nn.Module, str]:
    """A model whose output layer is no plain linear layer any more, and a parameter that the loss has to reach."""
    if kind == "weight_norm":
        torch.nn.utils.parametrizations.weight_norm(model.lm_head)
        return model, "lm_head.parametrizations.weight.original0"
    peft = pytest.importorskip("peft")
    modules = {"lora": dict(target_modules=["q_proj", "lm_head"])}.get(
        kind, dict(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    names = {"lora": "lm_head.lora_B.default.weight", "saved": "lm_head.modules_to_save.default.weight"}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, **modules)), names[kind]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("kind", ["lora", "saved", "weight_norm"])
def test_an_adapted_output_layer_falls_back_to_logits(kind: str) -> None:
    """Its weight alone is not what it computes: logits by default, an error where they are to be skipped."""
    plain = tiny_model().train()
    inputs = batch(plain, 4)
    adapted, name = replaced_head(tiny_model(), kind)
    adapted.train()
    outputs = adapted(**inputs)
    assert outputs.logits is not None
    torch.testing.assert_close(outputs.loss, plain(**inputs).loss)  # adapters start as the identity
    outputs.loss.backward()
    (parameter,) = (p for n, p in adapted.named_parameters() if n.endswith(name))
    assert parameter.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="`skip_logits=True`.*wrapped"):
        adapted(**inputs, skip_logits=True)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters_in_the_trunk_train_without_logits(exact: None) -> None:
    """LoRA elsewhere: the head is frozen and plain, the adapters get the gradients that they get with logits."""
    peft = pytest.importorskip("peft")
    model = tiny_model("uniform")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    _, gradients = assert_same_step(adapted, **batch(model, 4))
    assert gradients
    assert all("lora" in name and gradient.abs().sum() > 0 for name, gradient in gradients.items())


def test_a_resized_vocabulary_trains_without_logits(exact: None) -> None:
    """The head has the rows that the configuration says."""
    model = tiny_model("uniform")
    model.resize_token_embeddings(VOCAB_SIZE + 4, mean_resizing=False)
    outputs, gradients = assert_same_step(model, **batch(model, 4))
    assert len(gradients["lm_head.weight"]) == VOCAB_SIZE + 4
    assert model.train()(**batch(model, 4)).logits is None
    assert outputs.loss.isfinite()


# ---- objective
@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_the_objective_of_a_call_overrides_that_of_the_configuration(variant: str, skip_logits: bool) -> None:
    """For blocks larger than 1; those of size 1 are scored by cross entropy in any case."""
    models = {name: tiny_model(variant, training_objective=name) for name in ("cross_entropy", "elbo")}
    inputs = batch(models["elbo"], [4, 1, 2]) | dict(skip_logits=skip_logits)
    losses = {name: model(**inputs).token_losses for name, model in models.items()}
    for configured, model in models.items():
        for objective, expected in losses.items():
            torch.testing.assert_close(model(**inputs, objective=objective).token_losses, expected)
        assert model.config.training_objective == configured
    differs = (losses["elbo"] - losses["cross_entropy"]).abs() > 1e-3
    assert differs.any(-1).tolist() == [True, False, True]


@pytest.mark.parametrize("skip_logits", [False, True])
def test_an_unknown_objective_is_refused(skip_logits: bool) -> None:
    """With the names that are accepted, also where block size 1 would not need it."""
    model = tiny_model()
    for block_size in (4, 1):
        with pytest.raises(ValueError, match="`objective` must be 'elbo' or 'cross_entropy'.*'mse'"):
            model(**batch(model, block_size), objective="mse", skip_logits=skip_logits)
