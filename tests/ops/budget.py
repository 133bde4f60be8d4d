"""Which tests run on interpreted kernels by default: kernels take thousands of times as long there. --thorough: all."""

import pytest

thorough = False  # --thorough: conftest.py

# Beside what all mixers promise: modules whose own tests would add some minutes, and those of them that run.
OF_MODULES = {
    "test_opcheck": (),
    "test_gated_delta_rule": ("test_any_size_of_heads",),
    "test_linear_attention": ("test_any_size_of_heads",),
    "test_linear_scan": ("test_any_trailing_shape",),
    "test_ssd": ("test_is_linear_attention_bit_for_bit",),
}

# What all mixers promise, of mixers that have tests of their own on interpreted kernels, or share their kernels with
# another.
OF_MIXERS = {
    # What the kernels of decays per channel do not share with those of decays per head.
    "gated_delta_rule_per_channel": (
        "test_documents_agree_with_the_fp64_reference",
        "test_low_precision_inputs_lose_no_more_than_a_plain_implementation",
        "test_nothing_in_one_document_changes_another_by_one_bit",
        "test_no_tokens_at_all",
    ),
    "selective_scan": ("test_no_tokens_at_all",),
    "causal_conv1d": ("test_no_tokens_at_all",),
    # Its kernels are those of linear attention, with steps and a skip.
    "ssd": (
        "test_documents_agree_with_the_fp64_reference",
        "test_rows_agree_with_the_fp64_reference",
        "test_low_precision_inputs_lose_no_more_than_a_plain_implementation",
        "test_no_tokens_at_all",
    ),
}


def runs_by_default(module: str, test: str, mixer: str | None) -> bool:
    """Whether a test runs on interpreted kernels by default; ``mixer``: of which, for what all of them promise."""
    if mixer is not None:
        return test in OF_MIXERS.get(mixer, (test,))
    return test in OF_MODULES.get(module, (test,))


def skip_if_interpreted(kernels: str) -> None:
    """In a test of which only a part is too slow for interpreted kernels."""
    skip_if(kernels == "triton")


def skip_if(slow: bool) -> None:
    """In a test of which some cases repeat others."""
    if slow and not thorough:
        pytest.skip("slow: only with --thorough")
