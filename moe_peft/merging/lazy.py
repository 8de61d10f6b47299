"""A model whose decoder layers stay on disk: each is read when its turn comes and let go after it.

For a static merge of a model that does not fit into memory. Only methods that go layer by layer can use it: what is
trained end to end (distillation, learned mixing) needs the whole model.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moe_peft.backbone import model_path
from moe_peft.export.checkpoint import Checkpoint, local_folder
from moe_peft.merging.decoder import Decoder
from moe_peft.tuners.layer import MoeTunerLayer


class LazyModel:
    """The adapter on a backbone without weights, and the weights' place on disk.

    Attributes:
        model: the adapter in memory, every frozen weight of its backbone away.
        decoder: its layers.
    """

    def __init__(self, adapter: str, base: str, device: str = "cpu", dtype: torch.dtype | None = None) -> None:
        """Read the configs and the adapter, and of the backbone its headers only.

        Args:
            base: a folder with safetensors, 'pocket', or an id on the Hub.
            dtype: of the frozen weights; None is the checkpoint's.
        """
        path = model_path(base)
        config = AutoConfig.from_pretrained(path)
        self.checkpoint, self.device = Checkpoint(local_folder(path)), device
        self.dtype = dtype or getattr(config, "dtype", None) or torch.float32
        with init_empty_weights(include_buffers=False):
            backbone = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        self.model: PeftModel = get_peft_model(backbone, PeftConfig.from_pretrained(adapter)).eval()
        self.decoder = Decoder(self.model)
        fetch_back(self.decoder, device)
        loaded = set_peft_model_state_dict(self.model, load_peft_weights(adapter, device=device))
        missing = [key for key in loaded.missing_keys if self.model.base_model.prefix in key]
        if missing or loaded.unexpected_keys:
            key = [*missing, *loaded.unexpected_keys][0]
            raise ValueError(f"'{adapter}' does not fit its own config: see `{key}`. Save the adapter again.")
        self._tied = {key: key for key in self.checkpoint.files}
        head = backbone.get_output_embeddings()
        if head is not None and "lm_head.weight" not in self.checkpoint:  # tied to the embedding, and stored once
            self._tied["lm_head.weight"] = "model.embed_tokens.weight"

    @contextmanager
    def resident(self, index: int) -> Iterator[None]:
        """One layer's frozen weights, or with -1 all others, are there within."""
        module: nn.Module = self.model.get_base_model() if index < 0 else self.decoder.blocks[index]
        prefix = "" if index < 0 else f"{self.decoder.layer_name(index)}."
        names = [n for n in frozen_names(module) if index >= 0 or not n.startswith(f"{self.decoder.name}.")]
        try:
            for name in names:
                stored = self.checkpoint.read(self._tied[prefix + name.replace(".base_layer.", ".")])
                set_module_tensor_to_device(module, name, self.device, value=stored.to(self.dtype))
            yield
        finally:
            for name in names:
                set_module_tensor_to_device(module, name, "meta")


def frozen_names(module: nn.Module) -> list[str]:
    """The parameters below `module` that are on the meta device or belong to no adapter."""
    experts = {
        id(p)
        for layer in module.modules()
        if isinstance(layer, MoeTunerLayer)
        for name in layer.adapter_layer_names
        for p in getattr(layer, name).parameters()
    }
    return [name for name, p in module.named_parameters() if id(p) not in experts]


def fetch_back(decoder: Decoder, device: str) -> None:
    """Give the adapter's own parameters memory again, which PEFT has sent after the frozen weights; values are not set."""
    for block in decoder.adapted:
        for layer in block.values():
            experts: nn.Module = layer.experts(decoder.adapter_name)
            for name, p in list(experts.named_parameters()):
                if p.is_meta:
                    empty = torch.empty(p.shape, dtype=p.dtype)
                    set_module_tensor_to_device(experts, name, device, value=empty)
            experts.to(device)
