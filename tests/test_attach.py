"""The injected balance gradient equals that of an explicit loss, counts once, and sees the real tokens, whatever runs."""

import copy
import gc
import pickle

import pytest
import torch
import transformers
from conftest import make_tiny_llama
from peft import get_peft_model
from torch import nn

from moe_peft import LinearMoeConfig, TaskTypeCollator, attach, context
from moe_peft.attach import RouterState, RoutingContext, balanced, set_aux_scale, switch_step
from moe_peft.balance import LOAD_WINDOW, localized_loss, switch_loss
from moe_peft.masks import real_from_mask
from moe_peft.routing import softmax_top_k
from moe_peft.tuners import router as router_module
from moe_peft.watch import find_routers


COEF = 0.1
MODES = ("none", "reentrant", "non-reentrant")
PINNED = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
LOCALIZED = {"routing": "softmax", "balance": "localized", "balance_delta": 0.3}


def make_model(mode="none", base=None, targets=("q_proj", "up_proj"), **settings):
    base = make_tiny_llama(layers=2, dtype=torch.float64) if base is None else base
    torch.manual_seed(2)
    settings = {"num_experts": 4, "router_aux_loss_coef": COEF, "init_weights": False, **settings}
    model = get_peft_model(base, LinearMoeConfig(target_modules=list(targets), **settings))
    if mode != "none":
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
    return model.train()


def context_of(model) -> RoutingContext:
    return next(module.context for module in model.modules() if hasattr(module, "context"))


def padded(rows=3, length=10, left=2, right=0):
    torch.manual_seed(1)
    tokens = torch.randint(1, 100, (rows, length))
    mask = torch.ones_like(tokens)
    mask[0, :left] = 0
    if right:
        mask[1, -right:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def explicit(monkeypatch, batches, aux, **settings):
    """Gradients of `sum of task losses + COEF * sum of aux`, with the injection replaced by a note of the logits."""
    seen = []

    def noted(logits, state, rule, top_k, coef, gradient, real, task_types, *context_and_rows):
        seen.append((rule(logits, top_k), real, task_types))
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(router_module, "balanced", noted)
        model = make_model(**settings)
        torch.manual_seed(3)  # of the dropout
        loss = sum(model(**batch).loss for batch in batches) + COEF * sum(aux(*item) for item in seen)
        loss.backward()
    assert len(seen) == 4 * len(batches)
    return gradients(model)


def pinned_switch(routing, real, task_types):
    return switch_loss(routing, real, PINNED)


@pytest.fixture
def _pinned_load(monkeypatch):
    monkeypatch.setattr(RouterState, "updated_load", lambda self, counts: PINNED)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"routing": "top_1"}, {"router_scale": 3.0}, {"num_shared_experts": 1}, {"lora_dropout": 0.3}],
    ids=str,
)
def test_the_gradient_is_that_of_an_explicit_loss(mode, settings, monkeypatch):
    batch = padded()
    expected = explicit(monkeypatch, [batch], lambda routing, real, _: switch_loss(routing, real), **settings)
    model = make_model(mode, **settings)
    torch.manual_seed(3)
    model(**batch).loss.backward()
    assert largest_difference(gradients(model), expected) <= 1e-12
    without = make_model(router_aux_loss_coef=0.0, **settings)
    torch.manual_seed(3)
    without(**batch).loss.backward()
    assert largest_difference(gradients(without), expected) > 1e-4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("_pinned_load")
def test_two_forward_passes_before_one_backward_pass(mode, monkeypatch):
    """A chosen and a rejected answer, as DPO-like losses do. A mask kept per model would be that of the last batch."""
    batches = [padded(left=4), padded(rows=3, left=0, right=3)]
    expected = explicit(monkeypatch, batches, pinned_switch)
    model = make_model(mode)
    sum(model(**batch).loss for batch in batches).backward()
    assert largest_difference(gradients(model), expected) <= 1e-12
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert [int(router.state.tokens) for router in find_routers(model).values()] == [real] * 4


