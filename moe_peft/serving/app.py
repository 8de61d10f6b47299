"""transformers' server with one model: its routes and handlers, and around them what keeps requests apart and within limits."""

import json
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException as AnyHTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import X_REQUEST_ID

from moe_peft.serving.engine import DEFAULT_NEW_TOKENS, Engine
from moe_peft.serving.requests import Asked, Limits, RequestRefused, check_chat, check_completion


_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")
"""Of transformers' routes those that concern one model. Others load models from the Hub, or unload this one."""


MAX_REQUESTS = 256
"""That are answered or wait at one time, unless told otherwise. OpenAI's own client tries again twice after a 503."""


def make_app(engine: Engine, max_body_bytes: int, max_requests: int = MAX_REQUESTS) -> FastAPI:
    """The server's application.

    Args:
        engine: with the model.
        max_body_bytes: longer requests are refused with 413, before they are read.
        max_requests: that are answered or wait at one time; further ones are refused with 503.
    """
    chat = Front(engine, Chat, check_chat)
    completion = Front(engine, Completion, check_completion)
    nobody: Any = None
    health: Any = _Health(engine)
    app = build_server(engine.models, chat, completion, nobody, nobody, nobody, health)  # type: ignore[arg-type]
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in _ROUTES]
    app.add_exception_handler(RequestRefused, _refused)
    app.add_exception_handler(RequestValidationError, _unreadable)
    app.add_exception_handler(AnyHTTPException, _as_openai)
    app.add_exception_handler(Exception, _failed)
    # transformers' only middleware gives a request its id, at a tenth of a millisecond for every piece of a stream.
    app.user_middleware[:] = []
    app.add_middleware(Around, limit=max_body_bytes, most=max_requests)
    return app


class _Health:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def is_cb_alive(self) -> bool:
        return self._engine.batches is None or self._engine.batches.is_alive()


class Front:
    """Stands before a handler of transformers: checks a request, and gives it a handler of its own."""

    def __init__(self, engine: Engine, handler: type, check: Callable[[dict[str, Any], Limits], Asked]) -> None:
        self._engine, self._handler, self._check = engine, handler, check

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer, whole or as a stream.

        Args:
            body: of the request.
            request_id: goes into the answer's header. Two clients may choose the same, so it names nothing in here.

        Raises:
            RequestRefused: what the request asks for cannot be done.
        """
        asked = self._check(body, self._engine.limits)
        handler = self._handler(self._engine, asked)
        try:
            answer = await handler.handle_request(asked.body, f"{self._handler.prefix}-{uuid.uuid4().hex}")
        except (TemplateError, ValueError) as error:
            if isinstance(error, RequestRefused):
                raise
            raise RequestRefused(f"The request cannot be answered: {error}") from error
        if isinstance(answer, StreamingResponse):
            answer.body_iterator = whole_stream(answer.body_iterator)
        return answer


class _OneRequest:
    """What both handlers do otherwise than transformers': one model that is there, and a draw as it was asked for."""

    def __init__(self, engine: Engine, asked: Asked) -> None:
        super().__init__(engine.models, engine.state(asked))  # type: ignore[call-arg]
        self._engine, self._asked = engine, asked

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        return self._engine.name, self._engine.model, self._engine.processor

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False
    ) -> Any:
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)  # type: ignore[misc]
        temperature, top_p = body.get("temperature"), body.get("top_p")
        if temperature or (temperature is None and top_p is not None and top_p < 1):
            config.do_sample = True  # a model that is greedy by default would leave both out in silence
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
        default = max(DEFAULT_NEW_TOKENS, model_generation_config.max_new_tokens or 0)
        config.max_new_tokens = self._asked.max_new_tokens or min(default, self._engine.limits.max_new_tokens)
        return config


class Chat(_OneRequest, ChatCompletionHandler):
    """`/v1/chat/completions` for one request."""

    prefix = "chatcmpl"

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        if self._engine.processor.chat_template is None:
            raise RequestRefused("The model has no chat template. Ask `/v1/completions` with a `prompt`.")
        return await super().handle_request(body, request_id)


