"""The mixture of feed-forward blocks against its definition: values and every gradient.

Whole blocks are compared, put together around each path as a tuner would: `fast` around `mixed_hidden`, `fan` around
`fan_out` and `fan_in`, `naive` around the loop over experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from moe_peft.ffn import mixed_hidden, out_product
from moe_peft.ffn_block import ACT_BACKWARD, FfnBlock, ffn_block
from moe_peft.ffn_fan import fan_in, fan_out
from moe_peft.ffn_naive import ffn_experts_naive
from moe_peft.routing import ROUTING_RULES, Routing


D, WIDTH, SCALE = 10, 14, 1.5

KINDS = ["glu", "fused_glu", "mlp"]
RULES = [("softmax_top_k", 1), ("softmax_top_k", 2), ("softmax_top_k", 3), ("softmax", 4), ("top_1", 1)]
SCHEDULES = ["static", "sorted"]


class Case(NamedTuple):
    """One mixture of blocks. The router has a row more than there are experts for each slot without expert."""

    block: FfnBlock
    frozen: list[Tensor]  # weight, bias of each linear in, then of the linear out
    leaves: list[Tensor]  # x, router, lora_A_out, lora_B_out, then lora_A and lora_B of each linear in

    @property
    def linears(self) -> int:
        return len(self.frozen) // 2 - 1

    def factors_in(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return tuple(self.leaves[4::2]), tuple(self.leaves[5::2])

    def routing(self, rule: str, top_k: int) -> Routing:
        x, router = self.leaves[:2]
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return ROUTING_RULES[rule](x.to(wide) @ router.to(wide).T, top_k)

    def base(self) -> tuple[Tensor, ...]:
        return tuple(F.linear(self.leaves[0], *self.frozen[2 * i : 2 * i + 2]) for i in range(self.linears))

    def hidden(self) -> tuple[Tensor, ...]:
        return tuple(A.flatten(0, 1) @ self.leaves[0].T.to(A.dtype) for A in self.factors_in()[0])

    def out(self, S: Tensor, z: Tensor, weights: Tensor) -> Tensor:
        weight, bias = self.frozen[-2:]
        surplus = ((weights.sum(1, keepdim=True) - 1) * bias).to(S.dtype)
        return out_product(F.linear(S, weight, bias) + surplus, z, self.leaves[3], SCALE)


def make_case(
    tokens: int = 33,
    experts: int = 4,
    r: int = 3,
    kind: str = "glu",
    act: Callable = F.silu,
    nulls: int = 0,
    dtype: torch.dtype = torch.float64,
    width: int = WIDTH,
) -> Case:
    torch.manual_seed(tokens + 100 * experts + r)
    widths = {"glu": [width, width], "fused_glu": [2 * width], "mlp": [width]}[kind]
    frozen = [t for w in (*widths, D) for t in (torch.randn(w, width if w == D else D) / 4, torch.randn(w) / 4)]
    shapes = [(tokens, D), (experts + nulls, D), (experts, r, width), (experts, r, D)]
    shapes += [shape for w in widths for shape in ((experts, r, D), (experts, r, w))]
    leaves = [(torch.randn(s) / (1 if i < 2 else 2)).to(dtype).requires_grad_() for i, s in enumerate(shapes)]
    return Case(ffn_block(kind, act), [t.to(dtype) for t in frozen], leaves)


def naive(case: Case, rule: str, top_k: int) -> Tensor:
    x, _, A_out, B_out = case.leaves[:4]
    *linears, out = [
        lambda h, w=weight, b=bias: F.linear(h, w, b)
        for weight, bias in zip(case.frozen[::2], case.frozen[1::2], strict=True)
    ]
    routing = case.routing(rule, top_k)
    return ffn_experts_naive(x, linears, out, *case.factors_in(), A_out, B_out, routing, case.block, SCALE)


def middle(case: Case, weights: Tensor, index: Tensor | None, **options) -> tuple[Tensor, Tensor]:
    """`mixed_hidden` on what the case's linears give; `options` may replace the factors B of the linears in."""
    base, lora_B = case.base(), options.pop("lora_B", case.factors_in()[1])
    options = {"normalised": True, **options}
    return mixed_hidden(base, case.hidden(), lora_B, case.leaves[2], weights, index, case.block, SCALE, **options)


