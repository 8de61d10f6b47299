"""Which expert answered: the trace against the routers' decisions while the model generates."""

import io

import pytest
import torch
from peft import get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_peft
from moe_peft import FfnMoeConfig, LinearMoeConfig, RankMoeConfig, expert_trace
from moe_peft.merge import routed_layers
from moe_peft.pocket import POCKET_DIR
from moe_peft.routing import dense_weights
from moe_peft.routing_control import seeing
from moe_peft.tracing import NOTHING


SEQUENCE = {"router_granularity": "sequence", "router_scope": "model"}
PROMPT = "12+30="
TYPES = [
    (LinearMoeConfig, {}),
    (LinearMoeConfig, {"routing": "softmax"}),
    (LinearMoeConfig, SEQUENCE),
    (LinearMoeConfig, {"num_experts": "1:2:3:4", "routing": "top_1"}),
    (FfnMoeConfig, {}),
    (RankMoeConfig, {"r": 4, "top_k": 2}),
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(POCKET_DIR)


def make_model(config_class=LinearMoeConfig, **settings):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(POCKET_DIR, dtype=torch.float64)
    fields = {
        "r": 2,
        "lora_alpha": 32,
        "target_modules": "all-linear",
        "init_weights": False,
        "task_type": "CAUSAL_LM",
    }
    if config_class is not RankMoeConfig:
        fields["num_experts"] = 4
    return get_peft_model(base, config_class(**{**fields, **settings})).eval()


@pytest.mark.parametrize(("config_class", "settings"), TYPES, ids=str)
def test_the_trace_is_what_decided_while_the_answer_was_made(config_class, settings, tokenizer):
    model = make_model(config_class, **settings)
    passes: list[dict[int, torch.Tensor]] = [{}]

    def see(router, routing):
        if id(router) in passes[-1] and settings.get("router_scope") != "model":
            passes.append({})
        passes[-1][id(router)] = dense_weights(routing)[-1]

    length = {"max_new_tokens": 5, "eos_token_id": None}
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    with seeing(model, see):
        answer = model.generate(input_ids=ids, do_sample=False, **length)[0, ids.shape[1] :]
    trace = expert_trace(model, tokenizer, PROMPT, **length)
    assert "".join(trace.tokens) == tokenizer.decode(answer)
    if settings.get("router_scope") == "model":
        passes = passes * 5
    assert len(passes) == 5
    for step, decided in enumerate(passes):
        assert len(decided) == len(trace.layers)
        for layer, weights in enumerate(decided.values()):
            expected = trace.weights[layer, step, : len(weights)]
            torch.testing.assert_close(expected.double(), weights, rtol=1e-5, atol=1e-6)
    given = expert_trace(model, tokenizer, PROMPT, answer.tolist())
    torch.testing.assert_close(given.weights, trace.weights)
    assert given.tokens == trace.tokens


def test_by_hand_the_trace_names_the_domain(tokenizer):
    model = make_model()
    for layer in routed_layers(model).values():
        layer.experts("default").domains = ["law", "code", "art", "news"]
    trace = expert_trace(model, tokenizer, PROMPT, max_new_tokens=3, eos_token_id=None, domain="art")
    assert trace.answered() == ["art"] * 3
    assert trace.parts() == [("art", "".join(trace.tokens), 1.0)]
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(trace.table())
    console.print(trace.table(trace.layers[0], by_token=True))
    printed = console.export_text()
    assert "art" in printed
    assert "100 %" in printed
    with moe_peft.routing(model, ablate=["law", "code", "art", "news"]):
        assert expert_trace(model, tokenizer, PROMPT, "42").answered() == [NOTHING, NOTHING]
    with moe_peft.routing(model, disable=["law", "code", "news"]):
        assert expert_trace(model, tokenizer, PROMPT, "42").parts() == [("art", "42", 1.0)]


def test_shares_are_means_over_layers_of_what_each_layer_gave(tokenizer):
    trace = expert_trace(make_model(), tokenizer, PROMPT, "42")
    mean = sum(trace.shares(layer) for layer in trace.layers) / len(trace.layers)
    torch.testing.assert_close(trace.shares(), mean)
    torch.testing.assert_close(trace.shares().sum(-1), torch.ones(2))
    assert trace.shares().shape == (2, 4)


def test_what_cannot_be_traced_is_refused(tokenizer):
    model = make_model()
    with pytest.raises(ValueError, match="`prompt` is '', but must be at least one token"):
        expert_trace(model, tokenizer, "", "42")
    with pytest.raises(ValueError, match="`answer` is .*, but must be at least one token"):
        expert_trace(model, tokenizer, PROMPT, "")
    with pytest.raises(ValueError, match="`layer` is 'q', but must be one of the 28 layers, such as"):
        expert_trace(model, tokenizer, PROMPT, "42").shares("q")
    with pytest.raises(ValueError, match="`adapter_name` is 'other', but must be an active adapter.*default"):
        expert_trace(model, tokenizer, PROMPT, "42", adapter_name="other")
