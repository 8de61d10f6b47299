"""One plain LoRA per expert with a selector, and one per request: equal to the model, and read without this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_peft
from moe_peft import FfnMoeConfig, LinearMoeConfig
from moe_peft.export.per_domain import export_experts, export_request_lora, request_factors
from moe_peft.export.selector import fit_selector, pooled_embeddings, selector_of
from moe_peft.merge import instead_of_routing, routed_layers
from moe_peft.pocket import POCKET_DIR
from moe_peft.routing import dense_weights
from moe_peft.routing_control import seeing
from moe_peft.serving.client import Selector as Client


SEQUENCE = {"router_granularity": "sequence", "router_scope": "model"}
HARD = {**SEQUENCE, "routing": "top_1_hard", "router_aux_loss_coef": 0.01, "balance": "switch"}
PROMPTS = ["12+30=", "What is the capital of Brana?\n", "reverse: abcde\n", "x", "Sort 5 2 9 1 in order:", "copy abc:"]
NAMES = ["law", "code", "art", "news"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(POCKET_DIR)


def make_model(names=NAMES, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(POCKET_DIR, dtype=dtype)
    fields = {"num_experts": 4, "r": 2, "lora_alpha": 64, "target_modules": "all-linear", "init_weights": False}
    model = get_peft_model(base, LinearMoeConfig(**{**fields, **settings}, task_type="CAUSAL_LM")).eval()
    for layer in routed_layers(model).values():
        experts = layer.experts("default")
        experts.domains = names
        if experts.router is not None:
            experts.router.data.normal_(std=30.0)  # prompts differ
    return model


def own_choice(model, tokenizer, prompt):
    """The expert of the largest weight in the model's own pass over the prompt."""
    found = []
    with torch.no_grad(), seeing(model, lambda router, routing: found.append(dense_weights(routing)[-1])):
        model(torch.tensor([tokenizer(prompt)["input_ids"]]))
    return int(found[0].argmax())


WITHOUT_US = """
import sys
class Forbidden:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in {forbidden!r}:
            raise ImportError(name)
sys.meta_path.insert(0, Forbidden())
"""


def run_without(forbidden, code, *arguments):
    program = WITHOUT_US.replace("{forbidden!r}", repr(forbidden)) + code
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


STOCK = """
import json, torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
base, out, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
folders = sys.argv[4:]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
tensors = {}
for number, folder in enumerate(folders):
    name = f"a{number}"
    if number == 0:
        model = PeftModel.from_pretrained(model, folder, adapter_name=name).eval()
    else:
        model.load_adapter(folder, adapter_name=name)
    model.set_adapter(name)
    with torch.no_grad():
        tensors[name] = model(torch.tensor([ids[number]])).logits.contiguous()
save_file(tensors, out)
"""


def stock_logits(tmp_path, ids, folders):
    from safetensors.torch import load_file

    out = tmp_path / "logits.safetensors"
    run_without(["moe_peft"], STOCK, POCKET_DIR, out, json.dumps(ids), *folders)
    return list(load_file(out).values())


# --- experts ---


@pytest.mark.parametrize("settings", [{}, {"num_shared_experts": 1}, {"share_A": True}, {"use_rslora": True}], ids=str)
def test_the_factors_of_an_expert_are_what_it_adds_alone(settings):
    model = make_model(**settings, dtype=torch.float64)
    layer = list(routed_layers(model).values())[-1]
    x = torch.randn(1, 5, layer.in_features, dtype=torch.float64)
    factors = layer.expert_factors("default")
    assert list(factors) == NAMES == layer.expert_names("default")
    for number, (A, B) in enumerate(factors.values()):
        others = [n for n in range(4) if n != number]
        with torch.no_grad(), moe_peft.routing(model, disable=others, weights={number: 1.0}):
            added = layer(x) - layer.base_layer(x)
        torch.testing.assert_close(x @ A.T @ B, added, rtol=1e-9, atol=1e-11)


