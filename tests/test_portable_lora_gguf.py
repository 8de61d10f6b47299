"""A plain LoRA in llama.cpp: its converter and its loader take the folder, and the logits are those of the adapter.

The converter and the build are those of `test_gguf.py`, with the same `$MOE_PEFT_LLAMA_CPP`. Keys and values are in fp32:
in 16 bits they alone cost 1e-2.
"""

import json

import numpy as np
import pytest
import torch
from peft import get_peft_model
from test_export_helpers import make_base
from test_gguf import CONVERT, VOCABULARY, LlamaCpp, _work, llama_cpp, llama_tokenizer  # noqa: F401
from transformers import AutoModelForCausalLM

from moe_peft import LinearMoeConfig
from moe_peft.plain_lora import save_lora


CONVERT_LORA = """
import runpy, sys
from pathlib import Path
script, site = sys.argv[1:3]
sys.argv = [script, *sys.argv[3:]]
sys.path.insert(0, str(Path(script).parent))
sys.path.append(site)
runpy.run_path(script, run_name="__main__")
"""
ANSWER = """
import json, sys
site, model, lora, asked, out = sys.argv[1:]
sys.path.append(site)
import numpy as np
from llama_cpp import Llama
llm = Llama(model_path=model, lora_path=lora or None, n_ctx=128, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0)
ids = json.loads(open(asked).read())
llm.eval(ids)
np.save(out, llm.scores[: len(ids)])
"""


@pytest.mark.slow
@pytest.mark.timeout(2400)
@torch.no_grad()
def test_llama_cpp_adds_the_lora_with_its_own_scale(llama_cpp: LlamaCpp, tmp_path):  # noqa: F811
    base_folder = make_base(tmp_path / "base", "llama", vocab_size=VOCABULARY)
    llama_tokenizer(base_folder)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    torch.manual_seed(4)
    config = LinearMoeConfig(num_experts=1, num_shared_experts=2, r=3, use_rslora=True, init_weights=False, target_modules="all-linear")  # fmt: skip
    model = get_peft_model(base, config).eval()
    save_lora(model, tmp_path / "lora")
    _work(CONVERT, [llama_cpp.convert, llama_cpp.site, True, base_folder, "--outfile", tmp_path / "model.gguf", "--outtype", "f32"], "the converter")  # fmt: skip
    script = llama_cpp.convert.with_name("convert_lora_to_gguf.py")
    _work(CONVERT_LORA, [script, llama_cpp.site, "--base", base_folder, "--outfile", tmp_path / "lora.gguf", "--outtype", "f32", tmp_path / "lora"], "the LoRA converter")  # fmt: skip
    ids = torch.randint(3, VOCABULARY - 4, (1, 24))
    (tmp_path / "ids.json").write_text(json.dumps(ids[0].tolist()))

    def answers(lora: object) -> torch.Tensor:
        _work(ANSWER, [llama_cpp.site, tmp_path / "model.gguf", lora, tmp_path / "ids.json", tmp_path / "out.npy"], "llama.cpp")  # fmt: skip
        return torch.from_numpy(np.load(tmp_path / "out.npy"))[:, :VOCABULARY]

    want = model(ids).logits[0]
    got = answers(tmp_path / "lora.gguf")
    error = float((got - want).abs().max() / want.abs().max())
    print(f"largest difference over the largest logit: {error:.1e}")
    assert error < 1e-4
    assert float((answers("") - want).abs().max() / want.abs().max()) > 1e-2  # without the LoRA it is another function
