"""`moe-peft serve` through the official `openai` package: answers equal `generate`'s, and no request sees another.

Requests go over a real port on this machine. The model is the pocket backbone with an adapter that changes its answers.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model

from moe_peft import DomainMoeConfig, FfnMoeConfig, LinearMoeConfig, RankMoeConfig, ShardPoolConfig, cli
from moe_peft.loaded import load_adapter
from moe_peft.pocket import make_suite
from moe_peft.saving import save_adapter
from moe_peft.trial import load_pocket


openai = pytest.importorskip("openai", reason="the server's extra is not installed: pip install 'peft-moe[serve]'")
uvicorn = pytest.importorskip("uvicorn", reason="the server's extra is not installed: pip install 'peft-moe[serve]'")
pytest.importorskip("fastapi", reason="the server's extra is not installed: pip install 'peft-moe[serve]'")

from moe_peft.serving import switches  # noqa: E402
from moe_peft.serving.app import Around, make_app, whole_stream  # noqa: E402
from moe_peft.serving.bundle import open_bundle, write_bundle  # noqa: E402
from moe_peft.serving.command import is_loopback, listen_at  # noqa: E402
from moe_peft.serving.engine import Engine, second_skeleton, why_not_batched  # noqa: E402


PROMPTS = [row["prompt"] for row in make_suite("fact8tag", 0).test[:64]]
LIMIT, BODY_LIMIT = 64, 20_000


def linear(**kwargs):
    given = {"num_experts": 3, "r": 2, "lora_alpha": 20, "target_modules": "all-linear", **kwargs}
    return LinearMoeConfig(init_weights=False, task_type="CAUSAL_LM", **given)


def make_bundle(config, folder, load_in="none"):
    torch.manual_seed(0)
    model, _ = load_pocket(quantize=False)
    save_adapter(get_peft_model(model, config), folder / "adapter")
    return write_bundle(str(folder / "adapter"), folder / "bundle", load_in=load_in).folder


@contextmanager
def serving(folder, batched, limit=LIMIT):
    """A server for one bundle on a free port: its engine and a client."""
    engine = Engine(open_bundle(folder), limit, batched)
    listening = listen_at("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(make_app(engine, BODY_LIMIT), log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{listening.getsockname()[1]}/v1", api_key="none", max_retries=0, timeout=60
    )
    try:
        yield engine, client
    finally:
        client.close()
        server.should_exit = True
        thread.join()
        engine.stop()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(linear(), tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module", params=[False, True], ids=["alone", "batched"])
def served(request, bundle):
    with serving(bundle, request.param) as (engine, client):
        assert (engine.batches is not None) == request.param
        yield engine, client


@pytest.fixture(scope="module")
def reference(bundle):
    """What `generate` answers through PEFT, token ids and all, without any of the server's code."""
    model, tokenizer = load_adapter(str(bundle.parent / "adapter"), load_in="none")

    def answer(prompt, **kwargs):
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            ids = model.generate(**inputs, **{"max_new_tokens": 24, **kwargs})[0, inputs["input_ids"].shape[1] :]
        return tokenizer.decode(ids, skip_special_tokens=True), len(ids)

    return answer


def chat(served, prompt, **kwargs):
    engine, client = served
    messages = [{"role": "user", "content": prompt}]
    return client.chat.completions.create(**{"model": engine.name, "messages": messages, "max_tokens": 24, **kwargs})


def streamed(served, prompt, **kwargs):
    """The text of a stream, its finish reason and its usage."""
    chunks = list(chat(served, prompt, stream=True, **kwargs))
    last = chunks[-1]
    return "".join(c.choices[0].delta.content or "" for c in chunks), last.choices[0].finish_reason, last.usage


