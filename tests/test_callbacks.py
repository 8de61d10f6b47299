"""The callback: what it logs is the definition's, it is to scale, it says what went wrong, and it stays out of the way."""

import copy
import gc
import logging
import math
import re
import subprocess
import sys
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, trainer
from transformers.trainer_callback import TrainerControl, TrainerState

from moe_peft import DomainMoeConfig, LinearMoeConfig, MoeCallback, TaskTypeCollator
from moe_peft.callbacks import AutomaticMoeCallback, install
from moe_peft.context import set_aux_scale
from moe_peft.routing import Routing
from moe_peft.watch import collapse, find_routers, read_windows


def routed(targets=("q_proj", "up_proj"), **settings):
    config = LinearMoeConfig(num_experts=4, target_modules=list(targets), **settings)
    return get_peft_model(make_tiny_llama(layers=2), config)


def context_of(model):
    return next(layer.context for layer in model.modules() if hasattr(layer, "context"))


ROWS = [{"input_ids": list(range(i + 1, i + 9)), "labels": list(range(i + 1, i + 9))} for i in range(16)]


def make_trainer(model, tmp_path, callbacks=(), **settings):
    arguments = {
        "output_dir": str(tmp_path), "max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1,
        "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, **settings,
    }  # fmt: skip
    return Trainer(
        model, TrainingArguments(**arguments), train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=list(callbacks)
    )


def callbacks_of(trainer):
    return [c for c in trainer.callback_handler.callbacks if isinstance(c, MoeCallback)]


def event(callback, name, model=None, args=None, state=None, **kwargs):
    state = state or TrainerState(stateful_callbacks=[])
    return getattr(callback, name)(args, state, TrainerControl(), model=model, **kwargs)


@pytest.mark.parametrize(
    ("types", "sentence"),
    [
        ([1], "trained on samples of one domain only, .* everything: law; it saw none of code, med"),
        ([0, 1], "trained on samples of some domains: code, law; it saw none of med"),
        ([0, 1, 2], None),
    ],
)
def test_a_gate_taught_by_labels_of_some_domains_alone_is_told_at_the_end(tmp_path, types, sentence):
    settings = {"gate_training": "labels", "r": 2, "target_modules": ["up_proj"]}
    config = DomainMoeConfig(domains=["code", "law", "med"], **settings)
    rows = [{**row, "task_type": types[i % len(types)]} for i, row in enumerate(ROWS)]
    trainer = make_trainer(
        get_peft_model(make_tiny_llama(layers=1), config), tmp_path, remove_unused_columns=False, max_steps=8
    )
    trainer.train_dataset, trainer.data_collator = rows, TaskTypeCollator(trainer.data_collator, num_types=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(w.message) for w in caught if "The gate was trained on samples" in str(w.message)]
    assert len(said) == (sentence is not None)
    assert sentence is None or re.search(sentence, said[0])


def test_a_routed_adapter_puts_it_among_the_default_callbacks_once():
    routed()
    routed()
    install()
    assert trainer.DEFAULT_CALLBACKS.count(AutomaticMoeCallback) == 1


def test_serving_does_not_load_the_trainer(tmp_path):
    routed().save_pretrained(tmp_path)
    program = f"""
import sys
import warnings
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from peft import PeftModel
import moe_peft
base = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                    num_key_value_heads=2, vocab_size=100))
PeftModel.from_pretrained(base, {str(tmp_path)!r})
assert "transformers.trainer" not in sys.modules, "loaded for inference"
PeftModel.from_pretrained(base, {str(tmp_path)!r}, is_trainable=True, adapter_name="second")
from transformers.trainer import DEFAULT_CALLBACKS
assert [c.__name__ for c in DEFAULT_CALLBACKS] == ["DefaultFlowCallback", "AutomaticMoeCallback"], DEFAULT_CALLBACKS
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


def test_nothing_happens_to_a_model_without_routed_layers(tmp_path):
    model = get_peft_model(make_tiny_llama(layers=2), LoraConfig(target_modules=["q_proj"]))
    plain = make_trainer(model, tmp_path)
    plain.train()
    assert not [key for entry in plain.state.log_history for key in entry if "router" in key]


class Reporter(TrainerCallback):
    """Like those for trackers, which the trainer puts before the callbacks of the user."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


