"""What a training run prints of its log."""

from blockgen_hf.cli.training_log import evaluation_line


def test_the_mixture_s_perplexity_is_jensen_s() -> None:
    """The log-sum-exp of two draws came out below its best component."""
    logs = {
        "eval_loss": 6.0,
        "eval_perplexity_block_size_1": 374.0,
        "eval_perplexity_block_size_4": 433.5,
        "eval_perplexity_log_sum_exp": 330.0,
        "eval_perplexity_jensen": 402.66,
    }
    assert evaluation_line(logs) == "validation perplexity  1: 374.00, 4: 433.50  mixture 402.66"