@pytest.mark.usefixtures("_pinned_load")
def test_the_scale_undoes_that_of_a_grad_scaler(monkeypatch):
    batch = padded()
    expected = explicit(monkeypatch, [batch], pinned_switch)
    model = make_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    set_aux_scale(1024.0)
    scaler.scale(model(**batch).loss).backward()
    scaler.unscale_(optimizer)
    assert largest_difference(gradients(model), expected) <= 1e-12


@pytest.mark.usefixtures("_pinned_load")
def test_accumulation_averages_the_balance_loss(monkeypatch):
    batches = [padded(left=1), padded(left=4)]
    model = make_model()
    set_aux_scale(0.5)
    for batch in batches:
        (model(**batch).loss / 2).backward()
    expected = [explicit(monkeypatch, [batch], pinned_switch) for batch in batches]
    mean = {name: (expected[0][name] + expected[1][name]) / 2 for name in expected[0]}
    assert largest_difference(gradients(model), mean) <= 1e-12


def test_a_scale_is_set_for_every_model_or_for_one():
    model, other = make_model(), make_model()
    set_aux_scale(0.5)
    set_aux_scale(0.25, model)
    assert (context_of(model).scale, context_of(other).scale) == (0.25, 0.5)
    assert context_of(make_model()).scale == 1  # made later
    assert context_of(copy.deepcopy(model)).scale == 0.25


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_counts_on_its_own(copied):
    model, batch = make_model(), padded()
    model(**batch).loss.backward()
    twin = copied(model)
    twin.zero_grad()
    before = {name: router.state.counts.clone() for name, router in find_routers(model).items()}
    twin(**batch).loss.backward()
    for (name, router), other in zip(find_routers(model).items(), find_routers(twin).values(), strict=True):
        assert torch.equal(router.state.counts, before[name])
        assert torch.equal(other.state.counts, 2 * before[name])
        assert int(router.state.number) != int(other.state.number)
        assert attach._states[int(other.state.number)] is other.state


def test_a_model_that_is_gone_leaves_no_state_behind():
    gc.collect()
    before = len(attach._states), len(context._live)
    model = make_model()
    model(**padded()).loss.backward()
    twin = copy.deepcopy(model)
    assert (len(attach._states), len(context._live)) == (before[0] + 8, before[1] + 2)
    del model, twin
    gc.collect()
    assert (len(attach._states), len(context._live)) == before


@pytest.mark.parametrize("mode", MODES)
def test_a_micro_batch_is_counted_once(mode):
    model, batch = make_model(mode), padded(left=3)
    loss = model(**batch).loss
    assert all(router.state.tokens is None for router in find_routers(model).values())  # not before backward
    loss.backward()
    for router in find_routers(model).values():
        state = router.state
        assert int(state.tokens) == 27
        assert int(state.counts.sum()) == 2 * 27
        torch.testing.assert_close(state.probability.sum(), state.tokens)
        torch.testing.assert_close(state.load, state.counts)


def test_passes_without_gradient_are_not_counted():
    model, batch = make_model(), padded()
    with torch.no_grad():
        model(**batch)
    model.eval()
    model(**batch).loss.backward()
    assert all(r.state.tokens is None and r.state.load is None for r in find_routers(model).values())


def test_training_rounds_alike_with_and_without_gradient():
    """A re-entrant checkpoint runs a layer without first, and the last bit can decide which expert a token visits."""
    model, batch = make_model(base=make_tiny_llama(layers=2)), padded()
    with torch.no_grad():
        without = model(**batch).logits
    assert torch.equal(model(**batch).logits, without)


def test_a_report_counts_in_inference():
    model, batch = make_model().eval(), padded(left=3)
    context_of(model).recording = True
    with torch.no_grad():
        model(**batch)
    assert [int(r.state.tokens) for r in find_routers(model).values()] == [27] * 4
    assert all(r.state.load is None for r in find_routers(model).values())  # what training balances is not touched


def test_without_a_balance_loss_only_who_watches_counts():
    model, batch = make_model(balance="none", router_aux_loss_coef=0.0), padded()
    model(**batch).loss.backward()
    alone = gradients(model)
    assert all(r.state.tokens is None for r in find_routers(model).values())
    model.zero_grad()
    context_of(model).watching = True
    model(**batch).loss.backward()
    assert all(int(r.state.tokens) == 28 for r in find_routers(model).values())
    assert largest_difference(gradients(model), alone) == 0