def test_one_client_gets_what_generate_gives(served, reference):
    engine, client = served
    assert [model.id for model in client.models.list()] == [engine.name]
    for prompt in PROMPTS[:3]:
        text, length = reference(prompt)
        answer = chat(served, prompt)
        assert answer.choices[0].message.content == text
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), length)
        assert answer.choices[0].finish_reason == ("length" if length == 24 else "stop")
        assert answer.model == engine.name
        got, finish, usage = streamed(served, prompt)
        assert (got, finish) == (text, answer.choices[0].finish_reason)
        assert usage.completion_tokens == length
        plain = client.completions.create(model=engine.name, prompt=prompt, max_tokens=24)
        assert plain.choices[0].text == text  # the pocket template adds nothing to a single question
        pieces = client.completions.create(model=engine.name, prompt=prompt, max_tokens=24, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == text


def test_64_parallel_requests_are_not_mixed_up(served, reference):
    wanted = [reference(prompt, max_new_tokens=8)[0] for prompt in PROMPTS]
    assert len(set(PROMPTS)) == 64
    assert len(set(wanted)) > 16  # an answer that went to the wrong client would show

    def ask(number):
        if number % 2:
            return streamed(served, PROMPTS[number], max_tokens=8)[0]
        return chat(served, PROMPTS[number], max_tokens=8).choices[0].message.content

    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(ask, range(64))) == wanted


def test_conversations_go_through_the_chat_template(served, reference):
    engine, client = served
    turns = [{"role": "user", "content": PROMPTS[0]}, {"role": "assistant", "content": "Wexley"}]
    turns.append({"role": "user", "content": [{"type": "text", "text": PROMPTS[1]}]})
    ids = engine.processor.apply_chat_template([*turns[:2], {"role": "user", "content": PROMPTS[1]}], tokenize=True)
    answer = client.chat.completions.create(model=engine.name, messages=turns, max_tokens=8)
    assert answer.usage.prompt_tokens == len(ids["input_ids"])


def test_drawn_answers_follow_their_seed_and_disturb_no_other(served, reference):
    drawn = {chat(served, PROMPTS[0], temperature=2.0, seed=7).choices[0].message.content for _ in range(3)}
    assert len(drawn) == 1
    others = {chat(served, PROMPTS[0], temperature=2.0, seed=seed).choices[0].message.content for seed in range(4)}
    assert len(others) > 1
    state = torch.get_rng_state()
    chat(served, PROMPTS[0], temperature=2.0, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    wanted = reference(PROMPTS[1])[0]

    def ask(number):
        options = {"temperature": 2.0} if number % 2 else {"temperature": 0}
        return chat(served, PROMPTS[1], **options).choices[0].message.content

    with ThreadPoolExecutor(16) as pool:
        assert set(list(pool.map(ask, range(16)))[::2]) == {wanted}


def test_stop_and_logit_bias_hold_for_their_request_alone(served, reference):
    engine, _ = served
    wanted, _ = reference(PROMPTS[0])
    assert chat(served, PROMPTS[0], stop=wanted[1]).choices[0].message.content == wanted[:2]
    eos = engine.processor.eos_token_id
    assert chat(served, PROMPTS[0], logit_bias={str(eos): 1000}).choices[0].message.content == ""
    assert chat(served, PROMPTS[0]).choices[0].message.content == wanted


def test_two_clients_may_choose_the_same_request_id(served, reference):
    wanted = [reference(prompt)[0] for prompt in PROMPTS[:8]]

    def ask(prompt):
        return chat(served, prompt, extra_headers={"x-request-id": "mine"}).choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, PROMPTS[:8])) == wanted


def test_a_client_that_leaves_does_not_stop_the_others(served, reference):
    for _ in range(3):
        stream = chat(served, PROMPTS[0], stream=True, max_tokens=LIMIT)
        next(iter(stream))
        stream.close()
    assert chat(served, PROMPTS[1]).choices[0].message.content == reference(PROMPTS[1])[0]


