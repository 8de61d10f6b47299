"""Groups of an FFN mixture's experts: what the router's choices share, on every linear of the block and on both paths."""

import copy

import pytest
import torch
from conftest import make_tiny_llama
from peft import PeftModel, get_peft_model
from test_resizing_blocks import BLOCKS, adapted, logits, on_block, text
from transformers import OPTConfig, OPTForCausalLM

import moe_peft
from moe_peft import FfnMoeConfig, LinearMoeConfig, add_experts, group_experts, prune_experts
from moe_peft.merge import routed_layers
from moe_peft.merging.decoder import Decoder
from moe_peft.merging.walk import Fit, walk
from moe_peft.resizing import together
from moe_peft.routing import Routing, assignments, dense_weights, grouped
from moe_peft.rules import softmax_top_k_null, softmax_top_p


EXACT = {"rtol": 1e-9, "atol": 1e-10}
RULES = {
    "top_k": lambda u: softmax_top_k_null(u, 4, 0),
    "null": lambda u: softmax_top_k_null(u, 5, 2),
    "top_p": lambda u: softmax_top_p(u, 8, 0.7),
    "all": lambda u: Routing(u, u.softmax(-1), None),
    "all-null": lambda u: Routing(u, u.softmax(-1), None),
}


@pytest.mark.parametrize("rule", RULES)
def test_choices_that_share_an_expert_give_it_the_sum_of_their_weights(rule):
    torch.manual_seed(0)
    u = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    of = torch.tensor([0, 1, 2, 0, 1, 2] if "null" in rule else [0, 1, 2, 0, 1, 2, 0, 0])
    before = RULES[rule](u)
    after = grouped(before, of, 3)
    every = dense_weights(before)[:, : len(of)]
    wanted = torch.stack([every[:, of == e].sum(1) for e in range(3)], dim=1)
    got = after.top_k_weights if after.top_k_index is None else dense_weights(after)[:, :3]
    torch.testing.assert_close(got, wanted, **EXACT)
    torch.testing.assert_close(after.top_k_weights.sum(1), before.top_k_weights.sum(1), **EXACT)
    assert after.router_logits is u
    turn = torch.randn(50, 3, dtype=torch.float64)
    for a, b in zip(
        *(torch.autograd.grad((w * turn).sum(), u, retain_graph=True) for w in (got, wanted)), strict=True
    ):
        torch.testing.assert_close(a, b, **EXACT)
    if after.top_k_index is not None:
        assert after.top_k_index.max() <= 8
        assert not after.top_k_weights[after.top_k_index == 8].any()
        real = torch.zeros(50, 9).scatter_add_(1, after.top_k_index, torch.ones(50, after.top_k_index.shape[1]))
        assert real[:, :8].max() == 1  # no expert twice in a row
        assert torch.equal(assignments(after)[:, :3] > 0, every.new_tensor(wanted.detach() > 0).bool())


def make_twins(model) -> None:
    """Experts 3, 4, 5 get the weights of 0, 1, 2 everywhere, and logits of their direction, so small that few tokens come."""
    with torch.no_grad():
        for layer in routed_layers(model).values():
            experts = layer.experts("default")
            experts.lora_A[3:6], experts.lora_B[3:6] = experts.lora_A[:3], experts.lora_B[:3]
            if experts.router is not None:
                experts.router[3:6] = 0.01 * experts.router[:3]


def in_fp64(**settings) -> PeftModel:
    return adapted(make_tiny_llama(layers=2, dtype=torch.float64), **settings).double()


SETTINGS = [
    {},
    {"routing": "softmax"},
    {"num_shared_experts": 1},
    {"num_null_experts": 2, "top_k": 5},
    {"routing": "top_p"},
    {"router_bias": True, "routing": "top_k", "norm_topk_prob": False, "top_k": 3},
]


