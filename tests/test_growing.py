"""Growing: a finished task keeps its function, its ranks stay frozen whatever is switched, and files hold all tasks."""

import copy
import json

import pytest
import torch
from conftest import make_tiny_llama
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from moe_peft import LinearMoeConfig, RankMoeConfig, grow
from moe_peft.budget import count_parameters
from moe_peft.tuners.rank_moe import RankMoeLinear


EXACT = {"rtol": 1e-9, "atol": 1e-11}
TARGETS = ["q_proj", "up_proj", "down_proj"]


def first_task(dtype=torch.float64, **settings) -> PeftModel:
    torch.manual_seed(0)
    settings = {"r": 4, "top_k": 3, "lora_alpha": 12, "temperature": 0.2, "target_modules": TARGETS, **settings}
    config = RankMoeConfig(routing="self_activated", task_type="CAUSAL_LM", **settings)
    model = get_peft_model(make_tiny_llama(dtype=dtype), config)
    randomise(model)
    return model.eval()


def randomise(model: PeftModel, adapter_name: str = "default") -> None:
    """As training would."""
    with torch.no_grad():
        for layer in layers_of(model):
            for weight in (layer.experts(adapter_name).lora_A, layer.experts(adapter_name).lora_B):
                weight.normal_(std=0.1)


def layers_of(model) -> list[RankMoeLinear]:
    return [module for module in model.modules() if isinstance(module, RankMoeLinear)]


def logits(model, tokens) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def frozen_bits(model) -> list[torch.Tensor]:
    return [
        w.clone()
        for layer in layers_of(model)
        for w in (layer.experts("default").frozen_A, layer.experts("default").frozen_B)
    ]


def is_frozen(model) -> bool:
    weights = [(n.rsplit(".", 1)[-1], p) for n, p in model.named_parameters() if "rank_moe" in n and ".default." in n]
    assert {name for name, _ in weights} == {"lora_A", "lora_B", "frozen_A", "frozen_B"}
    return all(not p.requires_grad for name, p in weights if name.startswith("frozen"))


# --- the function ---


@pytest.mark.parametrize("threshold", [None, 0.4])
def test_a_finished_task_keeps_its_function(tokens, threshold):
    model = first_task(threshold=threshold)
    before = logits(model, tokens)
    for layer in layers_of(model):
        layer.experts("default").consolidate()
    torch.testing.assert_close(logits(model, tokens), before, **EXACT)
    assert not torch.equal(before, logits(make_tiny_llama(dtype=torch.float64), tokens))


def test_with_a_scale_that_is_a_power_of_two_it_keeps_it_bit_for_bit(tokens):
    model = first_task(dtype=torch.float32, lora_alpha=8)
    x = torch.randn(40, 64)
    for layer in layers_of(model):
        if layer.in_features == 64:
            layer.base_layer.weight.data.zero_()
            before = layer(x)
            layer.experts("default").consolidate()
            assert torch.equal(layer(x), before)
            assert before.any()


def test_new_ranks_change_the_competition_though_their_b_is_zero(tokens):
    model = first_task()
    before = logits(model, tokens)
    grow(model, r=4)
    assert not any(layer.experts("default").lora_B.any() for layer in layers_of(model))
    assert not torch.allclose(logits(model, tokens), before)


def test_each_tasks_ranks_keep_the_scale_they_were_trained_with():
    model = first_task()
    first = [layer.experts("default").lora_B.clone() for layer in layers_of(model)]
    grow(model, r=6)
    assert {layer.experts("default").scaling for layer in layers_of(model)} == {12 / 6}
    randomise(model)
    second = [layer.experts("default").lora_B.clone() for layer in layers_of(model)]
    grow(model, r=2)
    for layer, one, two in zip(layers_of(model), first, second, strict=True):
        experts = layer.experts("default")
        torch.testing.assert_close(experts.frozen_B, torch.cat((12 / 4 * one, 12 / 6 * two)), **EXACT)
        assert (layer.r["default"], layer.scaling["default"]) == (2, 12 / 2)
        assert (experts.num_experts, experts.top_k) == (12, 3)


