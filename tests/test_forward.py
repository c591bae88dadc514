"""`forward` as a causal language model and as a denoiser: logits, positions, padding, attention back ends."""

from typing import Any

import pytest
import torch
from tiny import BLOCK_CAUSAL, CAUSAL, MASK, VARIANTS, left_padded, tiny_model, words
from transformers import DynamicCache

from blockgen_hf import BlockGenForDiffusionLM, BlockGenOutput


TOLERANCE = dict(atol=1e-5, rtol=1e-5)
LENGTHS = [7, 4, 1, 0]


def denoise(model: BlockGenForDiffusionLM, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Logits of the denoiser, at a fixed noise level for the models that want one."""
    kwargs.setdefault("noise_level", 0.5)
    with torch.no_grad():
        return model(*args, **kwargs).logits


# ---- the three uses
def test_input_ids_alone_give_next_token_logits() -> None:
    """As a causal language model: `logits[:, i]` predict position i + 1, one for every input token."""
    model, text = tiny_model(), words(2, 6)
    outputs = model(text)
    assert isinstance(outputs, BlockGenOutput)
    assert outputs.logits.shape == (2, 6, model.config.vocab_size)
    assert outputs.loss is None
    assert outputs.cache.get_seq_length() == 6
    for length in range(1, 7):
        shorter = model(text[:, :length]).logits[:, -1]
        torch.testing.assert_close(shorter, outputs.logits[:, length - 1], **TOLERANCE)


def test_noisy_input_ids_make_it_the_denoiser() -> None:
    """As the denoiser: one row of raw logits a noisy token, and by default neither cache nor loss."""
    model = tiny_model()
    outputs = model(words(2, 8), words(2, 8, seed=1), block_size=4)
    assert outputs.logits.shape == (2, 8, model.config.vocab_size)
    assert outputs.loss is None and outputs.cache is None
    assert (outputs.logits[..., MASK] > -100).all()  # raw: before the masked parameterisation


def test_labels_make_it_the_training_loss() -> None:
    """As the training loss: a scalar with a gradient, whatever is not passed is drawn."""
    outputs = tiny_model()(input_ids=words(2, 8), labels=words(2, 8))
    assert outputs.loss.shape == () and outputs.loss.requires_grad and outputs.loss > 0
    assert outputs.logits.shape[:2] == (2, 8)
    assert outputs.cache is None


@pytest.mark.parametrize("variant", CAUSAL)
def test_block_size_1_denoiser_gives_the_autoregressive_logits(variant: str) -> None:
    """Sec. 3.1: block size 1 on fully noised tokens is the AR model. (The AR use rules out the mask token itself.)"""
    model, text = tiny_model(variant), words(2, 7)
    queries = model.fixed_queries(torch.arange(7)[None]).expand(2, -1)
    denoised = denoise(model, text, queries, block_size=1, noise_level=1.0)
    autoregressive = model(text[:, :-1]).logits
    if model.config.diffusion_type == "masked":
        assert (autoregressive[..., MASK] == torch.finfo(torch.float32).min).all()
        autoregressive, denoised = autoregressive[..., :MASK], denoised[..., :MASK]
    torch.testing.assert_close(autoregressive, denoised[:, 1:], **TOLERANCE)
    empty = model(text[:, :0]).logits[..., : denoised.shape[-1]]
    torch.testing.assert_close(empty, denoised[:, :1], **TOLERANCE)


def test_given_queries_stand_at_the_last_predicted_positions() -> None:
    """`query_input_ids` replaces the fixed queries of a uniform model: last Q predictions."""
    model, text, queries = tiny_model("uniform"), words(2, 5), words(2, 3, seed=4)
    denoised = denoise(
        model, text, queries, block_size=1, noise_level=1.0, noisy_position_ids=torch.arange(3, 6)[None]
    )
    torch.testing.assert_close(model(text, query_input_ids=queries).logits, denoised, **TOLERANCE)


def test_verification_is_the_denoiser_with_block_size_1() -> None:
    """AR verification of n proposed tokens is one call, equal to n calls of the AR model."""
    model, text, proposal = tiny_model(), words(1, 5), words(1, 4, seed=1)
    queries = torch.full((1, 4), MASK)
    verified = denoise(
        model,
        torch.cat([text, proposal], dim=1),
        queries,
        block_size=1,
        noise_level=1.0,
        noisy_position_ids=torch.arange(5, 9)[None],
    )
    for index in range(4):
        prefix = torch.cat([text, proposal[:, :index]], dim=1)
        torch.testing.assert_close(verified[:, index, :MASK], model(prefix).logits[:, -1, :MASK], **TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_layout_equals_training_layout(variant: str) -> None:
    """The last block of a training pass and the same block behind its clean prefix have the same logits."""
    model, text, noisy = tiny_model(variant), words(2, 8), words(2, 8, seed=1)
    trained = denoise(model, text, noisy, block_size=4)
    generated = denoise(model, text[:, :4], noisy[:, 4:], block_size=4, noisy_position_ids=torch.arange(4, 8)[None])
    torch.testing.assert_close(generated, trained[:, 4:], **TOLERANCE)
    first = denoise(model, None, noisy[:, :4], block_size=4)
    torch.testing.assert_close(first, trained[:, :4], **TOLERANCE)


def test_block_size_defaults_to_the_largest_trained() -> None:
    """The denoiser's default."""
    model, text, noisy = tiny_model(), words(1, 16), words(1, 16, seed=1)
    assert torch.equal(denoise(model, text, noisy), denoise(model, text, noisy, block_size=8))


@pytest.mark.usefixtures("loud_transformers")
def test_block_size_without_training_runs_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    """Any positive size runs; one that the model was not trained for warns once."""
    model, text = tiny_model(), words(1, 6)
    for _ in range(2):
        assert denoise(model, text, text, block_size=3).shape == (1, 6, model.config.vocab_size)
    warnings = [record.message for record in caplog.records if "`block_size=3`" in record.message]
    assert len(warnings) == 1 and "[1, 2, 4, 8]" in warnings[0]


# ---- logits_to_keep, positions
@pytest.mark.parametrize("variant", ["masked", "uniform"])
@pytest.mark.parametrize("keep", [1, 3, 6, torch.tensor([0, 2, 5]), torch.tensor([4])], ids=str)
def test_logits_to_keep_selects_from_all_logits(variant: str, keep: int | torch.Tensor) -> None:
    """As in every causal language model: the last so many, or the ones of an index tensor; 0 means all."""
    model, text, noisy = tiny_model(variant), words(2, 6), words(2, 6, seed=1)
    selected = slice(-keep, None) if isinstance(keep, int) else keep
    torch.testing.assert_close(
        model(text, logits_to_keep=keep).logits, model(text, logits_to_keep=0).logits[:, selected], **TOLERANCE
    )
    torch.testing.assert_close(
        denoise(model, text, noisy, block_size=2, logits_to_keep=keep),
        denoise(model, text, noisy, block_size=2)[:, selected],
        **TOLERANCE,
    )


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_rotary_positions_are_relative(attn_implementation: str) -> None:
    """Given positions replace the default ones; a common shift of all of them changes nothing but rounding."""
    model, text, noisy = tiny_model(attn_implementation=attn_implementation), words(2, 8), words(2, 8, seed=1)
    shifted = torch.arange(8)[None] + 8
    torch.testing.assert_close(model(text, position_ids=shifted).logits, model(text).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        denoise(model, text, noisy, block_size=4, position_ids=shifted),
        denoise(model, text, noisy, block_size=4),
        atol=1e-4,
        rtol=1e-4,
    )
    spread = torch.arange(0, 16, 2)[None]
    assert (model(text, position_ids=spread).logits - model(text).logits).abs().max() > 1e-2


def test_given_positions_of_the_default_layout_change_nothing(any_model: BlockGenForDiffusionLM) -> None:
    """`position_ids` and `noisy_position_ids`, one a row or one for all rows."""
    text, noisy, positions = words(2, 8), words(2, 8, seed=1), torch.arange(8)[None]
    base = denoise(any_model, text, noisy, block_size=4)
    for given in (positions, positions.expand(2, -1)):
        torch.testing.assert_close(denoise(any_model, text, noisy, block_size=4, position_ids=given), base)
        torch.testing.assert_close(
            denoise(any_model, text, noisy, block_size=4, position_ids=given, noisy_position_ids=given),
            base,
            **TOLERANCE,
        )


def test_wrong_shapes_are_refused_by_name() -> None:
    """An error says what was given and what is accepted."""
    model = tiny_model()
    with pytest.raises(ValueError, match="`input_ids`, `noisy_input_ids`"):
        model()
    with pytest.raises(ValueError, match="`noisy_position_ids`"):
        model(words(1, 6), words(1, 4), block_size=4)
    with pytest.raises(ValueError, match="`position_ids`"):
        model(words(1, 6), position_ids=torch.arange(5)[None])
    with pytest.raises(ValueError, match="`attention_mask`"):
        model(words(1, 6), attention_mask=torch.ones(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="`attention_mask`"):
        model(words(1, 6), attention_mask=torch.ones(1, 1, 6, 6))
    with pytest.raises(ValueError, match="`noisy_position_ids`"):
        model(words(1, 6), words(1, 4), block_size=4, noisy_position_ids=torch.arange(5)[None])
    for bad in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="`block_size`"):
            model(words(1, 6), words(1, 6), block_size=bad)


def test_time_conditional_model_needs_a_noise_level_and_heeds_it() -> None:
    """The noisy half gets the embedding of its level; a scalar, `[B]` and `[B, N]` are the same."""
    model, text, noisy = tiny_model("time_conditional"), words(2, 8), words(2, 8, seed=1)
    with pytest.raises(ValueError, match="`noise_level`"):
        model(text, noisy, block_size=4)
    base = denoise(model, text, noisy, block_size=4, noise_level=0.3)
    for level in (torch.tensor(0.3), torch.tensor([0.3, 0.3]), torch.full((2, 8), 0.3)):
        torch.testing.assert_close(denoise(model, text, noisy, block_size=4, noise_level=level), base, **TOLERANCE)
    assert (denoise(model, text, noisy, block_size=4, noise_level=0.9) - base).abs().max() > 1e-3
    mixed = denoise(model, text, noisy, block_size=4, noise_level=torch.tensor([0.3, 0.9]))
    torch.testing.assert_close(mixed[0], base[0], **TOLERANCE)
    by_block = torch.tensor([[0.3] * 4 + [0.9] * 4] * 2)
    torch.testing.assert_close(
        denoise(model, text, noisy, block_size=4, noise_level=by_block)[:, :4], base[:, :4], **TOLERANCE
    )


def test_time_unconditional_model_ignores_the_noise_level(model: BlockGenForDiffusionLM) -> None:
    """Suppl. A.2: adaLN is fed with the embedding of zero."""
    text, noisy = words(2, 8), words(2, 8, seed=1)
    assert torch.equal(
        denoise(model, text, noisy, block_size=4, noise_level=0.1),
        denoise(model, text, noisy, block_size=4, noise_level=0.9),
    )


# ---- padding
@pytest.mark.parametrize("variant", CAUSAL)
def test_left_padded_rows_have_their_own_autoregressive_logits(variant: str) -> None:
    """A padded batch equals its rows one by one, an empty row included: its one logit is that of no prompt."""
    model = tiny_model(variant)
    prompts = [words(length, seed=length) for length in LENGTHS]
    logits = model(**left_padded(prompts)).logits
    for row, prompt in enumerate(prompts):
        if len(prompt):
            torch.testing.assert_close(logits[row, -len(prompt) :], model(prompt[None]).logits[0], **TOLERANCE)
        else:
            torch.testing.assert_close(logits[row, -1], model(prompt[None]).logits[0, -1], **TOLERANCE)
    assert logits.isfinite().all()


@pytest.mark.parametrize("variant", CAUSAL)
def test_right_padded_rows_have_their_own_autoregressive_logits(variant: str) -> None:
    """Scoring (lm-eval) pads on the right."""
    model = tiny_model(variant)
    text, mask = words(3, 7), torch.tensor([[1] * n + [0] * (7 - n) for n in (7, 4, 1)])
    logits = model(text, attention_mask=mask).logits
    for row, length in enumerate((7, 4, 1)):
        alone = model(text[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(logits[row, :length], alone, **TOLERANCE)
    assert logits.isfinite().all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_padded_denoiser_equals_its_rows_one_by_one(variant: str, side: str) -> None:
    """Training layout: blocks are counted from each row's own first token."""
    model, lengths = tiny_model(variant), (8, 6, 3, 0)
    text, noisy = torch.full((4, 8), 20), torch.full((4, 8), 20)
    mask = torch.zeros(4, 8, dtype=torch.long)
    spans = [slice(8 - n, 8) if side == "left" else slice(0, n) for n in lengths]
    for row, (n, span) in enumerate(zip(lengths, spans, strict=True)):
        text[row, span], noisy[row, span], mask[row, span] = words(n, seed=row), words(n, seed=9 + row), 1
    logits = denoise(model, text, noisy, block_size=4, attention_mask=mask)
    assert logits.isfinite().all()
    for row, span in enumerate(spans[:3]):
        alone = denoise(model, text[row : row + 1, span], noisy[row : row + 1, span], block_size=4)
        torch.testing.assert_close(logits[row, span], alone[0], **TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_behind_left_padded_prompts_equals_one_by_one(variant: str) -> None:
    """Generation layout: prompts of different lengths, one empty, and a noisy block behind each."""
    model = tiny_model(variant)
    lengths = [8, 4, 0] if variant in BLOCK_CAUSAL else LENGTHS
    prompts = [words(length, seed=length) for length in lengths]
    batch, noisy = left_padded(prompts), words(len(lengths), 4, seed=5)
    positions = batch["attention_mask"].sum(-1, keepdim=True) + torch.arange(4)
    logits = denoise(
        model,
        batch["input_ids"],
        noisy,
        block_size=4,
        attention_mask=batch["attention_mask"],
        noisy_position_ids=positions,
    )
    for row, prompt in enumerate(prompts):
        alone = denoise(
            model,
            prompt[None],
            noisy[row : row + 1],
            block_size=4,
            noisy_position_ids=torch.arange(len(prompt), len(prompt) + 4)[None],
        )
        torch.testing.assert_close(logits[row], alone[0], **TOLERANCE)


# ---- attention implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sdpa_equals_eager(variant: str, dtype: torch.dtype) -> None:
    """Every back end gives the same result, with and without padding, which sees nothing."""
    eager, sdpa = (tiny_model(variant, attn_implementation=name).to(dtype) for name in ("eager", "sdpa"))
    tolerance = TOLERANCE if dtype == torch.float32 else dict(atol=1e-12, rtol=1e-12)
    text, noisy = words(3, 8), words(3, 8, seed=1)
    for mask in (None, torch.tensor([[1] * 8, [0] * 3 + [1] * 5, [0] * 8])):
        kwargs = dict(attention_mask=mask, block_size=4)
        torch.testing.assert_close(
            denoise(sdpa, text, noisy, **kwargs), denoise(eager, text, noisy, **kwargs), **tolerance
        )
        if variant in CAUSAL:
            for keep in (0, 1):
                torch.testing.assert_close(
                    sdpa(text, attention_mask=mask, logits_to_keep=keep).logits,
                    eager(text, attention_mask=mask, logits_to_keep=keep).logits,
                    **tolerance,
                )


def test_attention_implementation_may_change_after_loading(model: BlockGenForDiffusionLM) -> None:
    """`set_attn_implementation` is transformers' way to switch."""
    text = words(2, 6)
    before = model(text).logits
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(model(text).logits, before, **TOLERANCE)


def test_flex_attention_is_refused_on_cpus(model: BlockGenForDiffusionLM) -> None:
    """Its backward pass does not exist there; the error says what to use."""
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="(?s)flex_attention.*'sdpa'"):
        model(words(1, 4))


def test_hidden_states_and_attentions_are_returned_on_request() -> None:
    """Input of the first layer and output of each; attention over clean and noisy tokens sums to 1."""
    model = tiny_model(attn_implementation="eager")
    outputs = model(words(2, 4), words(2, 4), block_size=2, output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(2, 8, 16)] * 3
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 2, 8, 8)] * 2
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(2, 2, 8))


