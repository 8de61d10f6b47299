"""Experts merged under an unchanged router: equal experts lose nothing, the others become what the definition says."""

import copy

import pytest
import torch
from conftest import make_tiny_llama
from peft import PeftModel, get_peft_model

from moe_peft import LinearMoeConfig, RankMoeConfig, add_experts, expert_scores, group_experts, prune_experts
from moe_peft.expert_groups import cut, output_products
from moe_peft.merge import routed_layers
from moe_peft.routing import dense_weights


EXACT = {"rtol": 1e-9, "atol": 1e-10}
LAYER = "model.layers.0.self_attn.q_proj"


def adapted(dtype=torch.float64, **settings) -> PeftModel:
    torch.manual_seed(3)
    given = {
        "num_experts": 6,
        "r": 2,
        "lora_alpha": 32,
        "target_modules": ["q_proj", "up_proj"],
        "init_weights": False,
    }
    config = LinearMoeConfig(**{**given, "router_init_std": 0.5, "task_type": "CAUSAL_LM", **settings})
    return get_peft_model(make_tiny_llama(layers=2, dtype=dtype), config).to(dtype).eval()


def text(batches: int = 2, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(1, 100, (3, 12), generator=generator)} for _ in range(batches)]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**text(1, seed=5)[0]).logits


def all_experts(model) -> dict:
    return {name: layer.experts("default") for name, layer in routed_layers(model).items()}


def seen_by(model, name=LAYER):
    """Every token that a layer reads in `text()`, `[T, d_in]`."""
    found = []
    handle = all_experts(model)[name].register_forward_pre_hook(
        lambda module, args: found.append(args[0].flatten(0, 1))
    )
    with torch.no_grad():
        for batch in text():
            model(**batch)
    handle.remove()
    return torch.cat(found)


def make_twins(model, share_A=False) -> None:
    """Experts 3, 4, 5 get the weights of 0, 1, 2, and logits of their direction, but so small that few tokens come."""
    with torch.no_grad():
        for experts in all_experts(model).values():
            experts.lora_B[3:6] = experts.lora_B[:3]
            experts.router[3:6] = 0.01 * experts.router[:3]
            if not share_A:
                experts.lora_A[3:6] = experts.lora_A[:3]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"routing": "softmax"},
        {"num_shared_experts": 1},
        {"share_A": True},
        {"num_null_experts": 2, "num_constant_experts": 1, "top_k": 4},
        {"routing": "top_p"},
        {"router_bias": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("merge", ["usage", "lstsq"])
def test_merging_equal_experts_changes_nothing_but_the_size(settings, merge, tmp_path):
    model = adapted(**settings)
    make_twins(model, settings.get("share_A", False))
    before, whole = logits(model), sum(e.lora_B.numel() for e in all_experts(model).values())
    routers = {name: experts.router.clone() for name, experts in all_experts(model).items()}
    shared = settings.get("num_shared_experts", 0)
    table = group_experts(model, text(), 3, merge=merge)
    for line in table:
        assert sorted(sorted(group) for group in line.groups) == [[0, 3], [1, 4], [2, 5]]
    for name, experts in all_experts(model).items():
        assert torch.equal(experts.router, routers[name])
        assert len(experts.lora_B) == 3 + shared
    torch.testing.assert_close(logits(model), before, **EXACT)
    assert sum(e.lora_B.numel() for e in all_experts(model).values()) == whole * (3 + shared) / (6 + shared)
    config = model.peft_config["default"]
    assert (config.num_experts, config.num_distinct_experts) == (6, 3)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_tiny_llama(layers=2, dtype=torch.float64), tmp_path).double()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)  # PEFT may load in fp32
    for name, experts in all_experts(again).items():
        assert torch.equal(experts.expert_map, all_experts(model)[name].expert_map)