def fast(case: Case, rule: str, top_k: int, **options) -> Tensor:
    _, weights, index = case.routing(rule, top_k)
    S, z = middle(case, weights, index, **{"normalised": rule != "top_1", **options})
    return case.out(S, z, weights)


def fan(case: Case, rule: str, top_k: int) -> Tensor:
    _, weights, index = case.routing(rule, top_k)
    wide = [
        fan_out(y, hidden, B, index, weights.shape[1], SCALE)
        for y, hidden, B in zip(case.base(), case.hidden(), case.factors_in()[1], strict=True)
    ]
    gate, up = wide[0].chunk(2, dim=-1) if case.block.kind == "fused_glu" else (wide[0], wide[-1])
    h = case.block.act(gate) * (1 if case.block.kind == "mlp" else up)
    S, z = fan_in(h, case.leaves[2], weights, index, normalised=rule != "top_1")
    return case.out(S, z, weights)


def output_and_gradients(path: Callable, case: Case, *args, **options) -> list[Tensor]:
    out = path(case, *args, **options)
    torch.manual_seed(7)
    cotangent = torch.randn(out.shape, dtype=torch.float32).to(out.dtype)
    return [out, *torch.autograd.grad(out, case.leaves, cotangent)]


def assert_equal_up_to(tolerance: float, got: list[Tensor], wanted: list[Tensor]) -> None:
    """Every difference is at most `tolerance` times the largest wanted value of that tensor (or 1, if that is less)."""
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert a.isfinite().all()
        if a.numel():
            assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("chunk", [1, 10, 512])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("rule", "top_k"), RULES)
@pytest.mark.parametrize("tokens", [1, 7, 33])
@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_path_is_the_definition_in_value_and_every_gradient(kind, tokens, rule, top_k, schedule, chunk):
    case = make_case(tokens, kind=kind)
    got = output_and_gradients(fast, case, rule, top_k, schedule=schedule, chunk=chunk)
    assert_equal_up_to(1e-12, got, output_and_gradients(naive, case, rule, top_k))


@pytest.mark.parametrize(("rule", "top_k"), RULES)
@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("kind", KINDS)
def test_the_fan_path_is_the_definition_in_value_and_every_gradient(kind, tokens, rule, top_k):
    case = make_case(tokens, kind=kind)
    wanted = output_and_gradients(naive, case, rule, top_k)
    assert_equal_up_to(1e-12, output_and_gradients(fan, case, rule, top_k), wanted)


@pytest.mark.parametrize("path", [fast, fan])
@pytest.mark.parametrize(("experts", "r", "rule", "top_k"), [(1, 1, "top_1", 1), (1, 4, "softmax_top_k", 1),
                                                             (8, 1, "softmax_top_k", 5), (3, 16, "softmax", 3)])  # fmt: skip
def test_one_expert_rank_one_and_many_slots(experts, r, rule, top_k, path):
    case = make_case(experts=experts, r=r)
    wanted = output_and_gradients(naive, case, rule, top_k)
    assert_equal_up_to(1e-12, output_and_gradients(path, case, rule, top_k), wanted)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_new", "relu", "relu2", "quick_gelu", "tanh"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_activation_has_its_gradient(schedule, kind, act):
    case = make_case(kind=kind, act=ACT2FN[act])
    got = output_and_gradients(fast, case, "softmax_top_k", 2, schedule=schedule)
    assert_equal_up_to(1e-12, got, output_and_gradients(naive, case, "softmax_top_k", 2))