def test_fewer_new_ranks_than_a_token_uses_are_fine(tokens):
    model = first_task()
    grow(model, r=1)
    assert logits(model, tokens).isfinite().all()


def test_fewer_new_ranks_than_a_token_uses_are_loaded_again(tokens, tmp_path):
    model = first_task(dtype=torch.float32, r="3:4", top_k=3)
    grow(model, r=1)
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_tiny_llama(), tmp_path).eval()
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    with pytest.raises(ValueError, match="`top_k` is 5, but must be at most 4, the smallest"):
        RankMoeConfig(routing="self_activated", r=1, frozen_r=["3:4"], top_k=5)


# --- what is trained ---


def test_earlier_ranks_stay_frozen_whatever_is_switched(tokens):
    model = first_task()
    grow(model, r=2)
    assert is_frozen(model)
    with model.disable_adapter():
        pass
    assert is_frozen(model)
    model.add_adapter("other", second_config())
    for name in ("other", "default", ["default", "other"]):
        model.base_model.set_adapter(name)
        assert is_frozen(model)
    model.set_requires_grad("default")
    assert is_frozen(model)
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert is_frozen(model)
    assert all(layer.experts("default").lora_A.requires_grad for layer in layers_of(model))


def second_config() -> RankMoeConfig:
    return RankMoeConfig(routing="self_activated", r=4, target_modules=TARGETS, task_type="CAUSAL_LM")


def test_training_moves_the_new_ranks_and_not_one_bit_of_the_earlier(tokens):
    model = first_task(dtype=torch.float32)
    grow(model, r=3)
    before, fresh = frozen_bits(model), [layer.experts("default").lora_B.clone() for layer in layers_of(model)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(frozen_bits(model), before, strict=True))
    for layer, start in zip(layers_of(model), fresh, strict=True):
        assert not torch.equal(layer.experts("default").lora_B, start)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_are_the_same_under_checkpointing(tokens, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = first_task(lora_dropout=0.1)
        grow(model, r=3)
        torch.manual_seed(3)
        randomise(model)
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(5)
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **EXACT, msg=name)


def test_only_the_new_ranks_count_as_trained():
    model = get_peft_model(
        make_tiny_llama(), RankMoeConfig(r=8, top_k=4, routing="self_activated", target_modules=["up_proj"])
    )
    grow(model, r=6)
    count = count_parameters(model)
    assert (count.layers, count.router, count.trainable) == (4, 0, 4 * 6 * (64 + 96))


def test_the_weights_keep_their_dtype_and_the_copy_is_a_model_of_its_own(tokens):
    model = first_task(dtype=torch.bfloat16)
    grow(model, r=3)
    assert {p.dtype for layer in layers_of(model) for p in layer.experts("default").parameters()} == {torch.float32}
    twin = copy.deepcopy(model)
    before = logits(twin, tokens)
    grow(model, r=2)
    assert torch.equal(logits(twin, tokens), before)
    assert is_frozen(twin)


# --- files ---


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_all_tasks_are_saved_and_loaded(tokens, tmp_path, low_cpu_mem_usage):
    model = first_task(dtype=torch.float32, r="2:4", top_k=2)
    grow(model, r=[1, 2, 3, 4])
    randomise(model)
    grow(model, r=3)
    randomise(model)
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert (config.frozen_r, config.r) == (["2:4", [1, 2, 3, 4]], 3)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["frozen_r"] == ["2:4", [1, 2, 3, 4]]
    loaded = PeftModel.from_pretrained(
        make_tiny_llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens))
    assert is_frozen(loaded)
    assert [layer.experts("default").num_frozen for layer in layers_of(loaded)[:: len(TARGETS)]] == [3, 4, 7, 8]
    grow(loaded, r=2)
    assert loaded.peft_config["default"].frozen_r == ["2:4", [1, 2, 3, 4], 3]


