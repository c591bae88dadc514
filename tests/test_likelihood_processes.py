"""`evaluate_likelihood` in two processes (gloo, CPU), and what importing the package does not import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


LENGTHS = (3, 17, 32, 8, 1, 25, 11, 30, 6)  # nine rows: the last batch leaves the second process without one


def evaluate(folder: Path, launched: bool) -> None:
    """Writes the result of this process."""
    import torch
    from tiny import tiny_model, words

    from blockgen_hf.evaluation import evaluate_likelihood

    rows = [{"input_ids": words(length, seed=index)} for index, length in enumerate(LENGTHS)]
    rows.insert(4, {"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([-100, -100])})
    model = tiny_model()
    found = evaluate_likelihood(model, iter(rows), monte_carlo_samples=2, batch_size=2)  # finds the launch itself
    accelerator = None
    if launched:
        from accelerate import Accelerator

        accelerator = Accelerator()
        assert accelerator.num_processes == 2
    given = evaluate_likelihood(model, rows, monte_carlo_samples=2, batch_size=2, accelerator=accelerator)
    assert given == found
    rank = accelerator.process_index if accelerator is not None else "alone"
    (folder / f"{rank}.json").write_text(json.dumps(given.to_dict()))
    try:
        evaluate_likelihood(model, [[1], [2], [99]], batch_size=1)
    except ValueError as error:
        assert "Row 2 of `dataset`" in str(error)  # on both, though one has the row
    else:
        raise AssertionError("a bad row went through")


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(tmp_path: Path) -> None:
    """Section 7 of the design: independent of the number of processes, and the same in each."""
    pytest.importorskip("accelerate")
    evaluate(tmp_path, launched=False)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path)], check=True, timeout=240, env=environment)
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert results["0"] == results["1"]
    for name in ("log_sum_exp", "log_sum_exp_corrected", "jensen"):
        assert results["0"][name] == pytest.approx(results["alone"][name], rel=1e-6, abs=1e-6)
    for size, figure in results["alone"]["block_sizes"].items():
        assert results["0"]["block_sizes"][size] == pytest.approx(figure, rel=1e-6, abs=1e-6)
    for name in ("num_sequences", "num_tokens", "num_skipped"):
        assert results["0"][name] == results["alone"][name]


@pytest.mark.slow
def test_loading_and_generating_needs_no_evaluation() -> None:
    """`import blockgen_hf` is for torch and transformers alone."""
    code = "import sys, blockgen_hf; sys.exit(any(name.startswith('blockgen_hf.evaluation') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


if __name__ == "__main__":
    evaluate(Path(sys.argv[1]), launched=True)
