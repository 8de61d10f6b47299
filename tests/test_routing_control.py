"""Experts and domains by hand: every adapter type, both kernels, `generate`, threads, and what is refused."""

import copy
import re
import threading

import pytest
import torch
from conftest import make_tiny_llama
from peft import get_peft_model

import moe_peft
from moe_peft import FfnMoeConfig, LinearMoeConfig, RankMoeConfig, task_types
from moe_peft.context import RoutingContext
from moe_peft.merge import routed_layers
from moe_peft.report import routing_report
from moe_peft.routing_control import ModelControl, seeing
from moe_peft.tuners import router as router_module


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXACT = {"rtol": 1e-9, "atol": 1e-11}
SEQUENCE = {"router_granularity": "sequence", "router_scope": "model"}

TYPES = {
    "linear": (LinearMoeConfig, {}),
    "linear, dense": (LinearMoeConfig, {"routing": "softmax"}),
    "linear, top 1": (LinearMoeConfig, {"routing": "top_1"}),
    "linear, shared": (LinearMoeConfig, {"num_shared_experts": 1, "num_null_experts": 1}),
    "linear, model": (LinearMoeConfig, SEQUENCE),
    "linear, random": (LinearMoeConfig, {"routing": "random"}),
    "ffn": (FfnMoeConfig, {}),
    "ffn, dense": (FfnMoeConfig, {"routing": "softmax"}),
    "ffn, top 1": (FfnMoeConfig, {"routing": "top_1_straight_through"}),
    "rank": (RankMoeConfig, {}),
    "rank, by itself": (RankMoeConfig, {"routing": "self_activated", "temperature": 0.2}),
}


def make_model(config_class=LinearMoeConfig, dtype=torch.float64, layers=2, **settings):
    torch.manual_seed(2)
    base = {"target_modules": ALL, "init_weights": False, "lora_alpha": 64}
    if config_class is RankMoeConfig:
        base |= {"r": 4, "top_k": 2}
    else:
        base |= {"num_experts": 4, "r": 4}
    return get_peft_model(make_tiny_llama(layers=layers, dtype=dtype), config_class(**{**base, **settings})).eval()


def named(model, names=("law", "code", "art", "news")):
    """As `domain_moe` has them."""
    for layer in routed_layers(model).values():
        layer.experts("default").domains = list(names)
    return model


def ids(rows=3, length=10):
    torch.manual_seed(1)
    return torch.randint(1, 100, (rows, length))


def logits(model, tokens=None, grad=False, **more):
    with torch.set_grad_enabled(grad):
        return model(ids() if tokens is None else tokens, **more).logits.detach()


def decisions(model, **more):
    """Router -> the weights it gave, `[T, N]`."""
    from moe_peft.routing import dense_weights

    found = {}
    with seeing(model, lambda router, routing: found.update({id(router): dense_weights(routing)})):
        logits(model, **more)
    return found


# --- the module's name ---


def test_the_name_is_the_context_manager_and_the_module_stays_importable():
    from moe_peft.routing import Routing, softmax_top_k

    assert moe_peft.routing is moe_peft.routing_control.routing
    assert Routing.__module__ == "moe_peft.routing"
    assert callable(softmax_top_k)


# --- what it does ---


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("grad", [False, True])  # the kernel for a few tokens, and the other
def test_holes_everywhere_are_the_base_model(kind, grad):
    config_class, settings = TYPES[kind]
    if "shared" in kind:
        settings = {"num_null_experts": 1}
    if config_class is FfnMoeConfig:  # elsewhere it has plain LoRAs
        settings = {**settings, "target_modules": ALL[4:]}
    model = make_model(config_class, **settings)
    with model.disable_adapter():
        expected = logits(model)
    assert not torch.allclose(logits(model), expected)
    with moe_peft.routing(model, ablate=range(4)):
        torch.testing.assert_close(logits(model, grad=grad), expected, **EXACT)
    if settings.get("routing") in ("softmax", "random"):
        with moe_peft.routing(model, weights=dict.fromkeys(range(4), 0.0)):
            torch.testing.assert_close(logits(model, grad=grad), expected, **EXACT)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("grad", [False, True])
