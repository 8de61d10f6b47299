"""How this package says no: the field as the user wrote it, what it is, what it may be, what to do.

Every room of the house raises through these two functions, so that messages read alike and a misspelt name always
meets the nearest right one.
"""

import difflib
from collections.abc import Iterable


def nearest(name: str, choices: Iterable[str]) -> str:
    """A sentence that names the closest of `choices`, or lists them all when none is close.

    >>> nearest("mloa", ["mola", "loramoe"])
    "Did you mean 'mola'?"
    """
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"Did you mean '{close[0]}'?"
    return "Choose one of: " + ", ".join(f"'{choice}'" for choice in known) + "."


def refuse(field: str, value: object, allowed: str, remedy: str) -> ValueError:
    """The four parts of a refusal as one `ValueError`; the caller raises it.

    Args:
        field: the name as the user wrote it, without quotes.
        value: what it is now.
        allowed: what it may be, as a noun phrase ("a whole number of at least 1").
        remedy: what to do, as a sentence.
    """
    return ValueError(f"`{field}` is {value!r}, but must be {allowed}. {remedy}")
