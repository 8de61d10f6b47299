"""The balance gradient under TRL's trainers, unmodified: it arrives, it is the definition's, and it is to scale."""

import copy
import sys

import pytest
import torch
from conftest import make_tiny_llama
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    TrainerCallback,
)

from moe_peft import FfnMoeConfig, LinearMoeConfig, MoeCallback, RankMoeConfig, ShardPoolConfig, TaskTypeCollator
from moe_peft.attach import RouterState
from moe_peft.balance import switch_loss
from moe_peft.balance_terms import updated_bias
from moe_peft.pocket.tokenizer import make_tokenizer
from moe_peft.tuners.linear_moe import RoutedLora
from moe_peft.watch import find_routers


trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()

COEF = 0.01
ROWS = 16


def words(i: int) -> str:
    return "abcdefgh"[i % 8] * (3 + i % 4)


PROMPTS = [{"prompt": words(i) + "="} for i in range(ROWS)]
PAIRS = [{"chosen": words(i + 3), "rejected": words(i + 1)} for i in range(ROWS)]
ON_POLICY = {"max_completion_length": 6}
KINDS = {  # trainer -> rows, settings of its own
    "SFT": ([{**row, "completion": words(i + 3)} for i, row in enumerate(PROMPTS)], {}),
    "DPO": ([{**row, **pair} for row, pair in zip(PROMPTS, PAIRS, strict=True)], {}),
    "KTO": ([{**row, "completion": words(i + 3), "label": i % 2 == 0} for i, row in enumerate(PROMPTS)], {}),
    "Reward": (PAIRS, {}),
    "GRPO": (PROMPTS, {**ON_POLICY, "num_generations": 2}),
    "RLOO": (PROMPTS, {**ON_POLICY, "num_generations": 2}),
    "Distillation": (PROMPTS, ON_POLICY),
}


def adapter(kind: str = "SFT", **settings) -> LinearMoeConfig:
    settings = {"num_experts": 4, "target_modules": ["q_proj", "up_proj"], **settings}
    if settings.get("balance") != "bias":
        settings.setdefault("router_aux_loss_coef", COEF)
    return LinearMoeConfig(task_type="SEQ_CLS" if kind == "Reward" else "CAUSAL_LM", **settings)


def backbone(kind: str) -> nn.Module:
    if kind != "Reward":
        return make_tiny_llama(layers=2)
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=100, pad_token_id=0, num_labels=1)  # fmt: skip
    return LlamaForSequenceClassification(config)


def as_in_long_answers(completions, **_):
    return [float(text.count("a")) for text in completions]


class Recorder(TrainerCallback):
    """The gradients before every optimizer step, the tokens counted until then, and what the definition expects."""

    def __init__(self):
        self.gradients, self.tokens, self.expected, self.calls = [], [], [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for name, router in find_routers(model).items():
            router.register_forward_pre_hook(lambda module, given, name=name: self.see(name, module, given))

    def see(self, name, module, given):
        if isinstance(module, RoutedLora) and module.training and torch.is_grad_enabled():
            x, _, context = given
            self.calls.append((name, x.detach().flatten(0, -2), context.real))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        routers = {name: r for name, r in find_routers(model).items() if r.state.tokens is not None}
        self.gradients.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        )
        self.tokens.append({name: int(router.state.tokens) for name, router in routers.items()})
        expected = {name: torch.zeros_like(r.router) for name, r in routers.items() if r.router is not None}
        for name, x, real in self.calls:
            weight = routers[name].router.detach().requires_grad_()
            loss = switch_loss(
                routers[name].rule(x @ weight.T, routers[name].top_k), None if real is None else real.flatten()
            )
            expected[name] += torch.autograd.grad(COEF * loss, weight)[0]
        self.expected.append(expected)
        self.calls.clear()

    def router_gradients(self, step: int = 0) -> dict:
        found = {k: g for k, g in self.gradients[step].items() if k.endswith(".router")}
        return {k.split(".linear_moe_experts")[0].removeprefix("base_model.model."): g for k, g in found.items()}