def test_disabled_experts_get_no_weight_and_others_all_of_it(kind, grad):
    config_class, settings = TYPES[kind]
    model = make_model(config_class, **settings)
    before = decisions(model)
    with moe_peft.routing(disable=[0, "2"]):
        after = decisions(model, grad=grad)
    assert after.keys() == before.keys()
    assert len(after) > 0
    for router, weights in after.items():
        assert float(weights[:, [0, 2]].abs().sum()) == 0
        rule = model.peft_config["default"].routing
        if rule not in ("top_1", "self_activated"):
            torch.testing.assert_close(weights.sum(-1), before[router].sum(-1), **EXACT)
    assert all(float(weights[:, [0, 2]].sum()) > 0 for weights in before.values())


def test_one_expert_that_is_left_is_its_lora():
    """Of every layer: y + s B A x, whatever the router says."""
    model = make_model()
    with moe_peft.routing(model, weights={1: 0.5}, disable=[0, 2, 3]):
        half = logits(model)
    for layer in routed_layers(model).values():
        experts = layer.experts("default")
        A, B = experts.lora_A[1], 0.5 * experts.scaling * experts.lora_B[1]
        layer.base_layer.weight.data += (A.T @ B).T
    with model.disable_adapter():
        torch.testing.assert_close(half, logits(model), **EXACT)


@pytest.mark.parametrize("kind", ["linear", "linear, dense", "ffn", "ffn, dense", "rank"])
def test_the_two_kernels_agree_on_every_wish(kind):
    config_class, settings = TYPES[kind]
    model = make_model(config_class, **settings)
    for wish in (
        {"disable": [1]},
        {"ablate": [1]},
        {"force": [2]},
        {"weights": {3: 0.4}},
        {"gate_floor": 0.9},
        {"force": [0], "disable": [1], "ablate": [0], "gate_floor": 0.5},
    ):
        with moe_peft.routing(model, **wish):
            few = logits(model)
            torch.testing.assert_close(logits(model, grad=True), few, **EXACT)
        if wish != {"force": [2]} or "dense" not in kind:  # there every expert is chosen
            assert not torch.allclose(few, logits(model)), wish


@pytest.mark.parametrize("kind", ["ffn", "ffn, dense", "ffn, top 1"])
def test_the_block_s_own_code_follows_as_the_fast_path_does(kind):
    config_class, settings = TYPES[kind]
    model = make_model(config_class, **settings)
    wishes = [
        {"ablate": [1]},
        {"weights": {2: 0.3}},
        {"weights": {2: 1.7}, "ablate": [0]},
        {"force": [3], "disable": [0]},
    ]
    fast = []
    for wish in wishes:
        with moe_peft.routing(model, **wish):
            fast.append(logits(model))
    for layer in routed_layers(model).values():
        if getattr(layer, "block", None) is not None and layer.block.fast is not None:
            layer.block.fast.enabled = False
    for wish, expected in zip(wishes, fast, strict=True):
        with moe_peft.routing(model, **wish):
            torch.testing.assert_close(logits(model), expected, **EXACT)


@pytest.mark.parametrize("config_class", [LinearMoeConfig, FfnMoeConfig, RankMoeConfig])
def test_more_slots_are_those_of_an_adapter_that_has_them(config_class):
    model, wide = make_model(config_class, lora_alpha=2), make_model(config_class, top_k=3, lora_alpha=2)
    if config_class is RankMoeConfig:
        wide = make_model(config_class, top_k=3, lora_alpha=3)  # alpha over top_k is the scale
    with moe_peft.routing(model, top_k=3):
        torch.testing.assert_close(logits(model), logits(wide), **EXACT)


def test_blocks_add_up_inside_and_end_outside():
    model = make_model()
    plain = logits(model)
    with moe_peft.routing(model, disable=[0], top_k=3):
        one = logits(model)
        with moe_peft.routing(disable=[1], top_k=1):
            both = decisions(model)
        assert torch.equal(logits(model), one)
    assert all(float(w[:, :2].sum()) == 0 and bool((w > 0).sum(-1).eq(1).all()) for w in both.values())
    assert torch.equal(logits(model), plain)
    assert not RoutingContext.controlled


def test_an_error_ends_the_block():
    model = make_model()
    with pytest.raises(RuntimeError, match="mine"), moe_peft.routing(model, disable=[0]):
        raise RuntimeError("mine")
    with pytest.raises(ValueError, match="`domain`"):
        model(ids(), domain="law")
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        named(model)(domain="law")
    assert not RoutingContext.controlled


