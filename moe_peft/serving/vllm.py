"""vLLM's Transformers-backed model with routed layers in it.

    vllm serve BASE --hf-overrides '{"architectures": ["MoePeftForCausalLM"], "moe_peft": "ADAPTER_DIR"}'

The checkpoint of the base is read as it is. Layers with experts keep vLLM's own linear under `base_layer`; they are not
fused with their neighbours (q with k and v, gate with up), the others are.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.models.transformers import TransformersForCausalLM  # pyright: ignore[reportMissingImports]

from moe_peft.errors import refuse
from moe_peft.serving.adapter import Adapter, check_server
from moe_peft.serving.install import install, load


class MoePeftForCausalLM(TransformersForCausalLM):
    """A causal language model of transformers with the routed adapter that `moe_peft` in its config names."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
        folder = getattr(config, "moe_peft", None)
        if not folder:
            remedy = 'Pass --hf-overrides \'{"architectures": ["MoePeftForCausalLM"], "moe_peft": "ADAPTER_DIR"}\'.'
            raise refuse("moe_peft", folder, "the adapter's folder", remedy)
        quantization, lora = vllm_config.model_config.quantization, vllm_config.lora_config
        check_server(parallel.tensor_parallel_size, parallel.pipeline_parallel_size, quantization, lora is not None)
        self._adapter = Adapter(folder)
        # vLLM keeps compiled graphs by the model's config, which would be the same for another adapter in this folder.
        text = json.dumps(self._adapter.fingerprint(), sort_keys=True)
        config.moe_peft_fingerprint = hashlib.sha256(text.encode()).hexdigest()
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _create_model(self) -> nn.Module:
        model = super()._create_model()
        self._places = install(model, self._adapter)
        return model

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """The base's weights, under the names that its linears have below the experts, and the adapter's."""
        loaded = super().load_weights((self._below(name), weight) for name, weight in weights)
        return loaded | {f"model.{name}" for name in load(self.model, self._adapter, self._places)}

    def _below(self, name: str) -> str:
        module, _, kind = name.rpartition(".")
        return f"{module}.base_layer.{kind}" if module in self._places else name
