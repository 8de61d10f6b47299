"""Experts added to a trained adapter and cut out of it: what stays is bit for bit, what changes is what is said."""

import copy

import pytest
import torch
from conftest import make_tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from moe_peft import (
    LinearMoeConfig,
    RankMoeConfig,
    ShardPoolConfig,
    add_experts,
    expert_scores,
    freeze_experts,
    prune_experts,
)
from moe_peft.merge import routed_layers
from moe_peft.pruning import easy_ep, easy_ep_naive


EXACT = {"rtol": 1e-9, "atol": 1e-11}
NAMES = ("lora_A", "lora_B", "router")


def adapted(base=None, **settings) -> PeftModel:
    torch.manual_seed(3)
    given = {
        "num_experts": 4,
        "r": 2,
        "lora_alpha": 32,
        "target_modules": ["q_proj", "up_proj"],
        "init_weights": False,
    }
    config = LinearMoeConfig(**{**given, "router_init_std": 0.5, "task_type": "CAUSAL_LM", **settings})
    return get_peft_model(base or make_tiny_llama(layers=2), config).eval()


def text(batches: int = 2, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(1, 100, (3, 12), generator=generator)} for _ in range(batches)]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**text(1, seed=5)[0]).logits


def all_experts(model, adapter_name="default") -> dict:
    return {name: layer.experts(adapter_name) for name, layer in routed_layers(model, adapter_name).items()}


def tensors(model) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{which}": getattr(experts, which).detach().clone()
        for name, experts in all_experts(model).items()
        for which in NAMES
        if getattr(experts, which) is not None
    }