@pytest.mark.parametrize("merge", ["lstsq", "usage"])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_merging_equal_experts_changes_nothing_but_the_size(settings, fast, merge, tmp_path):
    model = in_fp64(num_experts=6, **settings)
    make_twins(model)
    for layer in routed_layers(model).values():
        layer.block.fast.enabled = fast
    before, shared = logits(model), settings.get("num_shared_experts", 0)
    routers = {n: layer.experts("default").router for n, layer in routed_layers(model).items() if "gate" in n}
    table = group_experts(model, text(), 3, merge=merge)
    assert [line.layer for line in table] == BLOCKS
    for line in table:
        assert sorted(sorted(group) for group in line.groups) == [[0, 3], [1, 4], [2, 5]]
    for name, layer in routed_layers(model).items():
        experts = layer.experts("default")
        assert len(experts.lora_B) == len(experts.lora_A) == 3 + shared
        if "gate" in name:
            assert torch.equal(experts.router, routers[name])
    torch.testing.assert_close(logits(model), before, **EXACT)
    config = model.peft_config["default"]
    assert (config.num_experts, config.num_distinct_experts) == (6, 3)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(
        make_tiny_llama(layers=2, dtype=torch.float64), tmp_path, autocast_adapter_dtype=False
    )
    torch.testing.assert_close(logits(again), logits(model), **EXACT)


def test_a_reloaded_adapter_answers_bit_for_bit(tmp_path):
    model = adapted(num_experts=6)
    group_experts(model, text(), {0: 2, 1: 4})
    assert model.peft_config["default"].num_distinct_experts == [2, 4]
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make_tiny_llama(layers=2), tmp_path)), wanted)


@pytest.mark.parametrize("routing", ["softmax_top_k", "softmax", "top_p"])
@pytest.mark.parametrize("fast", [True, False])
def test_the_block_computes_the_definition_with_gradients(routing, fast):
    """sum_n g_n(x) O_map[n](x), by a loop over the router's choices."""
    model = in_fp64(num_experts=4, routing=routing, balance="none")
    group_experts(model, text(), 2)
    mlp = model.base_model.model.model.layers[0].mlp
    parts = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    parts[0].block.fast.enabled = fast
    first = parts[0].experts("default")
    x = torch.randn(1, 9, parts[0].in_features, dtype=torch.float64, requires_grad=True)

    def linear(part, h, e):
        experts = part.experts("default")
        return part.get_base_layer()(h) + experts.scaling * h @ experts.lora_A[e].T @ experts.lora_B[e]

    g = dense_weights(first.rule(x[0] @ first.router.T, first.top_k))
    slow = sum(
        g[:, n, None] * linear(parts[2], mlp.act_fn(linear(parts[0], x[0], e)) * linear(parts[1], x[0], e), e)
        for n, e in enumerate(first.expert_map.tolist())
    )
    wanted = [
        p.requires_grad_(True)
        for p in model.parameters()
        if any(p is q for part in parts for q in part.experts("default").parameters())
    ]
    assert len(wanted) == 7
    out = mlp(x)
    torch.testing.assert_close(out[0], slow, **EXACT)
    turn = torch.randn_like(slow)
    for a, b in zip(torch.autograd.grad((out[0] * turn).sum(), [x, *wanted]),
                    torch.autograd.grad((slow * turn).sum(), [x, *wanted]), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, **EXACT)


