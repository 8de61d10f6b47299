"""Experts from trained LoRAs: the function at the start is the LoRA's where that is promised, and misfits are told at once."""

import json
import math
import re

import pytest
import torch
from conftest import make_tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from moe_peft import FfnMoeConfig, LinearMoeConfig, init_experts_from_lora
from moe_peft.merge import routed_layers
from moe_peft.plain_loras import Pair, fitted, read_lora
from moe_peft.upcycling import _diversified


EXACT = {"rtol": 1e-9, "atol": 1e-11}
TARGETS = ["q_proj", "up_proj", "down_proj"]
BASE = {"dtype": torch.float64, "layers": 2}


def make_lora(folder, seed: int = 0, base=None, **settings) -> tuple[str, torch.Tensor]:
    """A trained LoRA on disk, and its logits."""
    torch.manual_seed(seed)
    given = {"r": 4, "lora_alpha": 24, "target_modules": TARGETS, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    model = get_peft_model(base or make_tiny_llama(**BASE), LoraConfig(**{**given, **settings})).double().eval()
    model.save_pretrained(folder)
    return str(folder), logits(model)


def adapted(config_class=LinearMoeConfig, base=None, **settings) -> PeftModel:
    torch.manual_seed(7)
    given = {"num_experts": 4, "r": 4, "lora_alpha": 10, "target_modules": TARGETS, "router_init_std": 0.0}
    config = config_class(**{**given, "task_type": "CAUSAL_LM", **settings})
    return get_peft_model(base or make_tiny_llama(**BASE), config).double().eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(1, 25).view(2, 12)).logits


def experts_of(model) -> dict:
    return {name: layer.experts("default") for name, layer in routed_layers(model).items()}


LORAS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3}, "alpha_pattern": {"up_proj": 5}},
    "fewer layers": {"target_modules": ["q_proj"]},
}
ADAPTERS = {
    "top 2": {"router_init_std": 0.5},
    "softmax": {"routing": "softmax", "router_init_std": 0.5},
    "shared, rslora": {"num_shared_experts": 1, "use_rslora": True, "router_init_std": None},
    "one expert": {"num_experts": 1},
    "larger rank": {"r": 7},
}


@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_exact_copies_are_the_lora_whatever_the_router_says(lora, adapter, tmp_path):
    source, wanted = make_lora(tmp_path, **LORAS[lora])
    model = adapted(**ADAPTERS[adapter])
    report = init_experts_from_lora(model, source, diversify=False)
    torch.testing.assert_close(logits(model), wanted, **EXACT)
    assert report.errors == {}
    assert sorted(report.layers + report.fresh) == sorted(experts_of(model))
    assert all(("q_proj" in name) == (name in report.layers) for name in experts_of(model)) or not report.fresh


@pytest.mark.parametrize(
    "settings", [{"router_init_std": 0.5}, {"num_shared_experts": 1}, {"num_experts": 1}], ids=str
)
def test_copies_in_an_ffn_mixture_are_the_lora(settings, tmp_path):
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]  # the attention's is one plain LoRA
    source, wanted = make_lora(tmp_path, target_modules=targets)
    model = adapted(FfnMoeConfig, target_modules=targets, **settings)
    init_experts_from_lora(model, source, diversify=False)
    torch.testing.assert_close(logits(model), wanted, **EXACT)


@pytest.mark.parametrize("r", [4, 5, 6])
def test_diversified_copies_are_the_lora_where_all_weigh_alike(r, tmp_path):
    source, wanted = make_lora(tmp_path, r=4)
    model = adapted(routing="softmax", r=r)
    init_experts_from_lora(model, source)
    torch.testing.assert_close(logits(model), wanted, **EXACT)
    for experts in experts_of(model).values():
        zero = (experts.lora_B == 0).all(-1)
        assert zero[:, :4].sum(1).tolist() == [2] * 4
        assert zero[:, 4:].all()
        assert bool((experts.lora_A != 0).all())  # ranks beyond the LoRA's can learn
        assert len(set(map(tuple, zero.tolist()))) > 1


