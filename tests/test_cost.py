"""What a routed layer costs, in numbers without noise: host synchronisations, kernels, saved bytes, base calls.

Seconds are measured in `eval/bench_speed.py`; these are the gates that a slow machine cannot fail by chance. Everything
is counted for one adapted linear with 8 experts of rank 16, of which a token visits 2, beside PEFT's LoRA of rank 32:
as many active ranks.
"""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe_peft.attach import RoutingContext
from moe_peft.config import LinearMoeConfig
from moe_peft.tuners.linear_moe import LinearMoeLinear


EXPERTS, TOP_K, RANK = 8, 2, 16

NO_KERNEL = {torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_like, torch.ops.aten._unsafe_view}

TOP_2 = {"top_k": TOP_K, "router_aux_loss_coef": 0.0}
BALANCED = {"top_k": TOP_K, "router_aux_loss_coef": 0.001}
DENSE = {"routing": "softmax"}


class Kernels(TorchDispatchMode):
    """Counts the operators that compute, and refuses those whose result the host must wait for.

    Each call that reaches the dispatcher counts as one kernel, except a view (the operator's schema says so) and a mere
    allocation. Sums into `.grad` of a leaf do not occur, as every count starts without gradients. An operator waits
    where its tags say that its value or its shape depends on data: `item`, `nonzero`, `is_nonzero`, `equal`, `unique`.

    `wide` counts those kernels whose result is at least that many elements, where a limit is given.
    """

    def __init__(self, limit: int = 0) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.limit, self.wide = limit, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        assert not waits, f"{func} makes the host wait for the device"
        if not func.is_view and func.overloadpacket not in NO_KERNEL:
            self.counts[str(func.overloadpacket)] += 1
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket not in NO_KERNEL and isinstance(result, Tensor):
            self.wide += result.numel() >= self.limit
        return result

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def make_base(d_in: int, d_out: int, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(d_in, d_out, bias=False, dtype=dtype).requires_grad_(False)


def make_lora(d_in: int, d_out: int, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    r = TOP_K * RANK
    layer = LoraLinear(make_base(d_in, d_out, dtype), "default", config=LoraConfig(r=r), r=r, lora_alpha=16)
    return layer.to(dtype).train()


def make_routed(d_in: int, d_out: int, dtype: torch.dtype = torch.bfloat16, **settings) -> LinearMoeLinear:
    layer = LinearMoeLinear(make_base(d_in, d_out, dtype), RoutingContext(), {})
    layer._active_adapter = "default"
    config = LinearMoeConfig(num_experts=EXPERTS, r=RANK, init_weights=False, **settings)
    layer.update_layer("default", config, EXPERTS, RANK)
    return layer.to(dtype).train()


def count_kernels(layer: nn.Module, d_in: int) -> tuple[Kernels, Kernels]:
    """Of the forward and of the backward pass of one step, in the second step: some state is made in the first."""
    for _ in range(2):
        layer.zero_grad()
        x = torch.randn(2, 6, d_in, dtype=torch.bfloat16, requires_grad=True)
        with Kernels() as forward:
            y = layer(x)
        cotangent = torch.randn_like(y)
        with Kernels() as backward:
            y.backward(cotangent)
    return forward, backward


def saved_bytes_per_token(layer: nn.Module, d_in: int, tokens: int = 64) -> float:
    """Bytes that the forward pass keeps for the backward pass: each storage once, the parameters' left out."""
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(1, tokens, d_in, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights) / tokens


@pytest.mark.parametrize("settings", [TOP_2, BALANCED, DENSE, {**TOP_2, "lora_dropout": 0.1}])
def test_no_pass_makes_the_host_wait(settings):
    count_kernels(make_routed(32, 48, **settings), 32)


def test_the_count_refuses_what_makes_the_host_wait():
    for wait in (Tensor.item, torch.nonzero, bool, torch.unique):
        with pytest.raises(AssertionError, match="makes the host wait"), Kernels():
            wait(torch.ones(1))


def test_a_training_step_takes_at_most_13_kernels_forward_and_30_in_all():
    forward, backward = count_kernels(make_routed(32, 48, **TOP_2), 32)
    lora = count_kernels(make_lora(32, 48), 32)
    print(f"\nPEFT LoRA: {lora[0].total} forward, {lora[0].total + lora[1].total} in all")
    print(f"routed: {forward.total} forward {dict(forward.counts)}, {backward.total} backward {dict(backward.counts)}")
    assert forward.total <= 13
    assert forward.total + backward.total <= 30


def test_few_kernels_are_as_wide_as_the_layer():
    """Forward the frozen layer and the sum, backward two gradients of x and their sum; all else is in rank space."""
    tokens, width = 256, 256
    wide = {}
    for name, layer in (("routed", make_routed(width, width, **TOP_2)), ("LoRA", make_lora(width, width))):
        x = torch.randn(1, tokens, width, dtype=torch.bfloat16, requires_grad=True)
        with Kernels(limit=tokens * width) as forward:
            y = layer(x)
        cotangent = torch.randn_like(y)
        with Kernels(limit=tokens * width) as backward:
            y.backward(cotangent)
        wide[name] = (forward.wide, backward.wide)
    print(f"\nwide kernels, forward and backward: {wide}")
    assert wide["routed"][0] <= 2
    assert wide["routed"][1] <= 3


def test_balancing_takes_at_most_24_kernels_and_all_in_backward():
    plain = count_kernels(make_routed(32, 48, **TOP_2), 32)
    forward, backward = count_kernels(make_routed(32, 48, **BALANCED), 32)
    print(
        f"\nbalance: {forward.total} forward, {backward.total} backward, {backward.total - plain[1].total} of its own"
    )
    print(dict(backward.counts - plain[1].counts))
    assert forward.total == plain[0].total
    assert backward.total <= plain[1].total + 24


def test_every_routing_costs_no_more_than_choosing_two():
    top_2, dense = (sum(c.total for c in count_kernels(make_routed(32, 48, **s), 32)) for s in (TOP_2, DENSE))
    assert dense <= top_2


def test_decoding_takes_no_more_kernels_than_the_forward_pass_of_training():
    layer = make_routed(32, 48, **TOP_2)
    training = count_kernels(layer, 32)[0].total
    x = torch.randn(1, 1, 32, dtype=torch.bfloat16)
    with torch.no_grad(), Kernels() as decoding:
        layer.eval()(x)
    print(f"\ndecoding: {decoding.total} {dict(decoding.counts)}")
    assert decoding.total <= training


@pytest.mark.parametrize("settings", [TOP_2, BALANCED, DENSE], ids=["top_2", "balanced", "dense"])
def test_what_is_kept_for_backward_is_within_five_percent_of_lora(settings):
    def measure(width: int) -> tuple[float, float]:
        routed = saved_bytes_per_token(make_routed(width, width, **settings), width)
        return routed, saved_bytes_per_token(make_lora(width, width), width)

    narrow, wide = measure(1024), measure(4096)
    for width, (ours, lora) in ((1024, narrow), (4096, wide)):
        print(f"\nwidth {width}: {ours:.0f} bytes per token, PEFT LoRA {lora:.0f}, ratio {ours / lora:.3f}")
    assert wide[0] <= 1.05 * wide[1]


def test_dropout_keeps_one_input_and_one_mask():
    """PEFT's LoRA keeps the masked input and the mask; a second copy of x would show here."""
    width = 1024
    settings = {**TOP_2, "lora_dropout": 0.1}
    extra = saved_bytes_per_token(make_routed(width, width, **settings), width) - saved_bytes_per_token(
        make_routed(width, width, **TOP_2), width
    )
    assert extra <= 1.01 * width  # a mask of one byte per value


def test_an_input_in_half_precision_is_kept_as_it_is_for_an_adapter_in_fp32():
    layer = make_routed(1024, 1024, **TOP_2)
    half = saved_bytes_per_token(layer, 1024)
    layer.linear_moe_experts.float()
    assert saved_bytes_per_token(layer, 1024) - half < 1024


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_the_frozen_layer_is_called_once_in_a_pass(mode: Callable):
    layer = make_routed(32, 48, **TOP_2)
    calls: list[None] = []
    layer.base_layer.register_forward_hook(lambda *_: calls.append(None))
    with mode():
        layer(torch.randn(2, 6, 32, dtype=torch.bfloat16))
    assert len(calls) == 1
