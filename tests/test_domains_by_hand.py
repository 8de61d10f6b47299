"""`domain_moe` by hand and exported: with each gate a domain is its expert, and the client chooses as the gate does."""

import pytest
import torch
from peft import get_peft_model
from test_per_domain import PROMPTS, own_choice
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_peft
from moe_peft import expert_trace, task_types
from moe_peft.export.per_domain import export_experts, request_factors
from moe_peft.export.selector import pooled_embeddings
from moe_peft.merge import instead_of_routing, routed_layers
from moe_peft.pocket import POCKET_DIR
from moe_peft.serving.client import Selector as Client


DomainMoeConfig = pytest.importorskip("moe_peft.domain_config").DomainMoeConfig

NAMES = ["law", "code", "art"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(POCKET_DIR)


def make_model(gate):
    torch.manual_seed(0)
    fields = {"domains": NAMES, "domain_ranks": [2, 3, 1], "r": 2, "lora_alpha": 64, "init_weights": False}
    config = DomainMoeConfig(gate=gate, target_modules="all-linear", task_type="CAUSAL_LM", **fields)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(POCKET_DIR, dtype=torch.float32), config).eval()
    for router in gates(model):
        router.router.data.normal_(std=3.0)  # prompts differ
    return model


def gates(model):
    experts = [layer.experts("default") for layer in routed_layers(model).values()]
    return [one for one in experts if one.router is not None]


@pytest.mark.parametrize("gate", ["token", "sequence", "given", "prototype", "arrow"])
def test_a_domain_is_its_expert_alone(gate, tokenizer):
    model = make_model(gate)
    torch.manual_seed(1)
    ids = torch.randint(4, 100, (2, 40))
    for domain in NAMES:
        with torch.no_grad():
            expected = model(ids, domain=domain).logits
            torch.testing.assert_close(model(ids[:, :8], domain=domain).logits, expected[:, :8], **CLOSE)
            torch.testing.assert_close(model(ids, domain=[domain, "law"]).logits[0], expected[0], **CLOSE)
            with instead_of_routing(model, request_factors(model, ids[0], domain=domain)):
                torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    if gate == "given":
        with task_types(model, [2, 0]), torch.no_grad():
            torch.testing.assert_close(model(ids).logits, model(ids, domain=["art", "law"]).logits, **CLOSE)
    how = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "eos_token_id": None}
    both = model.generate(input_ids=ids, domain=["art", "code"], **how)
    for row, domain in enumerate(("art", "code")):
        assert torch.equal(model.generate(input_ids=ids[row : row + 1], domain=domain, **how)[0], both[row])
    trace = expert_trace(model, tokenizer, "12+3=", domain="code", max_new_tokens=2, eos_token_id=None)
    assert trace.answered() == ["code"] * 2


@pytest.mark.parametrize("gate", ["sequence", "prototype"])
@pytest.mark.parametrize("null", [False, True])
def test_the_client_chooses_as_the_gate_does(gate, null, tmp_path, tokenizer):
    model = make_model(gate)
    if gate == "prototype":
        means = pooled_embeddings(model, tokenizer, ["12+30=", "reverse: abc", "WHO IS"])
        gates(model)[0].router.data.copy_(means)
    torch.manual_seed(5)
    prompts = PROMPTS + ["".join(tokenizer.decode(i) for i in torch.randint(4, 100, (n,))) for n in range(1, 30)]
    if null:
        scores = export_experts(model, tmp_path / "first").selector.scores(
            pooled_embeddings(model, tokenizer, prompts, "max" if gate == "sequence" else "mean")
        )
        ordered = scores.amax(-1).sort().values  # between two prompts, not on one
        gates(model)[0].null_threshold.fill_(float(ordered[9:11].mean()))
    export_experts(model, tmp_path / "out")
    client = Client(tmp_path / "out", POCKET_DIR)
    chosen = [client.choose(prompt).model for prompt in prompts]
    assert chosen == [[*NAMES, None][own_choice(model, tokenizer, prompt)] for prompt in prompts]
    assert len(set(chosen)) >= 3 - null
    assert (None in chosen) == null
    for prompt, name in zip(prompts[:6], chosen, strict=False):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad(), model.disable_adapter() if name is None else moe_peft.routing(model, domain=name):
            expected = model(ids).logits
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
