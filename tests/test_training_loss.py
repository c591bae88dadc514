"""`forward(labels=...)`: the mixture loss (Eq. 7) against its parts written out, what is drawn, and its gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from tiny import MASK, VARIANTS, VOCAB_SIZE, left_padded, tiny_model, words

from blockgen_hf import BlockGenForDiffusionLM


EPS = 1e-3


def noise(model: BlockGenForDiffusionLM, text: torch.Tensor, t: float, seed: int = 7) -> torch.Tensor:
    """z_t of Eq. 1 for one noise level, drawn here and not by the model."""
    generator = torch.Generator().manual_seed(seed)
    stays = torch.rand(text.shape, generator=generator) < EPS + (1 - EPS) * (1 - t)
    prior = torch.full_like(text, MASK)
    if model.config.diffusion_type == "uniform":
        prior = torch.randint(VOCAB_SIZE, text.shape, generator=generator)
    return torch.where(stays, text, prior)


def cross_entropy_by_hand(logits: np.ndarray, x: int, z: int, masked: bool) -> float:
    """-log x_hat(x); masked: the mask token is impossible and visible tokens are carried over."""
    if masked and z != MASK:
        return 0.0
    scores = logits[:MASK] if masked else logits
    return float(np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[x])


def elbo_by_hand(logits: np.ndarray, x: int, z: int, t: float, masked: bool) -> float:
    """Eq. 15 and Eq. 17 for the linear schedule, with the signs that make them positive."""
    alpha, slope = EPS + (1 - EPS) * (1 - t), -(1 - EPS)
    if masked:
        return -slope / (1 - alpha) * cross_entropy_by_hand(logits, x, z, masked)
    x_hat = np.exp(logits - logits.max())
    x_hat /= x_hat.sum()
    bar = VOCAB_SIZE * alpha * np.eye(VOCAB_SIZE)[x] + 1 - alpha
    bar_hat = VOCAB_SIZE * alpha * x_hat + 1 - alpha
    ratio = bar / bar[z]
    bracket = VOCAB_SIZE / bar[z] - VOCAB_SIZE / bar_hat[z] - (ratio * np.log(bar_hat[z] / bar_hat * ratio)).sum()
    return float(slope / (VOCAB_SIZE * alpha) * bracket)


def loss_by_hand(
    model: BlockGenForDiffusionLM,
    labels: torch.Tensor,
    noisy: torch.Tensor,
    logits: torch.Tensor,
    t: torch.Tensor,
    block_size: int,
) -> float:
    """Mean over the scored tokens, by a loop."""
    masked = model.config.diffusion_type == "masked"
    terms = []
    for row, position in np.ndindex(*labels.shape):
        x, z = int(labels[row, position]), int(noisy[row, position])
        if x == -100:
            continue
        scores = logits[row, position].double().numpy()
        if block_size == 1 or model.config.training_objective == "cross_entropy":
            terms.append(cross_entropy_by_hand(scores, x, z, masked))
        else:
            terms.append(elbo_by_hand(scores, x, z, float(t.expand(labels.shape)[row, position]), masked))
    return float(np.mean(terms))


def labels_with_prompt(text: torch.Tensor) -> torch.Tensor:
    """-100 on prompts of different lengths, and on a token in the middle."""
    labels = text.clone()
    labels[0, :3] = -100
    labels[1, 5] = -100
    return labels


@pytest.mark.parametrize(
    ("variant", "objective", "block_size"),
    [
        *((variant, objective, 4) for variant in VARIANTS for objective in ("cross_entropy", "elbo")),
        *((variant, "elbo", size) for variant in ("masked", "uniform_time_conditional") for size in (1, 2)),
        ("uniform", "cross_entropy", 1),
    ],
)
def test_loss_is_the_mean_of_its_parts(variant: str, objective: str, block_size: int) -> None:
    """Given block size, noise level and noise: Eq. 15, Eq. 17, or cross entropy, over the scored tokens."""
    model = tiny_model(variant, training_objective=objective)
    text = words(3, 8)
    labels = labels_with_prompt(text)
    t = torch.tensor([0.2, 0.6, 0.95])[:, None]
    noisy = torch.cat([noise(model, text[i : i + 1], float(t[i]), seed=i) for i in range(3)])
    if block_size == 1:
        noisy, t = noise(model, text, 1.1), torch.ones(3, 1)
    noisy = torch.where(labels == -100, text, noisy)
    with torch.no_grad():
        outputs = model(text, noisy, labels=labels, block_size=block_size, noise_level=t)
        logits = model(text, noisy, block_size=block_size, noise_level=t).logits
    torch.testing.assert_close(outputs.logits, logits, atol=1e-5, rtol=1e-5)
    expected = loss_by_hand(model, labels, noisy, logits, t, block_size)
    assert outputs.loss.item() == pytest.approx(expected, rel=1e-4)


def test_noise_level_may_be_given_for_all_for_a_row_or_for_a_token() -> None:
    """A number, `[B]`, `[B, 1]` and `[B, L]` (one t a block) mean the same where they agree."""
    model, text = tiny_model("uniform_time_conditional"), words(2, 8)
    noisy = noise(model, text, 0.4)
    levels = [0.4, torch.tensor(0.4), torch.tensor([0.4, 0.4]), torch.full((2, 1), 0.4), torch.full((2, 8), 0.4)]
    losses = [model(text, noisy, labels=text, block_size=4, noise_level=level).loss.item() for level in levels]
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-5)
    by_block = torch.tensor([[0.4] * 4 + [0.8] * 4] * 2)
    with torch.no_grad():
        outputs = model(text, noisy, labels=text, block_size=4, noise_level=by_block)
    assert outputs.loss.item() == pytest.approx(
        loss_by_hand(model, text, noisy, outputs.logits, by_block, 4), rel=1e-4
    )


def test_loss_is_divided_by_the_number_of_items_when_it_is_given() -> None:
    """The mean over scored tokens, or the sum divided by `num_items_in_batch`."""
    model, text = tiny_model(), words(2, 8)
    labels, noisy = labels_with_prompt(text), noise(model, text, 0.7)
    kwargs = dict(labels=labels, block_size=4, noise_level=0.7)
    mean = model(text, noisy, **kwargs).loss
    scored = int((labels != -100).sum())
    assert scored == 12
    for items in (40, torch.tensor(40)):
        total = model(text, noisy, num_items_in_batch=items, **kwargs).loss * 40
        assert total.item() == pytest.approx(mean.item() * scored, rel=1e-5)


def test_loss_of_a_batch_is_the_weighted_mean_of_its_rows() -> None:
    """Nothing leaks between rows: in any order, and as several micro-batches with the total number of items."""
    model, text = tiny_model(), words(4, 8)
    labels, noisy = labels_with_prompt(text), noise(model, text, 0.7)
    t = torch.tensor([0.7, 0.5, 0.9, 0.6])
    total = model(text, noisy, labels=labels, block_size=4, noise_level=t).loss
    items = int((labels != -100).sum())
    order = torch.tensor([2, 0, 3, 1])
    permuted = model(text[order], noisy[order], labels=labels[order], block_size=4, noise_level=t[order]).loss
    torch.testing.assert_close(permuted, total)
    parts = [
        model(
            text[rows], noisy[rows], labels=labels[rows], block_size=4, noise_level=t[rows], num_items_in_batch=items
        ).loss
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), total)


@pytest.mark.parametrize(
    ("variant", "side"),
    [*((variant, "left") for variant in VARIANTS), *((variant, "right") for variant in ("masked", "block_causal"))],
)
def test_padding_changes_no_loss(variant: str, side: str) -> None:
    """Padded rows with -100 on their pads cost what they cost alone, whatever the pads are."""
    model, lengths = tiny_model(variant), (8, 5)
    rows = [words(n, seed=n) for n in lengths]
    noisy_rows = [noise(model, row, 0.6) for row in rows]
    expected = 0.0
    for row, noisy in zip(rows, noisy_rows, strict=True):
        loss = model(row[None], noisy[None], labels=row[None], block_size=4, noise_level=0.6).loss
        expected += loss.item() * len(row) / sum(lengths)
    for pad in (20, 3):
        text, noisy, labels, mask = (torch.full((2, 8), value) for value in (pad, pad, -100, 0))
        for i, n in enumerate(lengths):
            span = slice(8 - n, 8) if side == "left" else slice(0, n)
            text[i, span], noisy[i, span], labels[i, span], mask[i, span] = rows[i], noisy_rows[i], rows[i], 1
        loss = model(text, noisy, labels=labels, attention_mask=mask, block_size=4, noise_level=0.6).loss
        assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_batch_without_a_scored_token_costs_nothing() -> None:
    """All -100: zero, not nan."""
    model, text = tiny_model(), words(2, 8)
    loss = model(text, labels=torch.full_like(text, -100)).loss
    assert loss.item() == 0.0


# ---- what is drawn
@contextmanager
def record_trunk(model: BlockGenForDiffusionLM) -> Iterator[list[dict[str, Any]]]:
    """What the trunk was called with: block size, noise level, noisy ids."""
    calls: list[dict[str, Any]] = []

    def hook(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append(kwargs)

    handle = model.model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_unscored_tokens_stay_clean_in_the_noisy_half(variant: str) -> None:
    """Prompts and padding are conditions, at every block size, block size 1 too."""
    model = tiny_model(variant, num_hidden_layers=1)
    text = words(16, 32)
    labels = text.clone()
    labels[:, :12] = -100
    for block_size in (1, 8):
        with record_trunk(model) as calls:
            model(text, labels=labels, block_size=block_size)
        noisy = calls[0]["noisy_input_ids"]
        assert torch.equal(noisy[:, :12], text[:, :12])
        changed = (noisy != text)[:, 12:].float().mean()
        assert changed > 0.3
        if block_size == 1 and variant == "masked":
            assert changed == 1.0


def test_labels_are_what_the_clean_half_holds() -> None:
    """Where labels differ from `input_ids` they are the text; where they are -100 `input_ids` are."""
    model, text = tiny_model(), words(1, 8)
    labels = words(1, 8, seed=3)
    labels[0, :2] = -100
    with record_trunk(model) as calls:
        model(text, labels=labels, block_size=4, noise_level=0.5)
    assert torch.equal(calls[0]["input_ids"], torch.where(labels == -100, text, labels))


def test_block_sizes_are_drawn_by_their_weights() -> None:
    """Eq. 6: the mixture over S with weights gamma."""
    model = tiny_model(num_hidden_layers=1, block_sizes=[1, 2, 4], block_size_weights=[0.5, 0.0, 0.5]).train()
    with record_trunk(model) as calls:
        for _ in range(60):
            model(words(1, 4), labels=words(1, 4))
    counts = {size: sum(call["block_size"] == size for call in calls) for size in (1, 2, 4)}
    assert counts[2] == 0
    assert 15 <= counts[1] <= 45


def test_one_noise_level_a_sequence_spread_over_the_batch() -> None:
    """Suppl. A.4: t uniform on [1e-3, 1], one a sequence, low-discrepancy over the batch."""
    model = tiny_model(num_hidden_layers=1).train()
    text = words(16, 8)
    with record_trunk(model) as calls:
        for _ in range(20):
            model(text, labels=text, block_size=4)
    levels = torch.stack([call["noise_level"].flatten() for call in calls])
    assert levels.shape == (20, 16)
    assert levels.min() >= 1e-3 and levels.max() <= 1
    gaps = levels.sort(dim=-1).values.diff()
    assert (gaps < 2 / 16).all()
    assert levels.mean() == pytest.approx(0.5005, abs=0.02)
    kept = torch.stack([(call["noisy_input_ids"] == text).float().mean(-1) for call in calls])
    assert torch.corrcoef(torch.stack([kept.flatten(), 1 - levels.flatten().float()]))[0, 1] > 0.8


@pytest.mark.parametrize("variant", ["masked", "uniform", "time_conditional"])
def test_block_size_1_is_fully_noised(variant: str) -> None:
    """Block size 1 always trains with cross entropy on fully noised inputs, t = 1."""
    model, text = tiny_model(variant), words(8, 16)
    with record_trunk(model) as calls:
        model(text, labels=text, block_size=1)
    assert (calls[0]["noise_level"] == 1).all()
    kept = (calls[0]["noisy_input_ids"] == text).float().mean()
    assert kept == 0 if variant != "uniform" else kept < 0.2


def test_seeds_reproduce_the_loss() -> None:
    """In training mode the draws come from torch's default generator, as those of dropout."""
    model, text = tiny_model().train(), words(4, 8)

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return model(text, labels=text, block_size=4).loss.item()

    assert loss(3) == loss(3) != loss(4)