REFUSED = [
    ({"model": "gpt-4"}, 404, "There is no model 'gpt-4' here. This server has 'bundle'."),
    ({"messages": []}, 400, "`messages` is [], but must be a list of at least one message."),
    ({"messages": [{"role": "user"}]}, 400, "`messages[0].content` is None, but must be a text, or a list of"),
    (
        {"messages": [{"content": "Hi"}]},
        400,
        "`messages[0]` is {'content': 'Hi'}, but must be an object with a `role`.",
    ),
    (
        {"max_tokens": LIMIT + 1},
        400,
        f"`max_tokens` is {LIMIT + 1}, but must be at most {LIMIT}. The server was started",
    ),
    (
        {"messages": [{"role": "user", "content": "a" * 3000}]},
        400,
        "The prompt is 3000 tokens long, and the model takes",
    ),
    ({"messages": [{"role": "user", "content": "a" * 2040}]}, 400, "Ask for at most 8, or shorten the prompt."),
    (
        {"messages": [{"role": "user", "content": "a" * BODY_LIMIT}]},
        413,
        f"The request is longer than {BODY_LIMIT} bytes.",
    ),
    (
        {"extra_body": {"disable_expert": [0]}},
        400,
        "`disable_expert` is not a field of a request. Did you mean 'disable_",
    ),
    ({"stream_options": {"include_usage": "x"}}, 400, "must be an object with `include_usage` alone, true or false"),
    ({"extra_body": {"disable_experts": 3}}, 400, "`disable_experts` is 3, but must be a list of experts"),
    ({"extra_body": {"force_experts": [-1]}}, 400, "`force_experts` is [-1], but must be a list of experts"),
    ({"extra_body": {"domain": [1]}}, 400, "`domain` is [1], but must be the name or the number of one domain."),
    ({"extra_body": {"generation_config": "{}"}}, 400, "`generation_config` is '{}', but must be left out."),
]


@pytest.mark.parametrize(("given", "status", "sentence"), REFUSED, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_gets_a_sentence(served, given, status, sentence, stream):
    with pytest.raises(openai.APIStatusError) as refused:
        chat(served, "Hi", stream=stream, **given)
    assert refused.value.status_code == status
    assert sentence in refused.value.body["message"]
    assert refused.value.body["type"] == "invalid_request_error"


def raw(client, method, path, body=None, **headers):
    """One request without the package: status and the parsed answer."""
    import httpx

    address = str(client.base_url).removesuffix("/v1/")
    answer = httpx.request(method, address + path, content=body, headers=headers, timeout=30)
    return answer.status_code, answer.json()


def test_what_is_no_request(served):
    _, client = served
    json_type = {"content-type": "application/json"}
    for body in (b"{", b"[1]", b'"text"'):
        status, answer = raw(client, "POST", "/v1/chat/completions", body, **json_type)
        assert (status, "is no JSON object" in answer["error"]["message"]) == (400, True)
    status, answer = raw(client, "GET", "/v1/chat/completions")
    assert (status, answer["error"]["message"]) == (405, "`/v1/chat/completions` is not asked by GET.")
    # What transformers' server has besides would load models from the Hub, or unload this one.
    for path in ("/load_model", "/reset", "/v1/responses", "/v1/systemone", "/nothing"):
        status, answer = raw(client, "POST", path, b'{"model": "x"}', **json_type)
        assert status == 404
        assert f"There is nothing at `{path}`. Choose one of: /v1/chat/completions" in answer["error"]["message"]
    assert raw(client, "GET", "/health") == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ('"temperature": 1' + "0" * 400, "`temperature` is 1000"),
        ('"top_p": 1' + "0" * 400, "`top_p` is 1000"),
        ('"logit_bias": {"3": 1' + "0" * 400 + "}", "`logit_bias` is {'3': 1000"),
        ('"logit_bias": {"3": 1e39}', "`logit_bias` is {'3': 1e+39}, but must be an object of token ids"),
        (r'"stop": "\ud800"', r"The request holds `\ud800`, half of a surrogate pair"),
        (r'"\ud800": 1', r"The request holds `\ud800`, half of a surrogate pair"),
        (r'"messages": [{"role": "user", "content": "a\udc00"}]', r"The request holds `\udc00`, half of a surrogate"),
    ],
    ids=lambda value: value[:24],
)
def test_numbers_and_texts_that_json_alone_can_hold_are_refused(served, given, sentence):
    engine, client = served
    body = f'{{"model": "{engine.name}", "messages": [{{"role": "user", "content": "Hi"}}], {given}}}'.encode()
    status, answer = raw(client, "POST", "/v1/chat/completions", body, **{"content-type": "application/json"})
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert sentence in answer["error"]["message"]


def test_a_whole_character_beyond_the_basic_plane_is_taken(served):
    assert chat(served, "\U0001f600", max_tokens=2).usage.completion_tokens >= 1


def test_a_long_body_without_a_length_is_refused_as_well(served):
    _, client = served

    def pieces():
        for _ in range(64):
            yield b"x" * 1024

    status, answer = raw(client, "POST", "/v1/chat/completions", pieces())
    assert (status, "longer than" in answer["error"]["message"]) == (413, True)


