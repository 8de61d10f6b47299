"""What a request may say: OpenAI's fields that have an effect here, three of our own, and a sentence for everything else.

transformers' server leaves out in silence what it cannot do (`n`, `response_format`, images for a model that reads text
...). Here such a field is refused, unless it has the value that asks for nothing.
"""

import inspect
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from moe_peft.errors import nearest, refuse


class RequestRefused(ValueError):
    """A request that cannot be answered as it is.

    Attributes:
        status: of the HTTP answer, 4xx.
        field: that is at fault, or None.
    """

    def __init__(self, sentence: str, field: str | None = None, status: int = 400) -> None:
        super().__init__(sentence)
        self.status, self.field = status, field


class Limits(NamedTuple):
    """What the server allows.

    Attributes:
        model: the name of the one model.
        max_new_tokens: that a request may ask for.
        context: tokens of prompt and answer together; None where the model has no bound.
        vocabulary: the number of token ids.
        tools: whether the chat template looks at tools.
    """

    model: str
    max_new_tokens: int
    context: int | None
    vocabulary: int
    tools: bool


class ExpertFields(NamedTuple):
    """Our own fields of a request, for `moe_peft.serving.switches.expert_control`; None is not given."""

    disable_experts: Any = None
    force_experts: Any = None
    domain: Any = None

    @property
    def given(self) -> dict[str, Any]:
        return {name: value for name, value in self._asdict().items() if value is not None}


class Asked(NamedTuple):
    """A request that was checked.

    Attributes:
        body: for transformers' handler, without our fields and the seed.
        experts: our fields.
        seed: of what is drawn, or None.
        max_new_tokens: that the request asks for, or None.
    """

    body: dict[str, Any]
    experts: ExpertFields
    seed: int | None
    max_new_tokens: int | None


_OURS = ExpertFields._fields
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity")
"""What says nothing about the answer."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tool_choice": ("auto",),
    **dict.fromkeys(("suffix", "audio", "function_call", "functions", "prediction", "reasoning_effort"), ()),
    **dict.fromkeys(("web_search_options", "generation_config"), ()),
}
"""What this server cannot do, and the values that do not ask for it."""

_SHARED = ("model", "stream", "stream_options", "temperature", "top_p", "seed", "stop", "max_tokens", "logit_bias")
_CHAT = (*_SHARED, "messages", "max_completion_tokens", "tools", "chat_template_kwargs")
_COMPLETION = (*_SHARED, "prompt")
_MESSAGE = ("role", "content", "tool_calls", "tool_call_id")
_MESSAGE_IGNORED = ("reasoning_content", "refusal", "annotations")
"""What our own answers carry, so that a client can send them back."""


def check_chat(body: dict[str, Any], limits: Limits) -> Asked:
    """A request to `/v1/chat/completions`.

    Raises:
        RequestRefused: a field that is unknown, of the wrong type or beyond the limits; another model (404).
    """
    asked = _check(body, _CHAT, limits)
    messages = asked.body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _refused(
            "messages", messages, "a list of at least one message", 'Write [{"role": "user", "content": "Hi"}].'
        )
    for number, message in enumerate(messages):
        _check_message(f"messages[{number}]", message)
    tools = asked.body.get("tools")
    if tools is not None:
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise _refused("tools", tools, "a list of tools", "Leave it out to have none.")
        if tools and not limits.tools:
            raise _refused("tools", tools, "left out", "The model's chat template does not look at tools.")
    extra = asked.body.get("chat_template_kwargs")
    if extra is not None and (not isinstance(extra, dict) or _TEMPLATE_ARGUMENTS & extra.keys()):
        remedy = "Our server sets the template's other arguments itself."
        raise _refused("chat_template_kwargs", extra, "an object with variables of the model's chat template", remedy)
    return asked


_TEMPLATE_ARGUMENTS = {
    *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
    *("messages", "load_audio_from_video"),
}


def check_completion(body: dict[str, Any], limits: Limits) -> Asked:
    """A request to `/v1/completions`.

    Raises:
        RequestRefused: see `check_chat`.
    """
    asked = _check(body, _COMPLETION, limits)
    prompt = asked.body.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise _refused("prompt", prompt, "a text that is not empty", "Send several prompts as several requests.")
    return asked


def _check(body: dict[str, Any], known: tuple[str, ...], limits: Limits) -> Asked:
    """What both ways to ask have in common."""
    _check_encodable(body)
    body = {name: value for name, value in body.items() if value is not None and name not in _IGNORED}
    for name, value in body.items():
        if name in _NEUTRAL:
            _check_neutral(name, value)
        elif name not in known and name not in _OURS:
            raise RequestRefused(f"`{name[:80]}` is not a field of a request. {nearest(name, (*known, *_OURS))}", name)
    model = body.get("model", limits.model)
    if model != limits.model:
        raise RequestRefused(
            f"There is no model {_short(model)} here. This server has '{limits.model}'.", "model", 404
        )
    for name, check in _CHECKS.items():
        if name in body:
            check(name, body[name])
    if "logit_bias" in body:
        _check_bias(body["logit_bias"], limits.vocabulary)
        body["logit_bias"] = {token: float(by) for token, by in body["logit_bias"].items()}  # generate wants floats
    wanted = {body[name] for name in ("max_tokens", "max_completion_tokens") if name in body}
    if len(wanted) > 1:
        allowed = f"what `max_completion_tokens` = {body['max_completion_tokens']} is"
        raise _refused("max_tokens", body["max_tokens"], allowed, "Give one of the two.")
    new_tokens = wanted.pop() if wanted else None
    if new_tokens is not None and new_tokens > limits.max_new_tokens:
        name = "max_tokens" if "max_tokens" in body else "max_completion_tokens"
        remedy = "The server was started with this limit: `moe-peft serve --max-new-tokens-limit`."
        raise _refused(name, new_tokens, f"at most {limits.max_new_tokens}", remedy)
    experts = ExpertFields(**{name: body.pop(name) for name in _OURS if name in body})
    _check_experts(experts)
    seed = body.pop("seed", None)
    body.pop("stream_options", None)  # the last chunk always carries the usage
    return Asked({name: value for name, value in body.items() if name not in _NEUTRAL}, experts, seed, new_tokens)


def _check_encodable(body: dict[str, Any]) -> None:
    """JSON can write half of a surrogate pair (`\\ud800`), which is no character: no tokenizer takes it, no answer holds it."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        raise RequestRefused(
            f"The request holds `{half}`, half of a surrogate pair and no character. Send whole characters."
        ) from error
    except RecursionError as error:
        raise RequestRefused("The request is nested too deeply. Send a flatter one.") from error