def test_the_sums_are_those_of_the_definition():
    logits = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    real = torch.arange(20) % 3 != 0
    state, context = RouterState(), RoutingContext()
    context.watching = True
    for _ in range(2):
        balanced(logits.requires_grad_(), state, softmax_top_k, 2, 0.0, None, real, None, context).sum().backward()
    probabilities = logits.detach().softmax(-1)[real]
    torch.testing.assert_close(state.probability, 2 * probabilities.sum(0))
    torch.testing.assert_close(state.entropy, -2 * (probabilities * probabilities.log()).sum())
    chosen = logits.detach()[real].topk(2).indices.flatten().bincount(minlength=4)
    assert state.counts.tolist() == (2 * chosen).tolist()
    assert int(state.tokens) == 2 * int(real.sum())
    state.reset()
    assert state.counts is state.probability is state.entropy is state.tokens is None


def test_the_load_is_taken_over_a_window_of_micro_batches():
    generator = torch.Generator().manual_seed(0)
    state, expected, context = RouterState(), torch.zeros(4, dtype=torch.float64), RoutingContext()
    for _ in range(30):
        logits = torch.randn(8, 4, dtype=torch.float64, generator=generator).requires_grad_()
        balanced(logits, state, softmax_top_k, 2, 1.0, switch_step, None, None, context).sum().backward()
        counts = logits.detach().topk(2).indices.flatten().bincount(minlength=4)
        expected = expected * (1 - 1 / LOAD_WINDOW) + counts
        weight = logits.detach().requires_grad_()
        switch_loss(softmax_top_k(weight, 2), None, expected / expected.sum()).backward()
        assert (logits.grad - 1 - weight.grad).abs().max() <= 1e-12
    torch.testing.assert_close(state.load, expected)


def test_the_forward_pass_is_untouched():
    model, batch = make_model(), padded()
    plain = make_model(balance="none", router_aux_loss_coef=0.0)
    assert torch.equal(model(**batch).logits, plain(**batch).logits)


S = 4
CAUSAL = torch.ones(S, S, dtype=torch.bool).tril()
FIRST_PADDED = torch.tensor([[False, True, True, True], [True] * S])
EXPANDED = CAUSAL & FIRST_PADDED[:, None, None, :]
STATES = torch.zeros(2, S, 8)


def additive(mask, dtype=torch.float32):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, None),
        (FIRST_PADDED, FIRST_PADDED),
        (FIRST_PADDED.long(), FIRST_PADDED),
        (torch.cat((torch.ones(2, 3), FIRST_PADDED.long()), 1), FIRST_PADDED),  # cached positions first
        (EXPANDED, FIRST_PADDED),
        (EXPANDED.expand(2, 3, S, S), FIRST_PADDED),
        (additive(EXPANDED), FIRST_PADDED),
        (additive(EXPANDED, torch.bfloat16), FIRST_PADDED),
        (torch.cat((torch.ones(2, 1, S, 3, dtype=torch.bool), EXPANDED), -1), FIRST_PADDED),
        (FIRST_PADDED[:, None, None, :], FIRST_PADDED),  # the same for all queries
        (additive(FIRST_PADDED)[:, None, None, :], FIRST_PADDED),
        (torch.zeros(2, S, S), None),  # three dimensions: unknown
        ("something else", None),
    ],
)
def test_real_tokens_are_read_from_any_mask(mask, expected):
    found = real_from_mask(mask, STATES)
    assert (found is None) if expected is None else torch.equal(found, expected)


def test_real_tokens_are_read_from_a_block_mask():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")

    def causal_and_real(b, h, q, kv):
        return (q >= kv) & FIRST_PADDED[b, kv]

    block = flex.create_block_mask(causal_and_real, 2, None, S, S, device="cpu")
    assert torch.equal(real_from_mask(block, STATES), FIRST_PADDED)