REQUESTS = {
    "model": SEQUENCE,
    "shared": {**SEQUENCE, "num_shared_experts": 1},
    "linear": {"router_granularity": "sequence"},
    "block": {"router_granularity": "sequence", "router_scope": "block", "num_experts": "1:2:3:4", "routing": "top_1"},
    "null": {**SEQUENCE, "num_null_experts": 2},
}


def test_stock_peft_reads_each_folder_without_us_and_computes_the_same(tmp_path, tokenizer):
    """Experts and requests, in one process that cannot import this package."""
    model = make_model(**HARD, num_shared_experts=1)
    done = export_experts(model, tmp_path / "out")
    assert list(done.folders) == NAMES
    assert done.r == 4  # two ranks of its own and two that are shared
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    ids, folders, expected = prompts[:4], list(done.folders.values()), []
    for prompt, name in zip(ids, NAMES, strict=True):
        with torch.no_grad():
            expected.append(model(torch.tensor([prompt]), domain=name).logits)
    for name, settings in REQUESTS.items():
        answer, logits, config = one_request(settings, tmp_path / name, tokenizer)
        assert config.r == {"model": 4, "shared": 6}.get(
            name, config.r
        )  # two experts of rank 2, and one that is shared
        ids, folders, expected = [*ids, answer], [*folders, tmp_path / name], [*expected, logits]
    for folder in folders:
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["lora_alpha"] == config["r"]
        assert config["rank_pattern"] == config["alpha_pattern"] == {}
        assert (config["peft_type"], config["bias"], config["use_rslora"]) == ("LORA", "none", False)
    for found, wanted in zip(stock_logits(tmp_path, ids, folders), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def one_request(settings, folder, tokenizer):
    """`(prompt and answer, the model's logits on them, the config of the request's LoRA)`; a test in itself."""
    model = make_model(None, **settings)
    ids = torch.tensor([tokenizer(PROMPTS[1])["input_ids"]])
    answer = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    prompt = torch.arange(answer.shape[1]) < ids.shape[1]
    with torch.no_grad():
        logits = model(answer, prompt_mask=prompt.unsqueeze(0)).logits
    config = export_request_lora(model, PROMPTS[1], folder, tokenizer)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(POCKET_DIR), folder).eval()
    again = stock.generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(again, answer)
    return answer[0].tolist(), logits, config


def test_under_a_hard_rule_the_chosen_expert_is_the_model(tmp_path, tokenizer):
    model = make_model(**HARD, num_shared_experts=1)
    export_experts(model, tmp_path / "out")
    client = Client(tmp_path / "out", POCKET_DIR)
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            whole, one = model(ids).logits, model(ids, domain=client.choose(prompt).model).logits
        torch.testing.assert_close(whole, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [HARD, {**SEQUENCE, "router_bias": True, "router_scale": 0.5}, {**SEQUENCE, "routing": "softmax"}],
    ids=str,
)
def test_the_client_chooses_as_the_model_does(settings, tmp_path, tokenizer):
    model = make_model(**settings)
    torch.manual_seed(5)
    prompts = PROMPTS + ["".join(tokenizer.decode(i) for i in torch.randint(4, 100, (n,))) for n in range(1, 30)]
    export_experts(model, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "router.json").read_text())
    assert about["exact"] == (settings is HARD)
    client = Client(tmp_path / "out", POCKET_DIR)
    chosen = [NAMES.index(client.choose(prompt).model) for prompt in prompts]
    assert chosen == [own_choice(model, tokenizer, prompt) for prompt in prompts]
    assert len(set(chosen)) > 2


def test_the_client_runs_without_torch_and_without_us(tmp_path):
    model = make_model(**HARD)
    export_experts(model, tmp_path / "out")
    expected = Client(tmp_path / "out", POCKET_DIR).choose(PROMPTS[0])
    code = "import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = [tmp_path / "out" / "client.py", tmp_path / "out", "--base", POCKET_DIR, "--prompt", PROMPTS[0]]
    answer = json.loads(run_without(["moe_peft", "torch", "transformers", "peft"], code, *arguments))
    assert answer == {"model": expected.model, "scores": pytest.approx(expected.scores)}