def parts(model, name="model.layers.0.self_attn.q_proj"):
    """x, u, the routed output and each expert's output on one fp64 layer."""
    layer = routed_layers(model)[name]
    experts = layer.experts("default")
    x = torch.randn(7, layer.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        delta = layer(x) - layer.base_layer(x)
        each = experts.scaling * torch.einsum("td,erd,ero->teo", x, experts.lora_A, experts.lora_B)
        return x, x @ experts.router.T, delta, each


# --- adding ---


@pytest.mark.parametrize("settings", [{}, {"num_shared_experts": 2}, {"routing": "softmax"}], ids=str)
@pytest.mark.parametrize("init_from", ["zero", 1])
def test_old_experts_and_rows_are_kept_bit_for_bit(settings, init_from):
    model = adapted(**settings)
    shared = settings.get("num_shared_experts", 0)
    before, stream = tensors(model), torch.get_rng_state()
    assert set(add_experts(model, 2, init_from=init_from).values()) == {6}
    assert init_from == "zero" or torch.equal(torch.get_rng_state(), stream)
    for name, new in tensors(model).items():
        old = before[name]
        assert torch.equal(new[:4], old[:4])
        assert name.endswith("router") or torch.equal(new[6:], old[4:])
        assert len(new) == 6 + (0 if name.endswith("router") else shared)
        if init_from == 1:
            assert torch.equal(new[4], old[1])
            assert torch.equal(new[5], old[1])
        elif not name.endswith("lora_A"):
            assert not new[4:6].any()
        else:
            assert not torch.equal(new[4], new[5])
    assert model.peft_config["default"].num_experts == 6


def test_the_output_after_adding_is_what_is_said():
    base = make_tiny_llama(layers=2, dtype=torch.float64)
    model = adapted(base, routing="softmax").double()
    _, u, delta, each = parts(model)
    g = u.softmax(-1)
    for init_from, wanted in (
        ("zero", delta * (u.exp().sum(-1) / (u.exp().sum(-1) + 1)).unsqueeze(-1)),
        (2, (delta + g[:, 2:3] * each[:, 2]) / (1 + g[:, 2:3])),
    ):
        grown = copy.deepcopy(model)
        add_experts(grown, init_from=init_from)
        torch.testing.assert_close(parts(grown)[2], wanted, **EXACT)


def test_a_token_whose_choice_does_not_change_computes_what_it_did():
    model = adapted(make_tiny_llama(layers=2, dtype=torch.float64)).double()
    _, u, before, _ = parts(model)
    add_experts(model)
    same = u.topk(2).values[:, 1] > 0  # a row of zeros has the logit 0
    after = parts(model)[2]
    assert 0 < int(same.sum()) < len(u)
    assert torch.equal(after[same], before[same])
    assert not torch.equal(after, before)


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("change", ["add", "prune"])
def test_what_was_changed_is_saved_and_loaded(tmp_path, layers, change):
    model = adapted(num_experts=3)
    if change == "add":
        add_experts(model, 2, layers=layers, init_from=1)
    else:
        prune_experts(model, 2 if layers is None else {1: 2}, calibration=text())
    new = 5 if change == "add" else 2
    assert model.peft_config["default"].num_experts == (new if layers is None else [3, new])
    for seen in model.base_model.modules():
        if hasattr(seen, "linear_moe_experts"):
            assert seen.num_experts["default"] == seen.linear_moe_experts["default"].num_experts
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_tiny_llama(layers=2), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert again.peft_config["default"].num_experts == model.peft_config["default"].num_experts


@pytest.mark.parametrize("where", ["text", "training"])
def test_the_most_used_expert_is_copied(where):
    model = adapted(balance="switch")
    for experts in all_experts(model).values():
        with torch.no_grad():
            experts.router[2] = 0
            experts.router[0] *= 30  # the largest logit or the smallest
    usage = expert_scores(model, text(), by="usage")
    if where == "training":
        model.train()(**text(1)[0], labels=text(1)[0]["input_ids"]).loss.backward()
        usage = {name: experts.state.load for name, experts in all_experts(model).items()}
    before = tensors(model)
    add_experts(model, init_from="most_used", calibration=text() if where == "text" else None)
    for name, experts in all_experts(model).items():
        assert torch.equal(experts.lora_B[4], before[f"{name}.lora_B"][usage[name].argmax()])


def step(model, optimizer) -> None:
    ids = text(1)[0]["input_ids"]
    optimizer.zero_grad()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("disturb", ["nothing", "set_adapter", "disable", "copy", "later"])
def test_frozen_experts_stay_bit_for_bit_and_the_new_ones_learn(disturb):
    model = adapted(num_shared_experts=1)
    add_experts(model, init_from=0, freeze_old=disturb != "later")
    if disturb == "set_adapter":
        model.add_adapter("other", LinearMoeConfig(num_experts=2, target_modules=["q_proj"]))
        model.set_adapter("other")
        model.set_adapter("default")
    elif disturb == "disable":
        with model.disable_adapter():
            logits(model)
    elif disturb == "copy":
        model = copy.deepcopy(model)
    elif disturb == "later":
        step(model, torch.optim.SGD(model.parameters(), 0.0))
        freeze_experts(model, range(4))
    before = tensors(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 0.1, weight_decay=0.0)
    for _ in range(2):
        step(model, optimizer)
    for name, new in tensors(model).items():
        assert torch.equal(new[:4], before[name][:4]), name
        assert not torch.equal(new[4:], before[name][4:]), name
    freeze_experts(model, [])
    step(model, optimizer)
    assert all(not torch.equal(new[:4], before[name][:4]) for name, new in tensors(model).items())


def test_freezing_some_frees_the_others():
    model = adapted(num_experts=3, routing="softmax")
    freeze_experts(model, [0, 1], layers=[0])
    freeze_experts(model, [2], layers=[0])
    before = tensors(model)
    step(model, torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 1.0))
    for name, new in tensors(model).items():
        moved = [not torch.equal(a, b) for a, b in zip(new, before[name], strict=True)]
        assert moved == ([True, True, False] if "layers.0" in name else [True] * 3)


def test_frozen_experts_stay_frozen_under_their_new_numbers():
    model = adapted()
    freeze_experts(model, [1, 3])
    scores = {name: torch.tensor([1.0, 0.0, 2.0, 3.0]) for name in all_experts(model)}
    prune_experts(model, 3, scores=scores)  # 0, 2, 3 stay
    add_experts(model, init_from=2)
    before = tensors(model)
    step(model, torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 1.0))
    for name, new in tensors(model).items():
        assert torch.equal(new[2], before[name][2])
        assert not torch.equal(new[3], before[name][3])


