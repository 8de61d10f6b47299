"""One routed layer as a trainer uses it: any shape and dtype, autocast, decoding, checkpoints, `torch.compile`, a GPU."""

import copy
import shutil

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from moe_peft.attach import RoutingContext
from moe_peft.config import LinearMoeConfig
from moe_peft.experts import lora_experts_naive
from moe_peft.tuners.linear_moe import LinearMoeLinear


D_IN, D_OUT = 20, 12

NEEDS_A_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


def assert_equal_up_to(tolerance: float, got: list[Tensor], wanted: list[Tensor]) -> None:
    """Every difference is at most `tolerance` times the largest wanted value of that tensor (or 1, if that is less)."""
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)


def make_layer(
    dtype: torch.dtype = torch.float32, base_dtype: torch.dtype | None = None, **settings
) -> LinearMoeLinear:
    torch.manual_seed(0)
    base = nn.Linear(D_IN, D_OUT, dtype=base_dtype or dtype).requires_grad_(False)
    layer = LinearMoeLinear(base, RoutingContext(), {})
    layer._active_adapter = "default"
    settings = {"num_experts": 4, "r": 3, "router_aux_loss_coef": 0.0, "init_weights": False, **settings}
    config = LinearMoeConfig(**settings)
    layer.update_layer("default", config, config.num_experts, config.r)
    layer.linear_moe_experts.to(dtype)
    return layer


def layer_by_definition(layer: LinearMoeLinear, x: Tensor) -> Tensor:
    experts = layer.linear_moe_experts["default"]
    flat = x.reshape(-1, D_IN)
    routing = experts.rule(flat @ experts.router.T * experts.router_scale, experts.top_k)
    delta = lora_experts_naive(flat, experts.lora_A, experts.lora_B, routing)
    return layer.base_layer(x) + experts.scaling * delta.view(*x.shape[:-1], D_OUT)


@pytest.mark.parametrize("shape", [(D_IN,), (5, D_IN), (2, 5, D_IN), (2, 3, 5, D_IN)])
def test_a_layer_takes_whatever_shape_its_linear_takes(shape):
    layer = make_layer(torch.float64).train()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out, wanted = layer(x), layer_by_definition(layer, x)
    cotangent = torch.randn_like(out)
    leaves = [x, *layer.linear_moe_experts["default"].parameters()]
    assert_equal_up_to(
        1e-12,
        [out, *torch.autograd.grad(out, leaves, cotangent)],
        [wanted, *torch.autograd.grad(wanted, leaves, cotangent)],
    )


@pytest.mark.parametrize(
    "settings", [{}, {"routing": "softmax"}, {"lora_dropout": 0.1}], ids=["top_2", "dense", "drop"]
)
def test_autocast_computes_in_bf16_and_keeps_gradients_in_fp32(settings):
    layer = make_layer(**settings).train()
    x = torch.randn(2, 5, D_IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    for tensor in (x, *layer.linear_moe_experts["default"].parameters()):
        assert tensor.grad.dtype == torch.float32
        assert tensor.grad.isfinite().all()
        assert tensor.grad.any()


def test_an_adapter_in_fp32_on_a_layer_in_bf16_rounds_once_at_the_end():
    """PEFT keeps adapters in fp32 by default, so this is what a bf16 model without autocast does."""
    layer = make_layer(torch.float32, base_dtype=torch.bfloat16).train()
    x = torch.randn(2, 5, D_IN, dtype=torch.bfloat16, requires_grad=True)
    experts = layer.linear_moe_experts["default"]
    out = layer(x)
    flat = x.detach().float().view(-1, D_IN)
    routing = experts.rule(flat @ experts.router.T, experts.top_k)
    delta = experts.scaling * lora_experts_naive(flat, experts.lora_A, experts.lora_B, routing)
    wanted = (layer.base_layer(x.detach()).float().view(-1, D_OUT) + delta).to(torch.bfloat16)
    one_rounding = torch.finfo(torch.bfloat16).eps * wanted.abs().float()
    assert ((out.view(-1, D_OUT).float() - wanted.float()).abs() <= one_rounding).all()
    out.float().square().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in experts.parameters())


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize(
    "settings", [{}, {"num_shared_experts": 2}, {"router_scale": 3.0}, {"routing": "softmax"}], ids=str
)
def test_decoding_gives_what_training_gives(tokens, settings):
    layer = make_layer(torch.float64, **settings).eval()
    x = torch.randn(1, tokens, D_IN, dtype=torch.float64)
    with_gradient = layer(x)
    with torch.no_grad():
        assert_equal_up_to(1e-14, [layer(x)], [with_gradient])
    with torch.inference_mode():
        assert_equal_up_to(1e-14, [layer(x)], [with_gradient])