@pytest.mark.parametrize("explicit", [False, True])
def test_log_history_and_trackers_see_the_routers(explicit, tmp_path, monkeypatch, caplog):
    reporter = Reporter()
    monkeypatch.setattr(trainer, "get_reporting_integration_callbacks", lambda report_to: [reporter])
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    own = MoeCallback()
    t = make_trainer(routed(), tmp_path, [own] if explicit else [])
    t.train()
    keys = {"router/entropy", "router/max_load", "router/dead_experts", "router/balance_loss"}
    training = [entry for entry in t.state.log_history if "loss" in entry]
    assert len(training) == 3
    assert all(keys <= entry.keys() for entry in training)
    assert [entry for entry in reporter.seen if keys <= entry.keys()] == [e for e in reporter.seen if "loss" in e]
    assert "there is already one" not in caplog.text
    automatic = callbacks_of(t)[0]
    assert isinstance(automatic, AutomaticMoeCallback)
    used, idle = (own, automatic) if explicit else (automatic, own)
    assert [entry["step"] for entry in used.history] == [1, 2, 3]
    assert idle.history == []
    layers = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")]
    assert list(used.history[0]["load"]) == list(used.history[0]["entropy"]) == layers
    assert all(sum(load) == pytest.approx(1) for load in used.history[0]["load"].values())


def test_evaluation_is_neither_counted_nor_logged(tmp_path):
    t = make_trainer(routed(), tmp_path, eval_strategy="steps", eval_steps=1)
    t.train()
    assert not [key for e in t.state.log_history if "eval_loss" in e for key in e if key.startswith("router")]
    quiet = make_trainer(routed(), tmp_path)
    quiet.train()
    assert callbacks_of(t)[0].history == callbacks_of(quiet)[0].history


def see(state, weights, probabilities, tokens=100):
    """As many equal tokens, of a dense routing, so that a load need not be a whole number."""
    rows = [torch.tensor(values, dtype=torch.float64).expand(tokens, -1) for values in (weights, probabilities)]
    state.observe(Routing(rows[1].log(), rows[0], None), None)


PROBABILITIES = [0.1, 0.2, 0.65, 0.05]


def known_windows(model):
    """Two routers that saw tokens made by hand; the others saw nothing."""
    first, second, *_ = (router.state for router in find_routers(model).values())
    see(first, [0.5, 0.5, 0.5, 0.5], [0.25] * 4)
    see(second, [0.6, 0.6, 0.7975, 0.0025], PROBABILITIES)


def test_the_values_are_those_of_the_definitions():
    model = routed()
    callback = MoeCallback()
    event(callback, "on_train_begin", model)
    known_windows(model)
    state = TrainerState(stateful_callbacks=[], global_step=7, log_history=[{"loss": 1.0, "step": 7}])
    logs = {"loss": 1.0}
    event(callback, "on_log", model, state=state, logs=logs)
    entropy = -sum(p * math.log(p) for p in PROBABILITIES)
    assert logs["router/entropy"] == pytest.approx((1 + entropy / math.log(4)) / 2)
    assert logs["router/max_load"] == pytest.approx(4 * 79.75 / 200)
    assert logs["router/dead_experts"] == 1  # 0.25 of 200 slots is half a percent of an even share, 50
    assert logs["router/balance_loss"] == pytest.approx(
        (1 + 4 * (0.3 * 0.1 + 0.3 * 0.2 + 0.39875 * 0.65 + 0.00125 * 0.05)) / 2
    )
    assert state.log_history[-1] == {**logs, "step": 7}
    assert callback.history[0]["load"] == {
        "model.layers.0.self_attn.q_proj": [0.25] * 4,
        "model.layers.0.mlp.up_proj": pytest.approx([0.3, 0.3, 0.39875, 0.00125]),
    }
    assert "router/active_experts" not in logs  # every token chooses two
    again = {"loss": 1.0}
    event(callback, "on_log", model, state=state, logs=again)
    assert again == {"loss": 1.0}  # a new window, and nothing in it yet


