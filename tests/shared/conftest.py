"""The shared tests are fetched to be collected: not where nobody wants slow tests."""

from pathlib import Path

import pytest


# Marks that transformers' tests carry.
MARKS = ("accelerate_tests", "all_flash_attn_test", "bitsandbytes", "flash_attn_test", "flash_attn_3_test",
         "flash_attn_4_test", "generate", "is_fsdp_test", "is_pipeline_test", "is_tensor_parallel_test",
         "is_training_test", "torch_compile_test", "torch_export_test")  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    for name in MARKS:
        config.addinivalue_line("markers", f"{name}: as transformers' tests use it")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_deselected = "not slow" in config.option.markexpr
    return True if is_deselected and collection_path.name == "test_shared_model_tests.py" else None