def make_trainer(kind, tmp_path, checkpointing=None, rows=None, model=None, config=None, callbacks=(), **settings):
    data, own = KINDS[kind]
    data = datasets.Dataset.from_list(data if rows is None else rows)
    recorder = Recorder()
    arguments = {
        "output_dir": str(tmp_path), "max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1,
        "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 0.0,
        "bf16": False, "gradient_checkpointing": checkpointing is not None, "learning_rate": 1e-2, **own, **settings,
    }  # fmt: skip
    if checkpointing is not None:
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": checkpointing == "reentrant"}
    others = {}
    if kind in ("GRPO", "RLOO"):
        others["reward_funcs"] = as_in_long_answers
    if kind == "Distillation":
        others["teacher_model"] = make_tiny_llama(5, layers=2)
    if config is not None or model is None:
        others["peft_config"] = config or adapter(kind)
    trainer = getattr(trl, f"{kind}Trainer")(
        model=backbone(kind) if model is None else model,
        args=getattr(trl, f"{kind}Config")(**arguments),
        train_dataset=data,
        eval_dataset=data.select(range(4)) if "eval_strategy" in settings else None,
        processing_class=make_tokenizer(),
        callbacks=[*callbacks, recorder],
        **others,
    )
    return trainer, recorder


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(((a[key] - b[key]).norm() / b[key].norm().clamp(min=1e-9)).item() for key in a)


@pytest.mark.parametrize("kind", KINDS)
def test_the_balance_gradient_is_the_definitions_under(kind, tmp_path):
    trainer, plain = make_trainer(kind, tmp_path)
    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    found = plain.router_gradients()
    assert len(found) == 4
    assert min(g.norm() for g in found.values()) > 1e-5  # B = 0, so that all of it comes from the balance loss
    assert largest_difference(found, plain.expected[0]) < 1e-5
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)
    assert trainer.state.log_history[0]["router/balance_loss"] >= 1.0
    for mode in ("reentrant", "non-reentrant"):
        checkpointed, recorder = make_trainer(kind, tmp_path, mode)
        checkpointed.train()
        assert recorder.tokens == plain.tokens  # counted once, though every layer ran twice
        for step in range(2):  # exactly: the first pass of a re-entrant checkpoint, without gradients, routes alike
            assert largest_difference(recorder.gradients[step], plain.gradients[step]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_balance_gradient_reaches_an_ffn_mixture_under(kind, tmp_path):
    """With B = 0 all experts of a block are equal, so that the task leaves the router alone: what it gets is balance."""
    config = FfnMoeConfig(
        num_experts=4, router_aux_loss_coef=COEF, task_type="SEQ_CLS" if kind == "Reward" else "CAUSAL_LM"
    )
    found = []
    for mode in (None, "reentrant", "non-reentrant"):
        trainer, recorder = make_trainer(kind, tmp_path, mode, config=copy.deepcopy(config), max_steps=1)
        trainer.train()
        routers = {name: g for name, g in recorder.gradients[0].items() if name.endswith(".router")}
        assert len(routers) == 2
        assert min(g.norm() for g in routers.values()) > 1e-5
        assert len(recorder.tokens[0]) == 2
        found.append((routers, recorder.tokens))
    for routers, tokens in found[1:]:
        assert tokens == found[0][1]
        assert largest_difference(routers, found[0][0]) == 0


def ranks(kind: str, **settings) -> RankMoeConfig:
    settings = {"r": 8, "top_k": 4, "target_modules": ["q_proj", "up_proj"], "init_weights": False, **settings}
    return RankMoeConfig(task_type="SEQ_CLS" if kind == "Reward" else "CAUSAL_LM", **settings)


@pytest.mark.parametrize("settings", [{}, {"routing": "self_activated"}], ids=["router", "themselves"])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_train_under(kind, settings, tmp_path):
    trainer, plain = make_trainer(kind, tmp_path, config=ranks(kind, **settings), max_steps=1)
    adapted = [name for name, p in trainer.model.named_parameters() if "rank_moe" in name and p.requires_grad]
    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert len(adapted) == 4 * (2 if settings else 3)
    learns = kind not in ("GRPO", "RLOO")  # where all answers of a group are rewarded alike there is nothing to learn
    assert all(plain.gradients[0][name].any() or not learns for name in adapted)
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)
    for mode in ("reentrant", "non-reentrant"):
        checkpointed, recorder = make_trainer(kind, tmp_path, mode, config=ranks(kind, **settings), max_steps=1)
        checkpointed.train()
        assert largest_difference(recorder.gradients[0], plain.gradients[0]) == 0