def test_an_adapter_loaded_for_inference_is_trained_once_it_grows(tokens, tmp_path):
    first_task(dtype=torch.float32).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(make_tiny_llama(), tmp_path)
    grow(model, r=2)
    assert is_frozen(model)
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    assert all(layer.experts("default").lora_B.grad.any() for layer in layers_of(model))


def test_a_reference_made_by_copying_parameters_has_the_earlier_tasks_too(tokens):
    """What TRL does for a reference policy."""
    model = first_task(dtype=torch.float32)
    grow(model, r=2)
    randomise(model)
    before = logits(model, tokens)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(logits(model.eval(), tokens), before)


def test_an_adapter_that_is_not_active_grows_in_silence(tokens):
    model = first_task()
    model.add_adapter("other", second_config())
    before = logits(model, tokens)
    grow(model, r=2, adapter_name="other")
    assert torch.equal(logits(model, tokens), before)
    other = [p for n, p in model.named_parameters() if ".other." in n]
    assert other
    assert not any(p.requires_grad for p in other)
    assert model.active_adapters == ["default"]


# --- refusals ---


def test_only_ranks_that_choose_themselves_grow():
    with pytest.raises(TypeError, match="`model` is a LlamaForCausalLM, but must be a PEFT model"):
        grow(make_tiny_llama(), r=4)
    for config in (LoraConfig(target_modules=TARGETS), LinearMoeConfig(num_experts=2, target_modules=TARGETS)):
        with pytest.raises(ValueError, match=f"of type {type(config).__name__} and cannot grow: only ranks"):
            grow(get_peft_model(make_tiny_llama(), config), r=4)
    routed = get_peft_model(make_tiny_llama(), RankMoeConfig(r=8, target_modules=TARGETS))
    with pytest.raises(ValueError, match="`routing` is 'sigmoid_top_k', but must be 'self_activated'"):
        grow(routed, r=4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"r": 0}, "`r` is 0, but must be a whole number of at least 1"),
        ({"r": "4:x"}, "`r` is '4:x', but must be a whole number"),
        ({"r": [4, 4]}, r"`r` is \[4, 4\], but must be a list of 4 numbers, one for each layer"),
        ({"r": 4, "adapter_name": "defautl"}, "`adapter_name` is 'defautl', .*Did you mean 'default'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_changed(tokens, call, message):
    model = first_task()
    before, config = logits(model, tokens), copy.deepcopy(model.peft_config["default"])
    with pytest.raises(ValueError, match=message):
        grow(model, **call)
    assert torch.equal(logits(model, tokens), before)
    assert model.peft_config["default"] == config
    assert not any(layer.experts("default").num_frozen for layer in layers_of(model))


def test_an_adapter_in_the_middle_of_a_step_does_not_grow(tokens):
    model = first_task(dtype=torch.float32).train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    with pytest.raises(ValueError, match=r"hold gradients, .* `optimizer.zero_grad\(\)`, grow, and make a new"):
        grow(model, r=2)
    model.zero_grad()
    grow(model, r=2)


class Grows(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.zero_grad()
        with pytest.raises(ValueError, match="cannot grow while a trainer runs: .* make a new trainer"):
            grow(model, r=2)
        self.tried = True


def test_an_adapter_does_not_grow_while_a_trainer_runs_and_does_afterwards(tmp_path):
    model, callback = first_task(dtype=torch.float32), Grows()
    rows = [{"input_ids": list(range(i + 1, i + 9)), "labels": list(range(i + 1, i + 9))} for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    assert callback.tried
    grow(model, r=2)
    before = frozen_bits(model)
    Trainer(model, arguments, train_dataset=rows).train()
    assert all(torch.equal(a, b) for a, b in zip(frozen_bits(model), before, strict=True))
    assert all(layer.experts("default").lora_B.any() for layer in layers_of(model))


def test_layers_of_a_bare_model_may_have_no_number():
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 5)), RankMoeConfig(r=2, routing="self_activated", target_modules=["0"])
    )
    grow(model, r=2)
    with pytest.raises(ValueError, match="has no layer number in its name"):
        grow(model, r=[1, 2])