SIZES = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
GROUPED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
FAMILIES = {  # transformers' name -> config, targets inside and after attention
    "Llama": (GROUPED, ("q_proj", "up_proj")),
    "Qwen3": ({**GROUPED, "head_dim": 8}, ("q_proj", "up_proj")),
    "Gemma3Text": (
        {**GROUPED, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        ("q_proj", "up_proj"),
    ),  # fmt: skip
    "OPT": ({**SIZES, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32}, ("q_proj", "fc1")),
    "GPT2": ({"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, ("c_attn", "c_fc")),
    "Bloom": ({"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4}, ("query_key_value", "dense_h_to_4h")),
    "Falcon": (SIZES, ("query_key_value", "dense_h_to_4h")),
    "GPTNeoX": (
        {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64},
        ("query_key_value", "dense_h_to_4h"),
    ),
}
PADDINGS = {"left": (4, 0), "right": (0, 3), "both": (4, 3), "no": (0, 0)}


def make_family(family, attention):
    sizes, targets = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes, attn_implementation=attention)
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    base = getattr(transformers, family.removesuffix("Text") + head)(config)
    return make_model(base=base, targets=targets)


@pytest.mark.parametrize(
    ("family", "attention"), [(f, a) for f in FAMILIES for a in ("eager", "sdpa") if (f, a) != ("Bloom", "sdpa")]
)  # Bloom has no sdpa
def test_every_family_tells_padding_from_tokens(family, attention):
    model = make_family(family, attention)
    seen = []
    for router in find_routers(model).values():
        router.register_forward_pre_hook(lambda module, given: seen.append(given[2].real))
    assert len(find_routers(model)) == 4
    for left, right in PADDINGS.values():
        batch = padded(left=left, right=right)
        model(**batch).loss.backward()
        mask = batch["attention_mask"].bool()
        assert len(seen) == 4
        for real in seen:
            assert bool(mask.all()) if real is None else torch.equal(real, mask)
        for router in find_routers(model).values():
            assert int(router.state.tokens) == int(mask.sum())
            router.state.reset()
        seen.clear()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_sequences_have_no_padding(attention):
    model = make_family("Llama", attention)
    tokens = padded(rows=1, left=0)["input_ids"]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]])
    model(input_ids=tokens, position_ids=positions, labels=tokens).loss.backward()
    assert [int(router.state.tokens) for router in find_routers(model).values()] == [10] * 4


def test_what_padding_holds_does_not_reach_the_router():
    batch = padded(left=4)
    batch["labels"][0, 4] = -100  # the last padding position would predict it
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7)}
    found = []
    for given in (batch, other):
        model = make_model()
        model(**given).loss.backward()
        found.append(gradients(model))
    assert largest_difference(*found) <= 1e-14


def test_cross_attention_leaves_the_mask_alone():
    class FooAttention(nn.Module):
        def forward(self, hidden_states, attention_mask=None, key_value_states=None):
            return hidden_states

    layer = nn.ModuleDict({"own": FooAttention(), "cross": FooAttention()}).train()
    context = RoutingContext()
    context.watch_attention(layer)
    context.watch_attention(layer)  # hooked once all the same
    assert [len(m._forward_pre_hooks) for m in layer.values()] == [1, 1]
    states = STATES.clone().requires_grad_()
    layer["own"](states, FIRST_PADDED)
    layer["cross"](states, torch.ones(2, 9), key_value_states=torch.zeros(2, 9, 8))
    assert torch.equal(context.real, FIRST_PADDED)
    assert torch.equal(context.real_tokens(8), FIRST_PADDED.flatten())
    assert context.real_tokens(18) is None  # the other sequence's tokens


def test_a_copy_has_a_context_of_its_own():
    model = make_model()
    twin = copy.deepcopy(model)
    assert context_of(twin) is not context_of(model)
    assert len({id(m.context) for m in twin.modules() if hasattr(m, "context")}) == 1
    twin(**padded(left=3)).loss.backward()
    assert [int(r.state.tokens) for r in find_routers(twin).values()] == [27] * 4
    assert all(r.state.tokens is None for r in find_routers(model).values())
    assert context_of(model).real is None