@pytest.mark.parametrize("form", [{"equivalent_rank": 2, "shards_per_vector": 2}, {"num_splits": 2}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pools_and_splits_train_under(kind, form, tmp_path, monkeypatch):
    def by_turns(completions, **_):  # so that there is an advantage to learn from, whatever is said
        return [float(i % 2) for i, _ in enumerate(completions)]

    monkeypatch.setattr(sys.modules[__name__], "as_in_long_answers", by_turns)
    task_type = "SEQ_CLS" if kind == "Reward" else "CAUSAL_LM"
    config = ShardPoolConfig(
        r=4, target_modules=["q_proj", "up_proj"], task_type=task_type, init_weights=False, index_seed=1, **form
    )
    found = []
    for mode in (None, "reentrant", "non-reentrant"):
        torch.manual_seed(3)
        trainer, recorder = make_trainer(kind, tmp_path, mode, config=copy.deepcopy(config), max_steps=1)
        start = {name: p.clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, start[name])}
        trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert changed == trained
        assert any(".shard_pool_weights." in name for name in trained)
        found.append(recorder.gradients[0])
    for gradients in found[1:]:
        assert largest_difference(gradients, found[0]) < 1e-5


@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO", "Reward"])
def test_gradient_accumulation_changes_nothing(kind, tmp_path, monkeypatch):
    """With the load pinned, as four loads of two rows are not one load of eight."""
    pinned = torch.tensor([0.4, 0.3, 0.2, 0.1])
    monkeypatch.setattr(RouterState, "updated_load", lambda self, counts: pinned)
    rows = [
        {key: value[:1] * 4 if isinstance(value, str) else value for key, value in row.items()}
        for row in KINDS[kind][0]
    ]
    gradients = []
    for accumulated, batch in ((4, 2), (1, 8)):
        trainer, recorder = make_trainer(
            kind, tmp_path, rows=rows, max_steps=1, gradient_accumulation_steps=accumulated,
            per_device_train_batch_size=batch,
        )  # fmt: skip
        trainer.train()
        gradients.append(recorder.router_gradients())
    assert largest_difference(*gradients) < 1e-5


def test_the_last_step_of_an_epoch_may_accumulate_less(tmp_path):
    trainer, recorder = make_trainer(
        "SFT", tmp_path, rows=KINDS["SFT"][0][:5], per_device_train_batch_size=1, gradient_accumulation_steps=4,
        max_steps=-1, num_train_epochs=1, learning_rate=0.0,
    )  # fmt: skip
    seen, step = [], trainer.training_step
    context = next(layer.context for layer in trainer.model.modules() if hasattr(layer, "context"))

    def watched_step(*args):
        seen.append(context.scale)
        return step(*args)

    trainer.training_step = watched_step
    trainer.train()
    assert seen == [0.25, 0.25, 0.25, 0.25, 1.0]


@pytest.mark.parametrize("config", [adapter, ranks])
@pytest.mark.parametrize("kind", ["DPO", "KTO", "GRPO", "RLOO"])
def test_a_continued_adapter_is_its_own_reference(kind, config, tmp_path):
    """TRL copies the policy into an adapter "ref"; the two must agree before the first step."""
    torch.manual_seed(3)
    policy = get_peft_model(backbone(kind), config(kind, init_weights=False))
    for router in find_routers(policy).values():
        if getattr(router, "selection_bias", None) is not None:  # TRL copies parameters, and this is a buffer
            router.selection_bias.normal_()
    settings = {"beta": 0.1} if kind in ("GRPO", "RLOO") else {}
    trainer, _ = make_trainer(kind, tmp_path, model=policy, max_steps=1, **settings)
    assert "ref" in trainer.model.peft_config
    tokens = torch.randint(4, 100, (2, 7))
    with torch.no_grad():
        ours = trainer.model(tokens).logits
        trainer.model.set_adapter("ref")
        reference = trainer.model(tokens).logits
        trainer.model.set_adapter("default")
        with trainer.model.disable_adapter():
            assert (trainer.model(tokens).logits - ours).abs().max() > 1e-3
    assert torch.equal(ours, reference)
    trainer.train()
    if kind == "DPO":
        assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)  # log 2: no preference yet


CHAT = [
    {"messages": [{"role": "user", "content": words(i)}, {"role": "assistant", "content": words(i + 3)}]}
    for i in range(ROWS)
]
TEXT = [{"text": words(i) + "=" + words(i + 3)} for i in range(ROWS)]


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (TEXT, {"packing": True, "max_length": 24}),
        (TEXT, {"packing": True, "packing_strategy": "wrapped", "max_length": 24}),
        (TEXT, {"padding_free": True, "max_length": None}),
        (CHAT, {"assistant_only_loss": True}),
        (KINDS["SFT"][0], {"completion_only_loss": True}),
        (KINDS["SFT"][0], {"completion_only_loss": False}),
    ],
    ids=["packing", "packing-wrapped", "padding-free", "assistant-only", "completion-only", "whole"],
)
def test_every_way_that_sft_makes_batches_counts_its_tokens(rows, settings, tmp_path):
    trainer, recorder = make_trainer("SFT", tmp_path, rows=rows, max_steps=1, logging_steps=10, **settings)
    trainer.train()
    assert largest_difference(recorder.router_gradients(), recorder.expected[0]) < 1e-5
    # TRL keeps a count of its own, from the batches
    assert set(recorder.tokens[0].values()) == {int(trainer._total_train_tokens)}


