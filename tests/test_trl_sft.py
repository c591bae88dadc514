"""TRL's forms of data on the training of `BlockGenTrainer`: what the model gets, what is logged, saved and refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import EOS, LETTERS, assert_near, tiny_model, tiny_tokenizer
from training import are_equal, checkpoints, losses, make_trainer, saved_model


pytest.importorskip("trl")
pytest.importorskip("peft")

import datasets
from peft import LoraConfig, PeftModel
from trl import SFTConfig, SFTTrainer

from blockgen_hf.training.trl_sft import BlockGenSFTConfig, BlockGenSFTTrainer


CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}r{% generation %}{{ m['content'] }}<end>"
    "{% endgeneration %}{% else %}q{{ m['content'] }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}r{% endif %}"
)
QUESTION, ANSWER = {"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}
TEXTS = [{"text": text} for text in ("abcde", "fgh", "ijklmnop", "abc", "qrst", "bcdefg", "hi", "jklm")]


def ids(text: str) -> list[int]:
    """A token a letter; a full stop is the end of text, a dash a label that is not scored."""
    return [{".": EOS, "-": -100}.get(letter, LETTERS.find(letter)) for letter in text]


def make(folder: Path, rows: list[dict[str, Any]], model: Any = None, **settings: Any) -> BlockGenSFTTrainer:
    """A trainer on the CPU whose every step is logged."""
    names = ("peft_config", "eval_dataset", "formatting_func", "compute_loss_func", "processing_class")
    kwargs = {name: settings.pop(name) for name in names if name in settings}
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    defaults: dict[str, Any] = dict(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        max_steps=4,
        per_device_train_batch_size=2,
        bf16=False,
        gradient_checkpointing=False,
        ema_decay=0.9,
        seed=1,
    )
    return BlockGenSFTTrainer(
        tiny_model() if model is None else model,
        BlockGenSFTConfig(**{**defaults, **settings}),
        train_dataset=datasets.Dataset.from_list(rows),
        **{"processing_class": tokenizer, **kwargs},
    )


def collated(trainer: BlockGenSFTTrainer) -> dict[str, torch.Tensor]:
    """All rows of the prepared data in one batch."""
    return trainer.data_collator(list(trainer.train_dataset))


FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "text": ({"text": "abc"}, {}, "abc.", "abc."),
    "another column": ({"story": "abc"}, {"dataset_text_field": "story"}, "abc.", "abc."),
    "formatting": ({"a": "ab", "b": "c"}, {"formatting_func": lambda row: row["a"] + row["b"]}, "abc.", "abc."),
    "prompt": ({"prompt": "abc", "completion": "de"}, {}, "abcde.", "---de."),
    "whole prompt": ({"prompt": "abc", "completion": "d"}, {"completion_only_loss": False}, "abcd.", "abcd."),
    "max_length": ({"text": "abcdef"}, {"max_length": 4}, "abcd", "abcd"),
    "messages": ({"messages": [QUESTION, ANSWER]}, {}, "qab.rcd.", "qab.rcd."),
    "assistant": ({"messages": [QUESTION, ANSWER]}, {"assistant_only_loss": True}, "qab.rcd.", "-----cd."),
    "chat prompt": ({"prompt": [QUESTION], "completion": [ANSWER]}, {}, "qab.rcd.", "-----cd."),
    "tokens": ({"input_ids": ids("abc"), "labels": ids("-bc")}, {}, "abc", "-bc"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_becomes_tokens_and_labels(form: str, tmp_path: Path) -> None:
    """Labels stand where they are scored, and the end of text is among them."""
    row, settings, tokens, labels = FORMS[form]
    batch = collated(make(tmp_path, [row], **settings))
    assert batch["input_ids"].tolist() == [ids(tokens)]
    assert batch["labels"].tolist() == [ids(labels)]
    assert set(batch) == {"input_ids", "labels"}


def test_rows_are_padded_and_padding_is_neither_seen_nor_scored(tmp_path: Path) -> None:
    batch = collated(make(tmp_path, TEXTS[:2], pad_to_multiple_of=4))
    assert batch["attention_mask"].tolist() == [[1] * 6 + [0] * 2, [1] * 4 + [0] * 4]
    assert batch["labels"][1].tolist() == ids("fgh.----")


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_packed_documents_are_kept_apart(strategy: str, tmp_path: Path) -> None:
    """They are as likely as each in a row of its own."""
    plain = make(tmp_path, TEXTS, eval_dataset=datasets.Dataset.from_list(TEXTS))
    packed = make(
        tmp_path, TEXTS, packing=True, max_length=16, packing_strategy=strategy,
        eval_dataset=datasets.Dataset.from_list(TEXTS),
    )  # fmt: skip
    batch = collated(packed)
    assert len(batch["input_ids"]) < len(TEXTS)
    is_end = (batch["input_ids"] == EOS)[:, :-1] & (batch["labels"] != -100)[:, 1:]
    assert torch.equal(batch["document_ids"].diff() != 0, is_end) and is_end.any()
    key = "eval_nll_block_size_1"  # exact, without noise
    assert packed.evaluate()[key] == pytest.approx(plain.evaluate()[key], rel=1e-5)
    packed.train()


def test_it_trains_as_our_trainer_does(tmp_path: Path) -> None:
    """On the same tokens: the same draws, the same losses and the same averages of weights, bit for bit."""
    rows = [{"input_ids": ids(row["text"])} for row in TEXTS]
    settings: dict[str, Any] = dict(gradient_accumulation_steps=2, learning_rate=1e-2, lr_scheduler_type="linear")
    kwargs = {"processing_class": tiny_tokenizer()}
    ours = make_trainer(tmp_path / "ours", rows=rows, trainer_kwargs=kwargs, **settings)
    theirs = make(tmp_path / "trl", rows, **settings)
    ours.train()
    theirs.train()
    assert losses(theirs) == losses(ours) and len(set(losses(ours))) == 4
    ours.save_model()
    theirs.save_model()
    assert are_equal(saved_model(tmp_path / "trl"), saved_model(tmp_path / "ours"))


def test_the_block_sizes_of_a_step_are_stratified_and_no_metric_of_next_tokens_is_logged(tmp_path: Path) -> None:
    trainer = make(tmp_path, TEXTS, gradient_accumulation_steps=4, max_steps=2)
    trainer.train()
    first = trainer.state.log_history[0]
    assert {name for name in first if name.startswith("loss_")} == {f"loss_block_size_{n}" for n in (1, 2, 4, 8)}
    assert not {"mean_token_accuracy", "entropy"} & set(first)


def test_rows_that_come_to_evaluate_are_prepared_and_give_bounds(tmp_path: Path) -> None:
    metrics = make(tmp_path, TEXTS).evaluate(datasets.Dataset.from_list(TEXTS))
    assert metrics["eval_loss"] == metrics["eval_nll_jensen"]
    assert not {"eval_mean_token_accuracy", "eval_entropy"} & set(metrics)


def test_the_end_of_an_answer_is_learned(tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "completion": "cd"}, {"prompt": "ef", "completion": "g"}]
    settings = dict(max_steps=100, learning_rate=1e-2, ema_decay=0, block_size_unit="sequence")
    trainer = make(tmp_path, rows, tiny_model(eos_token_id=EOS), **settings)
    trainer.train()
    for row in rows:
        answer = ids(row["completion"] + ".")
        for settings in ({"decoding": "ar"}, {"decoding": "block_diffusion", "block_size": 2}):
            prompt = torch.tensor([ids(row["prompt"])])
            text = trainer.model.eval().generate(prompt, do_sample=False, max_new_tokens=6, **settings)
            assert text[0, 2 : 2 + len(answer)].tolist() == answer


def test_an_adapter_is_trained_and_saved(tmp_path: Path) -> None:
    adapter = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    trainer = make(tmp_path, TEXTS, peft_config=adapter, gradient_checkpointing=True, learning_rate=1e-2)
    before = [parameter.clone() for parameter in trainer.model.parameters() if not parameter.requires_grad]
    trainer.train()
    after = [parameter for parameter in trainer.model.parameters() if not parameter.requires_grad]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    trainer.save_model()
    adapted = PeftModel.from_pretrained(tiny_model(), tmp_path)
    tokens = torch.tensor([ids("abcd")])
    assert_near(adapted.eval()(tokens).logits, trainer.model.eval()(tokens).logits)
    assert not torch.equal(adapted(tokens).logits, tiny_model()(tokens).logits)


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """From a checkpoint of ours: the weights, their average, and no card of TRL beside it."""
    whole = make(tmp_path / "whole", TEXTS, save_strategy="steps", save_steps=2, learning_rate=1e-2)
    whole.train()
    assert checkpoints(tmp_path / "whole") == ["checkpoint-2", "checkpoint-4"]
    assert not (tmp_path / "whole" / "README.md").exists()
    resumed = make(tmp_path / "resumed", TEXTS, learning_rate=1e-2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed)[-2:] == losses(whole)[-2:]
    assert all(torch.equal(*pair) for pair in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_a_model_may_be_named_by_its_folder(saved: Path, tmp_path: Path) -> None:
    trainer = make(tmp_path / "run", TEXTS, str(saved), max_steps=1, processing_class=None)
    trainer.train()
    assert losses(trainer)


def test_the_first_token_of_a_document_is_not_scored_by_the_ar_baseline(tmp_path: Path) -> None:
    """With `next_token_prediction` nothing predicts it."""
    model = tiny_model(next_token_prediction=True, block_sizes=[1], adaptive_layer_norm=False)
    trainer = make(tmp_path, TEXTS[:2], model, packing=True, max_length=16)
    assert collated(trainer)["labels"].tolist() == [ids("-bcde.-gh.")]
    trainer.train()


@pytest.mark.parametrize(
    ("name", "value"), [("loss_type", "dft"), ("label_smoothing_factor", 0.1), ("padding_free", True)]
)
def test_settings_that_mean_another_loss_are_refused(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be .*, but is {value!r}"):
        BlockGenSFTConfig(output_dir=str(tmp_path), **{name: value})


def test_arguments_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(TEXTS)
    with pytest.raises(ValueError, match="`args` must be a `BlockGenSFTConfig`.*is a `SFTConfig`"):
        BlockGenSFTTrainer(tiny_model(), SFTConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=rows)
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match="`compute_loss_func` must be None"):
        make(tmp_path, TEXTS, compute_loss_func=lambda *args, **kwargs: 0)


def test_trl_s_own_trainer_says_what_to_take_instead(tmp_path: Path) -> None:
    """It computes a loss of next tokens from the trunk, which would be wrong for a model with a noisy half."""
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=1)
    trainer = SFTTrainer(
        tiny_model(), args, train_dataset=datasets.Dataset.from_list(TEXTS), processing_class=tiny_tokenizer()
    )
    with pytest.raises(ValueError, match="BlockGenSFTTrainer"):
        trainer.train()