def test_frozen_experts_refuse_a_sharded_gradient():
    from moe_peft.frozen import _Mask

    with pytest.raises(RuntimeError, match="gradient of frozen experts is sharded"):
        _Mask((0,), 4)(torch.zeros(2, 3))


# --- pruning ---


@pytest.mark.parametrize("settings", [{}, {"num_shared_experts": 1}, {"routing": "softmax"}], ids=str)
def test_the_score_is_the_definition(settings):
    model = adapted(make_tiny_llama(layers=2, dtype=torch.float64), **settings).double()
    layer = routed_layers(model)["model.layers.1.mlp.up_proj"]
    experts = layer.experts("default")
    seen = []
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append((args[0], args[1], args[2])))
    found = expert_scores(model, text())["model.layers.1.mlp.up_proj"]
    handle.remove()
    wanted = torch.zeros(4, dtype=torch.float64)
    with torch.no_grad():
        for x, y, _ in seen:
            x, y = x.flatten(0, 1), y.flatten(0, 1)
            each = experts.scaling * torch.einsum("td,erd,ero->teo", x, experts.lora_A, experts.lora_B)
            u = x @ experts.router.T
            g = u.softmax(-1)
            if experts.top_k < 4:
                g = torch.zeros_like(u).scatter(1, u.topk(2).indices, u.topk(2).values.softmax(-1))
            wanted += easy_ep_naive(g, each[:, :4], y + each[:, 4:].sum(1))
    torch.testing.assert_close(found, wanted, **EXACT)


def test_one_A_for_all_experts_is_scored_as_its_copies():
    experts = copy.deepcopy(all_experts(adapted())["model.layers.0.mlp.up_proj"]).double()
    torch.manual_seed(0)
    x, y, g = (torch.randn(5, n, dtype=torch.float64) for n in (64, 96, 4))
    with torch.no_grad():
        experts.lora_A[:] = experts.lora_A[:1].clone()
        wanted = easy_ep(experts, x, y, g)
        experts.lora_A = torch.nn.Parameter(experts.lora_A[:1].clone())
        torch.testing.assert_close(easy_ep(experts, x, y, g), wanted, **EXACT)


def test_padding_scores_nothing():
    model = adapted()
    batch = text(1)[0]
    mask = torch.ones_like(batch["input_ids"])
    padded = {
        "input_ids": torch.cat((batch["input_ids"], torch.full((3, 4), 9)), 1),
        "attention_mask": torch.cat((mask, torch.zeros(3, 4, dtype=torch.long)), 1),
    }
    plain, with_padding = expert_scores(model, [batch]), expert_scores(model, [padded])
    for name, score in plain.items():
        torch.testing.assert_close(with_padding[name], score, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"num_shared_experts": 1}, {"routing": "softmax"}], ids=str)
def test_pruning_keeps_the_best_bit_for_bit(settings):
    model = adapted(**settings)
    before, scores = tensors(model), expert_scores(model, text())
    table = prune_experts(model, 2, scores=scores)
    assert [line.layer for line in table] == list(scores)
    for line in table:
        score = scores[line.layer]
        assert set(line.kept) == set(score.topk(2).indices.tolist())
        assert sorted(line.kept + line.dropped) == [0, 1, 2, 3]
        assert line.share == pytest.approx(float(score.topk(2).values.sum() / score.sum()))
        for which in NAMES:
            new, old = tensors(model)[f"{line.layer}.{which}"], before[f"{line.layer}.{which}"]
            assert torch.equal(new, old[line.kept + list(range(4, len(old)))])


def test_cutting_out_an_expert_that_no_token_visits_changes_nothing():
    model = adapted(num_experts=5)
    for experts in all_experts(model).values():
        with torch.no_grad():  # logits a, -a, 0, 2 a, -2 a: the two largest are |a| and 2 |a|
            experts.router.copy_(experts.router[0] * torch.tensor([1.0, -1.0, 0.0, 2.0, -2.0]).unsqueeze(1))
    before = logits(model)
    table = prune_experts(model, 4, calibration=text())
    assert {tuple(line.dropped) for line in table} == {(2,)}
    assert {line.share for line in table} == {1.0}
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_a_dry_run_changes_nothing():
    model = adapted()
    modules, before = all_experts(model), tensors(model)
    table = prune_experts(model, {0: 3}, calibration=text(), dry_run=True)
    assert {line.layer.split(".")[2] for line in table} == {"0"}
    assert all(len(line.kept) == 3 for line in table)
    assert all_experts(model) == modules
    assert model.peft_config["default"].num_experts == 4
    assert all(torch.equal(value, before[name]) for name, value in tensors(model).items())


