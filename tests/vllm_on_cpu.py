"""Runs adapters through vLLM's own Python code on the CPU: plugins, registry, config, init, loader, forward, its LoRA loader.

Started by `test_serving_vllm.py` with the interpreter of an environment that has vLLM and no PEFT:

    python vllm_on_cpu.py CASES OUT [PLAIN_LORA]

Nothing is compiled there, so three things are not vLLM's: attention is torch's, over the same packed tokens, linears are
`F.linear`, and norms are the torch forms that vLLM's operators have of themselves.
"""

import json
import os
import sys
from pathlib import Path


os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
from safetensors.torch import save_file


def attend(self, query, key, value, *args, **kwargs):
    """Causal attention within each request; `LENGTHS` says where they end in the packed row."""
    shape = query.shape
    q, k, v = (t.reshape(-1, heads, self.head_size) for t, heads in ((query, self.num_heads), (key, self.num_kv_heads), (value, self.num_kv_heads)))  # fmt: skip
    out = []
    for q_, k_, v_ in zip(q.split(LENGTHS), k.split(LENGTHS), v.split(LENGTHS), strict=True):
        q_, k_, v_ = (t.transpose(0, 1) for t in (q_, k_, v_))
        k_, v_ = (t.repeat_interleave(self.num_heads // self.num_kv_heads, 0) for t in (k_, v_))
        scale = self.impl.scale if hasattr(self.impl, "scale") else self.head_size**-0.5
        out.append(torch.nn.functional.scaled_dot_product_attention(q_, k_, v_, is_causal=True, scale=scale))
    return torch.cat([o.transpose(0, 1) for o in out]).reshape(*shape[:-1], -1)


LENGTHS: list[int] = []


def serve(case: Path) -> dict[str, torch.Tensor]:
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.model_loader import get_model

    overrides = {"architectures": ["MoePeftForCausalLM"], "moe_peft": str(case / "adapter")}
    args = EngineArgs(
        model=str(case / "base"),
        hf_overrides=overrides,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=64,
    )
    config = args.create_engine_config()
    ids = torch.tensor(json.loads((case / "tokens.json").read_text()))
    LENGTHS[:] = [ids.shape[1]] * ids.shape[0]
    positions = torch.arange(ids.shape[1]).repeat(ids.shape[0])
    with set_current_vllm_config(config), torch.no_grad():
        model = get_model(vllm_config=config)
        with set_forward_context(None, config):

            def logits():
                return model.compute_logits(model(ids.flatten(), positions)).view(*ids.shape, -1).clone()

            got = {case.name: logits()}
            [m for m in model.modules() if hasattr(m, "lora_B")][-1].lora_B.zero_()
            got[f"{case.name}.dead"] = logits()
    kinds = {type(m).__name__ for m in model.modules()}
    assert "Linear" not in kinds, "vLLM has not replaced every frozen linear"
    return got


def read_lora(folder: Path) -> dict[str, torch.Tensor]:
    """What vLLM's LoRA loader makes of a plain LoRA: the change of each module's weight."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_local_dir(str(folder), None)
    record = json.loads((folder / "moe_peft_export.json").read_text())
    rank = int(record["vllm_flag"].split()[-1]) if record["vllm_flag"] else 16
    helper.validate_legal(LoRAConfig(max_lora_rank=rank))
    modules = {name.rpartition(".")[2] for name in record["ranks"]}
    model = LoRAModel.from_local_checkpoint(
        str(folder), modules, helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )
    return {name: (lora.scaling * lora.lora_b @ lora.lora_a).contiguous() for name, lora in model.loras.items()}


def main() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.layers.attention import Attention
    from vllm.plugins import load_general_plugins

    torch.set_num_threads(1)
    Attention.forward = attend
    torch.accelerator.empty_cache = lambda: None  # which asks for a GPU even where the target is the CPU
    load_general_plugins()
    cases, out = Path(sys.argv[1]), Path(sys.argv[2])
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{out.parent / 'meeting'}", 0, "gloo")
        initialize_model_parallel(1, 1)
    logits = {}
    for case in sorted(cases.iterdir()):
        logits |= serve(case)
    if len(sys.argv) > 3:
        save_file(read_lora(Path(sys.argv[3])), out.with_name("lora.safetensors"))
    for library in ("peft", "trl", "bitsandbytes"):
        assert library not in sys.modules, library
    save_file(logits, out)


if __name__ == "__main__":
    main()
