"""Routed layers without PEFT: the logits of the adapter itself, in a process that may not import it; one graph; refusals."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving_cases import CASES, make_case, save_case
from torch import nn

import moe_peft_vllm
from moe_peft.serving.adapter import Adapter, check_server
from moe_peft.serving.install import install, load
from moe_peft.serving.routed import LoraExperts


ROOT = Path(__file__).parents[1]
SERVE = """
import json, sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path

class Forbidden(MetaPathFinder, Loader):  # others may look whether a library is there, and find it, but not import it
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name.partition(".")[0] in ("peft", "trl", "bitsandbytes") else None

    def exec_module(self, module):
        raise AssertionError(f"{module.__name__} must not be imported here")

forbidden = Forbidden()
sys.meta_path.insert(0, forbidden)
folder = Path(sys.argv[1])
sys.path.insert(0, sys.argv[2])
import moe_peft_vllm
from safetensors.torch import save_file
Adapter, install = moe_peft_vllm.serving("adapter").Adapter, moe_peft_vllm.serving("install")
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
logits = {}
for case in sorted(folder.iterdir()):
    model = AutoModelForCausalLM.from_pretrained(case / "base", dtype=torch.float64).eval()
    ids = torch.tensor(json.loads((case / "tokens.json").read_text()))
    adapter = Adapter(case / "adapter")
    places = install.install(model, adapter)
    install.load(model, adapter, places)
    with torch.no_grad():
        logits[case.name] = model(ids).logits
        dead = [m for m in model.modules() if hasattr(m, "lora_B")][-1]
        dead.lora_B.zero_()
        logits[case.name + ".dead"] = model(ids).logits
assert not {"peft", "trl", "bitsandbytes", "moe_peft"} & set(sys.modules), "loaded all the same"
save_file(logits, folder.parent / "logits.safetensors")

