"""Routed adapters and plain LoRAs through vLLM's own Python code, on the CPU, in an environment that has no PEFT.

The environment takes a few minutes and 3 GB: vLLM's wheel without what it depends on, torch for CPUs, and the small
packages that vLLM imports. `$MOE_PEFT_VLLM_ENV` names a folder to find it in, or to make it in once:

    MOE_PEFT_VLLM_ENV=~/.cache/moe_peft_vllm pytest -m slow tests/test_serving_vllm.py

What is not vLLM's here is said in `vllm_on_cpu.py`. Nothing of this has run on a GPU, with tensor parallelism, with CUDA
graphs or through vLLM's compiler.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from serving_cases import CASES, save_case
from test_portable_lora import exact_lora

from moe_peft.plain_lora import lora_factors


pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
ROOT = Path(__file__).parents[1]
VLLM = "vllm==0.33.0"
WITHOUT_DEPENDENCIES = (
    *(VLLM, "compressed-tensors==0.17.0", "depyf==0.20.0", "astor", "dill", "loguru", "lm-format-enforcer==0.11.3"),
    *("outlines_core==0.2.14", "xgrammar==0.2.8", "apache-tvm-ffi==0.1.11", "llguidance<1.8", "anthropic"),
    "model-hosting-container-standards<1",
)
SMALL = (
    *("transformers==5.20.*", "regex", "cachetools", "psutil", "sentencepiece", "numpy", "requests", "tqdm", "blake3"),
    *(
        "py-cpuinfo",
        "protobuf",
        "pydantic",
        "orjson",
        "prometheus_client",
        "pillow",
        "cloudpickle",
        "msgspec",
        "pyzmq",
    ),
    *(
        "filelock",
        "einops",
        "pyyaml",
        "typing_extensions",
        "cbor2",
        "python-json-logger",
        "pybase64",
        "mistral_common",
    ),
    *("partial-json-parser", "jsonschema", "lark", "aiohttp", "fastapi<0.137", "openai", "ijson", "setproctitle"),
    *("ninja", "watchfiles", "tiktoken", "oss-harmony", "mcp>=2.2,<3", "prometheus-fastapi-instrumentator"),
    *("opentelemetry-api", "opentelemetry-sdk"),
)


def _run(*command: object, **options) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=1500, **options)
    if done.returncode:
        raise RuntimeError("\n".join((done.stdout + done.stderr).strip().splitlines()[-12:]))


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory) -> Path:
    """Python of the environment with vLLM."""
    given = os.environ.get("MOE_PEFT_VLLM_ENV")
    place = Path(given).expanduser() if given else tmp_path_factory.mktemp("vllm_env")
    python = place / "bin/python"
    if (place / "whole").is_file():
        return python
    if "+cpu" not in torch.__version__:
        pytest.skip(f"torch {torch.__version__} is no build for CPUs: a second one would be gigabytes of CUDA.")
    try:
        _run(sys.executable, "-m", "venv", place)
        pip = (python, "-m", "pip", "--disable-pip-version-check", "install")
        _run(*pip, f"torch=={torch.__version__}")
        _run(*pip, *SMALL)
        _run(*pip, "--no-deps", *WITHOUT_DEPENDENCIES)
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"{VLLM} and what it imports cannot be had from the package index: {error}")
    (place / "whole").touch()
    return python


@pytest.fixture(scope="module")
def served(interpreter, tmp_path_factory):
    """(logits of PEFT, those of vLLM, the plain LoRA's factors, what vLLM made of it)."""
    folder = tmp_path_factory.mktemp("served")
    want = {name: save_case(name, folder / "cases" / name, torch.float32) for name in CASES}
    plain = lora_factors(exact_lora(folder / "lora"))
    info = folder / "site/peft_moe-0.dist-info"  # vLLM finds the plugin as it does when the package is installed
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: peft-moe\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nmoe_peft = moe_peft_vllm:register\n")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder / 'site'}", "OMP_NUM_THREADS": "1"}
    script = ROOT / "tests/vllm_on_cpu.py"
    _run(interpreter, script, folder / "cases", folder / "out.safetensors", folder / "lora", env=environment)
    return want, load_file(folder / "out.safetensors"), plain, load_file(folder / "lora.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_vllm_answers_as_the_adapter_does(served, name):
    want, got, *_ = served
    torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=2e-6)
    assert (got[f"{name}.dead"] - want[name]).abs().max() > 1e-4  # a dead expert shows


def test_vllm_reads_a_plain_lora_as_what_it_is(served):
    *_, plain, read = served
    assert read.keys() == plain.keys()
    for name, factors in plain.items():
        torch.testing.assert_close(read[name], factors.B @ factors.A, rtol=1e-5, atol=1e-6)


def test_the_environment_has_no_peft(interpreter):
    code = "import importlib.util, json; print(json.dumps([importlib.util.find_spec(n) is None for n in ('peft', 'trl', 'bitsandbytes')]))"
    done = subprocess.run([str(interpreter), "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [True] * 3