def test_an_adapter_made_before_the_trainer_is_served_alike(tmp_path):
    given, first = make_trainer("SFT", tmp_path)
    model = get_peft_model(backbone("SFT"), adapter())
    model.load_state_dict(given.model.state_dict())
    made, second = make_trainer("SFT", tmp_path, model=model)
    for trainer in (given, made):
        torch.manual_seed(0)  # of the order of the rows
        trainer.train()
    assert losses(made) == losses(given)
    assert largest_difference(second.router_gradients(1), first.router_gradients(1)) == 0


def quantised(folder):
    pytest.importorskip("bitsandbytes")
    make_tiny_llama(layers=2).save_pretrained(folder)
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, device_map={"": "cpu"})


def test_evaluation_does_not_disturb_training_on_four_bits(tmp_path):
    """bitsandbytes repacks weights at the first evaluation on some CPUs; then gradients stop and weights are lost."""
    curves, models = [], []
    for evaluate in (False, True):
        settings = {"eval_strategy": "steps", "eval_steps": 1} if evaluate else {}
        trainer, recorder = make_trainer(
            "SFT", tmp_path, "reentrant", model=quantised(tmp_path / "base"), config=adapter(), max_steps=4, **settings
        )
        before = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
        trainer.train()
        assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)
        assert all(gradient.norm() > 0 for gradient in recorder.gradients[2].values())
        curves.append(losses(trainer))
        models.append(trainer.model)
    assert curves[0] == curves[1]
    assert {p.dtype for p in models[0].parameters() if p.requires_grad} == {torch.float32}


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}
    whole, recorder = make_trainer("SFT", tmp_path / "whole", **settings)
    whole.train()
    again, resumed = make_trainer("SFT", tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(again)[-3:] == losses(whole)[-3:]
    for step in range(3):
        assert largest_difference(resumed.gradients[step], recorder.gradients[3 + step]) == 0
    keys = ("router/entropy", "router/max_load", "router/balance_loss")
    assert [[e[k] for k in keys] for e in again.state.log_history[3:6]] == [
        [e[k] for k in keys] for e in whole.state.log_history[3:6]
    ]


def test_a_checkpoint_without_the_callback_can_be_resumed(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, _ = make_trainer("SFT", tmp_path / "a", **settings)
    whole.remove_callback(MoeCallback)
    whole.train()
    again, _ = make_trainer("SFT", tmp_path / "b", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))  # and saves again at step 4
    assert (tmp_path / "b" / "checkpoint-4").exists()


LOCALIZED = {"routing": "softmax", "balance": "localized"}
TYPED = [{**row, "task_type": i % 2} for i, row in enumerate(KINDS["SFT"][0])]


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
def test_loramoe_trains_under_sft(checkpointing, tmp_path):
    trainer, recorder = make_trainer(
        "SFT", tmp_path, checkpointing, rows=TYPED, config=adapter(**LOCALIZED), remove_unused_columns=False
    )
    trainer.data_collator = TaskTypeCollator(trainer.data_collator)
    trainer.train()
    assert min(g.norm() for g in recorder.router_gradients().values()) > 1e-6


def test_loramoe_without_task_types_says_what_to_do(tmp_path):
    trainer, _ = make_trainer("SFT", tmp_path, rows=TYPED, config=adapter(**LOCALIZED))
    with pytest.raises(ValueError, match=r"`balance` is 'localized', but must be 'none' where .*TaskTypeCollator"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"`column` is 'task_type', but must be a column of every row: .*`remove_unused_columns` to False"),
        ({"remove_unused_columns": False, "packing": True, "max_length": 24}, r"a packed row holds several samples"),
        (
            {"remove_unused_columns": False, "padding_free": True, "max_length": None},
            r"`padding_free` is True, but must",
        ),
    ],
    ids=["column-removed", "packing", "padding-free"],
)
def test_task_types_are_refused_where_a_row_has_none(settings, message, tmp_path):
    trainer, _ = make_trainer("SFT", tmp_path, rows=TYPED, config=adapter(**LOCALIZED), **settings)
    trainer.data_collator = TaskTypeCollator(trainer.data_collator)
    with pytest.raises(ValueError, match=message):
        trainer.train()