def test_unloading_takes_the_hooks_off_and_a_new_adapter_puts_its_own_on():
    model = make_model(num_experts=1)
    base = model.merge_and_unload()
    gc.collect()
    assert not any(module._forward_pre_hooks for module in base.modules())
    again = make_model(base=make_model(base=base).unload(), **LOCALIZED)
    again(**padded(), task_types=torch.tensor([0, 1, 1])).loss.backward()  # old hooks would have taken them


@pytest.mark.parametrize("mode", MODES)
def test_task_types_reach_the_localized_balance(mode, monkeypatch):
    batches = [
        {**padded(left=4), "task_types": torch.tensor([0, 1, 0])},
        {**padded(), "task_types": torch.tensor([1, 1, 0])},
    ]

    def aux(routing, real, task_types):
        return localized_loss(routing, task_types, 0.3, real)

    expected = explicit(monkeypatch, batches, aux, **LOCALIZED)
    model = make_model(mode, **LOCALIZED)
    sum(model(**batch).loss for batch in batches).backward()
    assert largest_difference(gradients(model), expected) <= 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_localized_balance_says_how_to_pass_task_types(mode):
    model = make_model(mode, **LOCALIZED)
    with pytest.raises(
        ValueError,
        match=r"`balance` is 'localized', but must be 'none' where .* Add a column `task_type`.*TaskTypeCollator",
    ):
        model(**padded()).loss.backward()
    with pytest.raises(
        ValueError, match=r"`task_types` is \[2\], but must be of the shape of 3 numbers, .* turn both off"
    ):
        model(**padded(), task_types=torch.tensor([0, 1]))
    model.eval()
    model(**padded())  # inference does without


def test_the_task_type_collator():
    def pad(rows):
        assert all("task_type" not in row for row in rows)
        return {"input_ids": nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], True)}

    collate = TaskTypeCollator(pad)
    batch = collate([{"input_ids": [1, 2], "task_type": 1}, {"input_ids": [3], "task_type": 0}])
    assert batch["task_types"].tolist() == [1, 0]
    assert batch["input_ids"].tolist() == [[1, 2], [3, 0]]
    with pytest.raises(ValueError, match=r"`column` is 'task_type', but must be a column of every row: input_ids"):
        collate([{"input_ids": [1]}])
    with pytest.raises(ValueError, match=r"`kind` is \[0, 2\], but must be whole numbers from 0 to 1"):
        TaskTypeCollator(pad, "kind")([{"input_ids": [1], "kind": 0}, {"input_ids": [1], "kind": 2}])
    named = TaskTypeCollator(pad, "domain", names=["law", "medicine", "code"])
    batch = named([{"input_ids": [1], "domain": kind} for kind in ("code", "law", 1, 2.0)])
    assert batch["task_types"].tolist() == [2, 0, 1, 2]
    with pytest.raises(ValueError, match=r"`domain` is 'lwa', but must be one of 'law', .*Did you mean 'law'"):
        named([{"input_ids": [1], "domain": "lwa"}])
    for value in ("law", 0.5, True, None):
        with pytest.raises(ValueError, match=rf"`kind` is {value!r}, but must be a whole number .* `names="):
            TaskTypeCollator(pad, "kind")([{"input_ids": [1], "kind": value}])


def test_a_compiled_model_trains_alike():
    def small():
        return make_model(base=make_tiny_llama(layers=1, dtype=torch.float64), targets=["q_proj"])

    model, compiled, batch = small(), small(), padded()
    model(**batch).loss.backward()
    expected = gradients(model)
    compiled.base_model.model.model.layers[0].compile(backend="eager")
    for scale in (1.0, 0.5):  # a new scale does not compile anew
        set_aux_scale(scale)
        for router in find_routers(compiled).values():
            router.state = RouterState()
        compiled.zero_grad()
        compiled(**batch).loss.backward()
        if scale == 1:
            assert largest_difference(gradients(compiled), expected) <= 1e-12
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
            torch._dynamo.utils.counters.clear()
    assert not torch._dynamo.utils.counters["stats"].get("unique_graphs")
    assert [int(router.state.tokens) for router in find_routers(compiled).values()] == [28]
