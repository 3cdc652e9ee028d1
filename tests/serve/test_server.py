"""`qlora serve`: the right adapter for each of many askers, the API's shapes, and what it refuses."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from qlora.errors import AdapterError, DataError, MachineError
from qlora.live import Answer
from qlora.serve.server import Limits, Server, serve
from tests.serve.conftest import SAID

KEY = "a-key-of-the-tests"


@contextmanager
def served(live, api_key=None, **limits):
    said = []
    server = Server("127.0.0.1", 0, api_key, Limits(**{"grace": 5.0, **limits}), said.append)
    server.said = said
    server.start(live)
    try:
        yield server
    finally:
        server.close()


def ask(server, body=None, path="/v1/chat/completions", method="POST", **headers):
    """Status and JSON of one request. body: bytes, or what JSON is made of."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    data = body if isinstance(body, bytes | type(None)) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, data, sent)
    response = connection.getresponse()
    found = response.read()
    connection.close()
    return response.status, json.loads(found)


def get(server, path, **headers):
    return ask(server, None, path, "GET", **headers)


def question(text="Who?", model="support", **more):
    return {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 20} | more


# --- with the real model


def test_fifty_at_once_with_openais_client_each_hear_the_adapter_that_they_asked(live):
    openai = pytest.importorskip("openai")
    with served(live) as server:
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="unused", max_retries=0)
        assert [model.id for model in client.models.list()] == ["support", "legal", "base"]
        assert client.models.retrieve("legal").owned_by == "qlora"

        def one(i):
            name = ("support", "legal")[i % 2]
            text = list(SAID[name])[i % 3]
            how = {"model": name, "messages": [{"role": "user", "content": text}], "max_tokens": 20}
            if i % 5:
                answer = client.chat.completions.create(**how)
                assert answer.model == name and answer.choices[0].finish_reason == "stop"
                assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
                return answer.choices[0].message.content == SAID[name][text]
            chunks = list(client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
            assert chunks[-1].usage.completion_tokens > 0 and chunks[-2].choices[0].finish_reason == "stop"
            assert chunks[0].choices[0].delta.role == "assistant"
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == SAID[name][text]

        with ThreadPoolExecutor(50) as pool:
            assert list(pool.map(one, range(50))) == [True] * 50
        with pytest.raises(openai.BadRequestError, match="there is no model 'nobody' here; there are: support, legal"):
            client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "Who?"}])


def test_without_that_client_the_same_is_seen(live):
    with served(live, batch=4) as server, ThreadPoolExecutor(12) as pool:
        asked = [(name, text) for name, said in SAID.items() for text in said] * 2
        answers = list(pool.map(lambda pair: ask(server, question(pair[1], pair[0])), asked))
    assert [answer["choices"][0]["message"]["content"] for _, answer in answers] == [SAID[n][t] for n, t in asked]


def events(server, body):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert (response.status, response.getheader("Content-Type")) == (200, "text/event-stream; charset=utf-8")
    lines = response.read().decode().split("\n\n")
    assert lines[-1] == "" and all(line.startswith("data: ") for line in lines[:-1])
    connection.request("GET", "/health")  # the connection goes on
    assert connection.getresponse().status == 200
    connection.close()
    return [line.removeprefix("data: ") for line in lines[:-1]]


def test_what_is_streamed_is_what_is_said_at_once(live):
    with served(live) as server:
        for how in ({}, {"temperature": 1.2, "seed": 3}, {"stop": " on"}, {"model": "base"}):
            _, whole = ask(server, question("The cat?", **how))
            *chunks, last, done = events(server, question("The cat?", **how, stream=True))
            assert done == "[DONE]"
            pieces = [json.loads(chunk)["choices"][0]["delta"].get("content") for chunk in chunks]
            assert "".join(pieces) == whole["choices"][0]["message"]["content"] and len(pieces) > 2
            assert json.loads(last)["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]


def test_parameters_mean_what_they_mean_elsewhere(live):
    with served(live) as server:

        def said(**how):
            status, answer = ask(server, question("The cat?", **how))
            assert status == 200, answer
            return answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]

        assert said() == ("The cat sat on the mat.", "stop")
        assert said(stop=["sat"]) == ("The cat ", "stop")
        assert said(max_tokens=None, max_completion_tokens=2)[1] == "length"
        assert said(temperature=0, top_p=0.5, n=1, user="me", presence_penalty=0)[1] == "stop"
        assert said(model="base") != said()
        parts = [
            {"role": "developer", "content": "Hi"},
            {"role": "user", "content": [{"type": "text", "text": "Who?"}]},
        ]
        assert ask(server, question(messages=parts))[0] == 200


