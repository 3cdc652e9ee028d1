"""`qlora serve`: the OpenAI chat-completions API over adapters on one base.

    POST /v1/chat/completions   `model` is an adapter's name, or `base`; whole or streamed
    GET  /v1/models             what `model` may be
    GET  /health                whether it answers

On the standard library's threading server: a thread for each connection, which waits for the engine's one thread. The
model is what takes the time, so a web framework and its event loop would bring dependencies and no speed.

Nothing of a request names a file: `model` is looked up among names that were given at the start. Where it listens on
this machine alone it answers only what is addressed to this machine, and only JSON, so that no page in a browser can
ask it anything.
"""

from __future__ import annotations

import hmac
import json
import selectors
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

from qlora.errors import DataError, MachineError, QLoRAError
from qlora.live import BASE, Answer, Live
from qlora.redact import redact
from qlora.serve.engine import Engine, Job, Refused, Started
from qlora.serve.protocol import ApiError, ChatRequest, Completion, model_card, read_request

_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one asker, or all of them together, can take.

    batch        questions answered at once
    waiting      questions that may wait beside them; who comes then is told to come again (429)
    max_tokens   of one answer
    body_bytes   of one request
    seconds      from a question's arrival to the end of its answer
    idle         seconds that a client may take to say or to read something
    connections  open at once
    grace        seconds that answers under way are given when the server is told to stop
    """

    batch: int = 8
    waiting: int = 64
    max_tokens: int = 1024
    body_bytes: int = 1 << 20
    seconds: float = 300.0
    idle: float = 30.0
    connections: int = 256
    grace: float = 30.0


def serve(
    adapters: Mapping[str, Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    limits: Limits | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Serve until SIGTERM or Ctrl-C; answers under way are finished, a second Ctrl-C stops at once.

    api_key  what clients have to show; None: nothing

    Raises MachineError where it cannot listen there, and as `Live.load` does.
    """

    def say(text: str) -> None:
        print(redact(text), file=sys.stderr, flush=True)

    server = Server(host, port, api_key, limits or Limits(), say)
    try:
        with Live.load(adapters, base=base, trust_remote_code=trust_remote_code, say=say) as live:
            server.start(live)
            with _told_to_stop() as stop:
                say(f"{', '.join(server.models)} at {server.address}/v1 (Ctrl-C stops)")
                if api_key is None and host not in _LOOPBACK:
                    say("without --api-key whoever reaches this address can use it")
                try:
                    while not stop.wait(1.0):  # a bare wait would keep signals from arriving on some systems
                        pass
                    say("stopping: answers under way are finished, Ctrl-C again stops at once")
                    server.close()
                except KeyboardInterrupt:
                    server.close(grace=0.0)
                    raise
    finally:
        server.server_close()