def test_more_requests_at_one_time_than_allowed_get_a_503():
    """Held back inside, two are there; the third is refused, and taken once one has ended. Others than POST come in."""
    import asyncio

    async def run():
        go, answers = asyncio.Event(), []

        async def inside(scope, receive, send):
            await go.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        around = Around(inside, limit=64, most=2)

        async def ask(method="POST"):
            seen = []

            async def send(message):
                seen.append(message)

            async def receive():
                return {"type": "http.request", "body": b"{}", "more_body": False}

            await around({"type": "http", "method": method, "headers": []}, receive, send)
            answers.append(seen)
            return seen[0]["status"], dict(seen[0]["headers"]), seen[-1].get("body", b"")

        waiting = [asyncio.create_task(ask()) for _ in range(2)]
        listed = asyncio.create_task(ask("GET"))
        await asyncio.sleep(0)
        refused = await ask()
        assert len(answers) == 1
        go.set()
        return refused, [(await task)[0] for task in waiting], (await listed)[0], (await ask())[0]

    refused, others, listed, after = asyncio.run(run())
    assert (refused[0], refused[1][b"retry-after"]) == (503, b"1")
    assert "2 requests are being answered or wait" in json.loads(refused[2])["error"]["message"]
    assert (others, listed, after) == ([200, 200], 200, 200)


def test_a_stream_ends_as_openai_ends_it(served):
    engine, client = served
    body = {"model": engine.name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "stream": True}
    import httpx

    with httpx.stream("POST", f"{client.base_url}chat/completions", json=body) as answer:
        assert answer.read().endswith(b"data: [DONE]\n\n")


async def _pieces(*texts):
    for text in texts:
        yield text


def test_an_error_within_a_stream_is_proper_json():
    import asyncio

    async def collected():
        return [
            text async for text in whole_stream(_pieces("data: {}\n\n", 'data: {"error": "no "quotes"\\ here"}\n\n'))
        ]

    texts = asyncio.run(collected())
    assert json.loads(texts[1].removeprefix("data: "))["error"]["message"] == 'no "quotes"\\ here'


# ---- Switches ----


@pytest.fixture
def control(monkeypatch):
    """A stand-in for `moe_peft.routing_control`: it says on which thread a switch is set."""
    seen = []
    here = threading.local()

    @contextmanager
    def routing(model, *, disable=(), force=(), domain=None):
        if disable and max(disable) > 2:
            raise ValueError(f"`disable` is {disable}, but must be experts from 0 to 2.")
        seen.append((disable, force, domain))
        here.on = True
        try:
            yield
        finally:
            here.on = False

    module = type(sys)("moe_peft.routing_control")
    module.routing = routing
    monkeypatch.setitem(sys.modules, "moe_peft.routing_control", module)
    return seen, here


def test_switches_hold_for_their_request_alone(served, reference, control):
    engine, _ = served
    seen, here = control
    eos = engine.processor.eos_token_id

    def ends_at_once(module, args, output):
        if getattr(here, "on", False):
            output.logits[..., eos] += 1000
        return output

    base = engine.model.get_base_model()
    hooks = [base.register_forward_hook(ends_at_once)]
    if engine.batches is not None:
        hooks.append(engine.batches._cb.model.register_forward_hook(ends_at_once))
    try:
        wanted = [reference(prompt)[0] for prompt in PROMPTS[:16]]

        def ask(number):
            extra = {"extra_body": {"disable_experts": [number % 3]}} if number % 2 else {}
            return chat(served, PROMPTS[number], **extra).choices[0].message.content

        with ThreadPoolExecutor(16) as pool:
            got = list(pool.map(ask, range(16)))
    finally:
        for hook in hooks:
            hook.remove()
    assert got == ["" if number % 2 else wanted[number] for number in range(16)]
    assert {entry for _, entry, _ in seen} == {()}


def test_switches_that_the_model_does_not_have_are_refused_before_an_answer_begins(served, control):
    with pytest.raises(openai.BadRequestError, match=r"`disable_experts` is \[7\], but must be experts from 0 to 2"):
        chat(served, "Hi", stream=True, extra_body={"disable_experts": [7]})
    chat(served, "Hi", extra_body={"force_experts": [1], "domain": "law"})
    assert control[0][-1] == ((), [1], "law")


