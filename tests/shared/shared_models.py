"""The models that the shared tests run on."""

from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import initialization as init
from transformers.testing_utils import torch_device

from blockgen_hf import BlockGenConfig, BlockGenForDiffusionLM, BlockGenModel
from blockgen_hf.modeling import modeling_blockgen
from blockgen_hf.modeling.layers_blockgen import BlockGenModulation


def randomize_zeros(module: nn.Module) -> None:
    """Fills what training starts at zero."""
    init.normal_(module.weight, std=0.2)
    init.normal_(module.bias, std=0.2)


class RandomTrunk(BlockGenModel):
    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BlockGenModulation):
            randomize_zeros(module)


class RandomBlockGen(BlockGenForDiffusionLM):
    """
    Gates and output layer start at zero, which makes all logits of a new model equal, whatever the layers compute.
    Nothing does here, so that each layer counts in the tests' comparisons.
    """

    def __init__(self, config: BlockGenConfig) -> None:
        with mock.patch.object(modeling_blockgen, "BlockGenModel", RandomTrunk):
            super().__init__(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.lm_head:
            randomize_zeros(module)


class CausalTrunk(RandomTrunk):
    """The trunk as the causal language model calls it, for tests of a model without a head."""

    def forward(self, input_ids: torch.Tensor) -> Any:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        queries = torch.full_like(input_ids, self.config.vocab_size - 1)
        return super().forward(input_ids, queries, position_ids=positions, noisy_position_ids=positions + 1)


class BlockGenTester:
    """What the shared tests ask of a model's tester: a tiny configuration, inputs, and the numbers in them."""

    config_class = BlockGenConfig
    causal_lm_class = RandomBlockGen
    is_training = True
    batch_size = 3
    seq_length = 7
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 2
    # Left when the vocabulary shrinks, and not in the random texts, whose loss it would make infinite.
    mask_token_id = 67

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        # Hidden states and attentions have a query token beside each token.
        self.encoder_seq_length = self.seq_length * (1 if settings.get("next_token_prediction") else 2)

    def get_config(self) -> BlockGenConfig:
        settings = dict(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=36,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=128,
            cond_dim=16,
            block_sizes=[1, 2, 4],
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            mask_token_id=self.mask_token_id,
        )
        return BlockGenConfig(**{**settings, **self.settings})

    def prepare_config_and_inputs_for_common(self) -> tuple[BlockGenConfig, dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch_size, self.seq_length)
        input_ids = torch.randint(3, self.mask_token_id, shape, generator=generator).to(torch_device)
        attention_mask = torch.ones_like(input_ids)
        attention_mask[0, :2] = 0
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}