def test_a_prompt_that_the_template_or_the_context_refuses_is_the_askers_mistake(live):
    with served(live) as server:
        status, answer = ask(server, question("cat " * 400))
        assert status == 400 and "the model takes 256" in answer["error"]["message"]
        status, answer = ask(server, question("cat " * 400, stream=True))
        assert status == 400 and answer["error"]["param"] == "messages"


# --- with a model that does what the test says


class Slow:
    """In a Live's place: it answers with the adapter's name, once it may."""

    names, has_base = ("support", "legal"), True

    def __init__(self):
        self.may, self.begun, self.batches = threading.Event(), threading.Event(), []

    def use(self, name):
        self.name = name

    def prompt(self, messages):
        if messages[0]["content"] == "bug":
            raise ZeroDivisionError("of ours")
        if messages[0]["content"] == "bad":
            raise DataError("the template says no")
        return [1, 2]

    def answers(self, questions):
        self.batches.append((self.name, len(questions)))
        self.begun.set()
        while not self.may.wait(0.01):
            if all(each.requested() for each in questions):
                return [Answer("", "cut", 2, 0) for _ in questions]
        for each in questions:
            each.on_text(str(self.name))
        return [Answer(str(self.name), "stop", 2, 1) for _ in questions]


@pytest.fixture
def slow():
    return Slow()


def waiting(server, count):
    until = time.monotonic() + 10
    while len(server.engine._jobs) != count:
        assert time.monotonic() < until
        time.sleep(0.005)


def test_those_who_wait_for_one_adapter_are_answered_together_and_nobody_is_passed_over(slow):
    with served(slow, batch=3) as server, ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, server, question())
        slow.begun.wait(10)
        rest = []
        for i, name in enumerate(("legal", "support", "legal", "base", "support")):
            rest.append(pool.submit(ask, server, question(model=name)))
            waiting(server, i + 1)
        slow.may.set()
        said = [each.result()[1]["choices"][0]["message"]["content"] for each in (first, *rest)]
    assert said == ["support", "legal", "support", "legal", "None", "support"]
    assert slow.batches == [("support", 1), ("legal", 2), ("support", 2), (None, 1)]


def test_a_full_queue_says_come_again(slow):
    with served(slow, batch=1, waiting=2) as server, ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, server, question())
        slow.begun.wait(10)
        more = [pool.submit(ask, server, question()) for _ in range(2)]
        waiting(server, 2)
        status, answer = ask(server, question())
        assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert get(server, "/health") == (200, {"status": "ok"})
        slow.may.set()
        assert [each.result()[0] for each in (first, *more)] == [200] * 3


def test_an_answer_that_takes_too_long_is_cut_and_so_is_one_that_nobody_waits_for(slow):
    with served(slow, seconds=0.2) as server:
        status, answer = ask(server, question())
        assert (status, answer["error"]["code"]) == (504, "timeout")
        last = json.loads(events(server, question(stream=True))[-1])
        assert last["error"]["code"] == "timeout"
    with served(slow, seconds=60.0) as server:
        slow.begun.clear()
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
        connection.request("POST", "/v1/chat/completions", json.dumps(question()), {"Content-Type": "application/json"})
        slow.begun.wait(10)
        connection.close()
        slow.may.wait(0.1)
        until = time.monotonic() + 10
        while server.engine._running:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert not slow.may.is_set()


def test_a_bug_in_one_answer_is_told_to_the_log_alone_and_the_next_is_answered(slow):
    slow.may.set()
    with served(slow) as server:
        status, answer = ask(server, question("bug"))
        assert (status, answer["error"]["type"]) == (500, "server_error") and "of ours" not in json.dumps(answer)
        assert any("ZeroDivisionError: of ours" in line for line in server.said)
        assert ask(server, question("bad"))[1]["error"]["message"] == "the template says no"
        assert ask(server, question())[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (
            question(model="../../etc/passwd"),
            400,
            "there is no model '../../etc/passwd' here; there are: support, legal, base",
        ),
        (question(messages=[]), 400, "`messages`: List should have at least 1 item"),
        (question(messages=[{"role": "tool", "content": "x"}]), 400, "`messages.0.role`"),
        (question(n=2), 400, "`n`: Input should be 1"),
        (question(temperature=3), 400, "`temperature`"),
        (question(stop=[""]), 400, "`stop"),
        (question(max_tokens=0), 400, "`max_tokens`"),
        (question(max_tokens=5000), 400, "max_tokens is 5,000; this server gives at most 1,024"),
        (question(tools=[{}]), 400, "`tools` is not supported here"),
        (question(temperatur=1), 400, "`temperatur` is not supported here"),
        (question(response_format={"type": "json_object"}), 400, "`response_format"),
        (b"{", 400, "JSON"),
        (b"[]", 400, "object"),
        (b"\xff", 400, ""),
        (b"[" * 100_000, 400, "JSON"),
        (b'{"model": "support", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, "JSON"),
        (b" " * (1 << 20) + b"1", 413, "this server takes 1,048,576"),
        (b"x" * (3 << 20), 413, "this server takes 1,048,576"),
    ],
    ids=lambda value: "" if isinstance(value, bytes | dict) else str(value)[:30],
)
def test_what_cannot_be_answered_is_said_in_the_apis_shape(body, status, said, slow):
    slow.may.set()
    with served(slow) as server:
        found, answer = ask(server, body)
        assert found == status and said in answer["error"]["message"]
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert not slow.batches and ask(server, question())[0] == 200


