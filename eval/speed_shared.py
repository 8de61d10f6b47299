"""What both processes of the speed benchmark need: the cases, the frozen layers and models, a step, a clock.

Imports neither this package nor the rival's: both are called `moe_peft`, so each has a process of its own.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP


EXPERTS, TOP_K, RANK = 8, 2, 16
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FFN_LINEARS = ["gate_proj", "up_proj", "down_proj"]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", *FFN_LINEARS]

Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One linear layer and one batch for it.

    Attributes:
        rows, length: the batch; `rows * length` tokens.
        kind: "train" for forward and backward, "decode" for a forward pass without gradient.
    """

    kind: str
    d_in: int
    d_out: int
    rows: int
    length: int
    dtype: str
    nf4: bool = False
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def __str__(self) -> str:
        precision = "NF4" if self.nf4 else self.dtype
        return f"{self.kind} {precision} {self.d_in}→{self.d_out} T={self.tokens}"


@dataclass(frozen=True)
class FfnCase:
    """One SwiGLU block of Llama and one batch to train it with."""

    hidden: int
    inner: int
    rows: int
    length: int
    dtype: str
    nf4: bool = False
    device: str = "cpu"
    kind: ClassVar[str] = "train"

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def d_in(self) -> int:
        return self.hidden

    @property
    def d_out(self) -> int:
        return self.hidden

    def __str__(self) -> str:
        precision = "NF4" if self.nf4 else self.dtype
        return f"ffn {precision} {self.hidden}/{self.inner} T={self.tokens}"


@dataclass(frozen=True)
class RankCase:
    """One square linear layer whose LoRA has 64 ranks, and one batch for it; `kind` as in [`Case`]."""

    kind: str
    width: int
    rows: int
    length: int
    dtype: str
    device: str = "cpu"
    nf4: ClassVar[bool] = False

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def d_in(self) -> int:
        return self.width

    @property
    def d_out(self) -> int:
        return self.width

    def __str__(self) -> str:
        return f"ranks {self.kind} {self.dtype} {self.width}→{self.width} T={self.tokens}"


@dataclass(frozen=True)
class ModelCase:
    """A tiny Llama and a batch for it."""

    dtype: str
    layers: int = 8
    width: int = 512
    inner: int = 1408
    vocabulary: int = 4096
    rows: int = 4
    length: int = 256
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def __str__(self) -> str:
        return f"model {self.dtype} {self.layers} layers d={self.width} T={self.tokens}"


def case_of(settings: dict[str, Any]) -> Case | FfnCase | ModelCase | RankCase:
    """The case whose fields these are, as they came from another process."""
    kinds = (Case, FfnCase, ModelCase, RankCase)
    return next(kind for kind in kinds if settings.keys() == {field.name for field in fields(kind)})(**settings)


def make_base(case: Case | RankCase, seed: int = 0) -> nn.Module:
    """The frozen layer, the same in every process."""
    torch.manual_seed(seed)
    dtype = DTYPES[case.dtype]
    base = nn.Linear(case.d_in, case.d_out, bias=False, dtype=dtype)
    if not case.nf4:
        return base.requires_grad_(False).to(case.device)
    from bitsandbytes.nn import Linear4bit

    packed = Linear4bit(case.d_in, case.d_out, bias=False, compute_dtype=dtype, quant_type="nf4")
    packed.load_state_dict(base.state_dict())
    packed.support_avx512bf16_for_cpu = False  # its repacked weight cannot be trained through
    return packed.requires_grad_(False).to(case.device)


@lru_cache(maxsize=1)  # the contenders share them; those of the last case go when the next one comes
def make_ffn_linears(case: FfnCase) -> dict[str, nn.Module]:
    """The frozen linears of the block, the same in every process."""
    shapes = [(case.hidden, case.inner)] * 2 + [(case.inner, case.hidden)]
    return {
        name: make_base(Case("train", *shape, case.rows, case.length, case.dtype, case.nf4, case.device), seed)
        for seed, (name, shape) in enumerate(zip(FFN_LINEARS, shapes, strict=True))
    }