@pytest.mark.parametrize(
    ("settings", "index", "wanted"),
    [
        ({"routing": "top_p"}, [[0, 1, 4, 4], [2, 4, 4, 4]], 1.5),
        ({"num_null_experts": 2, "top_k": 3}, [[0, 1, 4], [5, 4, 2]], 1.5),
        ({"top_k": 2}, [[0, 1], [2, 3]], None),
    ],
)
def test_how_many_experts_a_token_chose_is_logged_where_that_is_open(settings, index, wanted):
    model = routed(**settings)
    callback = MoeCallback()
    event(callback, "on_train_begin", model)
    router = next(iter(find_routers(model).values()))
    chosen = torch.tensor(index)
    router.state.observe(Routing(torch.zeros(2, router.num_experts), torch.ones(chosen.shape), chosen), None)
    logs = {"loss": 1.0}
    state = TrainerState(stateful_callbacks=[], global_step=7, log_history=[{"loss": 1.0}])
    event(callback, "on_log", model, state=state, logs=logs)
    assert logs.get("router/active_experts") == wanted


def test_one_transfer_to_the_host_per_log_line(monkeypatch):
    model = routed()
    callback = MoeCallback()
    event(callback, "on_train_begin", model)
    known_windows(model)
    transfers = []
    for name in ("tolist", "item", "__float__", "__int__", "__bool__"):
        true = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, t=true, n=name: (transfers.append(n), t(self))[1])
    args = SimpleNamespace(gradient_accumulation_steps=4)
    event(callback, "on_step_begin", model, args)
    event(callback, "on_step_end", model, args)
    assert transfers == []
    event(callback, "on_log", model, logs={"loss": 1.0})
    assert transfers == ["tolist"]


def test_the_scale_is_that_of_the_trainer_and_its_scaler():
    model = routed()
    callback = MoeCallback()
    event(callback, "on_train_begin", model)
    args = SimpleNamespace(gradient_accumulation_steps=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    event(callback, "on_step_begin", model, args, optimizer=SimpleNamespace(scaler=scaler))
    assert context_of(model).scale == 256
    off = torch.amp.GradScaler("cpu", enabled=False)
    event(callback, "on_step_begin", model, args, optimizer=SimpleNamespace(scaler=off))
    assert context_of(model).scale == 0.25
    event(callback, "on_train_end", model)
    assert context_of(model).scale == 1


@pytest.mark.parametrize(
    ("batches", "expected"), [(8, [4, 4, 4, 4]), (9, [4, 4, 1, 4, 4, 1]), (3, [3, 3]), (4, [4, 4])]
)
def test_the_scale_knows_how_the_epoch_ends(batches, expected):
    model = routed()
    callback = MoeCallback()
    event(callback, "on_train_begin", model)
    args = SimpleNamespace(gradient_accumulation_steps=4)
    for step, accumulated in enumerate(expected):
        state = TrainerState(stateful_callbacks=[], global_step=step)
        event(callback, "on_step_begin", model, args, state, train_dataloader=range(batches))
        assert context_of(model).scale == pytest.approx(1 / accumulated)
    event(callback, "on_train_end", model)


def test_watching_lasts_as_long_as_training(tmp_path):
    model = routed(balance="none")
    context = context_of(model)
    watched = []

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            watched.append(context.watching)

    t = make_trainer(model, tmp_path, [Look()])
    t.train()
    assert watched == [True] * 3
    assert not context.watching
    assert all("router/max_load" in e for e in t.state.log_history if "loss" in e)  # with no balance loss either


class Stop(TrainerCallback):
    """An error in the middle of a step, which no other callback hears of."""

    def on_substep_end(self, *args, **kwargs):
        raise KeyboardInterrupt


def stopped(tmp_path):
    """A model whose trainer was stopped between two micro-batches of four; the trainer as well, which lives on."""
    model = routed(router_aux_loss_coef=1.0)
    t = make_trainer(model, tmp_path, [Stop()], gradient_accumulation_steps=4)
    with pytest.raises(KeyboardInterrupt):
        t.train()
    assert (context_of(model).scale, context_of(model).watching) == (0.25, True)
    model.zero_grad()
    return model, t


def balance_gradients(model):
    tokens = torch.arange(1, 17).view(2, 8)
    model.train()(tokens, labels=tokens).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if name.endswith("router")}


