"""How many experts, and of what rank, each layer gets: "2:4:6:8", a list, or one number.

Plain Python: knows nothing of torch or of models. MoLA (arXiv:2402.08562) introduced layer-wise allocation with four
groups of eight layers; `expand` extends it to any number of layers.
"""

from typing import Any

from moe_peft.errors import refuse


Allocation = int | str | list[int]
"""One number for every layer, "a:b:c" for consecutive groups of layers, or a list with one number per layer."""


def parse(value: Allocation, field: str) -> tuple[int, ...]:
    """The numbers that an allocation names, checked, in order and not yet spread over layers.

    Args:
        value: what the user wrote.
        field: the name of the config field, for the error.

    Raises:
        ValueError: if it is not a positive whole number, a list of them, or such numbers joined by colons.
    """
    allowed = (
        'a whole number of at least 1, numbers for groups of layers such as "2:4:6:8", or a list with one per layer'
    )
    if isinstance(value, str):
        parts = value.split(":")
        if not all(part.strip().isdecimal() for part in parts):
            raise refuse(field, value, allowed, "Write digits separated by colons, without other signs.")
        numbers: tuple[Any, ...] = tuple(int(part) for part in parts)
    elif isinstance(value, (list, tuple)):
        numbers = tuple(value)
    else:
        numbers = (value,)
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
        raise refuse(field, value, allowed, "Correct the entry that is not a positive whole number.")
    return numbers


def is_uniform(value: Allocation) -> bool:
    """Whether the allocation is one number, which needs no layer index to be applied."""
    return isinstance(value, int) or (isinstance(value, str) and ":" not in value)


def expand(value: Allocation, num_layers: int, field: str) -> list[int]:
    """One number per layer, shape `[num_layers]`.

    Groups are consecutive and nearly equal: layer `i` of `L` belongs to group `i * G // L`. With MoLA's 32 layers and 4
    groups these are its blocks of eight.

    Raises:
        ValueError: if a list has not one entry per layer, or a pattern has more groups than there are layers.
    """
    numbers = parse(value, field)
    if isinstance(value, int) or len(numbers) == 1 and isinstance(value, str):
        return [numbers[0]] * num_layers
    if isinstance(value, str):
        if len(numbers) > num_layers:
            raise refuse(
                field,
                value,
                f"a pattern of at most {num_layers} groups, as the model has {num_layers} layers",
                f"It names {len(numbers)} groups; drop {len(numbers) - num_layers} or write a list with one per layer.",
            )
        return [numbers[i * len(numbers) // num_layers] for i in range(num_layers)]
    if len(numbers) != num_layers:
        raise refuse(
            field,
            value,
            f"a list of {num_layers} numbers, one for each layer of the model",
            f'It has {len(numbers)}. Give one per layer, or groups as a string: "{":".join(map(str, numbers))}".',
        )
    return list(numbers)