@pytest.mark.parametrize("r", [1, 2, 3])
def test_diversified_copies_are_the_lora_in_expectation(r):
    pair, generator, draws = Pair(torch.ones(r, 2), torch.ones(r, 5)), torch.Generator().manual_seed(0), 2000
    drawn = [torch.stack([copy.B for copy in _diversified(pair, 3, generator)]) for _ in range(draws)]
    assert {float(value) for copies in drawn for value in copies.unique()} <= {0.0, 1.0, 1.5, 2.0}
    if r == 1:  # a half of one rank is all of it or nothing: by halves in the pair, and the last one keeps it
        assert all(copies[2].eq(1).all() and copies[:2].sum() == 10 for copies in drawn)
    else:
        pairs = torch.stack([copies[:2].mean(0) for copies in drawn])
        assert bool((pairs == 1).all())
        assert float((torch.stack(drawn)[:, 2].mean(0) - 1).abs().max()) < 5 / math.sqrt(draws)


def test_the_seed_decides_and_the_random_stream_is_left_alone(tmp_path):
    source, _ = make_lora(tmp_path)
    written = []
    for seed in (0, 0, 1):
        model, stream = adapted(), torch.get_rng_state()
        init_experts_from_lora(model, source, seed=seed)
        assert torch.equal(torch.get_rng_state(), stream)
        written.append(torch.cat([experts.lora_B.flatten() for experts in experts_of(model).values()]))
    assert torch.equal(written[0], written[1])
    assert not torch.equal(written[0], written[2])


@pytest.mark.parametrize("r", [2, 3])
def test_a_split_lora_is_the_lora_where_all_weigh_alike(r, tmp_path):
    source, wanted = make_lora(tmp_path, r=8, use_rslora=True)
    model = adapted(routing="softmax", r=r, num_shared_experts=1)
    init_experts_from_lora(model, source, how="split")
    torch.testing.assert_close(logits(model), wanted, **EXACT)


def test_a_split_lora_is_the_lora_in_expectation_over_the_choice(tmp_path):
    """Over all pairs of experts, each as likely and with weights of one half: the mean of the layer's change."""
    source, _ = make_lora(tmp_path, r=8)
    model = adapted(r=2)
    init_experts_from_lora(model, source, how="split")
    for name, pair in read_lora(source).pairs.items():
        experts = experts_of(model)[name]
        each = experts.scaling * torch.einsum("ero,eri->eoi", experts.lora_B, experts.lora_A)
        pairs = [(each[i] + each[j]) / 2 for i in range(4) for j in range(i)]
        torch.testing.assert_close(torch.stack(pairs).mean(0).detach(), pair.B.double().T @ pair.A.double(), **EXACT)


@pytest.mark.parametrize("config_class", [LinearMoeConfig, FfnMoeConfig])
@pytest.mark.parametrize("named", [False, True])
def test_of_several_loras_each_is_an_expert(config_class, named, tmp_path):
    targets = ["gate_proj", "up_proj", "down_proj"]
    made = [make_lora(tmp_path / str(e), seed=e, r=r, target_modules=targets) for e, r in enumerate((4, 2, 3))]
    sources = [source for source, _ in made]
    model = adapted(config_class, num_experts=3, target_modules=targets, routing="softmax")
    given = dict(zip(("law", "code", "chat"), sources, strict=True)) if named else sources
    init_experts_from_lora(model, given)
    for chosen, (_, wanted) in enumerate(made):
        for layer in routed_layers(model).values():  # each expert by itself: all of the weight to one
            experts = layer.experts("default")
            experts.rule = only(chosen)
        torch.testing.assert_close(logits(model), wanted, **EXACT)


def only(expert):
    from moe_peft.routing import Routing

    def rule(router_logits, top_k):
        return Routing(router_logits, torch.nn.functional.one_hot(
            torch.full(router_logits.shape[:1], expert), router_logits.shape[1]).to(router_logits), None)  # fmt: skip

    return rule


