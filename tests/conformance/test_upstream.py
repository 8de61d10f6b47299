"""PEFT's tests are at hand, or the run says how to get them."""

import pytest

from . import factory


def test_the_tests_of_the_installed_peft_are_at_hand():
    if factory.unwanted:
        pytest.skip(f"{factory.SKIP}=1")
    if not factory.upstream_is_here():
        pytest.fail(
            f"PEFT's own tests could not be fetched, so conformance was not checked ({factory.fetch_error}). The "
            f"command was: {' '.join(factory.COMMAND)}. Run it where a package index can be reached, or set "
            f"{factory.SKIP}=1.",
            pytrace=False,
        )