def seen_by(model, block: int = 0) -> torch.Tensor:
    """Every token that a block reads in `text()`, `[T, d]`."""
    found = []
    mlp = model.base_model.model.model.layers[block].mlp
    handle = mlp.register_forward_pre_hook(lambda module, args: found.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in text():
            model(**batch)
    handle.remove()
    return torch.cat(found)


@pytest.mark.parametrize("similarity", ["router", "outputs"])
def test_groups_are_the_most_used_and_their_nearest(similarity):
    model = in_fp64()
    x = seen_by(model)
    _, changes, g = on_block(model, x)
    router = routed_layers(model)["model.layers.0.mlp.gate_proj"].experts("default").router
    vectors = (x @ router.T).T if similarity == "router" else changes.transpose(0, 1).flatten(1)
    usage = g.sum(0)
    dominant = usage.topk(2).indices.sort().values.tolist()
    wanted = {d: [d] for d in dominant}
    for e in set(range(4)) - set(dominant):
        near = max(dominant, key=lambda d: float(torch.cosine_similarity(vectors[e], vectors[d], dim=0)))
        wanted[near].append(e)
    before = logits(model)
    line = group_experts(model, text(), 2, similarity, dry_run=True)[0]
    assert line.groups == list(wanted.values())
    assert line.share == pytest.approx(float(usage[dominant].sum() / usage.sum()))
    assert model.peft_config["default"].num_distinct_experts is None
    assert torch.equal(logits(model), before)


def read_by_linears(model, group):
    """What the experts of a group read on each linear of the first block, `[T, K, d_in]` by expert, and their weights."""
    x, parts = seen_by(model), together(routed_layers(model)["model.layers.0.mlp.gate_proj"])
    _, _, g = on_block(model, x)

    def adapted(part, e):
        experts = part.experts("default")
        return part.get_base_layer()(x) + experts.scaling * x @ experts.lora_A[e].T @ experts.lora_B[e]

    with torch.no_grad():
        units = [torch.nn.functional.silu(adapted(parts[0], e)) * adapted(parts[1], e) for e in group]
    return [[x] * len(group)] * 2 + [units], g[:, group]


def test_a_merged_group_is_the_usage_mean_cut_to_rank_r_as_the_text_asks():
    """On each linear by itself: what is lost of the mean, on what the group's tokens bring there, is all that must be."""
    model = in_fp64()
    old = copy.deepcopy(model)
    (group,) = group_experts(model, text(), 1, merge="usage")[0].groups
    read, g = read_by_linears(old, group)
    usage = g.sum(0) / g.sum()
    before, after = (together(routed_layers(m)["model.layers.0.mlp.gate_proj"]) for m in (old, model))
    with torch.no_grad():
        for which, (old_part, new_part) in enumerate(zip(before, after, strict=True)):
            was, new = old_part.experts("default"), new_part.experts("default")
            tokens = torch.cat([g[:, [i]] * h for i, h in enumerate(read[which])])
            if which < 2:  # all experts read the same token, which counts by the sum of their weights
                tokens = g.sum(1, keepdim=True) * read[which][0]
            mean = sum(u * was.lora_B[e].T @ was.lora_A[e] for u, e in zip(usage, group, strict=True))
            merged = new.lora_B[0].T @ new.lora_A[0]
            best = torch.linalg.svdvals(tokens @ mean.T)[2:].square().sum()  # Eckart-Young on what the text shows
            torch.testing.assert_close((tokens @ (merged - mean).T).square().sum(), best, rtol=1e-6, atol=1e-9)


def test_least_squares_come_closest_to_what_the_experts_added_on_each_linear():
    """Against the mean, and against any small step from where they are, on the text that they were fitted to."""
    errors = {}
    for merge in ("usage", "lstsq"):
        model = in_fp64(r=1)
        old = copy.deepcopy(model)
        (group,) = group_experts(model, text(), 1, merge=merge)[0].groups
        read, g = read_by_linears(old, group)
        before, after = (together(routed_layers(m)["model.layers.0.mlp.gate_proj"]) for m in (old, model))

        def error(which, merged, before=before, group=group, read=read, g=g):
            was = before[which].experts("default")
            wanted = [
                g[:, [i]] * (h @ was.lora_A[e].T @ was.lora_B[e])
                for i, (e, h) in enumerate(zip(group, read[which], strict=True))
            ]
            made = [g[:, [i]] * (h @ merged.T) for i, h in enumerate(read[which])]
            if which < 2:
                return float((sum(wanted) - sum(made)).square().sum())
            return sum(float((a - b).square().sum()) for a, b in zip(wanted, made, strict=True))

        with torch.no_grad():
            factors = [(part.experts("default").lora_B[0], part.experts("default").lora_A[0]) for part in after]
            errors[merge] = [error(which, B.T @ A) for which, (B, A) in enumerate(factors)]
            if merge == "lstsq":
                generator = torch.Generator().manual_seed(0)
                for which, (B, A) in enumerate(factors):
                    span = (
                        before[which].experts("default").lora_A[group].flatten(0, 1)
                    )  # the rows that A may be made of
                    for _ in range(20):
                        step = torch.randn(1, len(span), generator=generator, dtype=torch.float64) @ span
                        turn = torch.randn(B.shape, generator=generator, dtype=torch.float64)
                        moved = (B + 1e-2 * B.norm() * turn / turn.norm()).T @ (
                            A + 1e-2 * A.norm() * step / step.norm()
                        )
                        assert error(which, moved) > errors[merge][which] * (1 - 1e-4)
    assert all(a < b for a, b in zip(errors["lstsq"], errors["usage"], strict=True))


def test_an_expert_alone_in_its_group_stays_bit_for_bit():
    model = adapted()
    old = copy.deepcopy(model)
    for line in group_experts(model, text(), 3):
        for number, group in enumerate(line.groups):
            for was, new in zip(
                *(together(routed_layers(m)[f"{line.layer}.gate_proj"]) for m in (old, model)), strict=True
            ):
                for name in ("lora_A", "lora_B"):
                    a, b = (getattr(part.experts("default"), name) for part in (was, new))
                    assert torch.equal(a[group[0]], b[number]) == (len(group) == 1)


def test_padding_groups_nothing():
    batch = text(1)[0]
    padded = {
        "input_ids": torch.cat((torch.zeros(3, 4, dtype=torch.long), batch["input_ids"]), 1),
        "attention_mask": torch.cat((torch.zeros(3, 4, dtype=torch.long), torch.ones(3, 12, dtype=torch.long)), 1),
    }
    models = in_fp64(), in_fp64()
    tables = [group_experts(m, [b], 2) for m, b in zip(models, (batch, padded), strict=True)]
    assert [line.groups for line in tables[0]] == [line.groups for line in tables[1]]
    torch.testing.assert_close(logits(models[0]), logits(models[1]), rtol=1e-5, atol=1e-6)


def test_a_grouped_block_learns_and_counts_its_choices():
    model = adapted(balance="switch", router_aux_loss_coef=0.1)
    group_experts(model, text(), 2)
    ids = text(1)[0]["input_ids"]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) == 14
    assert all(grad is not None and grad.any() for grad in grads)
    for name, layer in routed_layers(model).items():
        if "gate" in name:
            assert layer.experts("default").state.load.shape == (4,)