def test_down_to_one_expert_it_is_a_plain_lora_and_can_be_merged():
    model = adapted(routing="softmax")
    prune_experts(model, 1, calibration=text())
    routed = logits(model)
    assert all(experts.router is None for experts in all_experts(model).values())
    torch.testing.assert_close(logits(model.merge_and_unload()), routed, rtol=1e-4, atol=1e-4)


def test_a_pruned_adapter_learns():
    model = adapted(balance="switch")
    step(model, torch.optim.SGD(model.parameters(), 0.0))  # its loads have four entries now
    prune_experts(model, 3, calibration=text())
    step(model, torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.1))
    assert all(experts.state.load.shape == (3,) for experts in all_experts(model).values())
    assert all(experts.router.grad.abs().sum() > 0 for experts in all_experts(model).values())


def test_another_adapters_trainability_is_left_alone():
    model = adapted()
    model.add_adapter("other", LinearMoeConfig(num_experts=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():  # by hand, and not as PEFT would set it
        if name.endswith("lora_A"):
            parameter.requires_grad_(".other." in name)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    add_experts(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    add_experts(model, adapter_name="other")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


# --- refusals ---


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: add_experts(m, 0), "`n` is 0, but must be a whole number of at least 1"),
        (lambda m: add_experts(m, layers=[7]), r"`layers` is \[7\], but must be numbers of layers .*: 0, 1"),
        (lambda m: add_experts(m, layers=0), "`layers` is 0, but must be a list of numbers of layers .*: 0, 1"),
        (lambda m: add_experts(m, freeze_old="no"), "`freeze_old` is 'no', but must be True or False"),
        (lambda m: prune_experts(m, 2, text(), dry_run="no"), "`dry_run` is 'no', but must be True or False"),
        (lambda m: prune_experts(m, 2, ["a text"]), "`calibration` is 'str', but must be of batches that map names"),
        (lambda m: add_experts(m, layers=[]), r"`layers` is \[\], but must be"),
        (lambda m: add_experts(m, init_from="most_use"), "`init_from` is 'most_use', .* Did you mean 'most_used'"),
        (lambda m: add_experts(m, init_from=4), "`init_from` is 4, but must be from 0 to 3"),
        (
            lambda m: add_experts(m, init_from="most_used"),
            "`init_from` is 'most_used', but must be 'zero' or a number",
        ),
        (lambda m: add_experts(m, calibration=[]), "`calibration` is 'given', but must be left out"),
        (
            lambda m: add_experts(m, router_bias_start=-9),
            "`router_bias_start` is -9, but must be 0 where the router has no",
        ),
        (lambda m: add_experts(m, router_bias_start="low"), "`router_bias_start` is 'low', but must be a number"),
        (lambda m: add_experts(m, adapter_name="x"), "No layer of this model holds a routed adapter named 'x'"),
        (lambda m: freeze_experts(m, [4]), r"`experts` is \[4\], but must be numbers from 0 to 3"),
        (lambda m: prune_experts(m, 1, text()), "`keep` is 1, but must be at least 2, the adapter's `top_k`"),
        (lambda m: prune_experts(m, 5, text()), "`keep` is 5, but must be at most 4, the experts of model.layers.0"),
        (lambda m: prune_experts(m, 2.5, text()), "`keep` is 2.5, but must be a whole number"),
        (lambda m: prune_experts(m, {9: 2}, text()), r"`keep` is \[9\], but must be numbers of layers"),
        (lambda m: prune_experts(m, 2), "takes `calibration` .* or `scores`, and exactly one"),
        (lambda m: prune_experts(m, 2, []), "The calibration text reached no expert"),
        (lambda m: prune_experts(m, 2, scores={}), "one finite number per expert .*\n- .*: no score, for 4 experts"),
        (lambda m: expert_scores(m, text(), by="use"), "`by` is 'use', but must be one of .* Did you mean 'usage'"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(call, message):
    model = adapted()
    before = tensors(model)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert all(torch.equal(value, before[name]) for name, value in tensors(model).items())
    assert model.peft_config["default"].num_experts == 4


@pytest.mark.parametrize("change", [add_experts, lambda model: prune_experts(model, 2, text())])
def test_another_type_a_merged_adapter_and_one_in_training_are_refused(change):
    for config, instead in (
        (RankMoeConfig(r=8), "adapter with another `r`"),
        (RankMoeConfig(r=8, routing="self_activated"), "`moe_peft.grow` gives it further ranks"),
        (ShardPoolConfig(r=4), "adapter with another `r`"),
    ):
        with pytest.raises(ValueError, match=f"is for LINEAR_MOE and FFN_MOE adapters, .*{instead}"):
            change(get_peft_model(make_tiny_llama(layers=2), config))
    lora = get_peft_model(make_tiny_llama(layers=2), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="No layer of this model holds a routed adapter"):
        change(lora)
    merged = adapted(num_experts=1)
    merged.merge_adapter()
    with pytest.raises(ValueError, match=r"is merged into the base weights. Call `model.unmerge_adapter\(\)`"):
        change(merged)
    model = adapted()
    next(iter(routed_layers(model).values())).context.scale_balance(1.0, lambda: True)
    with pytest.raises(RuntimeError, match="a trainer is running on this model"):
        change(model)


def test_a_callback_that_adds_experts_while_the_trainer_runs_is_refused(tmp_path):
    class Growing(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            add_experts(model)

    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    model = adapted()
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[Growing()])
    with pytest.raises(RuntimeError, match="Adding experts gives adapter 'default' new parameters, but a trainer is"):
        trainer.train()
    assert set(add_experts(model).values()) == {5}  # after it has ended, in an error too


@pytest.mark.parametrize(
    "settings",
    [
        {"share_A": True},
        {"num_null_experts": 2, "num_constant_experts": 1, "router_bias": True},
        {"balance": "bias", "num_null_experts": 1},
        {"freeze_router": True},
        {"routing": "sigmoid_top_k"},
    ],
    ids=str,
)
def test_whatever_else_a_router_has_follows(settings, tmp_path):
    model = adapted(**settings)
    tail = settings.get("num_null_experts", 0) + settings.get("num_constant_experts", 0)
    before = {name: experts.state_dict() for name, experts in all_experts(model).items()}
    for state in before.values():
        for tensor in state.values():
            torch.nn.init.normal_(tensor)
    before = copy.deepcopy(before)
    add_experts(model, init_from=1)
    scores = {name: torch.arange(5.0) for name in before}
    prune_experts(model, 4, scores=scores)  # without expert 0
    for name, experts in all_experts(model).items():
        for key, new in experts.state_dict().items():
            rows = [1, 2, 3, 1, *range(4, 4 + tail)]
            whole = key == "constant" or (key == "lora_A" and "share_A" in settings)
            old = before[name][key]
            assert torch.equal(new, old if whole else old[rows[: len(old)]]), key
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_tiny_llama(layers=2), tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("init_from", ["zero", 0])
def test_with_a_low_bias_the_output_is_kept_bit_for_bit(init_from):
    model = adapted(router_bias=True)
    before = logits(model)
    add_experts(model, init_from=init_from, router_bias_start=-1e4)
    assert torch.equal(logits(model), before)


def test_a_single_expert_has_no_router_to_add_to():
    with pytest.raises(ValueError, match="has one expert and no router"):
        add_experts(adapted(num_experts=1))


def test_what_the_config_cannot_hold_is_refused_before_anything_changes():
    model = adapted(routing="softmax", balance="localized")
    with pytest.raises(ValueError, match="`num_experts` is 5, but must be even numbers"):
        add_experts(model)
    assert model.peft_config["default"].num_experts == 4
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model = get_peft_model(base, LinearMoeConfig(num_experts=3, target_modules=["0", "1"]))
    assert add_experts(model) == {"0": 4, "1": 4}
    with pytest.raises(ValueError, match=r"`layers` is \[0\], but must be .*there are none"):
        add_experts(model, layers=[0])