sys.meta_path.remove(forbidden)  # training in the same process, later
routing = sys.modules["moe_peft.routing"]
import moe_peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from moe_peft.routing import Routing
assert "LINEAR_MOE" in PEFT_TYPE_TO_CONFIG_MAPPING and Routing is routing.Routing
assert sys.modules["moe_peft"].__file__
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(logits of the PEFT models, logits of the served ones), by case; one process serves all."""
    folder = tmp_path_factory.mktemp("served") / "cases"
    want = {name: save_case(name, folder / name) for name in CASES}
    command = [sys.executable, "-c", SERVE, str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return want, load_file(folder.parent / "logits.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_adapter(served, name):
    want, got = served
    torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_an_expert_that_is_dead_shows(served, name):
    want, got = served
    assert (got[f"{name}.dead"] - want[name]).abs().max() > 1e-4


def _twin(name: str, tmp_path: Path, dtype: torch.dtype = torch.float64):
    base, model = make_case(name, dtype)
    model.save_pretrained(str(tmp_path))
    adapter = Adapter(tmp_path)
    load(base, adapter, install(base, adapter))
    return base, model


@pytest.mark.parametrize(
    "name", ["top_p-shared", "null-constant", "smora", "moram", "mixlora-null", "mixlora-grouped"]
)
@torch.no_grad()
def test_requests_packed_into_one_row_do_not_see_each_other(tmp_path, name):
    base, _ = _twin(name, tmp_path)
    mlp = base.model.layers[0].mlp
    one, other = torch.randn(1, 5, 32, dtype=torch.float64), torch.randn(1, 45, 32, dtype=torch.float64)
    apart = torch.cat((mlp(one), mlp(other)), dim=1)
    torch.testing.assert_close(mlp(torch.cat((one, other), dim=1)), apart, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["null-constant", "share-A-block", "smora", "mixlora-null", "grouped", "mixlora-grouped"]
)
@torch.no_grad()
def test_one_graph_for_every_length(tmp_path, name):
    base, _ = _twin(name, tmp_path, torch.float32)
    mlp, graphs = base.model.layers[0].mlp, []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(mlp, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(specialize_float=True):  # else every scale is an input first, and then is not
        for tokens in (40, 7, 300):
            x = torch.randn(1, tokens, 32)
            torch.testing.assert_close(compiled(x), mlp(x))
    assert len(graphs) == 1


def test_a_host_differs_from_its_like(tmp_path):
    base, _ = _twin("mola", tmp_path)
    first, second = (layer.self_attn for layer in base.model.layers)
    assert type(first).__name__ == "LlamaAttention"
    assert type(second).__name__ == "MoePeftLlamaAttention"
    assert isinstance(second, type(first))
    assert not any(isinstance(module, nn.Linear) for routed in _routed(base) for module in routed.children() if module is not routed.base_layer)  # fmt: skip
    again, _ = make_case("mola")
    assert type(again.model.layers[1].self_attn) is type(first)  # the class of transformers itself is as it was


def _routed(model: nn.Module) -> list[LoraExperts]:
    return [module for module in model.modules() if isinstance(module, LoraExperts)]


def test_half_precision_rounds_factors_and_no_bias(tmp_path):
    base, model = _twin("group-bias", tmp_path, torch.bfloat16)
    layer = next(layer for layer in _routed(base) if layer.routes is not None)
    assert layer.lora_A.dtype == layer.routes.router.dtype == torch.bfloat16
    assert layer.routes.selection_bias.dtype == torch.float32
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(base(ids).logits, model(ids).logits, rtol=0.05, atol=0.05)


# --- what is refused ---


def _edited(tmp_path: Path, name: str = "mola", **changes) -> Path:
    _, model = make_case(name)
    model.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "REMOVED"}))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_granularity": "sequence"}, "`router_granularity` is 'sequence'.*packs tokens.*`generate`"),
        ({"routing": "random"}, "`routing` is 'random'.*merge_and_unload"),
        ({"routing": "given"}, "`routing` is 'given'.*does not tell the task type"),
        ({"expert_groups": [[0], [1]]}, "`expert_groups` is .*left out.*does not tell the task type"),
        ({"router_scope": "model"}, "`router_scope` is 'model'.*'linear', 'group' or 'block'"),
        ({"modules_to_save": ["lm_head"]}, r"`modules_to_save` is \['lm_head'\].*would be lost"),
        ({"trainable_token_indices": [1]}, "`trainable_token_indices` is .*would be lost"),
        ({"peft_type": "LORA"}, "`peft_type` is 'LORA'.*--enable-lora"),
        ({"peft_type": "SHARD_POOL"}, "`peft_type` is 'SHARD_POOL'.*save_lora"),
        ({"routing": "REMOVED"}, "does not say `routing`.*save it again"),
    ],
)
def test_config_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Adapter(_edited(tmp_path, **changes))


def test_a_schedule_that_is_pending_is_refused_and_one_that_is_over_is_not(tmp_path):
    folder = _edited(tmp_path, schedule_steps=100, top_k_start=4)
    Adapter(folder)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 40}))
    with pytest.raises(ValueError, match="`schedule_steps` is 100, but must be at most 40.*still pending"):
        Adapter(folder)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 100}))
    Adapter(folder)


def test_files_refused(tmp_path):
    with pytest.raises(ValueError, match="no adapter_config.json"):
        Adapter(tmp_path)
    folder = _edited(tmp_path)
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.zeros(2, 2)}, weights)
    with pytest.raises(ValueError, match=r"tensor 'base_model.model.lm_head.weight', which is none of an adapter"):
        Adapter(folder)
    save_file({key: value for key, value in tensors.items() if not key.endswith("q_proj.linear_moe_experts.lora_B")}, weights)  # fmt: skip
    with pytest.raises(ValueError, match="no whole pair of factors for 'model.layers.1.self_attn.q_proj'"):
        Adapter(folder)
    weights.unlink()
    with pytest.raises(ValueError, match="no adapter_model.safetensors"):
        Adapter(folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="is not JSON that PEFT wrote"):
        Adapter(folder)


def test_another_base_is_refused_before_anything_changes(tmp_path):
    adapter = Adapter(_edited(tmp_path))
    other, _ = make_case("mola")
    other.model.layers[1].mlp.down_proj = nn.Linear(65, 32)
    with pytest.raises(ValueError, match="lead from 64 to 32 units, the model's layer from 65 to 32"):
        install(other, adapter)
    other.model.layers[1].mlp.down_proj = nn.Identity()
    with pytest.raises(ValueError, match="no linear layer of that name"):
        install(other, adapter)
    assert not _routed(other)


def test_a_block_of_unknown_code_is_refused(tmp_path):
    adapter = Adapter(_edited(tmp_path, "mixlora"))
    base, _ = make_case("mixlora")
    for layer in base.model.layers:
        layer.mlp.__class__ = type("OwnMLP", (type(layer.mlp),), {})
    with pytest.raises(ValueError, match="`the FFN block` is 'OwnMLP'.*export --to moe"):
        install(base, adapter)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((2, 1, None, False), "`--tensor-parallel-size` is 2, but must be 1.*--data-parallel-size"),
        ((1, 2, None, False), "`--pipeline-parallel-size` is 2, but must be 1"),
        ((1, 1, "bitsandbytes", False), "`--quantization` is 'bitsandbytes'.*bf16 or fp16"),
        ((1, 1, None, True), "`--enable-lora` is True.*left out"),
    ],
)
def test_server_settings_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_server(*settings)
    check_server(1, 1, None, False)


# --- the door ---


def test_registers_once_and_by_name(monkeypatch):
    known: dict[str, str] = {}
    registry = SimpleNamespace(get_supported_archs=known.keys, register_model=known.__setitem__)
    fake = ModuleType("vllm")
    fake.ModelRegistry = registry
    monkeypatch.setitem(sys.modules, "vllm", fake)
    moe_peft_vllm.register()
    moe_peft_vllm.register()
    assert known == {"MoePeftForCausalLM": "moe_peft_vllm:MoePeftForCausalLM"}
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        moe_peft_vllm.other  # noqa: B018


def test_the_entry_point_is_the_door():
    text = (ROOT / "pyproject.toml").read_text()
    assert '[project.entry-points."vllm.general_plugins"]\nmoe_peft = "moe_peft_vllm:register"\n' in text
    assert '"moe_peft_vllm.py" = "moe_peft_vllm.py"' in text