def test_the_scale_of_a_trainer_that_was_stopped_ends_with_it(tmp_path):
    model, trainer = stopped(tmp_path)
    fresh = copy.deepcopy(model)  # a copy belongs to no trainer
    assert (context_of(fresh).scale, context_of(fresh).watching) == (1.0, False)
    expected, found = balance_gradients(fresh), balance_gradients(model)
    assert min(gradient.norm() for gradient in expected.values()) > 0
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (context_of(model).scale, context_of(model).watching) == (1.0, False)


def test_a_loop_of_ones_own_after_a_trainer_that_was_stopped_keeps_the_scale_it_sets(tmp_path):
    model, trainer = stopped(tmp_path)
    set_aux_scale(0.125)
    balance_gradients(model)
    assert context_of(model).scale == 0.125


def test_a_trainer_goes_on_after_it_was_stopped(tmp_path):
    model, trainer = stopped(tmp_path)
    trainer.remove_callback(Stop)
    scales = []

    class Look(TrainerCallback):
        def on_substep_end(self, *args, **kwargs):
            scales.append(context_of(model).scale)

    trainer.add_callback(Look())
    trainer.train()
    assert scales == [0.25] * 3 * 3
    assert context_of(model).scale == 1


def test_training_that_changes_nothing_is_refused():
    """Re-entrant checkpoints cut the graph where no input needs a gradient; the head still learns, so nothing fails."""
    model = routed(modules_to_save=["lm_head"])
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
    model.base_model.model.disable_input_require_grads()  # which transformers 5 turns on by itself
    model.train()
    callback = MoeCallback()
    event(callback, "on_train_begin", model)
    tokens = torch.randint(1, 100, (2, 8))
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        model(tokens, labels=tokens).loss.backward()
    with pytest.raises(
        RuntimeError, match=r"None of the 12 adapter parameters has a gradient.*enable_input_require_grads"
    ):
        event(callback, "on_pre_optimizer_step", model)
    model.base_model.model.enable_input_require_grads()
    model(tokens, labels=tokens).loss.backward()
    event(callback, "on_train_begin", model)
    event(callback, "on_pre_optimizer_step", model)
    model.zero_grad()
    event(callback, "on_pre_optimizer_step", model)  # asked once only


def quantised(folder):
    pytest.importorskip("bitsandbytes")
    make_tiny_llama(layers=2).save_pretrained(folder)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=how, device_map={"": "cpu"})
    model = get_peft_model(model, LinearMoeConfig(num_experts=4, target_modules=["q_proj"]))
    for parameter in model.parameters():
        if parameter.requires_grad:  # as TRL does
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


@pytest.mark.parametrize(
    ("own", "expected"),
    [(None, torch.float32), (MoeCallback(), torch.float32), (MoeCallback(adapter_dtype=None), torch.bfloat16)],
    ids=["automatic", "own", "own-none"],
)
def test_adapters_on_four_bits_train_in_full_precision(own, expected, tmp_path):
    model = quantised(tmp_path)
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    make_trainer(model, tmp_path, [] if own is None else [own])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == expected
            assert torch.equal(parameter, before[name].to(expected))


def test_a_dtype_that_is_none_is_refused():
    assert MoeCallback("bfloat16").adapter_dtype == torch.bfloat16
    with pytest.raises(ValueError, match="`adapter_dtype` is 'float33', but must be a torch dtype, its name or None"):
        MoeCallback("float33")


