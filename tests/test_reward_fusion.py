"""A reward model of capability experts: the head reads what the experts' own score heads read, trains under TRL, comes back."""

import json
import re
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from moe_peft.reward_fusion import RewardFusionConfig, RewardFusionModel, fuse, last_tokens


NAMES = ["kind", "brief"]


def classifier(seed: int = 0, pad_token_id: int | None = 0) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40, max_position_embeddings=64, pad_token_id=pad_token_id, num_labels=1,
    )  # fmt: skip
    return LlamaForSequenceClassification(config).eval()


def experts(names=NAMES, base=None, **settings):
    """LoRAs that differ, with score heads that differ."""
    base = base or classifier()
    model = None
    for seed, name in enumerate(names):
        torch.manual_seed(10 + seed)
        given = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS", "init_lora_weights": False}
        config = LoraConfig(**given, **settings)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        for key, parameter in model.named_parameters():
            if f"modules_to_save.{name}" in key:
                torch.nn.init.normal_(parameter)
    return model.eval()


def batch(side="right"):
    torch.manual_seed(3)
    ids = torch.randint(1, 40, (4, 9))
    mask = torch.ones_like(ids)
    for row, short in enumerate((0, 3, 5, 1)):
        if short:
            where = slice(-short, None) if side == "right" else slice(0, short)
            ids[row, where], mask[row, where] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_state_is_what_the_experts_own_score_head_sees(side):
    """An expert's score of its state is its logit: no other token, adapter or layer could give that."""
    model, inputs = experts(), batch(side)
    states = fuse(model).states(**inputs, capabilities=NAMES).chunk(2, dim=-1)
    for name, state in zip(NAMES, states, strict=True):
        model.set_adapter(name)
        score = model.get_base_model().score.modules_to_save[name]
        with torch.no_grad():
            torch.testing.assert_close(score(state), model(**inputs).logits, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def states_in_one_pass(model, input_ids, attention_mask, capabilities):
    """By PEFT's mixed batches: each row stands once for every expert."""
    many, found = len(capabilities), []
    names = [name for name in capabilities for _ in range(len(input_ids))]
    body = model.experts.get_base_model().model
    hook = body.register_forward_hook(lambda module, given, output: found.append(output.last_hidden_state))
    ids = input_ids.repeat(many, 1)
    model.experts(input_ids=ids, attention_mask=attention_mask.repeat(many, 1), adapter_names=names)
    hook.remove()
    states = found[0][torch.arange(len(ids)), last_tokens(ids, None, 0)]
    return torch.cat(states.chunk(many), dim=-1)


def test_one_pass_is_as_good_as_many():
    model, inputs = fuse(experts(["kind", "brief", "true"])).double(), batch()
    model.experts.double()
    names = ["true", "kind", "brief"]
    apart, together = (
        model.states(**inputs, capabilities=names),
        states_in_one_pass(model, **inputs, capabilities=names),
    )
    torch.testing.assert_close(apart, together, rtol=1e-9, atol=1e-11)


def test_the_reward_is_the_formula_and_only_the_head_learns():
    model, inputs = fuse(experts(), fusion_size=5), batch()
    before = {name: p.clone() for name, p in model.experts.named_parameters()}
    states = model.states(**inputs, capabilities=NAMES)
    first, act, second = model.fusion["all"]
    hidden = states @ first.weight.T + first.bias
    hidden = torch.where(hidden > 0, hidden, act.weight * hidden)
    torch.testing.assert_close(model(**inputs).logits, hidden @ second.weight.T + second.bias)
    assert model(**inputs).logits.shape == (4, 1)
    model.train()
    loss = -torch.nn.functional.logsigmoid(torch.sub(*model(**inputs).logits.chunk(2))).mean()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss.backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in (first.weight, act.weight, second.weight))
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.experts.named_parameters())
    assert not any(p.requires_grad for p in model.experts.parameters())


def test_scoring_leaves_the_active_adapter_and_everything_frozen():
    model = fuse(experts())
    model.experts.set_adapter("brief", inference_mode=True)
    model(**batch())
    assert model.experts.active_adapter == "brief"
    assert not any(p.requires_grad for p in model.experts.parameters())


def test_dropout_of_the_experts_is_off_in_training():
    model = fuse(experts(lora_dropout=0.5)).train()
    model.experts.train()
    assert torch.equal(model(**batch()).logits, model(**batch()).logits)


def test_the_head_counts_in_its_own_precision_under_autocast():
    model = fuse(experts()).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(**batch()).logits
    assert found.dtype == torch.float32
    found.sum().backward()
    torch.testing.assert_close(found, model(**batch()).logits, rtol=0.1, atol=0.1)


def test_padding_changes_nothing():
    model, inputs = fuse(experts()).double(), batch()
    model.experts.double()
    for row in range(4):
        length = int(inputs["attention_mask"][row].sum())
        alone = model(inputs["input_ids"][row : row + 1, :length]).logits
        torch.testing.assert_close(model(**inputs).logits[row : row + 1], alone, rtol=1e-9, atol=1e-11)


def test_where_a_row_ends():
    ids = torch.tensor([[0, 0, 5, 6], [5, 6, 0, 0], [5, 0, 6, 0]])
    assert last_tokens(ids, None, 0).tolist() == [3, 1, 2]
    assert last_tokens(ids, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]), None).tolist() == [3, 2, 0]
    assert last_tokens(ids, None, None).tolist() == [3, 3, 3]