def step_down(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=1.0).step()


def set_twice(weight: nn.Parameter) -> None:
    """New storage, and then storage that may lie where the first one lay."""
    for _ in range(2):
        weight.data = weight.data * 2


@pytest.mark.parametrize("change", [lambda weight: weight.data.mul_(2), set_twice, step_down])
@pytest.mark.parametrize("name", ["lora_A", "lora_B", "router"])
def test_a_changed_weight_is_seen_by_the_next_decoding_step(name, change):
    """However it was changed: `weight.data.mul_` for one does not touch the version counter."""
    layer = make_layer(torch.float64).eval()
    x = torch.randn(1, 1, D_IN, dtype=torch.float64)
    with torch.no_grad():
        layer(x)
        change(getattr(layer.linear_moe_experts["default"], name))
        assert_equal_up_to(1e-12, [layer(x)], [layer_by_definition(layer, x)])


def test_the_first_pass_of_a_reentrant_checkpoint_rounds_as_the_second_does():
    """A last bit that differs could send a token to another expert in the pass that takes the gradients."""
    layer = make_layer().train()
    for tokens in (1, 2, 3, 10, 100):  # few tokens are decoded in another order of summation
        x = torch.randn(3, tokens, D_IN, requires_grad=True)
        with torch.no_grad():
            first = layer(x)
        assert torch.equal(first, layer(x))


def test_dropout_plays_no_part_outside_training():
    layer = make_layer(torch.float64, lora_dropout=0.5).eval()
    x = torch.randn(2, 5, D_IN, dtype=torch.float64, requires_grad=True)
    assert_equal_up_to(1e-12, [layer(x)], [layer_by_definition(layer, x)])


@pytest.mark.parametrize(
    ("dtype", "autocast", "wanted"),
    [
        (torch.bfloat16, False, torch.float32),
        (torch.float32, True, torch.float32),
        (torch.float64, False, torch.float64),
    ],
)
def test_routing_is_computed_in_at_least_fp32(dtype, autocast, wanted):
    layer = make_layer(dtype).train()
    experts, seen = layer.linear_moe_experts["default"], []
    rule = experts.rule

    def watched(logits: Tensor, top_k: int):
        seen.append(logits.dtype)
        return rule(logits, top_k)

    experts.rule = watched
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer(torch.randn(2, 5, D_IN, dtype=dtype))
    assert seen == [wanted]


def compiled_and_eager(backend: str, dtype: torch.dtype = torch.float32, **settings) -> int:
    """Compare a training step at several lengths; returns how many graphs were built."""
    torch._dynamo.reset()
    layer = make_layer(dtype, **settings).train()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    parameters = list(layer.linear_moe_experts["default"].parameters())
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    for length in (16, 24, 7, 33):
        x = torch.randn(2, length, D_IN, dtype=dtype, requires_grad=True)
        cotangent = torch.randn(2, length, D_OUT, dtype=dtype)
        outs = compiled(x), layer(x)
        both = [[out, *torch.autograd.grad(out, [x, *parameters], cotangent)] for out in outs]
        assert_equal_up_to(tolerance, *both)
    return counter.frame_count