def test_layers_by_name():
    model = make_model(layers=3)
    layers = routed_layers(model)
    with moe_peft.routing(model, disable={"layers.1": [0], "q_proj": [3]}):
        found = decisions(model)
    for name, layer in layers.items():
        weights = found[id(layer.experts("default"))]
        assert (float(weights[:, 0].sum()) == 0) == (".1." in name)
        assert (float(weights[:, 3].sum()) == 0) == ("q_proj" in name)


def test_a_copy_and_another_model_are_left_alone():
    model, other = make_model(), make_model()
    twin = copy.deepcopy(model)
    plain = logits(model)
    with moe_peft.routing(model, disable=[0]):
        assert torch.equal(logits(other), plain)
        assert torch.equal(logits(twin), plain)
        assert not torch.allclose(logits(model), plain)
    named(twin)
    assert not torch.allclose(logits(twin, domain="art"), plain)
    assert torch.equal(logits(model), plain)


def test_layers_with_fewer_experts_have_nothing_to_disable():
    model = make_model(num_experts="1:3", layers=2, routing="top_1")
    with moe_peft.routing(model, disable=[2]):
        found = decisions(model)
    assert len(found) == 7
    assert all(float(weights[:, 2].sum()) == 0 for weights in found.values())


def test_the_report_counts_what_the_hand_chose():
    model = make_model()
    with moe_peft.routing(model, disable=[2]):
        report = routing_report(model, {"all": [{"input_ids": ids()}]})
    assert all(counts[0][2] == 0 and sum(counts[0]) == 60 for counts in report.counts.values())


# --- nothing when nothing is asked ---


def test_without_a_block_nothing_is_asked(monkeypatch):
    def refuse(*args):
        raise AssertionError

    monkeypatch.setattr(router_module, "override_of", refuse)
    for config_class, settings in TYPES.values():
        logits(make_model(config_class, **settings))
    model = make_model()
    with pytest.raises(AssertionError), moe_peft.routing(model, disable=[0]):
        logits(model)


def test_the_model_is_as_it_was_after_unloading():
    model = make_model()
    base = model.unload()
    assert "generate" not in base.__dict__
    hooks = [*base._forward_pre_hooks.values(), *base._forward_hooks.values()]
    assert not any(isinstance(getattr(hook, "__self__", None), ModelControl) for hook in hooks)
    again = named(get_peft_model(base, LinearMoeConfig(num_experts=4, target_modules=ALL)))
    again.eval().generate(input_ids=ids(), max_new_tokens=2, domain="law")


def test_in_a_compiled_layer():
    model = make_model(dtype=torch.float32, layers=1, target_modules=["q_proj"])
    plain = logits(model)
    with moe_peft.routing(model, disable=[0]):
        off = logits(model)
    model.base_model.model.model.layers[0].compile(backend="eager")
    torch.testing.assert_close(logits(model), plain)
    with moe_peft.routing(model, disable=[0]):
        torch.testing.assert_close(logits(model), off)
    torch.testing.assert_close(logits(model), plain)


# --- domains ---


GIVEN = {"routing": "given"}
GROUPS = {"expert_groups": [[0, 1], [1, 2, 3]]}


@pytest.mark.parametrize("config_class", [LinearMoeConfig, FfnMoeConfig])
@pytest.mark.parametrize("settings", [GIVEN, GROUPS], ids=str)
def test_where_experts_have_groups_a_domain_is_a_task_type(config_class, settings):
    model = make_model(config_class, **settings)
    for domain, types in ((1, [1, 1, 1]), ("0", [0, 0, 0]), (["0", 1, 1], [0, 1, 1])):
        with task_types(model, types):
            expected = logits(model)
        assert torch.equal(logits(model, domain=domain), expected)
        with moe_peft.routing(model, domain=domain):
            assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", ["linear", "linear, shared", "linear, model", "ffn", "ffn, dense"])
def test_a_named_domain_is_its_expert_alone(kind):
    config_class, settings = TYPES[kind]
    model = named(make_model(config_class, **settings))
    for layer in routed_layers(model).values():
        assert layer.expert_names("default") == ["law", "code", "art", "news"]
    rows = logits(model, domain=["art", "law", "art"])
    for row, domain in enumerate(("art", "law", "art")):
        torch.testing.assert_close(rows[row], logits(model, domain=domain)[row], **EXACT)
    off = ["law", "code", "news"]
    if "shared" not in kind:  # there is a null expert to go to
        expected = logits(model, domain="art")
        with moe_peft.routing(model, weights={"art": 1.0}, disable=off):
            torch.testing.assert_close(logits(model), expected, **EXACT)