def test_an_activation_that_works_in_place_and_one_that_does_nothing():
    for act, pure in ((nn.ReLU(inplace=True), F.relu), (nn.Identity(), torch.clone)):
        for kind in KINDS:
            got = output_and_gradients(fast, make_case(kind=kind, act=act), "softmax_top_k", 2)
            wanted = output_and_gradients(naive, make_case(kind=kind, act=pure), "softmax_top_k", 2)
            assert_equal_up_to(1e-12, got, wanted)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("silu", "silu"), ("swish", "silu"), ("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("relu", "relu"),
     ("gelu_pytorch_tanh", "gelu_tanh"), ("quick_gelu", ""), ("relu6", ""), ("mish", "")],
)  # fmt: skip
def test_an_activation_is_known_by_what_it_computes(name, wanted):
    assert ffn_block("glu", ACT2FN[name]).act_name == wanted


def test_an_activation_that_learns_is_left_to_autograd():
    assert ffn_block("mlp", nn.PReLU(init=0.0)).act_name == ""
    assert set(ACT_BACKWARD) == {"silu", "gelu", "gelu_tanh", "relu"}


@pytest.mark.parametrize("path", [fast, fan])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("rule", "top_k"), RULES)
def test_a_slot_may_hold_no_expert(rule, top_k, schedule, path):
    """Three rows of the router stand for no expert, so that a token may have several such slots."""
    case = make_case(nulls=3)
    if rule == "softmax":  # every row is a slot: as a choice of all, the definition says what the null ones are
        rule, top_k = "softmax_top_k", 7
    assert (case.routing(rule, top_k).top_k_index >= 4).any()
    options = {"schedule": schedule} if path is fast else {}
    got = output_and_gradients(path, case, rule, top_k, **options)
    assert_equal_up_to(1e-12, got, output_and_gradients(naive, case, rule, top_k))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_with_no_expert_in_any_slot_the_block_is_frozen_and_the_adapter_gets_no_gradient(schedule):
    case = make_case()
    index, weights = torch.full((33, 2), 4), torch.full((33, 2), 0.5, dtype=torch.float64)
    base, (A_in, B_in) = case.base(), case.factors_in()
    S, z = middle(case, weights, index, schedule=schedule)
    assert torch.equal(S, F.silu(base[0]) * base[1])
    assert not z.any()
    factors = [*A_in, *B_in, case.leaves[2]]
    gradients = torch.autograd.grad(S.sum() + z.sum(), factors, allow_unused=True)
    assert all(g is None or not g.any() for g in gradients)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_expert_that_no_token_visits_gets_a_gradient_of_exactly_zero(schedule):
    case = make_case()
    with torch.no_grad():
        case.leaves[0].abs_()
        case.leaves[1].abs_()
        case.leaves[1][3].neg_()  # the last expert loses
    got = output_and_gradients(fast, case, "softmax_top_k", 2, schedule=schedule)
    assert_equal_up_to(1e-12, got, output_and_gradients(naive, case, "softmax_top_k", 2))
    for gradient in got[3:]:
        assert not gradient[3].any()
        assert gradient[0].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rule", "top_k"), [r for r in RULES if r[0] != "top_1"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("act", "width"), [(F.silu, 32), (F.relu, 13)])