def test_the_client_asks_the_server_for_that_adapter(tmp_path, capsys):
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    from moe_peft.serving.client import main

    model, asked = make_model(**HARD), []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            body = json.dumps({"choices": [{"text": "42"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    export_experts(model, tmp_path / "out")
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        main([str(tmp_path / "out"), "--base", str(POCKET_DIR), "--prompt", PROMPTS[0], "--url", url])
    finally:
        server.shutdown()
    expected = Client(tmp_path / "out", POCKET_DIR).choose(PROMPTS[0]).model
    assert [(path, body["model"], body["prompt"]) for path, body in asked] == [
        ("/v1/completions", expected, PROMPTS[0])
    ]
    assert capsys.readouterr().out == "42\n"


# --- fitted selectors ---

TEXTS = {
    "law": ["12+30=", "7*8=", "99-1=", "4+4="],
    "code": ["reverse: abcde", "copy: fghij", "upper: klmno", "reverse: pqr"],
    "art": ["WHO IS HE", "WHERE IS IT", "WHAT IS THAT", "WHY SO"],
    "news": ["...???", "!!..", "??!!", "..!"],
}


@pytest.mark.parametrize("kind", ["prototypes", "logistic"])
def test_a_fitted_selector_knows_its_text_and_the_client_agrees(kind, tmp_path, tokenizer):
    model = make_model()
    assert selector_of(model) is None  # it routes single tokens
    selector = fit_selector(model, tokenizer, TEXTS, kind, null_share=0.25)
    export_experts(model, tmp_path / "out", selector)
    client = Client(tmp_path / "out", POCKET_DIR)
    texts = [(name, text) for name, some in TEXTS.items() for text in some]
    scores = selector.scores(pooled_embeddings(model, tokenizer, [text for _, text in texts]))
    missed = 0
    for row, (name, text) in zip(scores, texts, strict=True):
        found = client.choose(text)
        assert max(found.scores, key=lambda key: found.scores[key]) == name
        assert list(found.scores.values()) == pytest.approx(row.tolist(), abs=1e-3)
        missed += found.model is None
    assert missed == 4  # a quarter of sixteen


def test_prototypes_are_the_means(tokenizer):
    model = make_model()
    selector = fit_selector(model, tokenizer, TEXTS)
    for row, texts in zip(selector.weight, TEXTS.values(), strict=True):
        torch.testing.assert_close(row, pooled_embeddings(model, tokenizer, texts).mean(0))
    table = model.get_input_embeddings().weight
    ids = tokenizer("7*8=")["input_ids"]
    torch.testing.assert_close(pooled_embeddings(model, tokenizer, ["7*8="], "max")[0], table[ids].amax(0).detach())


@pytest.mark.parametrize(
    ("texts", "more", "sentence"),
    [
        ({**TEXTS, "lwa": ["x"]}, {}, "`texts_by_domain` is 'lwa', but must be one of .*Did you mean 'law'"),
        ({**TEXTS, "law": []}, {}, "`texts_by_domain` is \"empty for 'law'\", but must be some prompts"),
        (TEXTS, {"kind": "logistics"}, "`kind` is 'logistics', but must be one of .*Did you mean 'logistic'"),
        (TEXTS, {"null_share": 1.0}, "`null_share` is 1.0, but must be from 0 to below 1"),
    ],
)
def test_what_cannot_be_fitted_is_refused(texts, more, sentence, tokenizer):
    with pytest.raises(ValueError, match=sentence):
        fit_selector(make_model(), tokenizer, texts, **more)


def test_another_base_and_damaged_folders_are_refused(tmp_path):
    model = make_model(**HARD)
    export_experts(model, tmp_path / "out")
    table = model.get_base_model().get_input_embeddings().weight
    table.data += 1.0
    model.get_base_model().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="it is another base model"):
        Client(tmp_path / "out", tmp_path / "other")
    with pytest.raises(ValueError, match="No safetensors file of .* the embedding table"):
        Client(tmp_path / "out", tmp_path)
    with pytest.raises(ValueError, match="`base` is .*, but must be the folder of the base model"):
        Client(tmp_path / "out", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no router.json"):
        Client(tmp_path / "out" / "law")
    with pytest.raises(ValueError, match="`prompt` has token ids .* must have some, from 0 to 99"):
        Client(tmp_path / "out", POCKET_DIR).choose([1, 100])
    path = tmp_path / "out" / "router.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(ValueError, match="`format` in router.json is 2, but must be 1"):
        Client(tmp_path / "out", POCKET_DIR)


def test_a_base_stored_in_half_precision_is_the_same_base(tmp_path, tokenizer):
    model = make_model(**HARD)
    export_experts(model, tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(POCKET_DIR, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    client = Client(tmp_path / "out", tmp_path / "half")
    for prompt in PROMPTS:
        assert client.choose(tokenizer(prompt)["input_ids"]).model == NAMES[own_choice(model, tokenizer, prompt)]


# --- one request ---


def test_with_a_domain_any_adapter_is_one_lora():
    model = make_model()
    ids = torch.randint(1, 100, (1, 12))
    factors = request_factors(model, ids, domain="art")
    with torch.no_grad():
        expected = model(ids, domain="art").logits
        with instead_of_routing(model, factors):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_no_lora_can_be_is_refused_and_nothing_is_written(tmp_path, tokenizer):
    def refused(sentence, model, **more):
        with pytest.raises(ValueError, match=sentence):
            export_request_lora(model, PROMPTS[0], tmp_path / "one", **{"tokenizer": tokenizer, **more})
        assert not (tmp_path / "one").exists()

    refused(
        "`router_granularity` is 'token', but must be 'sequence' for a LoRA per request.*moe-peft merge", make_model()
    )
    refused("`tokenizer` is None", make_model(**SEQUENCE), tokenizer=None)
    refused("`num_constant_experts` is 1", make_model(**SEQUENCE, num_constant_experts=1))
    refused("`adapter` is 'default', but must be one that routes", make_model(["a"], num_experts=1, routing="softmax"))
    base = AutoModelForCausalLM.from_pretrained(POCKET_DIR)
    block = get_peft_model(base, FfnMoeConfig(num_experts=2, top_k=2))
    refused("`peft_type` is 'ffn_moe', but must be 'linear_moe' or 'domain_moe'.*--to moe", block)
    with pytest.raises(ValueError, match="`peft_type` is 'ffn_moe'"):
        export_experts(block, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ValueError, match="`output` is .*, but must be a new or empty folder"):
        export_experts(make_model(**HARD), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize(("field", "value"), [("router_act", "tanh"), ("scoring_func", "cosine"), ("balance", "bias")])
def test_a_router_that_no_linear_classifier_is_asks_for_a_fitted_one(field, value, tmp_path, tokenizer):
    settings = {**SEQUENCE, field: value, "top_k": 2}
    model = make_model(**settings)
    with pytest.raises(ValueError, match=f"`{field}` is '{value}', but must be another for a selector.*fit_selector"):
        export_experts(model, tmp_path / "out")
    export_experts(model, tmp_path / "out", fit_selector(model, tokenizer, TEXTS))
    assert Path(tmp_path / "out" / "router.json").is_file()


# --- the command line ---


def run(capsys, *arguments):
    from moe_peft import cli

    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return stopped.value.code or 0, " ".join((said.out + said.err).split())


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    folders = {}
    for name, settings in (("sequence", HARD), ("token", {})):
        folders[name] = tmp_path_factory.mktemp("adapters") / name
        make_model(None, **settings).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def test_the_command_writes_what_the_functions_do(saved, tmp_path, capsys):
    code, said = run(capsys, "export", saved["sequence"], "--to", "loras", "--output", tmp_path / "out")
    assert code == 0, said
    assert "expert0 of it as a plain LoRA" in (tmp_path / "out" / "expert0" / "README.md").read_text()
    for words in (
        "4 LoRAs of rank 2",
        f"vllm serve {POCKET_DIR} --enable-lora --lora-modules expert0=",
        "The adapter's own choice, exactly: python",
    ):
        assert words in said
    assert Client(tmp_path / "out", POCKET_DIR).choose(PROMPTS[0]).model in (
        "expert0",
        "expert1",
        "expert2",
        "expert3",
    )
    options = ("--to", "request-lora", "--prompt", PROMPTS[0], "--output", tmp_path / "one")
    code, said = run(capsys, "export", saved["sequence"], *options)
    assert code == 0, said
    assert "one LoRA of rank 2, exact for this request" in said
    code, said = run(capsys, "export", saved["token"], "--to", "loras", "--output", tmp_path / "plain")
    assert code == 0, said
    assert "Nothing picks among them" in said
    assert not (tmp_path / "plain" / "router.json").exists()
    rows = [{"prompt": text, "completion": "x", "domain": n} for n, some in enumerate(TEXTS.values()) for text in some]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--to", "loras", "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "fitted")
    code, said = run(capsys, "export", saved["token"], *options)
    assert code == 0, said
    assert "Fitted to your prompts" in said
    assert Client(tmp_path / "fitted", POCKET_DIR).choose("7*8=").model == "expert0"


def test_routing_by_label_is_a_lora_for_each_label(tokenizer, tmp_path, capsys):
    settings = {
        "num_experts": 3,
        "num_shared_experts": 1,
        "routing": "given",
        "balance": "none",
        "router_scope": "linear",
    }
    model = make_model(None, **settings).eval()
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    code, said = run(capsys, "export", tmp_path / "adapter", "--to", "loras", "--output", tmp_path / "out")
    assert code == 0, said
    assert "Each is exactly what the adapter computes for its task type: expert0 for 0" in said
    one = ("export", tmp_path / "adapter", "--to", "request-lora", "--domain", 1, "--output", tmp_path / "one")
    code, said = run(capsys, *one)
    assert code == 0, said
    assert "exact for the domain '1'" in said
    ids = [tokenizer(PROMPTS[0])["input_ids"]]
    found = stock_logits(tmp_path, ids * 3, [tmp_path / "out" / f"expert{n}" for n in range(3)])
    with torch.no_grad():
        for label, logits in enumerate(found):
            wanted = model(torch.tensor(ids), task_types=torch.tensor([label])).logits
            torch.testing.assert_close(logits, wanted.view_as(logits), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--to", "lora"], "`--to` is 'lora', but must be 'moe', .* Did you mean 'loras'"),
        (["--to", "loras"], "`--output` is None"),
        (
            ["--to", "loras", "--prompt", "x", "--output", "new"],
            "`--prompt` is 'x', but must be left out with `--to loras`",
        ),
        (["--to", "loras", "--check", "--output", "new"], "`--check` is True, but must be left out"),
        (["--to", "request-lora", "--output", "new"], "`--prompt` is None, but must be the request's text"),
        (["--to", "request-lora", "--prompt", "x", "--output", "new"], "`router_granularity` is 'token'"),
        (["--prompt", "x"], "`--prompt` goes with `--to loras` or `--to request-lora` alone"),
    ],
    ids=str,
)
def test_the_command_refuses_in_words(options, sentence, saved, tmp_path, capsys, monkeypatch):
    import re

    monkeypatch.chdir(tmp_path)
    code, said = run(capsys, "export", saved["token"], *options)
    assert code == 2
    assert re.search(sentence, said), said
    assert list(tmp_path.iterdir()) == []