@pytest.mark.parametrize("typed", [True, False])
def test_generate_takes_a_domain_for_each_row(typed):
    model = named(make_model(task_type="CAUSAL_LM" if typed else None))
    tokens, mask = ids(), torch.ones(3, 10, dtype=torch.long)
    mask[0, :3] = 0
    domains = ["code", "law", "news"]
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    plain = model.generate(input_ids=tokens, attention_mask=mask, **settings)
    for beams, per_row, cache in ((1, 1, True), (1, 1, False), (3, 1, True), (3, 2, True), (3, 2, False)):
        how = {"num_beams": beams, "num_return_sequences": per_row, "use_cache": cache, **settings}
        batch = model.generate(input_ids=tokens, attention_mask=mask, domain=domains, **how)
        assert not torch.equal(batch[::per_row], plain)
        for row, domain in enumerate(domains):
            part = slice(row, row + 1)
            alone = model.generate(input_ids=tokens[part], attention_mask=mask[part], domain=domain, **how)
            assert torch.equal(batch[row * per_row : (row + 1) * per_row], alone)
        with moe_peft.routing(model, domain=domains):
            assert torch.equal(model.generate(input_ids=tokens, attention_mask=mask, **how), batch)
    model.generate(input_ids=tokens, domain=domains, do_sample=True, num_return_sequences=3, max_new_tokens=2)
    assert torch.equal(model.generate(input_ids=tokens, attention_mask=mask, **settings), plain)