def test_with_B_zero_the_mean_is_the_frozen_block_bit_for_bit(kind, rule, top_k, dtype, act, width):
    """On CPUs torch computes the last few values of silu, those that fill no vector, to another last bit: no such."""
    case = make_case(100, kind=kind, dtype=dtype, act=act, width=width)
    _, weights, index = case.routing(rule, top_k)
    base, hidden = case.base(), case.hidden()
    zeros = tuple(torch.zeros_like(B) for B in case.factors_in()[1])
    gate, up = base[0].chunk(2, -1) if kind == "fused_glu" else (base[0], base[-1])
    wanted = act(gate) if kind == "mlp" else act(gate) * up
    for schedule in SCHEDULES:
        S, _ = middle(case, weights, index, lora_B=zeros, schedule=schedule, chunk=33)
        assert torch.equal(S, wanted)
    fanned = [fan_out(y, h, B, index, top_k, SCALE) for y, h, B in zip(base, hidden, zeros, strict=True)]
    assert all(torch.equal(f, y.unsqueeze(1).expand_as(f)) for f, y in zip(fanned, base, strict=True))
    S, _ = fan_in(wanted.unsqueeze(1).expand(-1, top_k, -1), case.leaves[2], weights, index, normalised=True)
    assert torch.equal(S, wanted)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_weight_of_zero_is_no_division_by_zero(schedule):
    case = make_case(5)
    weights = torch.tensor([[0, 0, 1], [0, 1, 0], [1, 0, 0], [0.5, 0.5, 0], [0, 0.5, 0.5]], dtype=torch.float64)
    index = torch.tensor([[0, 1, 2], [2, 3, 1], [3, 0, 2], [1, 2, 0], [1, 0, 3]])
    base, factors = case.base(), (case.hidden(), case.factors_in()[1], case.leaves[2])
    wanted = mixed_hidden(base, *factors, weights, index, case.block, SCALE, normalised=False, schedule="static")
    got = mixed_hidden(base, *factors, weights, index, case.block, SCALE, normalised=True, schedule=schedule)
    assert_equal_up_to(1e-12, list(got), list(wanted))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("index", [None, torch.tensor([[0, 1], [1, 2], [2, 0]])])
def test_the_derivative_of_the_middle_is_that_of_finite_differences(index, schedule):
    case = make_case(3, experts=2, r=2)
    leaves = [t.detach().requires_grad_() for t in (*case.base(), *case.hidden(), *case.factors_in()[1])]
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)

    def of_leaves(weights, A_out, *t):
        return mixed_hidden(
            t[:2], t[2:4], t[4:], A_out, weights, index, case.block, SCALE, normalised=False, schedule=schedule
        )

    assert torch.autograd.gradcheck(of_leaves, (weights, case.leaves[2], *leaves))


def test_a_gradient_for_one_output_alone_and_gradients_of_any_strides():
    case = make_case()
    _, weights, index = case.routing("softmax_top_k", 2)
    for schedule in SCHEDULES:
        S, z = middle(case, weights, index, schedule=schedule)
        of_S, of_z = torch.randn_like(S), torch.randn_like(z)
        leaves = [case.leaves[i] for i in (0, 1, 2, 4, 5, 6, 7)]

        def gradients(outputs, cotangents, leaves=leaves):
            return torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True, materialize_grads=True)

        both = gradients([S, z], [of_S, of_z])
        scattered = gradients([S, z], [of_S.T.contiguous().T, of_z.T.contiguous().T])
        apart = [a + b for a, b in zip(gradients([S], [of_S]), gradients([z], [of_z]), strict=True)]
        assert_equal_up_to(1e-12, list(scattered), list(both))
        assert_equal_up_to(1e-12, apart, list(both))
        expanded = gradients([S.sum()], [torch.ones((), dtype=S.dtype)])
        assert_equal_up_to(1e-12, list(expanded), list(gradients([S], [torch.ones_like(S)])))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_first_layer_whose_input_wants_no_gradient_trains_the_same(schedule):
    case = make_case()
    wanted = output_and_gradients(fast, case, "softmax_top_k", 2)[2:]
    still = case._replace(leaves=[case.leaves[0].detach(), *case.leaves[1:]])
    out = fast(still, "softmax_top_k", 2, schedule=schedule)
    torch.manual_seed(7)
    cotangent = torch.randn(out.shape, dtype=torch.float32).to(out.dtype)
    got = torch.autograd.grad(out, still.leaves[1:], cotangent)
    assert_equal_up_to(1e-12, list(got), wanted)