def _check_neutral(name: str, value: Any) -> None:
    neutral = _NEUTRAL[name]
    if not any(type(value) in (type(one), float) and value == one for one in neutral):
        allowed = " or ".join(map(repr, neutral)) if neutral else "left out"
        raise _refused(name, value, allowed, "This server cannot do more, and leaves nothing out in silence.")


def _check_message(field: str, message: Any) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _refused(field, message, "an object with a `role`", 'Write {"role": "user", "content": "Hi"}.')
    for name, value in message.items():
        if name not in _MESSAGE and name not in _MESSAGE_IGNORED and value is not None:
            remedy = nearest(name, _MESSAGE)
            raise RequestRefused(f"`{field}.{name[:80]}` is not a field of a message here. {remedy}", field)
    calls, content = message.get("tool_calls"), message.get("content")
    if calls is not None:
        _check_tool_calls(f"{field}.tool_calls", calls)
        return
    if "tool_calls" in message:
        del message["tool_calls"]  # the handler asks whether it is there
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            remedy = "The model reads text alone."
            raise _refused(f"{field}.content", content, 'a text, or a list of {"type": "text", "text": ...}', remedy)


def _check_tool_calls(field: str, calls: Any) -> None:
    try:
        for call in calls:
            function = call.get("function") or call
            arguments = function["arguments"]
            json.loads(arguments) if isinstance(arguments, str) else dict(arguments)
            str(function["name"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        allowed = "a list of calls, each a `function` with a `name` and `arguments` in JSON"
        raise _refused(field, calls, allowed, "Send the calls back as they came.") from error


def _check_bias(bias: Any, vocabulary: int) -> None:
    try:
        right = all(0 <= int(token) < vocabulary and _is_number(by) for token, by in bias.items())
    except (AttributeError, TypeError, ValueError):
        right = False
    if not right:
        allowed = f"an object of token ids from 0 to {vocabulary - 1} and the numbers to add to their logits"
        raise _refused("logit_bias", bias, allowed, 'Write {"42": -100}, say.')


def _check_experts(fields: ExpertFields) -> None:
    """Types only: whether the model has such experts and domains is known where they are switched."""
    for name in ("disable_experts", "force_experts"):
        value = getattr(fields, name)
        if value is not None and not (isinstance(value, list) and all(map(_names_expert, value))):
            raise _refused(name, value, "a list of experts, by number from 0 or by name", "Write [0, 3], say.")
    if fields.domain is not None and not (isinstance(fields.domain, str) or _is_whole(fields.domain)):
        raise _refused(
            "domain", fields.domain, "the name or the number of one domain", "A request is about one domain."
        )


def _names_expert(entry: Any) -> bool:
    return isinstance(entry, str) or (_is_whole(entry) and entry >= 0)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return -_LARGEST <= value <= _LARGEST  # false for NaN; a whole number in JSON may be too long for a float


_LARGEST = 1e30
"""In size, of any number in a request: what is added to logits in fp32 must stay finite."""


def _check_with(right: Callable[[Any], bool], allowed: str, remedy: str) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if not right(value):
            raise _refused(name, value, allowed, remedy)

    return check


def _is_stop(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return 1 <= len(texts) <= 4 and all(isinstance(text, str) and text for text in texts)


_whole = _check_with(
    lambda value: _is_whole(value) and value >= 1, "a whole number of at least 1", "Leave it out for the default."
)
_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "stream": _check_with(
        lambda value: isinstance(value, bool), "true or false", "Leave it out for one whole answer."
    ),
    "stream_options": _check_with(
        lambda value: (
            isinstance(value, dict) and all(k == "include_usage" and isinstance(v, bool) for k, v in value.items())
        ),
        "an object with `include_usage` alone, true or false",
        "The usage comes with the last chunk in any case.",
    ),
    "temperature": _check_with(
        lambda value: _is_number(value) and 0 <= value <= 2, "a number from 0 to 2", "0 takes the likeliest token."
    ),
    "top_p": _check_with(
        lambda value: _is_number(value) and 0 < value <= 1, "a number above 0 and at most 1", "1 keeps all tokens."
    ),
    "seed": _check_with(
        lambda value: _is_whole(value) and 0 <= value < 2**63, "a whole number from 0", "Leave it out to draw freely."
    ),
    "stop": _check_with(_is_stop, "a text, or up to four of them", "None of them may be empty."),
    "max_tokens": _whole,
    "max_completion_tokens": _whole,
}


def _refused(field: str, value: Any, allowed: str, remedy: str) -> RequestRefused:
    return RequestRefused(str(refuse(field, _Shown(value), allowed, remedy)), field)


class _Shown:
    """A value in a sentence: a request may hold megabytes."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return _short(self.value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
