"""Likelihood figures as `evaluate` and the end of a training print them."""

from blockgen_hf.cli.figures import likelihood_table


def test_block_sizes_in_order_and_rounding_errors_are_zero() -> None:
    metrics = {}
    for name, error in (("block_size_1", 2e-14), ("block_size_16", 0.25), ("block_size_2", 0.0), ("jensen", None)):
        metrics |= {f"nll_{name}": 2.0, f"perplexity_{name}": 7.39}
        metrics |= {} if error is None else {f"perplexity_standard_error_{name}": error}
    _, *rows = likelihood_table(metrics).text(100).splitlines()
    assert [" ".join(row.split()) for row in rows] == [
        "block size 1 2.0000 7.39 ± 0",
        "block size 2 2.0000 7.39 ± 0",
        "block size 16 2.0000 7.39 ± 0.25",
        "mixture, Jensen (Eq. 7) 2.0000 7.39",
    ]