def test_a_lora_of_higher_rank_is_cut_by_its_best_approximation(tmp_path):
    source, _ = make_lora(tmp_path, r=6)
    model = adapted(r=4)
    report = init_experts_from_lora(model, source, diversify=False)
    for name, pair in read_lora(source).pairs.items():
        whole = pair.B.double().T @ pair.A.double()
        U, sigma, Vh = torch.linalg.svd(whole)
        experts = experts_of(model)[name]
        found = experts.scaling * experts.lora_B[2].T @ experts.lora_A[2]
        torch.testing.assert_close(found.detach(), U[:, :4] * sigma[:4] @ Vh[:4], rtol=1e-5, atol=1e-6)
        assert report.errors[name] == pytest.approx(float(sigma[4:].norm() / sigma.norm()), rel=1e-4)


def test_cutting_to_the_rank_it_has_is_exact():
    torch.manual_seed(0)
    A, B = torch.randn(3, 9, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    pair, error = fitted(Pair(torch.cat((A, A)), torch.cat((B, 2 * B))), 3)
    torch.testing.assert_close(pair.B.T @ pair.A, 3 * B.T @ A, **EXACT)
    assert error < 1e-12
    assert fitted(Pair(0 * torch.cat((A, A)), torch.cat((B, B))), 3)[1] == 0.0


def test_it_is_saved_and_loaded_as_any_adapter(tmp_path):
    source, wanted = make_lora(tmp_path / "lora")
    model = adapted()
    init_experts_from_lora(model, source, diversify=False)
    model.save_pretrained(tmp_path / "moe")
    again = PeftModel.from_pretrained(make_tiny_llama(**BASE), tmp_path / "moe").double()
    torch.testing.assert_close(logits(again), wanted, rtol=1e-5, atol=1e-6)


# --- refusals ---


def test_everything_that_does_not_fit_is_told_at_once_and_nothing_is_changed(tmp_path):
    wide = make_tiny_llama(**BASE)
    wide.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 80, bias=False, dtype=torch.float64)
    wide.model.layers[0].mlp.gate_proj = torch.nn.Linear(64, 80, bias=False, dtype=torch.float64)
    wide.model.layers[0].mlp.down_proj = torch.nn.Linear(80, 64, bias=False, dtype=torch.float64)
    dora, _ = make_lora(tmp_path / "dora", use_dora=True)
    odd, _ = make_lora(tmp_path / "odd", base=wide, target_modules=["up_proj", "v_proj"], bias="lora_only", r=2)
    config = json.loads((tmp_path / "odd" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "somebody/another"
    (tmp_path / "odd" / "adapter_config.json").write_text(json.dumps(config))
    base = make_tiny_llama(**BASE)
    base.config._name_or_path = "models/this-one"
    model = adapted(base=base, num_experts=3)
    before = logits(model)
    with pytest.raises(ValueError, match="cannot start from this, and nothing was changed") as caught:
        init_experts_from_lora(model, [dora, odd])
    for part in (
        f"{dora}: `use_dora`: DoRA",
        f"{odd}: `bias` is 'lora_only'",
        f"{odd}: it was trained on somebody/another, and this is models/this-one",
        f"{odd}: model.layers.0.mlp.up_proj: from 64 to 80, the model's layer from 64 to 96",
        f"{odd}: model.layers.1.self_attn.v_proj: no layer of the adapter",
        "model.layers.1.mlp.up_proj: 2 LoRAs for 3 experts",
    ):
        assert part in str(caught.value), part
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save`: it trained whole modules"),
        ({"lora_bias": True}, "`lora_bias`: its B has a bias"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens.* is no factor of a linear layer"),
    ],
    ids=str,
)
def test_what_no_expert_can_take_over_is_refused(settings, message, tmp_path):
    source, _ = make_lora(tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        init_experts_from_lora(adapted(), source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights` is 'pissa_niter_4', which changed the base"),
        ({"r": 3}, "the config says rank 3, the weights have 4"),
        ({"peft_type": "IA3"}, r"\(IA3\)', but must be the folder or the Hub id of a plain LoRA"),
    ],
)
def test_a_config_that_says_otherwise_is_refused(changes, message, tmp_path):
    source, _ = make_lora(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        init_experts_from_lora(adapted(), source)


def test_half_a_pair_and_no_pair_are_refused(tmp_path):
    source, _ = make_lora(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    first = next(key for key in state if "lora_B" in key)
    save_file({k: v for k, v in state.items() if k != first}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="its factors do not fit each other"):
        init_experts_from_lora(adapted(), source)
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="it has no factors at all"):
        init_experts_from_lora(adapted(), source)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, {"lora": []}, r"`lora` is \[\], but must be a folder or id, or a list or dict .* not empty"),
        ({}, {"lora": None}, "`lora` is None, but must be a folder or id"),
        ({}, {"diversify": "no"}, "`diversify` is 'no', but must be True or False"),
        ({}, {"how": "spwan"}, "`how` is 'spwan', but must be 'spawn' or 'split' for one LoRA. Did you mean 'spawn'"),
        ({"num_experts": 3}, {"how": "split"}, "rank 4 cannot be split evenly between 3 experts"),
        ({"num_experts": 2, "r": 1}, {"how": "split"}, "a part has rank 2, an expert 1: raise `r`"),
        ({"init_weights": False}, {}, "is not fresh: the experts of .* would be written over"),
        ({}, {"adapter_name": "x"}, "No layer of this model holds a routed adapter named 'x'"),
    ],
)
def test_wrong_requests_are_refused(settings, arguments, message, tmp_path):
    source, _ = make_lora(tmp_path)
    with pytest.raises(ValueError, match=message):
        init_experts_from_lora(adapted(**settings), **{"lora": source, **arguments})


