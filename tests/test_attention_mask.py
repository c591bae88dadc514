"""Who sees whom (Fig. 5): a second, naive writing of the rule against masks and sensitivities."""

from typing import Any

import pytest
import torch
from tiny import BLOCK_CAUSAL, VARIANTS, left_padded, tiny_model, words
from transformers import DynamicCache, StaticCache

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.modeling.masking_blockgen import AttentionChunk, build_layout, make_attention_mask


Kind = str  # "clean" or "noisy"
Token = tuple[Kind, int]  # and its position


def sees(query: Token, key: Token, block_size: int, first_noisy: int, clean_block_size: int, window: int = 99) -> bool:
    """The attention rule of docs/model.md, written naively; `clean_block_size` is 1 for causal clean attention."""
    (query_kind, q), (key_kind, k) = query, key
    if query_kind == "clean":
        block_end = (q // clean_block_size + 1) * clean_block_size
        return key_kind == "clean" and block_end - window <= k < block_end
    block_start = first_noisy + (q - first_noisy) // block_size * block_size
    if key_kind == "clean":
        return block_start - window <= k < block_start
    return block_start <= k < block_start + block_size


def visibility(
    queries: list[Token], keys: list[Token], block_size: int, clean_block_size: int, window: int = 99
) -> torch.Tensor:
    """`[queries, keys]`, by a double loop."""
    noisy_positions = [position for kind, position in queries if kind == "noisy"]
    first = min(noisy_positions, default=0)
    rows = [[sees(query, key, block_size, first, clean_block_size, window) for key in keys] for query in queries]
    return torch.tensor(rows)


def tokens(kind: Kind, positions: range) -> list[Token]:
    return [(kind, position) for position in positions]


# clean positions, noisy positions, block size
LAYOUTS = {
    "training": (range(0, 8), range(0, 8), 4),
    "training_block_1": (range(0, 6), range(0, 6), 1),
    "training_odd_block": (range(0, 8), range(0, 8), 3),
    "training_last_block_shorter": (range(0, 7), range(0, 7), 4),
    "training_block_longer_than_text": (range(0, 5), range(0, 5), 16),
    "generation": (range(0, 4), range(4, 8), 4),
    "generation_inside_a_block": (range(0, 5), range(5, 9), 4),
    "generation_several_blocks": (range(0, 3), range(3, 9), 2),
    "generation_without_prompt": (range(0, 0), range(0, 4), 4),
    "verification": (range(0, 7), range(4, 7), 1),
    "commit": (range(0, 6), range(0, 0), 4),
}


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("clean_block_size", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rendered_mask_is_the_rule(layout: str, clean_block_size: int, window: int | None) -> None:
    """The boolean mask of sdpa and the float mask of eager, entry for entry; own noisy block, or clean before it."""
    clean, noisy, block_size = LAYOUTS[layout]
    everyone = tokens("clean", clean) + tokens("noisy", noisy)
    expected = visibility(everyone, everyone, block_size, clean_block_size, window or 99)
    built = build_layout(
        torch.tensor([*clean], dtype=torch.long)[None],
        torch.tensor([*noisy], dtype=torch.long)[None],
        block_size,
        clean_block_size,
        torch.zeros(1, 0, dtype=torch.long),
        num_committed=0,
        window=window,
    )
    boolean = make_attention_mask(built, "sdpa", torch.float32)
    assert boolean.dtype == torch.bool
    assert torch.equal(boolean[0, 0], expected)
    added = make_attention_mask(built, "eager", torch.float32)
    assert torch.equal(added[0, 0] == 0, expected)
    assert (added[0, 0][~expected] == torch.finfo(torch.float32).min).all()


def logits_of_all_rows(model: BlockGenForDiffusionLM, clean: torch.Tensor, noisy: torch.Tensor, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(clean, noisy, **kwargs).logits


@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        *((variant, "training_last_block_shorter") for variant in VARIANTS),
        *((variant, "generation") for variant in VARIANTS),
        *((variant, "verification") for variant in ("masked", "uniform_time_conditional")),
    ],
)
def test_a_logit_changes_exactly_with_the_tokens_it_may_see(variant: str, layout: str) -> None:
    """Perturb each token in turn: the noisy logits that move are those of the rule, all others are bit-equal."""
    model = tiny_model(variant)
    clean_range, noisy_range, block_size = LAYOUTS[layout]
    clean, noisy = words(1, len(clean_range)), words(1, len(noisy_range), seed=1)
    kwargs = dict(
        block_size=block_size, noise_level=0.5, noisy_position_ids=torch.tensor([*noisy_range], dtype=torch.long)[None]
    )
    everyone = tokens("clean", clean_range) + tokens("noisy", noisy_range)
    grid = 4 if variant in BLOCK_CAUSAL else 1
    expected = visibility(everyone, everyone, block_size, grid)[len(clean_range) :]

    base = logits_of_all_rows(model, clean, noisy, **kwargs)
    moved = torch.zeros_like(expected)
    for index in range(len(everyone)):
        changed = torch.cat([clean, noisy], dim=1)
        changed[0, index] = (changed[0, index] + 7) % 20
        logits = logits_of_all_rows(model, changed[:, : clean.shape[1]], changed[:, clean.shape[1] :], **kwargs)
        moved[:, index] = (logits != base).any(-1)[0]
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("variant", ["masked", "uniform", "without_adaln"])
def test_autoregressive_logits_see_the_past_only(variant: str) -> None:
    """`forward(input_ids)`: logits at i move with tokens at positions up to i, and with no later one."""
    model, text = tiny_model(variant), words(1, 6)
    with torch.no_grad():
        base = model(text).logits
        for index in range(6):
            changed = text.clone()
            changed[0, index] = (changed[0, index] + 7) % 20
            moved = (model(changed).logits != base).any(-1)[0]
            assert moved.tolist() == [position >= index for position in range(6)]


@pytest.mark.parametrize("cache_class", ["dynamic", "static"])
@pytest.mark.parametrize("layout", ["generation", "generation_inside_a_block", "verification"])
def test_mask_with_cached_clean_tokens_is_the_rule(layout: str, cache_class: str) -> None:
    """With three clean tokens in the cache: slots of the cache first, then clean, then noisy; free slots unseen."""
    clean, noisy, block_size = LAYOUTS[layout]
    model, num_cached, num_slots = tiny_model(), 3, 20
    config = model.config
    cache = DynamicCache(config=config) if cache_class == "dynamic" else StaticCache(config, max_cache_len=num_slots)
    text = words(1, len(clean))
    model(text[:, :num_cached], words(1, 0), cache=cache, use_cache=True)
    mask = recorded_mask(
        model,
        text[:, num_cached:],
        words(1, len(noisy)),
        block_size=block_size,
        cache=cache,
        noisy_position_ids=torch.tensor([*noisy])[None],
    )
    queries = tokens("clean", clean[num_cached:]) + tokens("noisy", noisy)
    expected = visibility(queries, tokens("clean", clean[:num_cached]) + queries, block_size, 1)
    if cache_class == "static":
        free = torch.zeros(len(queries), num_slots - num_cached, dtype=torch.bool)
        expected = torch.cat([expected[:, :num_cached], free, expected[:, num_cached:]], dim=1)
    assert torch.equal(mask[0, 0], expected)


@pytest.mark.parametrize("clean_block_size", [1, 4])
def test_padding_is_seen_by_nobody(clean_block_size: int) -> None:
    """Left-padded training: each row has the mask of its own positions; a pad sees itself, so no softmax is empty."""
    overrides = {} if clean_block_size == 1 else {"clean_attention": "block_causal", "block_sizes": [4]}
    model = tiny_model(**overrides)
    lengths = [8, 5, 1, 0]
    batch = left_padded([words(length) for length in lengths])
    mask = recorded_mask(model, batch["input_ids"], words(4, 8), block_size=4, attention_mask=batch["attention_mask"])
    for row, length in enumerate(lengths):
        real = [8 - length + i for i in range(length)] + [16 - length + i for i in range(length)]
        everyone = tokens("clean", range(length)) + tokens("noisy", range(length))
        expected = torch.eye(16, dtype=torch.bool)
        if length:
            inner = visibility(everyone, everyone, 4, clean_block_size)
            expected[torch.tensor(real)[:, None], torch.tensor(real)] = inner
        seen = mask[row, 0]
        assert torch.equal(seen[real], expected[real])
        assert not seen[real][:, [i for i in range(16) if i not in real]].any()
        assert seen.any(-1).all()


def recorded_mask(model: BlockGenForDiffusionLM, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The boolean mask that the layers of one forward pass get."""
    masks: list[Any] = []

    def record(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        masks.append(kwargs["attention_mask"])

    handle = model.model.layers[0].self_attn.register_forward_pre_hook(record, with_kwargs=True)
    with torch.no_grad():
        model(*args, noise_level=0.5, **kwargs)
    handle.remove()
    (mask,) = masks
    return dense(mask, len(args[0])) if isinstance(mask, tuple) else mask


def dense(chunks: tuple[AttentionChunk, ...], batch_size: int) -> torch.Tensor:
    """The mask `[B, 1, Q, Q]` that chunks of attention stand for."""
    size = max(chunk.queries.stop for chunk in chunks)
    mask = torch.zeros(batch_size, 1, size, size, dtype=torch.bool)
    for chunk in chunks:
        queries = torch.arange(chunk.queries.start, chunk.queries.stop)
        keys = torch.cat([torch.arange(run.start, run.stop) for run in chunk.keys])
        mask[:, :, queries[:, None], keys] = keys <= queries[:, None] if chunk.mask is None else chunk.mask
    return mask


@pytest.mark.parametrize("block_size", [1, 2, 3, 6])
def test_block_causal_model_refuses_blocks_that_would_reveal_the_answer(block_size: int) -> None:
    """Fig. 5a: clean tokens see their whole block, so that a noisy block may not start inside of one."""
    model = tiny_model("block_causal")
    with pytest.raises(ValueError, match="`block_size=.*clean_attention='block_causal'"):
        model(words(1, 12), words(1, 12), block_size=block_size)
    with pytest.raises(ValueError, match="block_causal"):
        model(words(1, 12))
    assert model(words(1, 12), words(1, 12), block_size=8).logits.shape[1] == 12


def test_block_causal_model_refuses_a_block_that_starts_off_the_grid() -> None:
    """Blocks of a block-causal model are those of training: a noisy block at position 6 of a grid of 4 leaks."""
    model = tiny_model("block_causal")
    with pytest.raises(ValueError):
        model(words(1, 8), words(1, 4), block_size=4, noisy_position_ids=torch.arange(6, 10)[None])
