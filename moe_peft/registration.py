"""Opens PEFT's closed `PeftType` and makes the official registration call. The only file that knows it is closed.

`register_peft_method` refuses a name that is not in the enum, and transformers reads `.value` of it, so a plain string
would not do: the member must be real.
"""

import enum

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method


def extend_str_enum(enum_class: type[enum.Enum], name: str) -> enum.Enum:
    """Add the member `name = "name"` to a `str` enum that has members already; returns it.

    Does nothing if the member exists. `EnumType` only forbids changing a member once it is in `_member_map_`, so the
    class attribute is set first.
    """
    if name in enum_class.__members__:
        return enum_class.__members__[name]
    member = str.__new__(enum_class, name)  # type: ignore[arg-type]  # PeftType is a subclass of str
    member._name_, member._value_ = name, name
    member.__objclass__ = enum_class
    member._sort_order_ = len(enum_class.__members__)
    setattr(enum_class, name, member)
    enum_class._member_names_.append(name)
    enum_class._member_map_[name] = member
    enum_class._value2member_map_[name] = member
    if hasattr(enum_class, "_hashable_values_"):  # Python 3.12 and later look values up here as well
        enum_class._hashable_values_.append(name)
    return member


def reserve(name: str) -> None:
    """Make `PeftType[NAME]` exist, which the config class needs before the tuner class can be registered."""
    extend_str_enum(PeftType, name.upper())


def register(name: str, config_cls: type[PeftConfig], tuner_cls: type[BaseTuner]) -> None:
    """Make `"peft_type": NAME` mean `config_cls` and `tuner_cls` to PEFT, in this process.

    Args:
        name: lower case; the parameter prefix is `name + "_"`, which transformers derives by itself.

    Raises:
        RuntimeError: if another package, or PEFT itself, holds the name or the prefix.
    """
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(name.upper())  # keyed by members, which hash as their strings
    if registered is config_cls:
        return
    prefix = f"{name}_"
    if registered is not None or prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values():
        raise RuntimeError(
            f"PEFT already knows an adapter type {name.upper()} ({registered}). moe_peft cannot add its own beside it: "
            "uninstall the other package, or use a version of PEFT without that type."
        )
    reserve(name)
    register_peft_method(name=name, config_cls=config_cls, model_cls=tuner_cls, prefix=prefix)