def make_mlp(case: FfnCase) -> LlamaMLP:
    """The frozen block, a new one around the same linears each time."""
    with torch.device("meta"):
        mlp = LlamaMLP(LlamaConfig(hidden_size=case.hidden, intermediate_size=case.inner))
    for name, linear in make_ffn_linears(case).items():
        setattr(mlp, name, linear)
    return mlp


def make_experts(case: FfnCase) -> dict[str, Tensor]:
    """What all mixtures of the block start from: `A [E, r, d_in]` and `B [E, r, d_out]` by linear, `router [E, d]`.

    Equal weights send the same tokens to the same experts, in every contender.
    """
    torch.manual_seed(2)
    widths = dict.fromkeys(FFN_LINEARS, (case.hidden, case.inner))
    widths["down_proj"] = (case.inner, case.hidden)
    weights = {"router": 0.02 * torch.randn(EXPERTS, case.hidden)}
    for name, (d_in, d_out) in widths.items():
        weights[f"{name}.A"] = torch.randn(EXPERTS, RANK, d_in) / d_in**0.5
        weights[f"{name}.B"] = 0.02 * torch.randn(EXPERTS, RANK, d_out)
    return {name: weight.to(case.device, DTYPES[case.dtype]) for name, weight in weights.items()}


def outcome(case: FfnCase, block: Callable[[Tensor], Tensor], gradients: Callable[[], dict]) -> dict[str, Tensor]:
    """What a training step yields: y, the gradient of x, those of the experts under `make_experts`' names."""
    x, cotangent = make_inputs(case)
    y = block(x.requires_grad_())
    y.backward(cotangent)
    return {"y": y.detach(), "x": x.grad, **gradients()}


def make_inputs(case: Case | FfnCase | RankCase) -> tuple[Tensor, Tensor]:
    """x and a cotangent of y."""
    torch.manual_seed(1)
    options = {"dtype": DTYPES[case.dtype], "device": case.device}
    x = torch.randn(case.rows, case.length, case.d_in, **options)
    return x, 0.1 * torch.randn(case.rows, case.length, case.d_out, **options)


def layer_step(
    case: Case | FfnCase | RankCase, layer: Callable[[Tensor], Tensor], parameters: list[nn.Parameter]
) -> Step:
    """One training step of the layer or block (no optimiser), or one decoding step."""
    x, cotangent = make_inputs(case)

    def train() -> None:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        layer(x).backward(cotangent)

    @torch.no_grad()
    def decode() -> None:
        layer(x)

    if case.kind == "decode":
        return decode
    x.requires_grad_()
    return train


def make_llama(case: ModelCase) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=case.width,
        intermediate_size=case.inner,
        num_hidden_layers=case.layers,
        num_attention_heads=case.width // 64,
        num_key_value_heads=case.width // 64,
        vocab_size=case.vocabulary,
        max_position_embeddings=2 * case.length,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(case.device, DTYPES[case.dtype])


def model_step(case: ModelCase, model: nn.Module, parameters: list[nn.Parameter]) -> Step:
    """Forward, backward and AdamW."""
    torch.manual_seed(1)
    ids = torch.randint(0, case.vocabulary, (case.rows, case.length), device=case.device)
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    model.train()

    def train() -> None:
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()

    return train


def seconds(step: Step, device: str, repeats: int = 1) -> float:
    """Process CPU time of one step on the CPU (others' load does not count), wall time up to the end on a GPU."""
    if device == "cpu":
        start = time.process_time()
        for _ in range(repeats):
            step()
        return (time.process_time() - start) / repeats
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def repeats_of(case: Case | FfnCase | ModelCase | RankCase) -> int:
    """Steps within one measurement: short ones are repeated, as the clock itself costs microseconds."""
    if isinstance(case, ModelCase):
        return 1
    return 50 if case.kind == "decode" and case.d_in * case.d_out < 4_000_000 else 10 if case.kind == "decode" else 1
