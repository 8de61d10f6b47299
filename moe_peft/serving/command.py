"""What `moe-peft bundle` and `moe-peft serve` do: check, say what will be, write or listen."""

import errno
import ipaddress
import logging
import socket
from pathlib import Path

from rich.console import Console

from moe_peft.errors import refuse


_NEEDED = ("fastapi", "uvicorn", "openai")


def bundle_adapter(
    console: Console, adapter: str, output: Path, model: str | None, load_in: str, copy: bool, any_base: bool
) -> None:
    """Write a bundle and say how to serve it.

    Raises:
        ValueError: see `write_bundle`.
    """
    from transformers.utils.logging import disable_progress_bar

    from moe_peft.serving.bundle import RECORD_FILE, write_bundle

    disable_progress_bar()
    record = write_bundle(adapter, output, model, load_in, copy, any_base).record
    stored = "as it is" if record["load_in"] == "none" else f"in {record['load_in']}"
    console.print(f"Written to {output}: '{record['base']}' {stored}, '{adapter}', tokenizer and {RECORD_FILE}. Next:")
    console.print(f"  moe-peft serve {output}", highlight=False, markup=False, soft_wrap=True)


def serve_bundle(
    console: Console,
    folder: Path,
    host: str,
    port: int,
    continuous_batching: bool | None,
    max_new_tokens_limit: int,
    max_body_bytes: int,
    max_requests: int,
) -> None:
    """Serve a bundle until somebody ends the process.

    Raises:
        ValueError: no bundle, one that was changed, a port in use, an address that is not this machine's, limits below
            what a request needs, or batches where the adapter would mix requests.
        ImportError: a library of the server's is missing.
    """
    for name, value, least in (
        ("--max-new-tokens-limit", max_new_tokens_limit, 1),
        ("--max-body-bytes", max_body_bytes, 64),
        ("--max-requests", max_requests, 1),
    ):
        if value < least:
            raise refuse(name, value, f"a whole number of at least {least}", "Leave it out for the default.")
    _need_server()
    with listen_at(host, port) as listening:
        import uvicorn
        from transformers.utils import logging as transformers_logging

        from moe_peft.serving.app import make_app
        from moe_peft.serving.bundle import open_bundle
        from moe_peft.serving.engine import Engine

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()  # its handlers warn of every request
        engine = Engine(open_bundle(folder), max_new_tokens_limit, continuous_batching)
        for line in announcement(engine, listening, max_body_bytes, max_requests):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        try:
            config = uvicorn.Config(
                make_app(engine, max_body_bytes, max_requests), log_level="warning", access_log=False
            )
            uvicorn.Server(config).run(sockets=[listening])
        finally:
            engine.stop()


def announcement(engine, listening: socket.socket, max_body_bytes: int, max_requests: int) -> list[str]:
    """What the console says before the first request."""
    host, port = listening.getsockname()[:2]
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    batches = "in batches" if engine.batches else f"one after the other, as {engine.unbatched}"
    limits = f"at most {engine.limits.max_new_tokens} new tokens and {max_body_bytes} bytes a request, {max_requests} requests at one time"
    said = [
        f"Serving '{engine.name}' at {where}: chat/completions, completions, models. Ctrl-C ends it.",
        f"Requests are answered {batches}; {limits}.",
    ]
    if not is_loopback(host):
        said.append(
            f"Warning: {host} is not this machine alone. Whoever reaches the port may use the model: there is no password "
            "and no encryption. The default, 127.0.0.1, is open to this machine only."
        )
    return said


def is_loopback(host: str) -> bool:
    """Whether an address (not a name) is of this machine alone."""
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


def listen_at(host: str, port: int) -> socket.socket:
    """A socket at that address, which nobody can connect to yet.

    Raises:
        ValueError: if the address is not this machine's, or the port is in use or not for everybody.
    """
    if not 0 <= port < 2**16:
        raise refuse("--port", port, "a whole number from 0 to 65535", "0 takes a free port.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except (socket.gaierror, UnicodeError) as error:
        raise refuse(
            "--host", host, "an address of this machine", "127.0.0.1 is open to this machine only."
        ) from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just left is free
        listening.bind(address)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            remedy = "Name another with --port, take any with --port 0, or end the program that has it."
            raise ValueError(f"Port {port} is in use by another program. {remedy}") from error
        if error.errno == errno.EACCES:
            raise refuse(
                "--port", port, "one that you may listen at", "Ports from 1024 on are for everybody."
            ) from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise refuse("--host", host, "an address of this machine", "127.0.0.1 is this machine alone.") from error
        raise
    return listening


def _need_server() -> None:
    for name in _NEEDED:
        try:
            __import__(name)
        except ImportError as error:
            raise ImportError(f"Serving needs {name}: pip install fastapi uvicorn openai") from error
    logging.getLogger("httpx").setLevel(logging.WARNING)