@pytest.mark.parametrize(
    "settings", [{}, {"routing": "softmax"}, {"routing": "top_1"}], ids=["top_2", "dense", "top_1"]
)
def test_a_training_step_compiles_to_one_graph_for_all_lengths(settings):
    """At most two: one for the first length, one for every other."""
    assert compiled_and_eager("aot_eager", **settings) <= 2


LOCALIZED = {"routing": "softmax", "balance": "localized", "balance_delta": 0.3}


@pytest.mark.parametrize(
    ("backend", "settings"),
    [
        ("aot_eager", {}),
        ("aot_eager", {"balance": "none"}),
        ("aot_eager", LOCALIZED),
        ("aot_eager", {**LOCALIZED, "routing": "softmax_top_k"}),
        pytest.param("inductor", {}, marks=NEEDS_A_COMPILER),
    ],
    ids=["switch", "watched", "localized", "localized_top_2", "inductor"],
)
def test_balancing_compiles_to_one_graph_and_counts_alike(backend, settings):
    """The same gradients, counts and loads as without the compiler; a new scale builds no new graph."""
    torch._dynamo.reset()
    eager = make_layer(
        torch.float64, router_aux_loss_coef=0.0 if settings.get("balance") == "none" else 0.5, **settings
    ).train()
    eager.context.watching = True
    layer = copy.deepcopy(eager)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for length, scale in ((16, 1.0), (24, 1.0), (7, 0.25), (33, 0.25)):
        x, cotangent = (torch.randn(2, length, width, dtype=torch.float64) for width in (D_IN, D_OUT))
        real, task_types = torch.rand(2, length) < 0.7, torch.tensor([0, 1])
        for one, run in ((eager, eager), (layer, compiled)):
            one.zero_grad()
            one.context.real, one.context.task_types, one.context.scale = real, task_types, scale
            run(x).backward(cotangent)
        states = [one.linear_moe_experts["default"].state for one in (layer, eager)]
        seen = [
            [s.counts, s.probability, s.entropy, s.tokens] + ([s.load] if "balance" not in settings else [])
            for s in states
        ]
        grads = [[p.grad for p in one.linear_moe_experts.parameters()] for one in (layer, eager)]
        assert_equal_up_to(1e-12, grads[0] + seen[0], grads[1] + seen[1])
        assert int(states[0].tokens) > 0
    assert counter.frame_count <= 2  # one for the first length, one for every other


def test_a_training_step_with_dropout_compiles_without_a_break():
    torch._dynamo.reset()
    layer = make_layer(lora_dropout=0.2).train()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(torch.randn(2, 6, D_IN)).sum().backward()
    assert layer.linear_moe_experts["default"].lora_A.grad.any()


@NEEDS_A_COMPILER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_agrees_with_eager(dtype):
    assert compiled_and_eager("inductor", dtype) <= 2


def test_decoding_compiles_without_a_break():
    torch._dynamo.reset()
    layer = make_layer().eval()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(1, 1, D_IN)
    with torch.no_grad():
        assert_equal_up_to(1e-5, [compiled(x)], [layer(x)])


ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class TestOnGpu:
    pytestmark = ON_GPU

    @pytest.mark.parametrize("settings", [{}, {"routing": "softmax"}, {"lora_dropout": 0.1}])
    def test_no_pass_waits_for_the_device(self, settings):
        layer = make_layer(torch.bfloat16, **settings).cuda().train()
        x = torch.randn(2, 64, D_IN, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        layer(x).sum().backward()  # what is made once is made here
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_training_step_can_be_captured_in_a_cuda_graph(self):
        layer = make_layer().cuda().train()
        leaves = list(layer.linear_moe_experts["default"].parameters())
        x = torch.randn(2, 64, D_IN, device="cuda", requires_grad=True)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                torch.autograd.grad(layer(x).square().sum(), [x, *leaves])
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = torch.autograd.grad(layer(x).square().sum(), [x, *leaves])
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        assert_equal_up_to(1e-5, list(captured), list(torch.autograd.grad(layer(x).square().sum(), [x, *leaves])))
