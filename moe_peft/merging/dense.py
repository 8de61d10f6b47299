"""Static factors added to the base's weights: a whole checkpoint, and how much of the change its dtype keeps.

Never into a packed grid: NF4 of (NF4 weight + change) is mostly the NF4 weight again (export.md B.3). The result is
written in 16 or 32 bits, from the base's original weights or from those that a 4-bit backbone computed with.
"""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from moe_peft.budget import meta_backbone
from moe_peft.errors import nearest, refuse
from moe_peft.export.checkpoint import Checkpoint, local_folder, torch_dtype
from moe_peft.export.plan import BASE_WEIGHTS, frozen_weights
from moe_peft.export.stock_moe import carry
from moe_peft.export.weights import nf4
from moe_peft.export.writer import PlannedTensor, check_space, write_checkpoint
from moe_peft.merge import Factors


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOST_TOO_MUCH = 0.25
"""Relative error of the change beyond which another dtype is advised."""


class Recovered(NamedTuple):
    """What rounding to a dtype leaves of the change, over all merged weights.

    Attributes:
        size: |change| / |weight|, Frobenius.
        share: how much of the change is in the result: <result - weight, change> / |change|^2, 1 is all.
        error: |result - weight - change| / |change|.
    """

    size: float
    share: float
    error: float


class DensePlan:
    """A dense merge that can be written: the base's files, the factors, and what the weights are.

    Attributes:
        base_weights, why: "original" or "dequantized", and the reason as a sentence.
        dtype: of the result.
        nbytes: it will have.
    """

    def __init__(self, base: str, adapter: str, base_weights: str = "auto", dtype: str = "auto") -> None:
        """Look at the base, and write nothing.

        Raises:
            ValueError: an unknown dtype or kind of weights, a base without safetensors or one that is stored quantised.
        """
        if base_weights not in BASE_WEIGHTS:
            allowed = "'original', 'dequantized' or 'auto'"
            raise refuse("base_weights", base_weights, allowed, nearest(base_weights, BASE_WEIGHTS))
        if dtype not in ("auto", *DTYPES):
            raise refuse("dtype", dtype, "'auto', 'float32', 'bfloat16' or 'float16'", nearest(dtype, DTYPES))
        self.folder, self.adapter = local_folder(base), local_folder(adapter)
        self.checkpoint = Checkpoint(self.folder)
        stored_packed = [name for name, kind in self.checkpoint.dtypes.items() if kind in ("U8", "I8")]
        if stored_packed:
            raise ValueError(
                f"'{base}' is stored quantised ('{stored_packed[0]}' in {self.checkpoint.dtypes[stored_packed[0]]}), and a change is never "
                "added to a packed weight: rounding would take most of it away. Give the base in 16 or 32 bits with "
                "`--model`; for an adapter that was trained on 4 bits add `--base-weights dequantized`."
            )
        self.base_weights, self.why = frozen_weights(self.adapter, base_weights)
        self.transposed, packed = _layouts(self.folder)
        self.packed = packed if self.base_weights == "dequantized" else set()
        wide = [torch_dtype(kind) for kind in self.checkpoint.dtypes.values()]
        stored = max(wide, key=wide.count)
        self.dtype = stored if dtype == "auto" else DTYPES[dtype]
        self.nbytes = sum(torch.Size(shape).numel() for shape in self.checkpoint.shapes.values()) * self.dtype.itemsize

    def write(self, factors: dict[str, Factors], folder: Path, max_shard_size: int | str = "4GB") -> Recovered:
        """The checkpoint with its config and tokenizer, into an empty folder.

        Raises:
            ValueError: if the base lacks a weight that the factors change, or the disk is too small.
        """
        missing = [name for name in factors if f"{name}.weight" not in self.checkpoint]
        if missing:
            raise ValueError(
                f"'{self.folder}' has no weight '{missing[0]}.weight', which the adapter changes. Give the base model that "
                "it was trained on."
            )
        check_space(folder, self.nbytes)
        sums = torch.zeros(4, dtype=torch.float64)
        write_checkpoint(list(self._planned(factors, sums)), folder, max_shard_size)
        shutil.copyfile(self.folder / "config.json", folder / "config.json")
        carry(self.adapter, self.folder, folder)
        weight, change, along, off = sums.tolist()
        change = max(change, 1e-30)
        return Recovered((change / max(weight, 1e-30)) ** 0.5, along / change, (off / change) ** 0.5)

    def _planned(self, factors: dict[str, Factors], sums: Tensor) -> Iterator[PlannedTensor]:
        for name, shape in self.checkpoint.shapes.items():
            stored = torch_dtype(self.checkpoint.dtypes[name])
            dtype = self.dtype if stored.is_floating_point else stored
            module = name.removesuffix(".weight")
            make: Any = partial(self._frozen, name)
            if module in factors and name.endswith(".weight"):
                make = partial(self._merged, name, factors[module], sums)
            yield PlannedTensor(name, shape, dtype, (make,))

    def _frozen(self, name: str) -> Tensor:
        """A weight as the backbone computed with it, those of linears without an adapter included."""
        weight = self.checkpoint.read(name)
        if self.base_weights == "original" or name not in self.packed:
            return weight
        return nf4(weight.T).T if name in self.transposed else nf4(weight)

    def _merged(self, name: str, f: Factors, sums: Tensor) -> Tensor:
        weight = self._frozen(name).float()
        change = f.B.cpu() @ f.A.cpu()
        if name in self.transposed:  # not told by the shapes, which agree where a linear is square
            change = change.T
        result = (weight + change).to(self.dtype)
        kept = result.float() - weight
        sums += torch.stack(
            [
                weight.double().square().sum(),
                change.double().square().sum(),
                (kept.double() * change.double()).sum(),
                (kept - change).double().square().sum(),
            ]
        )
        return result


def _layouts(folder: Path) -> tuple[set[str], set[str]]:
    """The weights stored as `[d_in, d_out]`, and those that bitsandbytes packs when the model is loaded in 4 bits."""
    model = meta_backbone(AutoConfig.from_pretrained(folder))
    head = model.get_output_embeddings()
    transposed: set[str] = set()
    packed: set[str] = set()
    for name, module in model.named_modules():
        is_conv = type(module).__name__ == "Conv1D"  # transformers', of GPT-2
        if is_conv:
            transposed.add(f"{name}.weight")
        if module is not head and (is_conv or isinstance(module, nn.Linear)):
            packed.add(f"{name}.weight")
    return transposed, packed


def advice(recovered: Recovered, dtype: torch.dtype) -> str:
    """The figures as a sentence and, where the dtype keeps too little of the change, what to do."""
    name = str(dtype).removeprefix("torch.")
    said = (
        f"The change is {recovered.size:.2%} of the weights; {name} keeps {recovered.share:.1%} of it, with an error of "
        f"{recovered.error:.0%} of its size."
    )
    if recovered.error <= LOST_TOO_MUCH or dtype == torch.float32:
        return said
    other = "`--dtype float16`, which is 8 times finer" if dtype == torch.bfloat16 else "`--dtype float32`"
    return f"{said} That is much: take {other}, or serve the plain LoRA on the base instead."
