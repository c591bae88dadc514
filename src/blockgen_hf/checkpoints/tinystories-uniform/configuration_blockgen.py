# Copyright 2026 The blockgen-hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""BlockGen configuration."""

import copy
from math import inf, isfinite
from os import PathLike
from pathlib import Path
from typing import Any

from transformers.utils.versions import require_version


# Before anything is imported that an older release does not have. No upper bound: this file travels with checkpoints.
require_version(
    "transformers>=5.20", "BlockGen models work with transformers 5.20 and newer: pip install -U transformers"
)

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import auto_docstring

from .remote_code_blockgen import AUTO_MAP, write_remote_code


DIFFUSION_TYPES = ("masked", "uniform")
CLEAN_ATTENTIONS = ("causal", "block_causal")
NOISE_SCHEDULES = ("linear", "cosine")
TRAINING_OBJECTIVES = ("cross_entropy", "elbo")
NORM_TYPES = ("layer_norm", "rms_norm")
AR_PREDICTIONS = ("query", "clean")
NOISY_ATTENTIONS = ("block", "causal")
ADAPTER_ROWS = ("all", "noisy")


# A bad field must raise a ValueError, which @strict would turn into an exception of its own: trf-ignore: TRF010
@auto_docstring
class BlockGenConfig(PreTrainedConfig):
    r"""
    Configuration of a [`BlockGenForDiffusionLM`]: a transformer denoiser trained on a mixture of block sizes
    (BlockGen, Sec. 3). The defaults are the 170M-parameter model of the paper (Suppl. A.2) on GPT-2 tokens. A value
    that a field does not accept raises a `ValueError` that names the field.

    The same trunk holds the models that `blockgen-hf convert --family causal-lm` makes of Llama, Mistral, Qwen and
    SmolLM checkpoints: `norm_type`, `gated_mlp`, `num_key_value_heads` and the fields beside them choose the layers,
    `ar_prediction="clean"` how block size 1 predicts.

    Args:
        vocab_size (`int`, defaults to 50258):
            Number of rows of the embedding and of the output matrix, the mask token included.
        hidden_size (`int`, defaults to 768):
            Width of the residual stream.
        intermediate_size (`int`, *optional*):
            Width of the MLP. `None` means `4 * hidden_size`.
        num_hidden_layers (`int`, defaults to 12):
            Number of transformer layers.
        num_attention_heads (`int`, defaults to 12):
            Number of attention heads. Without `head_dim` it must divide `hidden_size` into heads of even width.
        num_key_value_heads (`int`, *optional*):
            Number of heads of keys and values (grouped-query attention). `None` means `num_attention_heads`.
        head_dim (`int`, *optional*):
            Width of a head, an even number. `None` means `hidden_size / num_attention_heads`.
        attention_bias (`bool`, defaults to `False`):
            Whether the projections of queries, keys and values have biases.
        attention_output_bias (`bool`, *optional*):
            Whether the output projection of attention has one. `None` means as `attention_bias`; Qwen2 differs.
        qk_norm (`bool`, defaults to `False`):
            Whether queries and keys are normalised in every head (RMS norm), as in Qwen3.
        gated_mlp (`bool`, defaults to `False`):
            Whether the MLP multiplies the activation of a gate with a linear branch (SwiGLU with `"silu"`).
        mlp_bias (`bool`, defaults to `True`):
            Whether the MLP has biases.
        lm_head_bias (`bool`, defaults to `True`):
            Whether the output layer has a bias.
        norm_type (`str`, defaults to `"layer_norm"`):
            `"layer_norm"` (without bias) or `"rms_norm"`.
        no_rope_layers (`list[int]`, *optional*):
            As in SmolLM3: one number a layer, 0 for layers without rotary position embedding. `None`: all have it.
        hidden_act (`str`, defaults to `"gelu_pytorch_tanh"`):
            Activation of the MLP.
        max_position_embeddings (`int`, defaults to 1024):
            Longest sequence, prompt included.
        rope_parameters (`dict`, *optional*):
            Rotary position embedding, as in every transformers model: all its types. Default: base 10000 on the whole
            head.
        layer_norm_eps (`float`, defaults to 1e-5):
            Epsilon of the norms, which are computed in float32.
        hidden_dropout (`float`, defaults to 0.1):
            Dropout on the two branches of every layer.
        tie_word_embeddings (`bool`, defaults to `False`):
            Whether the output matrix is the embedding matrix.
        use_cache (`bool`, defaults to `True`):
            Whether `forward(input_ids)`, the causal language model, returns a cache unless told otherwise.
        diffusion_type (`str`, defaults to `"masked"`):
            The prior pi of Eq. 1: `"masked"` or `"uniform"`.
        mask_token_id (`int`, *optional*):
            The mask token. `None` means the last id of the vocabulary for a masked model; with `ar_prediction="clean"`
            it is the id behind the vocabulary, of the vector `noise_embedding`, which only the input has.
        block_sizes (`list[int]`, defaults to `[1, 2, 4, 8, 16]`):
            The set S of block sizes that the model is trained on, any positive sizes.
        block_size_weights (`list[float]`, *optional*):
            The mixture weights gamma of Eq. 6, one a block size, adding up to 1. `None` means uniform.
        clean_attention (`str`, defaults to `"causal"`):
            Attention among clean tokens: `"causal"` (Fig. 5b) or `"block_causal"` (Fig. 5a). Several block sizes share
            one cache only with `"causal"`.
        noise_schedule (`str`, defaults to `"linear"`):
            `"linear"` or `"cosine"`, see [`NoiseSchedule`].
        noise_schedule_eps (`float`, defaults to 1e-3):
            alpha at t = 1.
        training_objective (`str`, *optional*):
            `"cross_entropy"` or `"elbo"`. `None` means the paper's choice: cross entropy for masked, ELBO for uniform
            models. Block size 1 always trains with cross entropy on fully noised inputs.
        adaptive_layer_norm (`bool`, defaults to `True`):
            Whether the layers have the adaptive layer norms of the diffusion transformer (adaLN).
        cond_dim (`int`, defaults to 128):
            Width of the time embedding that feeds adaLN.
        time_conditioning (`bool`, defaults to `False`):
            `False` feeds adaLN with the embedding of zero. `True` feeds the noisy half with the embedding of its noise
            level and the clean half with that of zero, so that its keys stay cacheable (Suppl. A.2).
        next_token_prediction (`bool`, defaults to `False`):
            `True` is the dense causal transformer of the paper's AR baseline: the hidden state of a clean token itself
            predicts the next one. There is no noise then: `block_sizes` are [1], there is no mask token, and
            `diffusion_type`, which means nothing, reads `"uniform"`.
        ar_prediction (`str`, defaults to `"query"`):
            Where block size 1 predicts. `"query"`, the paper: a fully noised token at the predicted position.
            `"clean"`: the state of a clean token predicts the next one, as in every causal language model, and the
            blocks are anchored: the canvas behind the clean token x_s is `[x_s, z_1 .. z_(B-1)]` at positions s to
            s + B - 1, and its index j scores the token s + 1 + j.
        noisy_attention (`str`, defaults to `"block"`):
            What a noisy token of an anchored block sees beside the past: the noisy tokens of its `"block"`, or only
            those before it (`"causal"`). The clean token that the block begins with sees the past only.
        adapter_rows (`str`, *optional*):
            Which tokens of a forward pass the adapters (LoRA) of the layers act on: `"all"`, or the `"noisy"` ones
            alone, so that an adapter leaves block size 1, verification and the cache what they are: bit for bit in
            passes of clean tokens, and but for rounding where clean and noisy tokens share one.
            `None` means `"noisy"` with `ar_prediction="clean"`, else `"all"`.

    ```python
    >>> from blockgen_hf import BlockGenConfig, BlockGenForDiffusionLM

    >>> model = BlockGenForDiffusionLM(BlockGenConfig(num_hidden_layers=2, block_sizes=[1, 4]))
    >>> model.config.block_sizes
    [1, 4]
    ```"""

    model_type = "blockgen"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    _gated_tp_plan = {"layers.*.mlp.gate_proj": "colwise"}
    _qk_norm_tp_plan = {
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
    }

    vocab_size: int = 50258
    hidden_size: int = 768
    intermediate_size: int = None  # type: ignore[assignment]  # derived below
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = None  # type: ignore[assignment]  # derived below
    head_dim: int = None  # type: ignore[assignment]  # derived below
    attention_bias: bool = False
    attention_output_bias: bool = None  # type: ignore[assignment]  # derived below
    qk_norm: bool = False
    gated_mlp: bool = False
    mlp_bias: bool = True
    lm_head_bias: bool = True
    norm_type: str = "layer_norm"
    no_rope_layers: list[int] | None = None
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 1024
    rope_parameters: dict = None  # type: ignore[assignment]  # filled by the parent
    layer_norm_eps: float = 1e-5
    hidden_dropout: float = 0.1
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    diffusion_type: str = "masked"
    mask_token_id: int | None = None
    block_sizes: list[int] = None  # type: ignore[assignment]  # derived below
    block_size_weights: list[float] | None = None
    clean_attention: str = "causal"
    noise_schedule: str = "linear"
    noise_schedule_eps: float = 1e-3
    training_objective: str | None = None
    adaptive_layer_norm: bool = True
    cond_dim: int = 128
    time_conditioning: bool = False
    next_token_prediction: bool = False
    ar_prediction: str = "query"
    noisy_attention: str = "block"
    adapter_rows: str = None  # type: ignore[assignment]  # derived below

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_sizes("vocab_size", "hidden_size", "num_attention_heads")
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        self._derive_attention()
        if self.adapter_rows is None:
            self.adapter_rows = "noisy" if self.ar_prediction == "clean" else "all"
        if self.next_token_prediction is True and self.diffusion_type == "masked":
            self.diffusion_type = "uniform"
        if self.block_sizes is None:
            self.block_sizes = [1] if self.next_token_prediction else [1, 2, 4, 8, 16]
        if self.mask_token_id is None and self.diffusion_type == "masked":
            self.mask_token_id = self.vocab_size - (0 if self.ar_prediction == "clean" else 1)
        if self.training_objective is None:
            has_elbo = self.diffusion_type == "uniform" and not self.next_token_prediction
            self.training_objective = "elbo" if has_elbo else "cross_entropy"
        if self.gated_mlp:
            self.base_model_tp_plan = {**self.base_model_tp_plan, **self._gated_tp_plan}
        if self.qk_norm:
            self.base_model_tp_plan = {**self.base_model_tp_plan, **self._qk_norm_tp_plan}
        super().__post_init__(**kwargs)
        self._check()

    def _derive_attention(self) -> None:
        if self.head_dim is None:
            if self.hidden_size % (2 * self.num_attention_heads) != 0:
                raise ValueError(
                    f"`num_attention_heads` must divide `hidden_size` ({self.hidden_size}) into heads of even width, "
                    f"which rotary embeddings need, but is {self.num_attention_heads}."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias

    @property
    def is_anchored(self) -> bool:
        """Whether blocks begin with the clean token before them, which predicts their first token."""
        return self.ar_prediction == "clean"

    @property
    def predicts_from_clean(self) -> bool:
        """Whether block size 1 predicts from clean tokens: a text needs one to begin with, which is not scored."""
        return self.is_anchored or self.next_token_prediction

    @property
    def has_mask_row(self) -> bool:
        """Whether the mask token is among the tokens that the output layer scores."""
        return self.diffusion_type == "masked" and not self.is_anchored

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # The parent sets the overrides in `kwargs` on the finished config.
        loaded = super().from_dict(config_dict, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._check()
        return loaded

    def _check(self) -> None:
        self._check_choices()
        self._check_sizes(
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "cond_dim",
        )
        self._check_numbers()
        self._check_block_sizes()
        self._check_next_token_prediction()
        self._check_anchors()

    def _check_choices(self) -> None:
        for name, accepted in (
            ("diffusion_type", DIFFUSION_TYPES),
            ("clean_attention", CLEAN_ATTENTIONS),
            ("noise_schedule", NOISE_SCHEDULES),
            ("training_objective", TRAINING_OBJECTIVES),
            ("norm_type", NORM_TYPES),
            ("ar_prediction", AR_PREDICTIONS),
            ("noisy_attention", NOISY_ATTENTIONS),
            ("adapter_rows", ADAPTER_ROWS),
            ("hidden_act", tuple(ACT2FN)),
        ):
            if getattr(self, name) not in accepted:
                raise ValueError(f"`{name}` must be one of {list(accepted)}, but is {getattr(self, name)!r}.")
        flags = (
            "adaptive_layer_norm", "time_conditioning", "next_token_prediction", "use_cache", "tie_word_embeddings",
            "attention_bias", "attention_output_bias", "qk_norm", "gated_mlp", "mlp_bias", "lm_head_bias",
        )  # fmt: skip
        for name in flags:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, but is {getattr(self, name)!r}.")
        if self.time_conditioning and not self.adaptive_layer_norm:
            raise ValueError(
                "`time_conditioning=True` needs `adaptive_layer_norm=True`: the noise level enters the model there."
            )

    def _check_sizes(self, *names: str) -> None:
        for name in names:
            if not is_positive_int(getattr(self, name)):
                raise ValueError(f"`{name}` must be a positive integer, but is {getattr(self, name)!r}.")

    def validate(self) -> None:
        """As of every configuration, but for a mask token that has a row behind the vocabulary."""
        # CODEPATH: the vocabulary of adapted models is that of the original one, which has no mask token.
        if self.mask_token_id == self.vocab_size:
            others = copy.copy(self)
            others.mask_token_id = None
            others.validate()
        else:
            super().validate()

    def _check_numbers(self) -> None:
        if self.head_dim % 2 != 0:
            raise ValueError(
                f"`head_dim` must be an even number, which rotary embeddings need, but is {self.head_dim}."
            )
        if self.num_attention_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"`num_key_value_heads` must divide `num_attention_heads` ({self.num_attention_heads}), but is "
                f"{self.num_key_value_heads}."
            )
        layers = self.no_rope_layers
        if layers is not None and (len(layers) != self.num_hidden_layers or not set(layers) <= {0, 1}):
            raise ValueError(
                f"`no_rope_layers` must hold 0 or 1 for each of the {self.num_hidden_layers} layers, or be None, but "
                f"is {layers!r}."
            )
        rope_type = self.rope_parameters["rope_type"]
        if rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
            raise ValueError(
                f"`rope_parameters` must have a `rope_type` among {['default', *ROPE_INIT_FUNCTIONS]}, but have "
                f"{rope_type!r}."
            )
        for name, low, high in (("noise_schedule_eps", 0.0, 1.0), ("hidden_dropout", 0.0, 1.0)):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not low <= value < high:
                raise ValueError(f"`{name}` must be a number in [{low:g}, {high:g}), but is {value!r}.")
        if not isinstance(self.layer_norm_eps, (int, float)) or not 0 < self.layer_norm_eps < inf:
            raise ValueError(f"`layer_norm_eps` must be a positive number, but is {self.layer_norm_eps!r}.")
        if (
            self.mask_token_id is not None
            and not self.is_anchored
            and (not isinstance(self.mask_token_id, int) or not 0 <= self.mask_token_id < self.vocab_size)
        ):
            raise ValueError(
                f"`mask_token_id` must be an id of the vocabulary (0 to {self.vocab_size - 1}) or None, but is "
                f"{self.mask_token_id!r}."
            )

    def _check_block_sizes(self) -> None:
        sizes, weights = self.block_sizes, self.block_size_weights
        if not isinstance(sizes, (list, tuple)) or not sizes or not all(is_positive_int(size) for size in sizes):
            raise ValueError(f"`block_sizes` must be a non-empty list of positive integers, but is {sizes!r}.")
        if len(set(sizes)) != len(sizes):
            raise ValueError(f"`block_sizes` must not repeat a size, but is {sizes!r}.")
        self.block_sizes = [int(size) for size in sizes]
        if weights is not None:
            if not isinstance(weights, (list, tuple)) or len(weights) != len(sizes):
                raise ValueError(
                    f"`block_size_weights` must hold one weight for each of the {len(sizes)} `block_sizes`, or be "
                    f"None, but is {weights!r}."
                )
            if (
                not all(isinstance(w, (int, float)) and isfinite(w) and w >= 0 for w in weights)
                or abs(sum(weights) - 1) > 1e-6
            ):
                raise ValueError(
                    f"`block_size_weights` must be non-negative numbers that add up to 1, but is {weights!r}."
                )
            self.block_size_weights = [float(weight) for weight in weights]
        if self.clean_attention == "block_causal" and len(sizes) > 1:
            raise ValueError(
                f"`clean_attention='block_causal'` needs a single block size, but `block_sizes` is {sizes!r}: block "
                "sizes share one cache only if no clean token sees a later one. Use `clean_attention='causal'`."
            )

    def save_pretrained(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """
        As [`PreTrainedConfig.save_pretrained`], which saving a model calls too. The folder carries the code of the
        model, so that `AutoModel.from_pretrained(folder, trust_remote_code=True)` loads it where this package is not
        installed.
        """
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory)
        write_remote_code(Path(save_directory))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", None) or Path(save_directory).name, **kwargs)

    def _check_next_token_prediction(self) -> None:
        if not self.next_token_prediction:
            return
        needed: dict[str, Any] = {
            "block_sizes": [1],
            "clean_attention": "causal",
            "diffusion_type": "uniform",
            "training_objective": "cross_entropy",
            "time_conditioning": False,
            "mask_token_id": None,
        }
        for name, value in needed.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"`{name}` must be {value!r} with `next_token_prediction=True`, a causal transformer without "
                    f"noise, but is {getattr(self, name)!r}."
                )

    def _check_anchors(self) -> None:
        if not self.is_anchored:
            if self.noisy_attention != "block":
                raise ValueError(
                    f"`noisy_attention={self.noisy_attention!r}` is for the blocks of `ar_prediction='clean'`, but "
                    f"`ar_prediction` is {self.ar_prediction!r}."
                )
            return
        needed: dict[str, Any] = {
            "next_token_prediction": False,
            "clean_attention": "causal",
            "time_conditioning": False,
            "mask_token_id": self.vocab_size if self.diffusion_type == "masked" else None,
        }
        for name, value in needed.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"`{name}` must be {value!r} with `ar_prediction='clean'` and "
                    f"`diffusion_type={self.diffusion_type!r}`, but is {getattr(self, name)!r}."
                )
        if 1 not in self.block_sizes:
            raise ValueError(
                f"`block_sizes` must have block size 1 with `ar_prediction='clean'`, whose clean tokens predict, but "
                f"are {self.block_sizes!r}."
            )


def is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


__all__ = ["BlockGenConfig"]
