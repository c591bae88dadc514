"""
Duo's curriculum (Sahoo et al., 2025, The Diffusion Duality) against plain training of a uniform model.

    python benchmarks/duo_curriculum.py --dataset text.txt --seed 0
    python benchmarks/duo_curriculum.py --dataset text.txt --seed 0 --temperature 0.1

Uniform noise is the arg-max of Gaussian noise on the one-hot tokens. In the first half of a run with `--temperature`,
the model reads their softmax at that temperature, annealed to a hundredth of it, in place of the arg-max: a mixture of
embeddings for each noisy token. The loss is that of the arg-max. A small model of characters is trained; what is
printed is its bound on the last tenth of the text.
"""

import argparse
import math
import time

import numpy as np
import torch
from torch import nn

from blockgen_hf import BlockGenConfig, BlockGenForDiffusionLM
from blockgen_hf.evaluation import evaluate_likelihood


LENGTH, ROWS, BLOCK_SIZE = 32, 16, 16


class SoftEmbedding(nn.Module):
    """An embedding whose last tokens are mixtures, `soft` `[B, N, V]`, where these are set."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding
        self.soft: torch.Tensor | None = None

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.soft is None:
            return self.embedding(input_ids)
        clean = input_ids[:, : input_ids.shape[1] - self.soft.shape[1]]
        return torch.cat([self.embedding(clean), self.soft @ self.embedding.weight], dim=1)


class GaussianLevels:
    """The Gaussian noise level of each discrete one: alpha = (V P(arg-max is the token) - 1) / (V - 1), on a grid."""

    def __init__(self, vocab_size: int) -> None:
        z = torch.linspace(-8, 16, 4001, dtype=torch.float64)
        self.levels = torch.cat([torch.linspace(0, 0.9, 400), 1 - torch.logspace(-1, -2.45, 200)[1:]]).double()
        signal = self.levels / (1 - self.levels**2).sqrt()
        log_density = -0.5 * (z - signal[:, None]) ** 2 - 0.5 * math.log(2 * math.pi)
        best = (log_density + (vocab_size - 1) * torch.special.log_ndtr(z)).exp()
        self.alphas = ((vocab_size * torch.trapezoid(best, z, dim=-1) - 1) / (vocab_size - 1)).clamp(0, 1)

    def of(self, alpha: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.interp(alpha.numpy(), self.alphas.numpy(), self.levels.numpy()))


def make_model(vocab_size: int) -> BlockGenForDiffusionLM:
    config = BlockGenConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        cond_dim=16,
        hidden_dropout=0.0,
        block_sizes=[BLOCK_SIZE],
        diffusion_type="uniform",
        pad_token_id=None,
        eos_token_id=None,
    )
    return BlockGenForDiffusionLM(config).train()


def train(model: BlockGenForDiffusionLM, ids: torch.Tensor, args: argparse.Namespace) -> None:
    """With `--temperature`, the curriculum in the first half of the steps."""
    vocab_size = model.config.vocab_size
    embedding = model.model.embed_tokens = SoftEmbedding(model.model.embed_tokens)
    gaussian = GaussianLevels(vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(100 + args.seed)
    for step in range(args.steps):
        decay = 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(1, step / 30) * decay
        start = torch.randint(len(ids) - LENGTH, (ROWS,), generator=generator)
        x = ids[start[:, None] + torch.arange(LENGTH)]
        level = ((torch.rand((), generator=generator) + torch.arange(ROWS) / ROWS) % 1).double() * 0.999 + 0.001
        alpha = model.diffusion.schedule.alpha(level)
        if args.temperature is None:
            stays = torch.rand(ROWS, LENGTH, generator=generator) < alpha[:, None]
            z = torch.where(stays, x, torch.randint(vocab_size, x.shape, generator=generator))
        else:
            signal = gaussian.of(alpha)[:, None, None].float()
            noise = torch.randn(ROWS, LENGTH, vocab_size, generator=generator)
            latents = signal * nn.functional.one_hot(x, vocab_size) + (1 - signal**2).sqrt() * noise
            z = latents.argmax(-1)
            temperature = args.temperature * 0.01 ** (step / (args.steps / 2))
            embedding.soft = (latents / temperature).softmax(-1) if step < args.steps // 2 else None
        model(x, noisy_input_ids=z, labels=x, noise_level=level, block_size=BLOCK_SIZE).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    embedding.soft = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a text file")
    parser.add_argument("--temperature", type=float, help="of the curriculum at the start; default: no curriculum")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    with open(args.dataset, encoding="utf-8") as file:
        text = file.read()
    characters = sorted(set(text))
    number = {character: i for i, character in enumerate(characters)}
    ids = torch.tensor([number[character] for character in text])
    cut = int(0.9 * len(ids))
    torch.manual_seed(args.seed)
    model = make_model(len(characters))
    started = time.process_time()
    train(model, ids[: cut - 1], args)
    seconds = time.process_time() - started
    rows = ids[cut : cut + 64 * LENGTH].view(64, LENGTH)
    figure = evaluate_likelihood(model, rows, [BLOCK_SIZE], 8, batch_size=32).block_sizes[BLOCK_SIZE]
    print(f"{figure.nll:.3f} ± {figure.nll_standard_error:.3f} nats per token, {seconds:.0f} CPU seconds of training")


if __name__ == "__main__":
    main()
