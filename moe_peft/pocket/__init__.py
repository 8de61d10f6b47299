"""
A backbone small enough to ship and to train adapters on in half a minute of one core, with tasks that test them.

The offline yardstick of this package: a Llama of under a million parameters in `POCKET_DIR`, which loads through
`AutoModelForCausalLM.from_pretrained(POCKET_DIR)` like any other, in 4 bits too; suites of conflicting tasks; exact
match scoring. It shows how methods differ in routing, interference and forgetting. It cannot show absolute gains on
models of useful size.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from .suites import SUITES, Suite, knowledge_probe, make_suite
from .world import Row, World, make_world


if TYPE_CHECKING:
    from .score import exact_match, exact_match_generated, per_domain

POCKET_DIR = Path(__file__).parent / "weights"

__all__ = [
    "POCKET_DIR",
    "SUITES",
    "Row",
    "Suite",
    "World",
    "exact_match",
    "exact_match_generated",
    "knowledge_probe",
    "make_suite",
    "make_world",
    "per_domain",
]


def __getattr__(name: str) -> object:
    # Scoring needs torch, which generating suites does not.
    if name in ("exact_match", "exact_match_generated", "per_domain"):
        from . import score

        return getattr(score, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
