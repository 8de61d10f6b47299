"""YAML as people who write settings expect it: the scalars of YAML 1.2's core schema.

PyYAML follows YAML 1.1, where `2:4:6:8` is a number in base 60, `no` is false and `3e-4` is a string. The first is
MoLA's allocation, the second a strategy of the trainer, the third a learning rate.
"""

import re
from typing import Any

import yaml

from moe_peft.errors import refuse


class _Loader(yaml.SafeLoader):
    """SafeLoader with resolvers of its own; the parent's are replaced, not added to."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))


def load(text: str) -> Any:
    """The value that `text` spells.

    >>> load("num_experts: 2:4:6:8"), load("eval_strategy: no"), load("learning_rate: 3e-4")
    ({'num_experts': '2:4:6:8'}, {'eval_strategy': 'no'}, {'learning_rate': 0.0003})

    Raises:
        yaml.YAMLError: if it is not YAML.
    """
    return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)


def load_settings(text: str, origin: str) -> dict[str, Any]:
    """The mapping in a settings file; `origin` names the file in messages.

    Raises:
        ValueError: if it is not YAML, or not a mapping of names to values.
    """
    try:
        values = load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(
            f"{origin} must hold settings, one `name: value` a line, but holds a {type(values).__name__}."
        )
    return values


def pairs(overrides: list[str] | dict[str, Any]) -> dict[str, Any]:
    """`["r=8", "num_experts=2:4"]` -> `{"r": 8, "num_experts": "2:4"}`; a mapping as it is.

    Raises:
        ValueError: if a text has no name or no equals sign.
    """
    if isinstance(overrides, dict):
        return overrides
    values = {}
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign or not key.strip():
            raise refuse("--set", text, "a field of the adapter and its value", "Write `--set num_experts=4`.")
        values[key.strip()] = load(value)
    return values