@pytest.mark.parametrize("training", [False, True])
def test_the_layer_computes_the_definition_with_gradients(training):
    """sum_n g_n(x) E_map[n](x), by a loop over the router's choices."""
    model = adapted(balance="none")
    group_experts(model, text(), {0: 3, 1: 2})
    assert model.peft_config["default"].num_distinct_experts == [3, 2]
    layer = routed_layers(model)[LAYER].train(training)
    experts = layer.experts("default")
    x = torch.randn(1, 7, layer.in_features, dtype=torch.float64, requires_grad=True)
    fast = layer(x) - layer.base_layer(x)
    g = dense_weights(experts.rule(x[0] @ experts.router.T, experts.top_k))
    slow = 0
    for choice, expert in enumerate(experts.expert_map.tolist()):
        slow = slow + g[:, choice, None] * experts.scaling * (x[0] @ experts.lora_A[expert].T @ experts.lora_B[expert])
    torch.testing.assert_close(fast[0], slow, **EXACT)
    wanted = [experts.lora_A, experts.lora_B, experts.router, x]
    for p in wanted:
        p.requires_grad_(True)
    fast = layer(x) - layer.base_layer(x)
    for a, b in zip(torch.autograd.grad(fast.sum().sin(), wanted),
                    torch.autograd.grad(slow.sum().sin(), wanted), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, **EXACT)
    every = experts.gates(x.detach(), layer.context)
    assert every.shape == (7, 3)
    torch.testing.assert_close(every.sum(1), torch.ones(7, dtype=torch.float64))


def test_groups_are_the_most_used_and_their_nearest():
    model = adapted()
    x = seen_by(model)
    experts = all_experts(model)[LAYER]
    u = (x @ experts.router.T).detach()
    usage = dense_weights(experts.rule(u, 2)).sum(0)
    dominant = usage.topk(3).indices.sort().values.tolist()
    wanted = {d: [d] for d in dominant}
    for expert in range(6):
        if expert not in dominant:
            near = max(dominant, key=lambda d: float(torch.cosine_similarity(u[:, expert], u[:, d], dim=0)))
            wanted[near].append(expert)
    table = group_experts(model, text(), 3, dry_run=True)
    line = next(line for line in table if line.layer == LAYER)
    assert line.groups == list(wanted.values())
    assert line.share == pytest.approx(float(usage[dominant].sum() / usage.sum()))
    assert model.peft_config["default"].num_distinct_experts is None
    assert all_experts(model)[LAYER] is experts


def test_likeness_of_outputs_is_the_definition():
    model = adapted()
    experts, x = all_experts(model)[LAYER], seen_by(model)
    each = torch.einsum("td,erd,ero->eto", x, experts.lora_A, experts.lora_B).flatten(1)
    torch.testing.assert_close(output_products(experts, x), each @ each.T, **EXACT)
    table = group_experts(model, text(), 2, similarity="outputs", dry_run=True)
    assert all(len(line.groups) == 2 for line in table)


def test_a_merged_group_is_the_usage_mean_cut_to_rank_r_as_the_text_asks():
    model = adapted()
    old, x = copy.deepcopy(all_experts(model)[LAYER]), seen_by(model)
    line = next(line for line in group_experts(model, text(), 3, merge="usage") if line.layer == LAYER)
    new = all_experts(model)[LAYER]
    g = dense_weights(old.rule(x @ old.router.T, 2)).detach()
    usage = g.sum(0)
    for number, group in enumerate(line.groups):
        merged = new.lora_B[number].T @ new.lora_A[number]
        if len(group) == 1:
            assert torch.equal(new.lora_A[number], old.lora_A[group[0]])
            assert torch.equal(new.lora_B[number], old.lora_B[group[0]])
            continue
        mean = sum(usage[e] / usage[group].sum() * old.lora_B[e].T @ old.lora_A[e] for e in group)
        seen = (g[:, group].sum(1, keepdim=True) * x).detach()
        best = torch.linalg.svdvals(seen @ mean.T.detach())[2:].square().sum()  # Eckart-Young on what the text shows
        torch.testing.assert_close((seen @ (merged - mean).T).square().sum(), best, rtol=1e-6, atol=1e-9)


def test_least_squares_is_no_worse_than_the_mean_on_its_own_text():
    errors = {}
    for merge in ("usage", "lstsq"):
        model = adapted(r=1)
        old, x = copy.deepcopy(all_experts(model)[LAYER]), seen_by(model)
        line = next(line for line in group_experts(model, text(), 2, merge=merge) if line.layer == LAYER)
        new, g = all_experts(model)[LAYER], dense_weights(old.rule(x @ old.router.T, 2))
        errors[merge] = 0.0
        for number, group in enumerate(line.groups):
            target = sum(g[:, e, None] * (x @ old.lora_A[e].T @ old.lora_B[e]) for e in group)
            w = g[:, group].sum(1, keepdim=True)
            made = w * (x @ new.lora_A[number].T @ new.lora_B[number])
            errors[merge] += float((made - target).square().sum().detach())
    assert errors["lstsq"] < errors["usage"]