def test_nothing_is_cast_where_parameters_are_sharded(tmp_path, monkeypatch):
    model = quantised(tmp_path)
    monkeypatch.setattr(
        "moe_peft.callbacks._is_sharded", lambda: True
    )  # FSDP2 wants one dtype, also of other adapters
    make_trainer(model, tmp_path)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}


def test_deepspeed_with_fp16_is_warned_of(monkeypatch):
    model, args = routed(), SimpleNamespace(fp16=True)
    event(MoeCallback(), "on_train_begin", model, args)
    monkeypatch.setattr("moe_peft.callbacks._distributed_by", lambda: "DEEPSPEED")
    event(MoeCallback(), "on_train_begin", model, SimpleNamespace(fp16=False))
    with pytest.warns(UserWarning, match="balance loss all but vanishes"):
        event(MoeCallback(), "on_train_begin", model, args)


def test_a_plain_base_keeps_the_dtype_that_was_asked_for(tmp_path):
    model = routed().to(torch.bfloat16)
    make_trainer(model, tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_of_two_trainers_on_one_model_the_one_that_trains_is_served(tmp_path):
    model = routed()
    first, second = MoeCallback(), MoeCallback()
    trainers = [make_trainer(model, tmp_path, [callback]) for callback in (first, second)]
    trainers[0].train()
    assert (len(first.history), len(second.history)) == (3, 0)
    trainers[1].train()
    assert (len(first.history), len(second.history)) == (3, 3)


def test_the_callback_keeps_no_model_alive(tmp_path):
    model = routed()
    t = make_trainer(model, tmp_path)
    t.train()
    gone = weakref.ref(context_of(model))
    copied = copy.deepcopy(model)
    del model, t
    gc.collect()
    assert gone() is None
    assert find_routers(copied)


@pytest.mark.parametrize(
    ("load", "top_k", "expected"),
    [
        ([0.25] * 4, 2, 0.0),
        ([0.5, 0.5, 0.0, 0.0], 2, 1.0),
        ([1.0, 0.0], 1, 1.0),
        ([0.5, 0.5], 1, 0.0),
        ([0.4, 0.2, 0.2, 0.2], 4, 0.2),
        ([1.0, 0.0, 0.0, 0.0], 4, 1.0),
    ],
)
def test_collapse_is_zero_when_even_and_one_when_the_rest_get_nothing(load, top_k, expected):
    assert collapse(load, top_k) == pytest.approx(expected)


def test_a_collapsed_router_is_named_once():
    model = routed()
    callback = MoeCallback()
    event(callback, "on_train_begin", model)
    state = find_routers(model)["model.layers.1.mlp.up_proj"].state
    collapsed = [1.0, 1.0, 0.0, 0.0], [0.25] * 4
    see(state, *collapsed, tokens=399)  # fewer than 100 per expert
    event(callback, "on_log", model, logs={"loss": 1.0})
    see(state, *collapsed, tokens=400)
    with pytest.warns(
        UserWarning, match=r"1 of 1 routers have collapsed.*model\.layers\.1\.mlp\.up_proj.*0\.50, 0\.50, 0\.00"
    ):
        event(callback, "on_log", model, logs={"loss": 1.0})
    see(state, *collapsed, tokens=400)
    event(callback, "on_log", model, logs={"loss": 1.0})  # a warning would be an error here


def test_names_are_those_of_the_base_model():
    model = routed(("q_proj",))
    model.add_adapter("other", LinearMoeConfig(num_experts=2, target_modules=["q_proj"]))
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert list(find_routers(model)) == [name + end for name in names for end in ("", ".other")]
    assert list(find_routers(model.base_model.model)) == list(find_routers(model))
    assert read_windows(find_routers(model)) == {}


def test_one_expert_has_no_router():
    model = get_peft_model(make_tiny_llama(layers=2), LinearMoeConfig(num_experts=1, target_modules=["q_proj"]))
    assert find_routers(model) == {}