class Completion(_OneRequest, CompletionHandler):
    """`/v1/completions` for one request."""

    prefix = "cmpl"


async def whole_stream(chunks: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """A stream with its errors in proper JSON and, as OpenAI's protocol has it, `[DONE]` at its end."""
    begin, end = 'data: {"error": "', '"}\n\n'
    async for chunk in chunks:
        text = chunk if isinstance(chunk, str) else chunk.decode()
        at = text.find(begin)
        if at >= 0:  # transformers puts the message there as it is, quotes and all
            sentence = text[at + len(begin) :].removesuffix(end)
            text = f"{text[:at]}data: {json.dumps(_error(sentence, None, 'server_error'))}\n\n"
        yield text
    yield "data: [DONE]\n\n"


class Around:
    """Gives a request its id, and reads its body up to a limit before anything else sees it.

    A longer body is answered with 413, and a request above the most at one time with 503.
    """

    def __init__(self, app: Any, limit: int, most: int = MAX_REQUESTS) -> None:
        self.app, self.limit, self.most, self.there = app, limit, most, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] != "POST":  # health and the list of models wait for nobody
            await self._within_limit(scope, receive, send)
            return
        if self.there >= self.most:
            sentence = f"{self.there} requests are being answered or wait, the most that this server takes at one time. Send this one again, or start the server with a larger --max-requests."
            headers = {"retry-after": "1", "connection": "close"}
            answer = JSONResponse(_error(sentence, None, "server_error"), status_code=503, headers=headers)
            await answer(scope, receive, send)
            return
        self.there += 1
        try:
            await self._within_limit(scope, receive, send)
        finally:
            self.there -= 1

    async def _within_limit(self, scope: Any, receive: Any, send: Any) -> None:
        said = dict(scope["headers"]).get(b"content-length", b"0")
        body, more = bytearray(), not (said.isdigit() and int(said) > self.limit)
        too_long = not more
        while more:
            message = await receive()
            if message["type"] != "http.request":  # the client has gone
                return
            body += message.get("body", b"")
            more, too_long = message.get("more_body", False), len(body) > self.limit
            more = more and not too_long
        if too_long:
            sentence = f"The request is longer than {self.limit} bytes. Shorten it, or start the server with a larger --max-body-bytes."
            answer = JSONResponse(_error(sentence, None), status_code=413, headers={"connection": "close"})
            await answer(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = headers.get(X_REQUEST_ID.encode(), b"")[:128] or uuid.uuid4().hex.encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode("latin-1")

        async def named(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (X_REQUEST_ID.encode(), request_id)]
            await send(message)

        first = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Any:
            return first.pop() if first else await receive()

        await self.app(scope, replay, named)


def _error(
    sentence: str, field: str | None, kind: str = "invalid_request_error", code: str | None = None
) -> dict[str, Any]:
    return {"error": {"message": sentence, "type": kind, "param": field, "code": code}}


async def _refused(request: Request, error: Any) -> JSONResponse:
    code = "model_not_found" if error.status == 404 else None
    return JSONResponse(_error(str(error), error.field, code=code), status_code=error.status)


async def _unreadable(request: Request, error: Any) -> JSONResponse:
    sentence = "The request's body is no JSON object. Send one, with `Content-Type: application/json`."
    return JSONResponse(_error(sentence, None), status_code=400)


async def _as_openai(request: Request, error: Any) -> JSONResponse:
    sentence = str(error.detail)
    if error.status_code == 404:
        sentence = f"There is nothing at `{request.url.path}`. Choose one of: {', '.join(_ROUTES)}."
    elif error.status_code == 405:
        sentence = f"`{request.url.path}` is not asked by {request.method}."
    return JSONResponse(_error(sentence, None), status_code=error.status_code, headers=error.headers)


async def _failed(request: Request, error: Exception) -> JSONResponse:
    sentence = f"The server failed ({type(error).__name__}). Its log says more."
    return JSONResponse(_error(sentence, None, "server_error"), status_code=500)