def test_several_loras_are_not_split_and_an_ffn_mixture_neither(tmp_path):
    source, _ = make_lora(tmp_path, target_modules=["gate_proj", "up_proj", "down_proj"])
    with pytest.raises(ValueError, match="`how` is 'split', but must be 'each' for several LoRAs"):
        init_experts_from_lora(adapted(), [source] * 4, how="split")
    ffn = adapted(FfnMoeConfig, target_modules=["gate_proj", "up_proj", "down_proj"])
    with pytest.raises(ValueError, match="`how` is 'split', but must be 'spawn' for an FFN mixture"):
        init_experts_from_lora(ffn, source, how="split")


def test_not_while_a_trainer_runs(tmp_path):
    source, _ = make_lora(tmp_path)
    model = adapted()
    next(iter(routed_layers(model).values())).context.scale_balance(1.0, lambda: True)
    with pytest.raises(RuntimeError, match="a trainer is running on this model"):
        init_experts_from_lora(model, source)


def test_where_the_start_is_not_the_lora_a_warning_says_so(tmp_path):
    source, _ = make_lora(tmp_path)
    with pytest.warns(UserWarning, match="a token's weights do not sum to 1"):
        init_experts_from_lora(adapted(routing="top_1"), source)
    with pytest.warns(UserWarning, match="`router_init_std` is None: the experts start unlike each other"):
        init_experts_from_lora(adapted(router_init_std=None), source)
    targets = ["gate_proj", "up_proj", "down_proj"]
    source, _ = make_lora(tmp_path / "ffn", target_modules=targets)
    ffn = adapted(FfnMoeConfig, num_null_experts=2, target_modules=targets)
    with pytest.warns(UserWarning, match="a token's weights do not sum to 1"):  # null experts alone: 0
        init_experts_from_lora(ffn, source)


def test_the_same_base_under_another_path_is_the_same_base(tmp_path):
    source, wanted = make_lora(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/tiny"}))
    base = make_tiny_llama(**BASE)
    base.config._name_or_path = "models/tiny"
    model = adapted(base=base)
    init_experts_from_lora(model, source, diversify=False)
    torch.testing.assert_close(logits(model), wanted, **EXACT)
    base = make_tiny_llama(**BASE)
    base.config._name_or_path = "models/other"
    with pytest.raises(ValueError, match=re.escape("trained on org/tiny, and this is models/other")):
        init_experts_from_lora(adapted(base=base), source)
    init_experts_from_lora(adapted(base=base), source, check_base=False)
