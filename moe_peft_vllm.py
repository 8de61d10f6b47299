"""vLLM's door to `moe_peft.serving`: the entry point of `vllm.general_plugins`, and the model class that it names.

A module beside the package, because importing any part of a package runs its `__init__` first, and that of `moe_peft` has
to register its adapter types with PEFT: training code may rely on `import moe_peft` alone. A server has no PEFT, or should
not load it. So this module puts an empty package in the place of `moe_peft` while the serving modules and the torch-only
core below them are loaded, and takes it away again: a later `import moe_peft` in the same process registers as ever and
shares the modules that are there by then.

    vllm serve BASE --hf-overrides '{"architectures": ["MoePeftForCausalLM"], "moe_peft": "ADAPTER_DIR"}'
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


ARCHITECTURE = "MoePeftForCausalLM"


def register() -> None:
    """Tell vLLM of the architecture; called in every process of a server, any number of times.

    Nothing of the model is imported here: vLLM does so by name once a server asks for it.
    """
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{__name__}:{ARCHITECTURE}")


def serving(name: str) -> ModuleType:
    """The module `moe_peft.serving.<name>`, without PEFT."""
    with _empty_parent():
        return importlib.import_module(f"moe_peft.serving.{name}")


@contextmanager
def _empty_parent() -> Iterator[None]:
    if "moe_peft" in sys.modules:  # registered already
        yield
        return
    spec = importlib.util.find_spec("moe_peft")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    parent = ModuleType("moe_peft")
    parent.__path__, parent.__spec__ = list(spec.submodule_search_locations), spec
    sys.modules["moe_peft"] = parent
    try:
        yield
    finally:
        del sys.modules["moe_peft"]


def __getattr__(name: str) -> Any:
    if name == ARCHITECTURE:
        return serving("vllm").MoePeftForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