class Server(ThreadingHTTPServer):
    """Listens once it is started; `port` 0 takes any that is free."""

    daemon_threads = True  # a connection without a request does not keep the program from ending
    request_queue_size = 128

    def __init__(
        self,
        host: str,
        port: int,
        api_key: str | None = None,
        limits: Limits | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Take the address, before anything long is done. Raises MachineError where it cannot be had."""
        self.limits, self.say = limits or Limits(), say
        self.models: tuple[str, ...] = ()
        self.created = int(time.time())
        self.local = host in _LOOPBACK
        self._key = api_key.encode() if api_key else None
        self._places = threading.BoundedSemaphore(self.limits.connections)
        self._busy = threading.Condition()
        self._requests = 0
        self._thread: threading.Thread | None = None
        self.engine: Engine | None = None
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler, bind_and_activate=False)
        try:
            self.server_bind()
        except (OSError, OverflowError) as error:
            self.server_close()
            raise MachineError(f"cannot listen at {host} port {port}: {error}\n  another: --host, --port") from error

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks a name server for the machine's name, at length
        host, port = self.server_address[:2]
        self.server_name, self.server_port = str(host), int(port)

    @property
    def address(self) -> str:
        host = f"[{self.server_name}]" if ":" in self.server_name else self.server_name
        return f"http://{host}:{self.server_port}"

    def start(self, live: Live) -> None:
        """Answer with these adapters from here on, in threads."""
        self.models = (*live.names, *([BASE] if live.has_base else []))
        self.engine = Engine(live, self.limits.batch, self.limits.waiting, self.say)
        self.server_activate()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.1,), name="qlora-http", daemon=True)
        self._thread.start()

    def close(self, grace: float | None = None) -> None:
        """Take nothing more, finish what is under way within `grace` seconds (the limits'), and stop."""
        if self._thread is not None and self.engine is not None:
            self.shutdown()
            self.engine.close(self.limits.grace if grace is None else grace)
            with self._busy:  # what is answered has still to be written
                self._busy.wait_for(lambda: self._requests == 0, timeout=2.0)
        self.server_close()

    def permits(self, authorization: str | None) -> bool:
        """Whether a client may ask. In constant time, so that the key cannot be found letter by letter."""
        if self._key is None:
            return True
        kind, _, shown = (authorization or "").partition(" ")
        return hmac.compare_digest(shown.strip().encode("latin-1", "replace"), self._key) and kind.lower() == "bearer"

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around one that is being answered."""
        with self._busy:
            self._requests += 1
        try:
            yield
        finally:
            with self._busy:
                self._requests -= 1
                self._busy.notify_all()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        self.say(f"a request came to nothing: {type(error).__name__}: {error}")


class _Gone(Exception):
    """The client has closed the connection."""


class _Handler(BaseHTTPRequestHandler):
    server: Server  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "qlora", ""

    def setup(self) -> None:
        self.request.settimeout(self.server.limits.idle)
        super().setup()

    def do_GET(self) -> None:
        with self._errors_as_json():
            path = self._place()
            if path == "/health":
                self._json(200, {"status": "ok"})
                return
            self._check()
            if path == "/v1/models":
                cards = [model_card(name, self.server.created) for name in self.server.models]
                self._json(200, {"object": "list", "data": cards})
            elif path.startswith("/v1/models/"):
                name = self._known(unquote(path.removeprefix("/v1/models/")), 404)
                self._json(200, model_card(name, self.server.created))
            else:
                raise ApiError(404, "there is no such address here")

    def do_POST(self) -> None:
        with self._errors_as_json(), self.server.request():
            self._check()
            if self._place() != "/v1/chat/completions":
                raise ApiError(404, "there is no such address here")
            if self.headers.get_content_type() != "application/json":
                raise ApiError(415, "send JSON, and say so: `Content-Type: application/json`")
            self._complete(read_request(self._body()))

    # What is asked

    def _place(self) -> str:
        """The path alone: what comes after it is not heeded and may be secret."""
        return getattr(self, "path", "").partition("?")[0]

    def _check(self) -> None:
        """Who asks, and whether it means this server."""
        named = self.headers.get("Host", "localhost").lower()
        host = named[1:].partition("]")[0] if named.startswith("[") else named.partition(":")[0]
        if self.server.local and host not in _LOOPBACK:  # a page whose name was pointed at this machine
            raise ApiError(403, "addressed to another machine than this one", code="wrong_host")
        if not self.server.permits(self.headers.get("Authorization")):
            raise ApiError(401, "no key, or a wrong one: `Authorization: Bearer KEY`", code="invalid_api_key")

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            raise ApiError(411, "a request says how long it is: `Content-Length`")
        most = self.server.limits.body_bytes
        if len(length) > 18 or int(length) > most:
            raise ApiError(413, f"the request has {length[:18]} bytes; this server takes {most:,}")
        body, until = b"", time.monotonic() + self.server.limits.idle
        while len(body) < int(length):
            try:
                piece = self.rfile.read1(int(length) - len(body))  # type: ignore[attr-defined]
            except TimeoutError:
                piece = b""
            if not piece or time.monotonic() > until:
                raise ApiError(408, "the request did not come to its end")
            body += piece
        self._unread = False
        return body

    def _known(self, name: str, status: int) -> str:
        if name not in self.server.models:
            listed = ", ".join(self.server.models)
            said = f"there is no model {name[:80]!r} here; there are: {listed}"
            raise ApiError(status, said, param="model", code="model_not_found")
        return name

    # What is answered

    def _complete(self, asked: ChatRequest) -> None:
        name, limits, engine = self._known(asked.model, 400), self.server.limits, self.server.engine
        assert engine is not None
        job = Job(
            name=None if name == BASE else name,
            messages=asked.turns(),
            max_new_tokens=asked.most_tokens(limits.max_tokens),
            temperature=asked.temperature or 0.0,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=asked.seed,
            stop=asked.stops(),
            deadline=time.monotonic() + limits.seconds,
        )
        try:
            engine.submit(job)
        except Refused as why:
            if str(why) == "full":
                said = f"{limits.waiting} questions are waiting already; ask again later"
                raise ApiError(429, said, kind="rate_limit_error", code="rate_limit_exceeded") from None
            raise ApiError(503, "the server is stopping", kind="server_error", code="stopping") from None
        try:
            if asked.stream:
                usage = asked.stream_options is not None and asked.stream_options.include_usage
                self._stream(job, Completion(name), usage)
            else:
                for event in job.events(self._look):
                    if isinstance(event, Answer | Exception):
                        self._json(200, Completion(name).whole(_answer(event, job)))
        finally:
            job.cancel()  # whatever went wrong, nobody waits for it any more

    def _stream(self, job: Job, completion: Completion, usage: bool) -> None:
        for event in job.events(self._look):
            if isinstance(event, Started):
                self._begin_stream()
                self._send(completion.chunk({"role": "assistant", "content": ""}))
            elif isinstance(event, str):
                self._send(completion.chunk({"content": event}))
            elif not self._streaming:
                _answer(event, job)
                raise AssertionError("an answer that was never started")
            else:
                try:
                    answer = _answer(event, job)
                except ApiError as error:  # too late for another status
                    self._send(error.body())
                else:
                    self._send(completion.chunk({}, answer.ended))
                    if usage:
                        self._send(completion.usage_chunk(answer))
                    self._write(b"data: [DONE]\n\n")
                if self._chunked:
                    self.wfile.write(b"0\r\n\r\n")

    def _begin_stream(self) -> None:
        self._streaming, self._chunked = True, self.request_version == "HTTP/1.1"
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        self.send_header(*(("Transfer-Encoding", "chunked") if self._chunked else ("Connection", "close")))
        self.end_headers()

    def _send(self, value: dict[str, Any]) -> None:
        self._write(b"data: " + _bytes(value) + b"\n\n")

    def _write(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if self._chunked else data)

    def _json(self, status: int, value: dict[str, Any]) -> None:
        data = _bytes(value)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After", "1")
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        if self._unread:  # what is still to come of the request would be read as the next one
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _look(self) -> None:
        """Whether the client is still there, while it waits. What it may have sent meanwhile is left to be read."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.connection, selectors.EVENT_READ)
            if selector.select(0) and not self.connection.recv(1, socket.MSG_PEEK):
                raise _Gone

    @contextmanager
    def _errors_as_json(self) -> Iterator[None]:
        self._streaming = self._chunked = False
        self._unread = self.command == "POST"  # its body, until that was read
        try:
            yield
        except (_Gone, ConnectionError, TimeoutError):  # nobody to tell
            self.close_connection = True
        except ApiError as error:
            self._json(error.status, error.body())
            if self._unread:
                self._drain()

    def _drain(self) -> None:
        """Read on for a while, unheeded: closed amid what it sends, a client would not come to read the answer."""
        until, left = time.monotonic() + 2.0, 16 * self.server.limits.body_bytes
        self.connection.settimeout(0.2)
        with suppress(OSError):
            while left > 0 and time.monotonic() < until and (piece := self.rfile.read1(1 << 16)):  # type: ignore[attr-defined]
                left -= len(piece)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """As the library says what it cannot read at all, in the API's shape."""
        self._unread = True
        self.command = getattr(self, "command", None) or "GET"
        self._json(code, ApiError(code, message or HTTPStatus(code).phrase).body())

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        status = int(code) if isinstance(code, int) else code
        self.log_message("%s %s %s", self.command, self._place(), status)

    def log_message(self, format: str, *args: Any) -> None:
        control = cast(Any, self)._control_char_table  # the library's own: what came from outside must not steer
        self.server.say(f"{self.client_address[0]} {(format % args).translate(control)}")


def _answer(event: Answer | Exception, job: Job) -> Answer:
    """The answer that came, or the ApiError that says why none did."""
    if isinstance(event, Answer):
        if event.ended != "cut":
            return event
        if job.late:
            raise ApiError(504, "the answer took too long", kind="server_error", code="timeout")
        raise ApiError(503, "the server is stopping", kind="server_error", code="stopping")
    if isinstance(event, DataError):  # of this prompt
        raise ApiError(400, str(event), param="messages")
    if isinstance(event, MachineError):
        raise ApiError(503, str(event), kind="server_error", code="out_of_memory")
    said = str(event) if isinstance(event, QLoRAError) else "something is wrong in the server; it has told its log"
    raise ApiError(500, said, kind="server_error")


def _bytes(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


@contextmanager
def _told_to_stop() -> Iterator[threading.Event]:
    """Set by SIGTERM or a first Ctrl-C; a second Ctrl-C interrupts."""
    told = threading.Event()

    def note(number: int, frame: Any) -> None:
        if told.is_set() and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        told.set()

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