@pytest.mark.parametrize("kind", ["block", "linear"])
def test_by_hand_a_choice_keeps_its_name_and_means_the_merged_expert(kind):
    more = {"num_experts": 4, "r": 2, "router_init_std": 0.5, "init_weights": False}
    config = (FfnMoeConfig if kind == "block" else LinearMoeConfig)(**more)
    torch.manual_seed(3)
    model = get_peft_model(make_tiny_llama(layers=2, dtype=torch.float64), config).double().eval()
    group_experts(model, text(), 2)
    other = copy.deepcopy(model)
    for layer in routed_layers(other).values():
        experts = layer.experts("default")
        if getattr(experts, "expert_map", None) is not None:
            experts.expert_map.copy_(experts.expert_map[3].expand(4))  # every choice means what choice 3 means
    with moe_peft.routing(model, force=["3"], top_k=1):
        forced = logits(model)
    torch.testing.assert_close(forced, logits(other), **EXACT)
    assert (forced - logits(model)).abs().max() > 1e-4
    names = {
        tuple(layer.expert_names("default"))
        for layer in routed_layers(model).values()
        if layer.experts("default").decides
    }
    assert names == {("0", "1", "2", "3")}
    with pytest.raises(ValueError, match="'4'"), moe_peft.routing(model, disable=["4"]):
        pass


