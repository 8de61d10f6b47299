"""The fast path against the definition: values and every gradient, in every shape and dtype a trainer brings."""

import shutil

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from moe_peft.attach import RoutingContext
from moe_peft.config import LinearMoeConfig
from moe_peft.experts import experts_out, lora_experts_naive, stacked_in
from moe_peft.routing import ROUTING_RULES, Routing, with_shared
from moe_peft.tuners.linear_moe import LinearMoeLinear


D_IN, D_OUT, SCALE = 20, 12, 1.5

SIZES = [
    pytest.param(experts, top_k, rule, id=f"{rule}-{top_k}of{experts}")
    for experts in (2, 3, 8)
    for rule, top_ks in (("softmax_top_k", range(1, experts + 1)), ("softmax", (experts,)), ("top_1", (1,)))
    for top_k in top_ks
]


def make_inputs(
    tokens: int, experts: int, r: int, dtype: torch.dtype = torch.float64, shared: int = 0
) -> list[Tensor]:
    """x `[T, d_in]`, lora_A, lora_B, router and y `[T, d_out]`, all leaves that want a gradient."""
    torch.manual_seed(tokens + 10 * experts + 100 * r)
    shapes = [
        (tokens, D_IN),
        (experts + shared, r, D_IN),
        (experts + shared, r, D_OUT),
        (experts, D_IN),
        (tokens, D_OUT),
    ]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def naive(inputs: list[Tensor], rule: str, top_k: int, shared: int = 0) -> Tensor:
    x, lora_A, lora_B, router, y = inputs
    routing = with_shared(ROUTING_RULES[rule](x @ router.T, top_k), shared)
    return y + SCALE * lora_experts_naive(x, lora_A, lora_B, routing)


def fast(inputs: list[Tensor], rule: str, top_k: int, shared: int = 0) -> Tensor:
    x, lora_A, lora_B, router, y = inputs
    hidden, logits = stacked_in(x, lora_A, router)
    routing = with_shared(ROUTING_RULES[rule](logits, top_k), shared)
    return experts_out(y, hidden, lora_B, routing.top_k_weights, routing.top_k_index, SCALE)


def output_and_gradients(function, inputs: list[Tensor], *args) -> list[Tensor]:
    out = function(inputs, *args)
    torch.manual_seed(7)
    return [out, *torch.autograd.grad(out, inputs, torch.randn_like(out))]


def assert_equal_up_to(tolerance: float, got: list[Tensor], wanted: list[Tensor]) -> None:
    """Every difference is at most `tolerance` times the largest wanted value of that tensor (or 1, if that is less)."""
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        if a.numel():
            assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("r", [1, 3, 16])
@pytest.mark.parametrize("tokens", [1, 7, 64, 100])
@pytest.mark.parametrize(("experts", "top_k", "rule"), SIZES)
def test_the_fast_path_is_the_definition_in_value_and_every_gradient(tokens, experts, top_k, rule, r):
    inputs = make_inputs(tokens, experts, r)
    assert_equal_up_to(
        1e-12, output_and_gradients(fast, inputs, rule, top_k), output_and_gradients(naive, inputs, rule, top_k)
    )


@pytest.mark.parametrize(("rule", "top_k"), [("softmax_top_k", 2), ("softmax", 3), ("top_1", 1)])
def test_shared_experts_are_visited_by_every_token_with_weight_one(rule, top_k):
    inputs = make_inputs(9, 3, 4, shared=2)
    assert_equal_up_to(
        1e-12, output_and_gradients(fast, inputs, rule, top_k, 2), output_and_gradients(naive, inputs, rule, top_k, 2)
    )


def test_an_expert_that_no_token_visits_gets_a_gradient_of_exactly_zero():
    x, lora_A, lora_B, router, y = make_inputs(16, 4, 3)
    x = x.detach().abs().requires_grad_()
    router = torch.cat((router[:3].detach().abs(), -router[3:].detach().abs())).requires_grad_()  # the last one loses
    inputs = [x, lora_A, lora_B, router, y]
    got = output_and_gradients(fast, inputs, "softmax_top_k", 2)
    assert_equal_up_to(1e-12, got, output_and_gradients(naive, inputs, "softmax_top_k", 2))
    for gradient in got[2:5]:
        assert not gradient[3].any()
        assert gradient[0].any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("rule", ["softmax_top_k", "softmax"])
