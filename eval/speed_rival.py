"""The rival's layers, timed in a process of their own: its released package has the import name of ours.

Started by `speed_peers.py` with the folder of a release (`pip install --no-deps --target FOLDER moe-peft==2.0.2`).
Reads one JSON request per line, answers one line with a number: `{"prepare": …}` builds, `{"run": …}` times one step,
`{"check": …}` writes what a block of experts computes into a file. Its FFN blocks are in `speed_rival_ffn.py`.

The release asks for torch < 2.6 and transformers < 4.47. Beside today's torch its layer files run unchanged, its model
classes do not (`LlamaConfig` has no `rope_theta` any more), so its layers are put into the same Llama as everyone
else's. In its favour: its dropout, which it forces to be above 0, is set to 0 after construction, and its router loss is
left out.
"""

import json
import sys
import types
from pathlib import Path

import torch
from speed_shared import (
    EXPERTS,
    LINEARS,
    RANK,
    TOP_K,
    Case,
    FfnCase,
    ModelCase,
    Step,
    case_of,
    layer_step,
    make_base,
    make_llama,
    model_step,
    outcome,
    repeats_of,
    seconds,
)
from torch import Tensor, nn


def load(folder: str) -> None:
    """Make the release importable; moe-peft without its `__init__`, which asks for more than a layer needs."""
    if not (Path(folder) / "moe_peft").is_dir():
        sys.path.insert(0, folder)
        return
    package = types.ModuleType("moe_peft")
    package.__path__ = [str(Path(folder) / "moe_peft")]
    sys.modules["moe_peft"] = package


class RivalLinear(nn.Module):
    """Its linear layer with its mixture in it, behind the signature of `nn.Linear`."""

    def __init__(self, base: nn.Module, method: str, device: str) -> None:
        super().__init__()
        from moe_peft.adapters import adapter_factory, moe_layer_factory
        from moe_peft.common import Linear, LLMBatchConfig, LLMModelInput

        settings = {"num_experts": EXPERTS, "router_loss": False}
        if method == "MOLA":
            settings["top_k"] = TOP_K
        shared = {"r": RANK, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": LINEARS}
        config = adapter_factory(method, "a", **shared, **settings)
        self.inner = Linear(base, device)
        self.inner.moes_["a"] = moe_layer_factory(self.inner.in_features_, torch.device(device), config)
        for number in range(EXPERTS):
            self.inner.init_lora_weight(config.expert_config(number))
        for lora in self.inner.loras_.values():
            lora.dropout_.p = 0.0
            nn.init.normal_(lora.lora_b_.weight, std=0.02)
        self._batch = lambda rows: LLMModelInput(batch_configs_=[LLMBatchConfig("a", 0, rows)])

    def trained(self) -> list[nn.Parameter]:
        """They stand in plain dicts, where `parameters()` does not look."""
        factors = [p for lora in self.inner.loras_.values() for p in (lora.lora_a_.weight, lora.lora_b_.weight)]
        return [*factors, self.inner.moes_["a"].gate_.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, self._batch(x.shape[0]))


def prepare(case: Case | FfnCase | ModelCase, method: str) -> Step:
    if isinstance(case, FfnCase):
        from speed_rival_ffn import make_block

        block = make_block(case, method)
        return layer_step(case, block, block.trained())
    if isinstance(case, Case):
        layer = RivalLinear(make_base(case), method, case.device)
        return layer_step(case, layer, layer.trained())
    model = make_llama(case).requires_grad_(False)
    adapted = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in LINEARS]
    parameters: list[nn.Parameter] = []
    for name in adapted:
        layer = RivalLinear(model.get_submodule(name), method, case.device)
        model.set_submodule(name, layer)
        parameters += layer.trained()
    return model_step(case, model, parameters)


def main() -> None:
    torch.set_num_threads(1)
    load(sys.argv[1])
    steps: dict[str, tuple[Step, str, int]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "prepare" in request:
            case = case_of(request["case"])
            steps = {} if request["first"] else steps
            step = prepare(case, request["method"])
            steps[request["prepare"]] = (step, case.device, repeats_of(case))
            answer = seconds(step, case.device)  # the first step, which is not counted
        elif "check" in request:
            from speed_rival_ffn import make_block

            case = case_of(request["case"])
            block = make_block(case, request["check"])
            torch.save(outcome(case, block, block.gradients), request["file"])
            answer = 0.0
        else:
            answer = seconds(*steps[request["run"]])
        print(f"seconds {answer!r}", flush=True)


if __name__ == "__main__":
    main()