# ---- the last layer
@pytest.mark.parametrize("variant", ["masked", "uniform_time_conditional", "without_adaln"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_last_layer_reads_all_tokens_and_computes_those_that_are_wanted(variant: str, implementation: str) -> None:
    """Logits are those of whole layers, which hidden states ask for: training, denoising, decoding, padded or not."""
    model = tiny_model(variant, attn_implementation=implementation)
    clean, noisy = words(2, 12), words(2, 12, seed=1)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    training = dict(input_ids=clean, noisy_input_ids=noisy, block_size=4, noise_level=0.5)
    passes = [training, training | {"attention_mask": mask}]
    behind = {"noisy_input_ids": noisy[:, :4], "noisy_position_ids": torch.arange(12, 16)[None]}
    passes += [training | behind, dict(input_ids=clean, logits_to_keep=1)]
    passes += [dict(input_ids=clean, attention_mask=mask, logits_to_keep=1), dict(input_ids=clean, logits_to_keep=4)]
    rows: list[int] = []
    model.model.layers[-1].mlp.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    for arguments in passes:
        rows.clear()
        cut, whole = model(**arguments).logits, model(**arguments, output_hidden_states=True).logits
        torch.testing.assert_close(cut, whole, **TOLERANCE)
        is_whole = arguments.get("logits_to_keep") == 4 and implementation == "sdpa"  # whose causal kernel is not cut
        assert is_whole or rows[0] == cut.shape[1] < rows[1]


@pytest.mark.parametrize("variant", ["masked", "uniform", "block_causal"])
def test_gradients_are_those_of_a_whole_last_layer(variant: str) -> None:
    model, text = tiny_model(variant).double().train(), words(3, 12)
    labels = text.masked_fill(torch.arange(12) < 3, -100)
    gradients = []
    for is_whole in (False, True):
        model.zero_grad()
        torch.manual_seed(0)
        model(text, labels=labels, output_hidden_states=is_whole).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 20
    for cut, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-9, atol=1e-12)


def test_a_pass_that_fills_the_cache_leaves_the_last_layer_out() -> None:
    """Its keys and values are all that anyone reads; one token goes on, because kernels take no empty tensor."""
    model, rows = tiny_model(), []
    model.model.layers[-1].mlp.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    text, cache = words(2, 9), DynamicCache(config=model.config)
    model(text[:, :8], text[:, :0], cache=cache, use_cache=True)
    assert rows == [1]
    assert cache.get_seq_length() == 8
    read = model(text[:, 8:], cache=cache, use_cache=True).logits
    torch.testing.assert_close(read, model(text).logits[:, -1:], **TOLERANCE)
