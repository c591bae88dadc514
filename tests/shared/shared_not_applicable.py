"""The shared tests that do not apply to BlockGen, each with the reason: the only place that skips any."""

import unittest
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any, NamedTuple


class NotApplicable(NamedTuple):
    error: str  # in the message of the failure; any other failure is one
    reason: str
    since: str = "5.0"  # the release of transformers that brought the test


NOT_APPLICABLE: dict[str, NotApplicable] = {
    "test_causal_lm_loss_honors_shift_labels": NotApplicable(
        "`shift_labels`",
        "labels are not shifted: the loss needs the clean and the noisy half of whole sequences, which sequence "
        "parallelism would cut, so that `shift_labels` are refused",
    ),
    "test_bc_cache_name_forward": NotApplicable(
        "False is not true",  # it expects a warning
        "`forward` takes `cache` and `past_key_values` alike on every supported release: neither name warns; "
        "tests/test_cache_names.py tests both",
        since="5.24",
    ),
    "test_generation_tester_mixin_inheritance": NotApplicable(
        "the tester must inherit from `GenerationTesterMixin`",
        "the source distribution has no `GenerationTesterMixin` to inherit from (tests/generation/test_utils.py); "
        "tests/test_generate*.py test generation",
    ),
}


def skip_not_applicable(test_class: type) -> type:
    """Class decorator: tests of the table are run, and skipped with the reason if they fail in the way it says."""
    for name, entry in NOT_APPLICABLE.items():
        if hasattr(test_class, name):
            setattr(test_class, name, skip_when_failing(getattr(test_class, name), entry))
    return test_class


def skip_when_failing(test: Callable[[Any], None], entry: NotApplicable) -> Callable[[Any], None]:
    @wraps(test)
    def run(self: unittest.TestCase) -> None:
        self.subTest = lambda *args, **kwargs: nullcontext()  # what fails within one is to be seen here
        try:
            test(self)
        except unittest.SkipTest as skip:
            stale = f"transformers skips it: {skip}"
        except Exception as error:
            if entry.error not in str(error):
                raise
            stale = None
        else:
            stale = "it passes"
        if stale is None:
            self.skipTest(entry.reason)
        self.fail(f"NOT_APPLICABLE[{test.__name__!r}] is stale: {stale}.")

    return run