# ----- Categories -----


CATEGORIES = {"chat": ["kind", "brief"], "facts": ["true", "brief"]}


def test_each_category_has_experts_and_a_head_of_its_own():
    model, inputs = fuse(experts(["kind", "brief", "true"]), categories=CATEGORIES), batch()
    found = model(**inputs, categories=["facts", "chat", "chat", "facts"]).logits
    for name, rows in {"chat": [1, 2], "facts": [0, 3]}.items():
        with model.category(name):
            torch.testing.assert_close(model(**inputs).logits[rows], found[rows])
        part = {key: value[rows] for key, value in inputs.items()}
        wanted = model.fusion[name](model.states(**part, capabilities=CATEGORIES[name]))
        torch.testing.assert_close(found[rows], wanted)
    found.sum().backward()
    assert all(p.grad is not None for p in model.fusion.parameters())


def test_a_prompt_is_routed_by_the_backbones_own_state():
    base = classifier()
    inputs = batch()
    with torch.no_grad():
        own = base.model(**inputs).last_hidden_state
    own = own[torch.arange(4), last_tokens(inputs["input_ids"], None, 0)]
    model = fuse(experts(["kind", "brief", "true"], base), categories=CATEGORIES)
    torch.testing.assert_close(model.prompt_states(**inputs), own)
    names = ["chat", "facts"]
    wanted = [names[i] for i in model.router(own).argmax(-1).tolist()]
    assert model.route(**inputs) == wanted
    assert len(model.experts.active_adapters) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: m(**batch()),
            "`categories` is None, but must be one of 'chat', 'facts' for each row. Say it for each",
        ),
        (
            lambda m: m(**batch(), categories=["chat"] * 3),
            "`categories` is '3 names', but must be one for each of the 4",
        ),
        (
            lambda m: m(**batch(), categories=["chats"] * 4),
            "`categories` is 'chats', but must be a category of the model. Did",
        ),
        (
            lambda m: m.category("fact").__enter__(),
            "`category` is 'fact', but must be a category of the model. Did you mean",
        ),
        (lambda m: m(**batch(), labels=1), "`labels` is 'given', but must be left out"),
        (lambda m: fuse(m.experts, ["kind", "kind"]), "`capabilities` is 'kind', but must be named once each"),
        (
            lambda m: fuse(m.experts, ["kind", "warm"]),
            "`capabilities` is 'warm', but must be among the adapters 'kind'",
        ),
        (lambda m: fuse(m.experts, ["a.b"]), "`capabilities` is 'a.b', but must be names of letters, digits"),
        (
            lambda m: fuse(m.experts, categories={"x": ["kind"]}),
            "`categories` is ['x'], but must be at least two, or None",
        ),
        (
            lambda m: fuse(m.experts, categories={"x": [], "y": ["kind"]}),
            "`categories.x` is [], but must be at least one",
        ),
        (
            lambda m: fuse(m.experts, categories={"x": ["kin"], "y": ["kind"]}),
            "`categories.x` is 'kin', but must be among 'kind', 'brief', 'true'. Did you mean 'kind'?",
        ),
        (lambda m: fuse(m.experts).route(**batch()), "`categories` is None, but must be there, to choose from"),
    ],
)
def test_what_has_no_meaning_is_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(fuse(experts(["kind", "brief", "true"]), categories=CATEGORIES))


# ----- Saving -----


_RELOAD = """
import sys, torch
torch.set_num_threads(1)
from moe_peft.reward_fusion import RewardFusionModel
model = RewardFusionModel.from_pretrained(sys.argv[1]).eval()
inputs = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save((model(**inputs, categories=["facts", "chat", "chat", "facts"]).logits, model.route(**inputs)), sys.argv[3])
"""


def test_it_comes_back_bit_for_bit_in_a_fresh_process(tmp_path):
    classifier().save_pretrained(tmp_path / "base")
    base = LlamaForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    model = fuse(experts(["kind", "brief", "true"], base), fusion_size=6, categories=CATEGORIES).eval()
    model.save_pretrained(tmp_path / "fused")
    torch.save(batch(), tmp_path / "rows.pt")
    command = [sys.executable, "-c", _RELOAD, *(str(tmp_path / name) for name in ("fused", "rows.pt", "out.pt"))]
    subprocess.run(command, check=True, capture_output=True, text=True)
    logits, routes = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        assert torch.equal(logits, model(**batch(), categories=["facts", "chat", "chat", "facts"]).logits)
    assert routes == model.route(**batch())
    again = RewardFusionConfig.from_pretrained(tmp_path / "fused")
    assert again.to_dict() == model.config.to_dict()
    assert again.capabilities == ["kind", "brief", "true"]
    assert again.categories == CATEGORIES
    weights = [path.name for path in (tmp_path / "fused").glob("*.safetensors")]
    assert weights == ["model.safetensors"]


def test_a_missing_expert_is_told(tmp_path):
    model = fuse(experts())
    model.save_pretrained(tmp_path)
    (tmp_path / "experts" / "brief" / "adapter_config.json").unlink()
    with pytest.raises(
        ValueError, match=r"The expert 'brief' is missing: .* has no experts/brief/adapter_config.json"
    ):
        RewardFusionModel.from_pretrained(tmp_path, backbone=classifier())
    assert "capabilities" in json.loads((tmp_path / "config.json").read_text())
