"""A transformers that is too old is refused before anything else can fail, in the code of a checkpoint too."""

import importlib.metadata
import runpy

import pytest

from blockgen_hf.modeling import configuration_blockgen


@pytest.mark.parametrize("release", ["4.57.6", "5.10.0", "5.19.0"])
def test_an_old_transformers_is_refused_with_the_releases_that_work(
    release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: release if name == "transformers" else found(name))
    monkeypatch.delattr("transformers.PreTrainedConfig")  # as in 4.57: the refusal comes before what is missing
    with pytest.raises(ImportError, match="work with transformers 5.20 and newer") as refusal:
        runpy.run_path(configuration_blockgen.__file__)
    assert f"found transformers=={release}" in str(refusal.value)