def test_without_the_module_for_switches_the_fields_are_refused(served, monkeypatch):
    monkeypatch.setitem(sys.modules, "moe_peft.routing_control", None)
    for given in ({"disable_experts": [0]}, {"force_experts": [0]}, {"domain": "law"}):
        name = next(iter(given))
        with pytest.raises(openai.BadRequestError, match=f"`{name}` is given, but this version of moe_peft cannot"):
            chat(served, "Hi", extra_body=given)
    assert switches.expert_control(None, switches.ExpertFields()).__enter__() is None


# ---- Adapters that batches would mix, or not ----


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (linear(router_granularity="sequence"), "its routers look at whole sequences"),
        (linear(routing="given", expert_groups=[[0], [1, 2]], balance="none"), "its experts follow the samples' task"),
        (
            DomainMoeConfig(domains=["law", "code"], gate="given", task_type="CAUSAL_LM"),
            "its experts follow the samples'",
        ),
        (DomainMoeConfig(domains=["law", "code"], gate="sequence", task_type="CAUSAL_LM"), "look at whole sequences"),
    ],
    ids=["sequence", "given", "domains given", "domains by prompt"],
)
def test_adapters_that_would_mix_requests_are_served_without_batches(config, reason, tmp_path):
    folder = make_bundle(config, tmp_path)
    opened = open_bundle(folder)
    with pytest.raises(ValueError, match="`--continuous-batching` is True, but must be left out here, as it"):
        Engine(opened, LIMIT, True)
    engine = Engine(opened, LIMIT, None)
    assert engine.batches is None
    assert reason in engine.unbatched


def test_a_router_of_whole_sequences_answers_as_generate_does(tmp_path):
    folder = make_bundle(linear(router_granularity="sequence"), tmp_path)
    model, tokenizer = load_adapter(str(tmp_path / "adapter"), load_in="none")
    wanted = []
    for prompt in PROMPTS[:6]:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=12)[0, ids["input_ids"].shape[1] :]
        wanted.append(tokenizer.decode(out, skip_special_tokens=True))
    with serving(folder, None) as served, ThreadPoolExecutor(6) as pool:
        ask = lambda prompt: chat(served, prompt, max_tokens=12).choices[0].message.content  # noqa: E731
        assert list(pool.map(ask, PROMPTS[:6])) == wanted


def test_a_processor_that_batches_would_leave_out_keeps_requests_apart(bundle):
    engine = Engine(open_bundle(bundle), LIMIT, False)
    assert engine.unbatched == "you asked for none"
    assert why_not_batched(engine.model) is None
    engine.model.generation_config.no_repeat_ngram_size = 2
    assert "NoRepeatNGram" in why_not_batched(engine.model)