@pytest.mark.parametrize("settings", [GIVEN, {}], ids=str)
def test_threads_do_not_mix(settings):
    model = make_model(**settings)
    wishes = [{"domain": 0}, {"domain": 2}] if settings is GIVEN else [{"disable": [0]}, {"force": [1], "top_k": 1}]
    alone = []
    for wish in wishes:
        with moe_peft.routing(model, **wish):
            alone.append(logits(model))
    assert not torch.allclose(*alone)
    wrong, barrier, tokens = [], threading.Barrier(2), ids()

    def serve(number):
        barrier.wait()
        for _ in range(20):
            with moe_peft.routing(model, **wishes[number]):
                found = logits(model, tokens)
                if not torch.allclose(found, alone[number], **EXACT):
                    wrong.append(float((found - alone[number]).abs().max()))

    threads = [threading.Thread(target=serve, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not RoutingContext.controlled


# --- what is refused ---

REFUSED = [
    ({"disable": ["0", 7]}, "`disable` is 7, but must be experts from 0 to 3. Count"),
    ({"ablate": ["lwa"]}, "`ablate` is 'lwa', but must be of 'law', 'code', 'art', 'news'. Did you mean 'law'"),
    ({"weights": {-1: 1.0}}, "`weights` is -1, but must be experts from 0 to 3"),
    (
        {"disable": range(4)},
        r"`disable` is \['0', '1', '2', '3'\], but must be some of the 4 experts in model.layers.0",
    ),
    ({"force": [0, 1, 2]}, r"`force` is .*, but must be at most 2 experts, as a token has 2 slots in .*Raise `top_k`"),
    ({"force": [0], "disable": [0]}, r"`force` is \['0'\], but must be experts that are not disabled"),
    ({"weights": {0: -0.5}}, "`weights` is -0.5, but must be a finite number of at least 0 for 0"),
    ({"weights": {0: float("nan")}}, "`weights` is nan, but must be a finite number"),
    ({"weights": {0: True}}, "`weights` is True, but must be a finite number"),
    ({"weights": [0.5]}, r"`weights` is \[0.5\], but must be a dict"),
    ({"disable": "law"}, r"`disable` is 'law', but must be a list of names or numbers .* Write `disable=\['law'\]`"),
    ({"force": [1.5]}, r"`force` is \[1.5\], but must be a list of names"),
    ({"disable": {"layers.9": [0]}}, "`disable` is 'layers.9', but must be a part of the name of a layer .*layers.0"),
    ({"domain": "law"}, "`domain` is 'law', but must be left out where the adapter's experts have no names"),
    ({"domain": []}, r"`domain` is \[\], but must be a name, or a list"),
    ({"domain": ["law", None]}, "`domain` is .*, but must be a name, or a list"),
    ({"top_k": 0}, "`top_k` is 0, but must be a whole number of at least 1"),
    ({"top_k": 5}, "`top_k` is 5, but must be at most 4"),
    ({"gate_floor": 1.5}, "`gate_floor` is 1.5, but must be a number from 0 to 1"),
]


@pytest.mark.parametrize(("wish", "sentence"), REFUSED, ids=str)
def test_what_does_not_fit_is_refused_on_entering(wish, sentence):
    model = named(make_model()) if "lwa" in str(wish) else make_model()
    with pytest.raises(ValueError, match=sentence), moe_peft.routing(model, **wish):
        pytest.fail("entered")
    assert not RoutingContext.controlled
    with pytest.raises(ValueError, match=sentence), moe_peft.routing(**wish):  # known once the model runs
        logits(model)
    assert not RoutingContext.controlled


NAMED = [
    ({"domain": "atr"}, {}, "`domain` is 'atr', but must be one of 'law', .*Did you mean 'art'"),
    (
        {"domain": "art", "disable": ["art"]},
        {},
        "`domain` is 'art', but must be a domain whose expert is not disabled",
    ),
    ({"domain": "art", "force": ["law"]}, {}, r"`force` is .* left out with `domain`, which has chosen"),
    ({"domain": "art", "top_k": 1}, {}, r"`top_k` is 1, but must be left out with `domain`"),
    ({"top_k": 2}, {"routing": "softmax"}, "`top_k` is 2, but must be left out with `routing` = 'softmax'"),
    ({"force": ["law", "art"]}, {"routing": "top_1"}, "`force` is .*at most 1 experts"),
    ({"force": ["law"]}, {"routing": "sparsegen"}, "`force` is .*left out with `routing` = 'sparsegen'.*weights"),
    ({"domain": 1, "disable": [1]}, GIVEN, "`domain` is 'code', but must be a domain whose expert is not disabled"),
    ({"disable": ["law", "code"]}, GROUPS, "`disable` is .*some of the experts of group 0"),
]


@pytest.mark.parametrize(("wish", "settings", "sentence"), NAMED, ids=str)
def test_what_does_not_go_together_is_refused(wish, settings, sentence):
    model = named(make_model(**settings))
    with pytest.raises(ValueError, match=sentence), moe_peft.routing(model, **wish):
        pytest.fail("entered")


def test_domains_that_are_not_as_many_as_the_rows_are_refused():
    model = named(make_model())
    sentence = re.escape("`domain` is ['law', 'art'], but must be one name, or 3 names, one per row of the batch")
    with pytest.raises(ValueError, match=sentence):
        model(ids(), domain=["law", "art"])
    with pytest.raises(ValueError, match=sentence):
        model.generate(input_ids=ids(), domain=["law", "art"])
    with pytest.raises(ValueError, match=sentence), moe_peft.routing(model, domain=["law", "art"]):
        model.generate(input_ids=ids())
    four = ids(4)
    with pytest.raises(ValueError, match="4 names"):
        model(four, domain=["law", "art"])  # four rows are no beams of two
    assert not RoutingContext.controlled


def test_training_is_refused():
    model = named(make_model()).train()
    sentence = r"`training` is True, but must be False within `moe_peft.routing`.*`model.eval\(\)`"
    with pytest.raises(ValueError, match=sentence), moe_peft.routing(model, disable=[0]):
        pytest.fail("entered")
    with pytest.raises(ValueError, match=sentence):
        model(ids(), domain="law")
    with pytest.raises(ValueError, match=sentence), moe_peft.routing(disable=["law"]):
        model(ids())
    model.eval()
    with pytest.raises(ValueError, match=sentence), moe_peft.routing(model, disable=["law"]):
        model.train()(ids())


def test_a_model_without_routers_is_refused():
    with pytest.raises(ValueError, match="`model` is 'LlamaForCausalLM', but must be a model with routed layers"):
        with moe_peft.routing(make_tiny_llama(), disable=[0]):
            pass
    single = make_model(num_experts=1, routing="softmax")
    with pytest.raises(ValueError, match="an active adapter that routes"), moe_peft.routing(single, disable=[0]):
        pass
    model = make_model()
    with pytest.raises(ValueError, match="`model` is None, .*with moe_peft.routing"), moe_peft.routing(disable=[0]):
        model.base_model.model.model(ids())