@pytest.mark.parametrize("path", [fast, fan])
@pytest.mark.parametrize(("rule", "top_k"), RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_tokens_passes_and_gives_gradients_of_zero(kind, rule, top_k, path):
    case = make_case(0, kind=kind)
    for options in [{"schedule": s} for s in SCHEDULES] if path is fast else [{}]:
        out, *gradients = output_and_gradients(path, case, rule, top_k, **options)
        assert out.shape == (0, D)
        for gradient, leaf in zip(gradients, case.leaves, strict=True):
            assert gradient.shape == leaf.shape
            assert not gradient.any()


def in_double(case: Case) -> Case:
    return case._replace(
        frozen=[t.double() for t in case.frozen], leaves=[t.detach().double().requires_grad_() for t in case.leaves]
    )


@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32], ids=["adapter_bf16", "adapter_fp32"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_half_precision_agrees_to_a_few_roundings(schedule, kind, adapter):
    """In the dtypes that PEFT brings: a backbone in bf16, an adapter in bf16 or fp32. Choices are made once, in fp64."""
    case = make_case(200, kind=kind, dtype=torch.bfloat16)
    case = case._replace(leaves=[case.leaves[0], *(t.detach().to(adapter).requires_grad_() for t in case.leaves[1:])])
    exact = in_double(case)
    fixed = exact.routing("softmax_top_k", 2)

    def given(case: Case, dtype: torch.dtype) -> Tensor:
        weights = fixed.top_k_weights.detach().to(dtype)
        S, z = middle(case, weights, fixed.top_k_index, schedule=schedule, chunk=50)
        assert S.dtype == case.leaves[0].dtype
        assert z.dtype == case.leaves[2].dtype
        return case.out(S, z, weights) + 0.01 * case.leaves[1].sum().to(S.dtype)

    got = output_and_gradients(lambda c: given(c, torch.float32), case)
    wanted = output_and_gradients(lambda c: given(c, torch.float64), exact)
    assert [g.dtype for g in got[1:]] == [leaf.dtype for leaf in case.leaves]
    assert_equal_up_to(0.03, [g.double() for g in got], wanted)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_autocast_agrees_to_a_few_roundings(schedule, cached):
    """Frozen linears give bf16 under autocast, factors stay fp32; backward may run inside or outside."""
    case = make_case(100, dtype=torch.float32)
    wanted = output_and_gradients(fast, in_double(case), "softmax", 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = fast(case, "softmax", 4, schedule=schedule)
        torch.manual_seed(7)
        cotangent = torch.randn(out.shape, dtype=torch.float32).to(out.dtype)
        if cached:
            gradients = torch.autograd.grad(out, case.leaves, cotangent)
    if not cached:
        gradients = torch.autograd.grad(out, case.leaves, cotangent)
    assert out.dtype == torch.bfloat16
    assert_equal_up_to(0.05, [t.double() for t in (out, *gradients)], wanted)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_checkpointing_changes_nothing(schedule, reentrant):
    case = make_case()

    def checkpointed(case: Case) -> Tensor:
        def run(*leaves: Tensor) -> Tensor:
            return fast(case._replace(leaves=list(leaves)), "softmax_top_k", 2, schedule=schedule)

        return checkpoint(run, *case.leaves, use_reentrant=reentrant)

    def loss_gradients(path: Callable) -> list[Tensor]:
        for leaf in case.leaves:
            leaf.grad = None
        path(case).square().sum().backward()
        return [leaf.grad for leaf in case.leaves]

    wanted = loss_gradients(lambda c: fast(c, "softmax_top_k", 2, schedule=schedule))
    got = loss_gradients(checkpointed)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(("rule", "top_k"), [("softmax_top_k", 2), ("softmax", 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_compile_traces_the_whole_and_does_not_trace_again_for_another_length(kind, rule, top_k):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (33, 21, 700):
        case = make_case(tokens, kind=kind)
        got = output_and_gradients(compiled, case, rule, top_k)
        assert_equal_up_to(1e-12, got, output_and_gradients(naive, case, rule, top_k))
    assert len(graphs) == 1


@pytest.mark.slow
def test_the_compiled_function_is_the_definition():
    torch._dynamo.reset()
    case = make_case()
    got = output_and_gradients(torch.compile(fast, fullgraph=True), case, "softmax_top_k", 2)
    assert_equal_up_to(1e-12, got, output_and_gradients(naive, case, "softmax_top_k", 2))


def test_a_second_derivative_is_refused_and_not_silently_wrong():
    case = make_case(5)
    gradient = torch.autograd.grad(fast(case, "softmax_top_k", 2).square().sum(), case.leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient[0].sum().backward()


def test_without_gradients_nothing_changes():
    case = make_case()
    with torch.no_grad():
        got = fast(case, "softmax_top_k", 2)
    assert not got.requires_grad
    assert torch.equal(got, fast(case, "softmax_top_k", 2))


def test_what_does_not_fit_together_is_refused():
    case = make_case()
    _, weights, index = case.routing("softmax_top_k", 2)
    base, hidden, lora_B, A_out = case.base(), case.hidden(), case.factors_in()[1], case.leaves[2]

    def call(base=base, index=index, **options):
        mixed_hidden(base, hidden, lora_B, A_out, weights, index, case.block, 1.0, normalised=True, **options)

    with pytest.raises(ValueError, match=r'"glu" block has 2 linear\(s\) in, .* 1, 2 and 2'):
        call(base=base[:1])
    with pytest.raises(ValueError, match="needs 4 columns, not 2"):
        call(index=None)
    with pytest.raises(ValueError, match='`schedule` is "slots"'):
        call(schedule="slots")
    with pytest.raises(ValueError, match="`chunk` 0"):
        call(chunk=0)
    with pytest.raises(ValueError, match='`kind` is "swiglu"'):
        ffn_block("swiglu", F.silu)
    with pytest.raises(ValueError, match="`num_slots` is 3"):
        fan_out(base[0], hidden[0], lora_B[0], index, 3, SCALE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("rule", "top_k"), RULES)
def test_the_fast_path_is_the_definition_on_a_gpu(rule, top_k, schedule):
    case = make_case(100)
    case = case._replace(
        frozen=[t.cuda() for t in case.frozen], leaves=[t.detach().cuda().requires_grad_() for t in case.leaves]
    )
    wanted = naive(case, rule, top_k)
    got = fast(case, rule, top_k, schedule=schedule)
    cotangent = torch.randn_like(wanted)
    got, wanted = ([y, *torch.autograd.grad(y, case.leaves, cotangent)] for y in (got, wanted))
    assert_equal_up_to(1e-12, got, wanted)


def fan_with_dropout(case: Case, rule: str, top_k: int, kept: Tensor, dropout: float) -> Tensor:
    """The frozen linear sees the hidden units whole, the experts' A what dropout leaves of them."""
    _, weights, index = case.routing(rule, top_k)
    wide = [
        fan_out(y, hidden, B, index, weights.shape[1], SCALE)
        for y, hidden, B in zip(case.base(), case.hidden(), case.factors_in()[1], strict=True)
    ]
    h = case.block.act(wide[0]) * wide[1]
    S = fan_in(h, case.leaves[2], weights, index, normalised=rule != "top_1")[0]
    seen = h * kept.unsqueeze(1) / (1 - dropout)
    z = fan_in(seen, case.leaves[2], weights, index, normalised=rule != "top_1")[1]
    return case.out(S, z, weights)


@pytest.mark.parametrize("chunk", [10, 512])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("rule", "top_k"), RULES)
def test_dropout_hides_hidden_units_from_the_experts_alone(rule, top_k, schedule, chunk):
    case = make_case()
    kept = torch.rand(33, WIDTH, generator=torch.Generator().manual_seed(8)) > 0.3
    got = output_and_gradients(fast, case, rule, top_k, schedule=schedule, chunk=chunk, kept=kept, dropout=0.3)
    assert_equal_up_to(1e-12, got, output_and_gradients(fan_with_dropout, case, rule, top_k, kept, 0.3))
    without = output_and_gradients(fast, case, rule, top_k, schedule=schedule, chunk=chunk)
    assert not torch.allclose(got[0], without[0])