TYPES = {
    "ffn": FfnMoeConfig(num_experts=3, r=2, lora_alpha=32, init_weights=False, task_type="CAUSAL_LM"),
    "rank": RankMoeConfig(init_weights=False, task_type="CAUSAL_LM"),
    "shards": ShardPoolConfig(init_weights=False, task_type="CAUSAL_LM"),
    "model scope": linear(router_scope="model"),
    "domains": DomainMoeConfig(domains=["law", "code"], r=2, lora_alpha=64, init_weights=False, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize(("kind", "load_in"), [*((kind, "none") for kind in TYPES), ("ffn", "4bit")])
def test_every_type_answers_in_batches_as_it_does_alone(kind, load_in, tmp_path):
    folder = make_bundle(TYPES[kind], tmp_path, load_in)
    model, tokenizer = load_adapter(str(tmp_path / "adapter"), load_in=load_in)
    wanted = []
    for prompt in PROMPTS[:12]:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=6)[0, ids["input_ids"].shape[1] :]
        wanted.append(tokenizer.decode(out, skip_special_tokens=True))
    with serving(folder, True) as served, ThreadPoolExecutor(12) as pool:
        ask = lambda prompt: chat(served, prompt, max_tokens=6).choices[0].message.content  # noqa: E731
        assert list(pool.map(ask, PROMPTS[:12])) == wanted


def test_the_second_skeleton_has_its_own_modules_over_the_same_weights(bundle):
    first = Engine(open_bundle(bundle), LIMIT, False).model.get_base_model()
    second = second_skeleton(first)
    pairs = list(zip(first.named_parameters(), second.named_parameters(), strict=True))
    assert all(a is b for (_, a), (_, b) in pairs)
    assert not {id(m) for m in first.modules()} & {id(m) for m in second.modules()}
    contexts = [{id(m.context) for m in model.modules() if hasattr(m, "context")} for model in (first, second)]
    assert len(contexts[0]) == len(contexts[1]) == 1
    assert contexts[0] != contexts[1]
    assert first.config is not second.config


# ---- The command ----


def left_with(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["serve", *map(str, argv)])
    return stopped.value.code, capsys.readouterr().err


def test_what_cannot_be_served_is_one_sentence(bundle, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        code, err = left_with(capsys, bundle, "--port", taken)
        assert (code, f"Port {taken} is in use by another program. Name another with --port" in err) == (2, True)
    for argv, message in (
        ([], "Missing argument 'DIR'"),
        ([bundle, "--prot", 1], "No such option: --prot"),
        ([bundle, "--port", "many"], "Invalid value for '--port'"),
        ([bundle, "--port", 70000], "`--port` is 70000, but must be a whole number from 0 to 65535."),
        ([bundle, "--host", "no.such.host.invalid"], "`--host` is 'no.such.host.invalid', but must be an address of"),
        (
            [bundle, "--port", 0, "--host", "192.0.2.1"],
            "`--host` is '192.0.2.1', but must be an address of this machine.",
        ),
        (
            [bundle, "--max-new-tokens-limit", 0],
            "`--max-new-tokens-limit` is 0, but must be a whole number of at least 1.",
        ),
        ([bundle, "--max-body-bytes", 1], "`--max-body-bytes` is 1, but must be a whole number of at least 64."),
        ([tmp_path, "--port", 0], "is no bundle: there is no moe_peft_bundle.json"),
        ([bundle.parent / "adapter", "--port", 0], "It holds an adapter alone. Make one with `moe-peft bundle"),
        ([tmp_path / "no", "--port", 0], "There is no folder"),
    ):
        code, err = left_with(capsys, *argv)
        assert (code, message in err) == (2, True), err
        assert "Traceback" not in err


def test_serving_without_the_extra_says_what_to_install(bundle, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    code, err = left_with(capsys, bundle)
    assert (code, "Serving needs openai: pip install fastapi uvicorn openai" in err) == (2, True)


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("0.0.0.0", False), ("10.0.0.1", False)],
)
def test_which_addresses_are_this_machine_alone(host, alone):
    assert is_loopback(host) == alone


def test_the_command_serves_and_warns_where_others_can_reach_it(bundle):
    command = [sys.executable, "-m", "moe_peft", "serve", str(bundle), "--port", "0", "--host", "0.0.0.0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        said = [process.stdout.readline() for _ in range(3)]
        assert said[0].startswith("Serving 'bundle' at http://0.0.0.0:")
        assert "one after the other" in said[1]
        assert said[2].startswith("Warning: 0.0.0.0 is not this machine alone.")
        port = int(said[0].split("/v1")[0].rsplit(":", 1)[1])
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=20)
        answer = client.chat.completions.create(
            model="bundle", messages=[{"role": "user", "content": "Hi"}], max_tokens=2
        )
        assert answer.usage.completion_tokens <= 2
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_where_the_task_type_alone_chooses_a_request_has_to_say_it():
    model = get_peft_model(load_pocket(quantize=False)[0], linear(routing="given", balance="none")).eval()
    fields = switches.ExpertFields
    with pytest.raises(
        switches.RequestRefused, match=r'`domain` is missing, .* Give one of 0, 1, 2 .* \{"domain": 2\}'
    ):
        switches.check_control(model, fields())
    switches.check_control(model, fields(domain=1))
    other = get_peft_model(load_pocket(quantize=False)[0], linear()).eval()
    with pytest.raises(switches.RequestRefused, match=r"`disable_experts` is .* Leave at least one of them on\."):
        switches.check_control(other, fields(disable_experts=[0, 1, 2]))