class Biases(TrainerCallback):
    """The selection biases and the counts behind them, at each step."""

    def __init__(self):
        self.counts, self.before, self.after = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.counts.append([router.state.step_counts.clone() for router in find_routers(model).values()])
        self.before.append([router.selection_bias.clone() for router in find_routers(model).values()])

    def on_log(self, args, state, control, model=None, **kwargs):
        self.after.append([router.selection_bias.clone() for router in find_routers(model).values()])


@pytest.mark.parametrize("mode", [None, "reentrant", "non-reentrant"])
def test_the_selection_bias_moves_once_per_optimizer_step(mode, tmp_path):
    seen = Biases()
    config = adapter(balance="bias", bias_update_speed=0.1)
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 3}
    trainer, recorder = make_trainer("SFT", tmp_path, mode, config=config, callbacks=[seen], **settings)
    trainer.train()
    assert len(seen.before) == 3
    for step in range(3):
        for counts, before, after in zip(seen.counts[step], seen.before[step], seen.after[step], strict=True):
            assert int(counts[:-1].sum()) == 2 * int(counts[-1])  # two slots for each token, counted once
            assert torch.equal(after, updated_bias(before, counts[:-1], counts[-1], 0.1, 4))
    tokens = [sum(counts[0][-1] for counts in seen.counts[: step + 1]) for step in range(3)]
    assert [next(iter(seen.values())) for seen in recorder.tokens] == [
        int(total) - (int(tokens[step - 1]) if step else 0) for step, total in enumerate(tokens)
    ]
    assert all(bias.any() for bias in seen.after[-1])
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(make_tiny_llama(layers=2), tmp_path / "saved")
    for router, bias in zip(find_routers(loaded).values(), seen.after[-1], strict=True):
        assert torch.equal(router.selection_bias, bias)


def test_a_resumed_run_goes_on_with_its_selection_bias(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    settings |= {"per_device_train_batch_size": 2}
    config = adapter(balance="bias", bias_update_speed=0.1)
    whole, recorder = make_trainer("SFT", tmp_path / "whole", config=copy.deepcopy(config), **settings)
    whole.train()
    again, resumed = make_trainer("SFT", tmp_path / "again", config=copy.deepcopy(config), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for step in range(2):
        assert largest_difference(resumed.gradients[step], recorder.gradients[2 + step]) == 0
    for router, other in zip(find_routers(whole.model).values(), find_routers(again.model).values(), strict=True):
        assert torch.equal(router.selection_bias, other.selection_bias)
    assert any(router.selection_bias.any() for router in find_routers(whole.model).values())


class Schedule(TrainerCallback):
    """Where the schedules are, in training and in evaluation."""

    def __init__(self):
        self.training, self.evaluating = [], []

    def watch(self, model):
        router = next(iter(find_routers(model).values()))
        router.register_forward_pre_hook(self.see)
        return router

    def see(self, module, given):
        found = module.slots(given[2]), round(1 / module.scale(given[2]), 6)
        (self.training if module.training else self.evaluating).append(found)


def test_schedules_run_under_a_trainer_and_are_over_in_evaluation(tmp_path):
    config = adapter(top_k_start=4, router_temperature_start=3.0, schedule_steps=2)
    trainer, _ = make_trainer("SFT", tmp_path, config=config, max_steps=4, eval_strategy="steps", eval_steps=1)
    seen = Schedule()
    seen.watch(trainer.model)
    trainer.train()
    assert seen.training == [(4, 3.0), (3, 2.0), (2, 1.0), (2, 1.0)]
    assert set(seen.evaluating) == {(2, 1.0)}


def test_whole_sequences_are_routed_by_their_prompts_under_a_trainer(tmp_path):
    settings = {"max_steps": 1, "completion_only_loss": True}
    found = []
    for mode in (None, "reentrant", "non-reentrant"):
        trainer, recorder = make_trainer(
            "SFT", tmp_path, mode, config=adapter(router_granularity="sequence", init_weights=False), **settings
        )
        trainer.train()
        found.append(recorder.gradients[0])
    assert largest_difference(found[1], found[0]) < 1e-5
    assert largest_difference(found[2], found[0]) < 1e-5
    trainer, recorder = make_trainer("DPO", tmp_path, config=adapter(router_granularity="sequence"), max_steps=1)
    trainer.train()  # TRL's DPO masks the prompt in labels as well
    assert all(gradient.any() for gradient in recorder.router_gradients().values())