def test_each_choice_of_a_grouped_linear_is_the_lora_of_its_group():
    torch.manual_seed(3)
    config = LinearMoeConfig(num_experts=4, r=2, num_shared_experts=1, init_weights=False, target_modules=["q_proj"])
    model = get_peft_model(make_tiny_llama(layers=2), config).eval()
    group_experts(model, text(), 2)
    for layer in routed_layers(model).values():
        experts, factors = layer.experts("default"), layer.expert_factors("default")
        assert list(factors) == ["0", "1", "2", "3"]
        for (A, B), e in zip(factors.values(), experts.expert_map.tolist(), strict=True):
            assert torch.equal(A, torch.cat((experts.lora_A[e], experts.lora_A[2])))
            assert torch.equal(B, experts.scaling * torch.cat((experts.lora_B[e], experts.lora_B[2])))


def test_a_static_merge_weighs_a_group_as_its_choices():
    """Equal experts: what is merged from the grouped adapter is the function that is merged from the whole one."""
    model = in_fp64(num_experts=6, target_modules="all-linear")
    make_twins(model)
    calibration = [{**b, "labels": b["input_ids"]} for b in text()]
    found = []
    for _ in range(2):
        factors = walk(Decoder(model), calibration, None, calibration, Fit("usage", 0.0, None)).factors
        found.append({name: (f.B.double() @ f.A.double()) for name, f in factors.items()})
        if len(found) == 1:
            group_experts(model, text(), 3)
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-4, atol=1e-6)


def test_blocks_without_a_module_of_their_own_are_grouped_by_the_router():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=100, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16
    )
    model = adapted(OPTForCausalLM(config).double(), num_experts=6).double()
    make_twins(model)
    before = logits(model)
    with pytest.raises(
        ValueError, match=r"`similarity` is 'outputs', but must be another where the linears .*'router'"
    ):
        group_experts(model, text(), 3, "outputs")
    assert len(group_experts(model, text(), 3)) == 2
    torch.testing.assert_close(logits(model), before, **EXACT)


def test_what_cannot_be_is_refused_and_changes_nothing():
    model = adapted()
    before = logits(model)
    for call, message in (
        (
            lambda: group_experts(model, text(), 5),
            r"`groups` is 5, but must be at most 4, the experts of model.layers.0.mlp",
        ),
        (
            lambda: group_experts(model, text(), 2, merge="lsq"),
            "`merge` is 'lsq', but must be 'lstsq' or 'usage'. Did you mean 'lstsq'?",
        ),
        (lambda: group_experts(model, [], 2), "The calibration text reached no expert"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert torch.equal(logits(model), before)
    group_experts(model, text(), 2)
    for change in (
        lambda: group_experts(model, text(), 1),
        lambda: prune_experts(model, 2, text()),
        lambda: add_experts(model),
    ):
        with pytest.raises(ValueError, match="`num_distinct_experts` is 2, but must be None where experts come or go"):
            change()
    for settings, message in (
        ({"num_distinct_experts": 9}, "must be a whole number from 1 to 8"),
        ({"num_distinct_experts": 2, "routing": "random"}, "left out with `routing` = 'random'"),
        ({"num_distinct_experts": 2, "expert_groups": [[0], [1]]}, "left out with `expert_groups` ="),
    ):
        with pytest.raises(ValueError, match=message):
            FfnMoeConfig(**settings)
    with pytest.raises(ValueError, match=r"a list that has an entry for model.layers.1.mlp.gate_proj"):
        get_peft_model(make_tiny_llama(layers=2), FfnMoeConfig(num_distinct_experts=[2]))