def test_lower_precision_agrees_to_a_few_roundings(dtype, tolerance, rule):
    """The tolerance is a few units of the dtype's last place; the routing is given, as a near tie may turn with it."""
    inputs = make_inputs(64, 8, 16, dtype)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    routing = ROUTING_RULES[rule]((exact[0] @ exact[3].T).detach(), 2)

    def given(inputs: list[Tensor], fixed: Routing) -> Tensor:
        x, lora_A, lora_B, router, y = inputs
        hidden, logits = stacked_in(x, lora_A, router)
        weights = fixed.top_k_weights.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        return experts_out(y, hidden, lora_B, weights, fixed.top_k_index, SCALE) + 0.01 * logits.sum()

    got = output_and_gradients(given, inputs, routing)
    torch.manual_seed(7)  # the same cotangent, rounded as the low-precision run rounds it
    cotangent = torch.randn_like(got[0]).double()
    out = given(exact, routing)
    wanted = [out, *torch.autograd.grad(out, exact, cotangent)]
    assert all(t.dtype == dtype for t in got)
    assert_equal_up_to(tolerance, [t.double() for t in got], wanted)


def test_the_shape_and_the_strides_of_the_input_do_not_matter():
    flat, lora_A, lora_B, router, y = make_inputs(24, 4, 3)
    wanted = stacked_in(flat, lora_A, router)
    batched = flat.view(4, 6, D_IN)
    scattered = torch.empty(D_IN, 6, 4, dtype=torch.float64).permute(2, 1, 0).copy_(batched).detach().requires_grad_()
    assert not scattered.is_contiguous()
    cotangents = [torch.randn_like(t) for t in wanted]
    of_flat = torch.autograd.grad(wanted, flat, cotangents)[0]
    for x in (batched, scattered):
        got = stacked_in(x, lora_A, router)
        assert_equal_up_to(1e-14, list(got), list(wanted))
        gradient = torch.autograd.grad(got, x, cotangents, retain_graph=True)[0]
        assert_equal_up_to(1e-14, [gradient.reshape(24, D_IN)], [of_flat])


@pytest.mark.parametrize("rule", ["softmax_top_k", "softmax", "top_1"])
def test_a_batch_without_tokens_passes_and_gives_gradients_of_zero(rule):
    inputs = make_inputs(0, 4, 3)
    out, *gradients = output_and_gradients(fast, inputs, rule, 2)
    assert out.shape == (0, D_OUT)
    for gradient, tensor in zip(gradients, inputs, strict=True):
        assert gradient.shape == tensor.shape
        assert not gradient.any()


def test_dropout_hides_values_from_the_experts_and_none_from_the_router():
    x, lora_A, _, router, _ = make_inputs(24, 4, 3)
    torch.manual_seed(3)
    got = stacked_in(x, lora_A, router, dropout=0.4)
    torch.manual_seed(3)
    dropped = torch.native_dropout(x, 0.4, True)[0]
    wanted = (lora_A.flatten(0, 1) @ dropped.T, x @ router.T)
    assert not torch.equal(dropped, x)
    cotangents = [torch.randn_like(t) for t in wanted]
    leaves = [x, lora_A, router]
    assert_equal_up_to(
        1e-12,
        [*got, *torch.autograd.grad(got, leaves, cotangents)],
        [*wanted, *torch.autograd.grad(wanted, leaves, cotangents)],
    )


def test_a_second_derivative_is_refused_and_not_silently_wrong():
    inputs = make_inputs(5, 3, 2)
    out = fast(inputs, "softmax_top_k", 2)
    gradient = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


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
def test_decoding_gives_what_training_gives(tokens):
    layer = make_layer(torch.float64).eval()
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
    layer = make_layer(torch.bfloat16).train()
    x = torch.randn(3, 50, D_IN, dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        first = layer(x)
    assert torch.equal(first, layer(x))


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


def test_a_training_step_with_dropout_compiles_without_a_break():
    torch._dynamo.reset()
    layer = make_layer(lora_dropout=0.2).train()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(torch.randn(2, 6, D_IN)).sum().backward()
    assert layer.linear_moe_experts["default"].lora_A.grad.any()


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
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

    def test_the_fast_path_is_the_definition(self):
        inputs = [t.detach().cuda().requires_grad_() for t in make_inputs(100, 8, 16)]
        for rule, top_k in (("softmax_top_k", 2), ("softmax", 8), ("top_1", 1)):
            got, wanted = (output_and_gradients(function, inputs, rule, top_k) for function in (fast, naive))
            assert_equal_up_to(1e-12, got, wanted)

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
