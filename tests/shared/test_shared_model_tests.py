"""transformers' shared model tests on BlockGen: what applies passes; `shared_not_applicable.py` has the rest."""

import unittest
from pathlib import Path
from typing import Any

import pytest
import shared_pipeline
import transformers
import transformers_tests
from packaging import version
from shared_models import BlockGenTester, CausalTrunk, RandomBlockGen
from shared_not_applicable import NOT_APPLICABLE, skip_not_applicable

from blockgen_hf import BlockGenConfig, BlockGenForDiffusionLM


pytest.importorskip("parameterized", reason="transformers' shared tests need parameterized")
try:
    transformers_tests.open_package()
except transformers_tests.TestsUnavailable as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.slow

configuration = transformers_tests.shared_module("configuration_common")
fsdp = transformers_tests.shared_module("fsdp_mixin")
modeling = transformers_tests.shared_module("modeling_common")
pipelines = transformers_tests.shared_module("pipeline_mixin")
tensor_parallel = transformers_tests.shared_module("tensor_parallel_mixin")
training = transformers_tests.shared_module("training_mixin")

# The models of transformers' own that these are for; None means all.
tensor_parallel.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
fsdp.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
pipelines.pipeline_test_mapping["text-generation"] = {"test": "shared_pipeline.TextGenerationPipelineTests"}
# Where the tests look up what kind of model a class is.
modeling.MODEL_MAPPING_NAMES = {**modeling.MODEL_MAPPING_NAMES, "trunk": "CausalTrunk"}
modeling.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = {
    **modeling.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "blockgen": "BlockGenForDiffusionLM",
    "random": "RandomBlockGen",
}


class ModelTests(modeling.ModelTesterMixin):
    all_model_classes = (BlockGenForDiffusionLM, RandomBlockGen)
    settings: dict[str, Any] = {}

    def setUp(self) -> None:
        settings = dict(self.settings)
        if self._testMethodName == "test_resize_tokens_embeddings" and "mask_token_id" not in settings:
            settings["mask_token_id"] = 3  # what the test leaves of the vocabulary are four tokens
        self.model_tester = BlockGenTester(**settings)
        if self._testMethodName.startswith("test_model_rope"):
            self.all_model_classes = (CausalTrunk,)

    def _prepare_for_class(
        self, inputs: dict[str, Any], model_class: type, return_labels: bool = False
    ) -> dict[str, Any]:
        inputs = super()._prepare_for_class(inputs, model_class, return_labels)
        if return_labels and not self.settings.get("next_token_prediction"):  # or two losses would differ by the draw
            noisy = inputs["labels"].clone()
            noisy[:, ::2] = self.model_tester.mask_token_id
            inputs |= dict(noisy_input_ids=noisy, noise_level=0.5, block_size=2)
        return inputs

    def test_config(self) -> None:
        settings = dict(hidden_size=32, num_attention_heads=2) | self.settings
        configuration.ConfigTester(self, config_class=BlockGenConfig, **settings).run_common_tests()


@skip_not_applicable
class TestMasked(ModelTests, pipelines.PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = {"text-generation": BlockGenForDiffusionLM}

    @pytest.fixture(autouse=True)
    def tiny_models(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The pipelines' models, in a folder instead of on the Hub."""
        if self._testMethodName.startswith("test_pipeline_text_generation"):
            shared_pipeline.save_tiny_model(tmp_path)
            monkeypatch.setattr(pipelines, "TRANSFORMERS_TINY_MODEL_PATH", str(tmp_path))
            monkeypatch.setattr(pipelines, "tiny_model_summary", shared_pipeline.TINY_MODEL_SUMMARY)


@skip_not_applicable
class TestUniform(ModelTests, unittest.TestCase):
    settings = {"diffusion_type": "uniform", "mask_token_id": None}


@skip_not_applicable
class TestNextToken(ModelTests, unittest.TestCase):
    settings = {"next_token_prediction": True, "block_sizes": [1], "mask_token_id": None}


# Tests that compare the losses of two models, or of two steps: these must not draw anything.
WITHOUT_DRAWS: dict[str, dict[str, Any]] = {
    "test_tp_": {"block_sizes": [1], "hidden_dropout": 0.0},
    "test_training_overfit": {"block_sizes": [1], "hidden_dropout": 0.0},
    # Their random texts have all ids, the mask token's too, so this is the model without one.
    "test_hsdp_grad_accumulation": {**TestNextToken.settings, "hidden_dropout": 0.0},
}


@skip_not_applicable
class TestTraining(
    tensor_parallel.TensorParallelTesterMixin, fsdp.FSDPTesterMixin, training.TrainingTesterMixin, unittest.TestCase
):
    all_model_classes = (BlockGenForDiffusionLM, RandomBlockGen)
    model_tester = None

    def setUp(self) -> None:
        (settings,) = [value for key, value in WITHOUT_DRAWS.items() if self._testMethodName.startswith(key)] or [{}]
        self.model_tester = BlockGenTester(**settings)

    def _skip_if_insufficient_devices(self, world_size: int) -> None:
        """Ranks on CPUs may be more than these."""


def test_each_entry_names_a_test() -> None:
    classes = (TestMasked, TestUniform, TestNextToken, TestTraining)
    release = version.parse(version.parse(transformers.__version__).base_version)
    expected = [name for name, entry in NOT_APPLICABLE.items() if release >= version.parse(entry.since)]
    assert [name for name in expected if not any(hasattr(cls, name) for cls in classes)] == []
