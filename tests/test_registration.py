"""PEFT and transformers treat our types as their own, by every door that an adapter can come in."""

import copy
import enum
import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_llama
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, PeftType, get_peft_model, inject_adapter_in_model
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe_peft import LinearMoeConfig, LinearMoeModel
from moe_peft.config import MoeConfig
from moe_peft.registration import extend_str_enum, register
from moe_peft.tuners.base import MoeTunerLayer


CLOSE = {"rtol": 1e-5, "atol": 1e-6}
SETTINGS = {"num_experts": 4, "r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def in_a_new_process(program: str, *arguments: object) -> str:
    """What the program prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def make_adapted() -> PeftModel:
    base = make_tiny_llama()
    torch.manual_seed(2)
    return get_peft_model(base, LinearMoeConfig(**SETTINGS, init_weights=False)).eval()


def logits(model, tokens) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with a base model in `base` and an adapter for it in `adapter`."""
    folder = tmp_path_factory.mktemp("saved")
    make_tiny_llama().save_pretrained(folder / "base")
    model = make_adapted()
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return folder


# --- the enum ---


class Native(str, enum.Enum):
    FIRST = "FIRST"
    SECOND = "SECOND"


class Extended(str, enum.Enum):
    FIRST = "FIRST"


extend_str_enum(Extended, "SECOND")


@pytest.mark.parametrize(
    "view",
    [
        list,
        len,
        lambda cls: cls("SECOND"),
        lambda cls: cls["SECOND"],
        lambda cls: cls.SECOND.name,
        lambda cls: cls.SECOND.value,
        lambda cls: [repr(member).split(".")[-1].split(":")[0] for member in cls],
        lambda cls: cls.SECOND == "SECOND" and hash(cls.SECOND) == hash("SECOND"),
        lambda cls: {"SECOND": 1}[cls.SECOND],
        lambda cls: json.dumps({cls.SECOND: cls.SECOND}),
        lambda cls: "SECOND" in cls.__members__ and cls.SECOND in cls,
        lambda cls: isinstance(cls.SECOND, cls) and isinstance(cls.SECOND, str),
        lambda cls: copy.deepcopy(cls.SECOND) is cls.SECOND,
        lambda cls: pickle.loads(pickle.dumps(cls.SECOND)) is cls.SECOND,
        lambda cls: sorted(cls, reverse=True),
    ],
)
def test_an_added_member_is_as_a_declared_one(view):
    assert view(Extended) == view(Native)


def test_a_member_cannot_be_added_twice_or_changed():
    assert extend_str_enum(Extended, "SECOND") is Extended.SECOND
    assert len(Extended) == 2
    with pytest.raises(AttributeError):
        Extended.SECOND = "other"


def test_our_type_is_a_peft_type():
    member = PeftType("LINEAR_MOE")
    assert member is PeftType["LINEAR_MOE"] is PeftType.LINEAR_MOE
    assert member in list(PeftType)
    assert PEFT_TYPE_TO_CONFIG_MAPPING["LINEAR_MOE"] is LinearMoeConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is LinearMoeModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == LinearMoeModel.prefix == "linear_moe_"
    assert isinstance(PeftConfig.from_peft_type(peft_type=member), LinearMoeConfig)


# --- names that are taken ---


@dataclass
class OtherConfig(PeftConfig):
    pass


def test_registering_the_same_type_again_changes_nothing():
    before = dict(PEFT_TYPE_TO_CONFIG_MAPPING), list(PeftType)
    register("linear_moe", LinearMoeConfig, LinearMoeModel)
    assert (dict(PEFT_TYPE_TO_CONFIG_MAPPING), list(PeftType)) == before


@pytest.mark.parametrize("name", ["linear_moe", "lora"])
def test_a_name_that_is_taken_is_refused(name):
    with pytest.raises(RuntimeError, match=rf"PEFT already knows an adapter type {name.upper()}.*uninstall the other"):
        register(name, OtherConfig, LinearMoeModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING["LINEAR_MOE"] is LinearMoeConfig


def test_a_prefix_that_is_taken_is_refused_and_leaves_no_member_behind(monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_PREFIX_MAPPING, PeftType.IA3, "fresh_")
    with pytest.raises(RuntimeError, match="PEFT already knows an adapter type FRESH"):
        register("fresh", OtherConfig, LinearMoeModel)
    assert "FRESH" not in PeftType.__members__


# --- PEFT's doors ---


def test_a_config_is_found_by_its_type(saved):
    for config_class in (PeftConfig, MoeConfig, LinearMoeConfig):
        config = config_class.from_pretrained(str(saved / "adapter"))
        assert type(config) is LinearMoeConfig
        assert config.peft_type is PeftType.LINEAR_MOE
    assert json.loads((saved / "adapter" / "adapter_config.json").read_text())["plugin"] == "moe_peft"


def test_auto_peft_loads_base_and_adapter(saved, tokens):
    model = AutoPeftModelForCausalLM.from_pretrained(saved / "adapter")
    assert isinstance(model.base_model, LinearMoeModel)
    torch.testing.assert_close(logits(model, tokens), logits(make_adapted(), tokens), **CLOSE)


def test_the_status_names_our_type(saved):
    status = PeftModel.from_pretrained(make_tiny_llama(), saved / "adapter").get_model_status()
    assert status.peft_types == {"default": "LINEAR_MOE"}
    assert status.adapter_model_type == "LinearMoeModel"


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_is_injected_without_a_peft_model(tokens, low_cpu_mem_usage):
    model = inject_adapter_in_model(
        LinearMoeConfig(**SETTINGS), make_tiny_llama(), low_cpu_mem_usage=low_cpu_mem_usage
    )
    layers = [module for module in model.modules() if isinstance(module, MoeTunerLayer)]
    assert len(layers) == 2 * 4
    devices = {p.device.type for layer in layers for p in layer.linear_moe_experts.parameters()}
    assert devices == {"meta" if low_cpu_mem_usage else "cpu"}
    if not low_cpu_mem_usage:
        assert torch.equal(logits(model, tokens), logits(make_tiny_llama(), tokens))


# --- transformers' doors ---


def test_transformers_loads_an_adapter_into_its_own_model(saved, tokens):
    model = make_tiny_llama()
    base = logits(model, tokens)
    model.load_adapter(str(saved / "adapter"), adapter_name="mine")
    torch.testing.assert_close(logits(model, tokens), logits(make_adapted(), tokens), **CLOSE)
    model.disable_adapters()
    assert torch.equal(logits(model, tokens), base)
    model.enable_adapters()
    model.delete_adapter("mine")
    assert not [name for name, _ in model.named_parameters() if "mine" in name]
    assert torch.equal(logits(model, tokens), base)


def test_transformers_loads_base_and_adapter_from_the_adapters_folder(saved, tokens):
    model = AutoModelForCausalLM.from_pretrained(saved / "adapter")
    torch.testing.assert_close(logits(model, tokens), logits(make_adapted(), tokens), **CLOSE)


def test_transformers_adds_a_fresh_adapter_and_saves_it(tmp_path, tokens):
    model = make_tiny_llama()
    base = logits(model, tokens)
    model.add_adapter(LinearMoeConfig(**SETTINGS), adapter_name="fresh")
    assert torch.equal(logits(model, tokens), base)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "linear_moe_experts.fresh" in name}
    assert trained
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert len(keys) == len(trained)
    assert all("linear_moe_experts" in key and "fresh" not in key for key in keys)
    assert type(PeftConfig.from_pretrained(tmp_path)) is LinearMoeConfig


# --- pickles, and what an import does ---

UNPICKLE = """
import pickle, sys, torch
torch.set_num_threads(1)
with open(sys.argv[1], "rb") as file:
    config = pickle.load(file)
with open(sys.argv[2], "rb") as file:
    model, tokens = pickle.load(file)
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
assert config.peft_type is PeftType["LINEAR_MOE"], config.peft_type
assert PEFT_TYPE_TO_CONFIG_MAPPING["LINEAR_MOE"] is type(config)
with torch.no_grad():
    torch.save(model(input_ids=tokens).logits, sys.argv[3])
"""


def test_pickles_open_in_a_process_that_does_not_import_us(tmp_path, tokens):
    model = make_adapted()
    before = logits(model, tokens)
    paths = [tmp_path / name for name in ("config", "model", "logits")]
    paths[0].write_bytes(pickle.dumps(model.peft_config["default"]))
    paths[1].write_bytes(pickle.dumps((model, tokens)))
    in_a_new_process(UNPICKLE, *paths)
    torch.testing.assert_close(torch.load(paths[2]), before, **CLOSE)


IMPORT = """
import json, sys
import peft
from peft import PeftConfig
before = set(sys.modules)
try:
    PeftConfig.from_pretrained(sys.argv[1])
    raise SystemExit("PEFT loaded a type that it cannot know")
except KeyError as error:
    assert "LINEAR_MOE" in str(error)
import moe_peft
import torch
added = sorted(set(sys.modules) - before)
PeftConfig.from_pretrained(sys.argv[1])
print(json.dumps({"added": added, "cuda": torch.cuda.is_initialized()}))
"""


def test_the_import_registers_and_does_nothing_else(saved):
    found = json.loads(in_a_new_process(IMPORT, saved / "adapter"))
    heavy = {"trl", "bitsandbytes", "datasets", "triton", "matplotlib", "scipy", "transformers.trainer"}
    assert "moe_peft.tuners.linear_moe" in found["added"]
    assert [name for name in found["added"] if name in heavy or name.split(".")[0] in heavy] == []
    assert not found["cuda"]