@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_block_size_1_loss_is_the_autoregressive_cross_entropy(variant: str) -> None:
    """Sec. 3.1: on masked models, exactly the next-token loss of the causal use, the first token included."""
    model, text = tiny_model(variant), words(2, 8)
    queries = model.fixed_queries(torch.arange(8)[None]).expand(2, -1)
    loss = model(text, queries, labels=text, block_size=1, noise_level=1.0).loss
    with torch.no_grad():
        first = model(text[:, :0]).logits
        logits = torch.cat([first, model(text[:, :-1]).logits], dim=1)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text.flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


# ---- refusals
def test_contradictory_training_arguments_are_refused() -> None:
    """Each error names the argument."""
    model, text = tiny_model(), words(2, 8)
    with pytest.raises(ValueError, match="`labels`"):
        model(text, labels=text[:, :-1])
    with pytest.raises(ValueError, match="`labels`"):
        model(labels=text)
    with pytest.raises(ValueError, match="`noise_level`"):
        model(text, text, labels=text, block_size=4)
    with pytest.raises(ValueError, match="`block_size`"):
        model(text, labels=text, block_size=0)
    with pytest.raises(ValueError, match="block_causal"):
        tiny_model("block_causal")(text, labels=text, block_size=2)
    with pytest.raises(ValueError, match="`noisy_input_ids`"):
        model(text, text[:, :-1], labels=text, block_size=4, noise_level=0.5)