def test_a_cut_of_full_rank_is_exact_and_pads_what_is_missing():
    torch.manual_seed(0)
    A, B, Z = torch.randn(4, 9).double(), torch.randn(4, 3).double(), torch.randn(4, 4).double()
    x = torch.randn(50, 9).double() @ A.T
    a, b = cut(A, B, Z, x.T @ x, 4)
    torch.testing.assert_close(b.T @ a, B.T @ Z @ A, **EXACT)
    assert a.shape == (4, 9)
    assert b.shape == (4, 3)


def test_padding_groups_nothing():
    model = adapted()
    batch = text(1)[0]
    mask = torch.cat((torch.ones(3, 12), torch.zeros(3, 4)), 1).long()
    padded = {"input_ids": torch.cat((batch["input_ids"], torch.full((3, 4), 9)), 1), "attention_mask": mask}
    plain = group_experts(copy.deepcopy(model), [batch], 3, dry_run=True)
    with_padding = group_experts(model, [padded], 3, dry_run=True)
    assert [line.groups for line in plain] == [line.groups for line in with_padding]


def test_a_grouped_adapter_learns_and_counts_its_choices():
    model = adapted(balance="switch", router_aux_loss_coef=0.1)
    group_experts(model, text(), 2)
    ids = text(1)[0]["input_ids"]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    for experts in all_experts(model).values():
        assert experts.state.load.shape == (6,)
        for parameter in (experts.lora_A, experts.lora_B, experts.router):
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0


def test_down_to_one_expert_all_choices_are_the_same():
    model = adapted()
    group_experts(model, text(), 1)
    layer = routed_layers(model)[LAYER]
    experts = layer.experts("default")
    x = torch.randn(5, layer.in_features, dtype=torch.float64)
    with torch.no_grad():
        delta = layer(x) - layer.base_layer(x)
        torch.testing.assert_close(delta, experts.scaling * x @ experts.lora_A[0].T @ experts.lora_B[0], **EXACT)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: group_experts(m, text(), 7), "`groups` is 7, but must be at most 6, the experts of model.layers.0"),
        (lambda m: group_experts(m, text(), 0), "`groups` is 0, but must be a whole number of at least 1"),
        (lambda m: group_experts(m, text(), {9: 2}), r"`groups` is \[9\], but must be numbers of layers"),
        (lambda m: group_experts(m, text(), 2, "route"), "`similarity` is 'route', but must be .* mean 'router'"),
        (lambda m: group_experts(m, text(), 2, merge="lstq"), "`merge` is 'lstq', but must be .* mean 'lstsq'"),
        (lambda m: group_experts(m, [], 2), "The calibration text reached no expert"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(call, message):
    model = adapted(torch.float32)
    before = all_experts(model)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert all_experts(model) == before
    assert model.peft_config["default"].num_distinct_experts is None


@pytest.mark.parametrize(
    "change",
    [
        lambda m: group_experts(m, text(), 1),
        lambda m: prune_experts(m, 2, text()),
        lambda m: add_experts(m),
        lambda m: expert_scores(m, text()),
    ],
)
def test_a_grouped_adapter_is_not_changed_again(change):
    model = adapted(torch.float32)
    group_experts(model, text(), 2)
    with pytest.raises(ValueError, match="`num_distinct_experts` is 2, but must be None where experts come or go"):
        change(model)


def test_other_types_and_settings_are_refused():
    ranks = get_peft_model(make_tiny_llama(layers=2), RankMoeConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="Grouping experts is for LINEAR_MOE and FFN_MOE adapters"):
        group_experts(ranks, text(), 2)
    with pytest.raises(ValueError, match="`routing` is 'random', but must be one with a router"):
        group_experts(adapted(torch.float32, routing="random", router_init_std=None), text(), 2)
    for settings, message in (
        ({"num_distinct_experts": 9}, "`num_distinct_experts` is 9, but must be a whole number from 1 to 8"),
        ({"num_distinct_experts": [2, 0]}, r"`num_distinct_experts` is \[2, 0\], but must be a whole number"),
        ({"num_distinct_experts": 2, "router_scope": "block"}, "left out with `router_scope` = 'block'"),
        ({"num_distinct_experts": 2, "routing": "random"}, "left out with `routing` = 'random'"),
        ({"num_distinct_experts": 2, "expert_groups": [[0], [1]]}, "left out with `expert_groups` ="),
    ):
        with pytest.raises(ValueError, match=message):
            LinearMoeConfig(**settings)
    with pytest.raises(ValueError, match="a list that has an entry for model.layers.1"):
        get_peft_model(make_tiny_llama(layers=2), LinearMoeConfig(num_distinct_experts=[2], target_modules=["q_proj"]))
