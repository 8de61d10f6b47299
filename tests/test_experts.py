"""The fast path against the definition: values and every gradient, in every shape and dtype a trainer brings."""

import pytest
import torch
from torch import Tensor

from moe_peft.experts import experts_decoded, experts_out, lora_experts_naive, stacked_in
from moe_peft.routing import ROUTING_RULES, Routing, dense_weights, with_shared


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


@pytest.mark.parametrize("tokens", [0, 1, 8])
@pytest.mark.parametrize(("experts", "top_k", "rule"), SIZES)
@torch.no_grad()
def test_decoding_is_the_definition(tokens, experts, top_k, rule):
    x, lora_A, lora_B, router, y = inputs = make_inputs(tokens, experts, 3)
    before = y.clone()
    gates = dense_weights(ROUTING_RULES[rule](x @ router.T, top_k))
    got = experts_decoded(y, x, lora_A, lora_B, gates, SCALE)
    assert_equal_up_to(1e-12, [got], [naive(inputs, rule, top_k)])
    assert torch.equal(y, before)


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("rule", "top_k"), [("softmax_top_k", 2), ("softmax", 8), ("top_1", 1)])
def test_the_fast_path_is_the_definition_on_a_gpu(rule, top_k):
    inputs = [t.detach().cuda().requires_grad_() for t in make_inputs(100, 8, 16)]
    got, wanted = (output_and_gradients(function, inputs, rule, top_k) for function in (fast, naive))
    assert_equal_up_to(1e-12, got, wanted)
