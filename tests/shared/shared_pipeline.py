"""
The text-generation pipeline as `PipelineTesterMixin` runs it: what `tests/pipelines/test_pipelines_text_generation.py`
gives in transformers' repository, which is not in the source distribution.
"""

import unittest
from pathlib import Path

import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TextGenerationPipeline


# As in transformers' summary of its tiny models: which tokenizer comes with a model.
TINY_MODEL_SUMMARY = {
    "BlockGenForDiffusionLM": {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": []}
}


def save_tiny_model(folder: Path) -> None:
    """The tiny model and its tokenizer, where the mixin looks for them."""
    target = folder / "blockgen" / "BlockGenForDiffusionLM"
    tiny_model().save_pretrained(target)
    tiny_tokenizer().save_pretrained(target)


class TextGenerationPipelineTests(unittest.TestCase):
    def get_test_pipeline(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, dtype: str
    ) -> tuple[TextGenerationPipeline, list[str]]:
        model = model.to(getattr(torch, dtype))
        pipeline = TextGenerationPipeline(model=model, tokenizer=tokenizer, max_new_tokens=6)
        return pipeline, ["abc", "dcbaefg"]

    def run_pipeline_test(self, pipeline: TextGenerationPipeline, examples: list[str]) -> None:
        prompt = examples[0]
        texts = []
        for options in ({}, {"return_full_text": True}, {"return_full_text": False}):
            torch.manual_seed(0)
            (output,) = pipeline(prompt, **options)
            texts.append(output["generated_text"])
        self.assertEqual(texts[0], texts[1])
        self.assertEqual(texts[1], prompt + texts[2])
        self.assertTrue(0 < len(texts[2]) <= 6, texts[2])

        (output,) = pipeline(prompt, return_tensors=True)
        self.assertEqual(len(output["generated_token_ids"]), len(prompt) + 6)
        for batch_size in (1, 2):
            rows = pipeline(examples, num_return_sequences=2, batch_size=batch_size, do_sample=True)
            self.assertEqual([len(row) for row in rows], [2, 2])
            for row, example in zip(rows, examples, strict=True):
                for output in row:
                    self.assertTrue(output["generated_text"].startswith(example), output)
        for option in ("return_full_text", "return_text"):
            with self.assertRaises(ValueError):
                pipeline(prompt, return_tensors=True, **{option: True})
        with self.assertRaises(ValueError):  # more than the model has positions
            pipeline(prompt * 40, max_new_tokens=20)