def test_other_addresses_methods_and_types_are_errors_in_json(slow):
    with served(slow) as server:
        assert ask(server, question(), "/v1/completions")[0] == 404
        assert get(server, "/../../etc/passwd")[0] == 404
        for line in (b"GET http://[/v1 HTTP/1.0", b"GET /v1/../../../etc/passwd HTTP/1.0", b"GET"):
            with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as raw:
                raw.sendall(line + b"\r\n\r\n")
                assert b'{"error": ' in raw.makefile("rb").read()
        assert get(server, "/v1/models/%2e%2e%2fsecret")[0] == 404
        assert get(server, "/v1/models/legal")[1]["id"] == "legal"
        assert ask(server, b"", method="PUT")[0] == 501
        assert ask(server, question(), Content_Type="text/plain")[0] == 415  # what any page in a browser can send
        assert ask(server, question(), Host="evil.example")[1]["error"]["code"] == "wrong_host"
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        connection.request("POST", "/v1/chat/completions", iter([b"{}"]), {"Content-Type": "application/json"})
        assert connection.getresponse().status == 411  # in chunks, which need not say how many they are
        connection.close()


def test_a_key_is_asked_for_where_there_is_one_and_never_told(slow):
    slow.may.set()
    with served(slow, KEY) as server:
        for shown in (None, "Bearer wrong", f"Bearer {KEY}x", f"Basic {KEY}", "Bearer \xe9", KEY):
            headers = {} if shown is None else {"Authorization": shown}
            status, answer = ask(server, question(), **headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert get(server, "/v1/models", **headers)[0] == 401
        assert ask(server, question(), Authorization=f"Bearer {KEY}")[0] == 200
        assert get(server, f"/v1/models?key={KEY}", Authorization=f"Bearer {KEY}")[0] == 200
        assert get(server, "/health")[0] == 200
        assert KEY not in "".join(server.said) and len(slow.batches) == 1


def test_a_request_that_never_comes_to_its_end_is_given_up(slow):
    with served(slow, idle=0.2) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        connection.putrequest("POST", "/v1/chat/completions")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b"{")
        assert connection.getresponse().status == 408
        connection.close()


def test_told_to_stop_it_finishes_what_is_under_way_and_takes_nothing_more(slow):
    with served(slow) as server, ThreadPoolExecutor(2) as pool:
        under_way = pool.submit(ask, server, question())
        slow.begun.wait(10)
        closing = pool.submit(server.close)
        until = time.monotonic() + 10
        while not server.engine._closing:
            assert time.monotonic() < until
            time.sleep(0.005)
        slow.may.set()
        assert under_way.result()[0] == 200
        closing.result()
        with pytest.raises(ConnectionRefusedError):
            get(server, "/health")


def test_what_outlasts_the_grace_is_cut(slow):
    with served(slow, grace=0.1) as server, ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(ask, server, question())
        slow.begun.wait(10)
        server.close()
        status, answer = under_way.result()
        assert (status, answer["error"]["code"]) == (503, "stopping")


def test_an_address_that_is_taken_is_found_before_anything_is_loaded(slow):
    with served(slow) as server, pytest.raises(MachineError, match=r"cannot listen at .* port"):
        serve({}, port=server.server_port)
    with pytest.raises(AdapterError, match="no adapter was given"):
        serve({}, port=0)


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_sigterm_ends_the_program_in_order(adapters):
    program = f"""
        from pathlib import Path
        from qlora.serve.server import serve
        serve({{"support": Path({str(adapters["support"])!r})}}, port=0)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if found := re.search(r"support, base at http://127.0.0.1:(\d+)/v1", line):
                break
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=30)
        connection.request("POST", "/v1/chat/completions", json.dumps(question()), {"Content-Type": "application/json"})
        assert json.loads(connection.getresponse().read())["choices"][0]["message"]["content"] == "Ada"
        process.send_signal(signal.SIGTERM)  # with a connection open
        assert process.wait(20) == 0
        assert "Traceback" not in process.stderr.read()
        connection.close()
    finally:
        process.kill()
        process.wait()