# ---- gradients
@pytest.mark.parametrize(("variant", "tied"), [*((variant, False) for variant in VARIANTS), ("uniform", True)])
def test_gradient_flows_to_every_parameter(variant: str, tied: bool) -> None:
    """Nothing is built that training would not reach (DDP refuses unused parameters)."""
    model = tiny_model(variant, tie_word_embeddings=tied).train()
    text = words(4, 8)
    model(text, labels=text, block_size=4).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    """With dropout too, whose random state the recomputation restores."""
    text = words(2, 8)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(hidden_dropout=0.2).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        outputs = model(text, labels=text, block_size=4)
        outputs.loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], msg=name)


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    """`hidden_dropout` on the two branches of every layer."""
    model, text = tiny_model(hidden_dropout=0.5), words(1, 6)
    assert torch.equal(model(text).logits, model(text).logits)
    model.train()
    assert not torch.equal(model(text, use_cache=False).logits, model(text, use_cache=False).logits)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_loss_is_finite_where_padding_leaves_rows_empty(attn_implementation: str) -> None:
    """A row of pads only, forward and backward."""
    model = tiny_model(attn_implementation=attn_implementation).train()
    batch = left_padded([words(8), words(0)])
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    loss = model(**batch, labels=labels, block_size=4).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("variant", "attention", "padded"),
    [
        ("masked", "eager", False),
        ("masked", "sdpa", True),
        ("uniform_time_conditional", "eager", True),
        ("uniform_time_conditional", "sdpa", False),
    ],
)
def test_a_text_of_one_block_is_trained_without_a_clean_half(variant: str, attention: str, padded: bool) -> None:
    """No noisy token of the first block sees a clean one: MDLM's and Duo's training is that of one long block."""
    model = tiny_model(variant)
    model.set_attn_implementation(attention)
    text, noisy = words(2, 10), words(2, 10, seed=1)
    mask = torch.ones_like(text)
    if padded:
        mask[1, 7:] = 0
    arguments: dict[str, Any] = {"noisy_input_ids": noisy, "noise_level": torch.tensor([0.3, 0.7]), "block_size": 16}
    arguments["attention_mask"] = mask if padded else None
    embedded: list[torch.Tensor] = []
    handle = model.model.embed_tokens.register_forward_hook(lambda module, args, output: embedded.append(output))
    logits = model(text, labels=text.masked_fill(mask == 0, -100), **arguments).logits
    handle.remove()
    assert embedded[0].shape[1] == 10
    expected = model(text, **arguments).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


def test_targets_of_sequence_parallelism_are_refused() -> None:
    text = words(1, 8)
    with pytest.raises(ValueError, match="`shift_labels` come from sequence or context parallelism"):
        tiny_model()(text, labels=text, shift_labels=text)


@pytest.mark.parametrize(
    ("objective", "block_size", "skip_logits"),
    [("cross_entropy", 1, False), ("cross_entropy", 4, True), ("elbo", 1, True), ("elbo", 4, False)],
)
def test_a_mask_token_as_a_target_is_impossible(objective: str, block_size: int, skip_logits: bool) -> None:
    """Its loss is infinite, and has no gradient: it could be lowered without end."""
    model, text = tiny_model(), words(1, 8)
    text[0, 3] = MASK
    outputs = model(
        text, labels=text, block_size=block_size, noise_level=1.0, objective=objective, skip_logits=skip_logits
    )
    assert outputs.loss == float("inf")
    assert outputs.token_losses.isinf().tolist() == [[position == 3 for position in range(8)]]
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
