"""A push sends what an export wrote, whole and nothing else, to a hub that is played here; nobody learns its token."""

import base64
import json
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants as hub
import pytest

from qlora import durable
from qlora.errors import AdapterError
from qlora.export.push import check, files_of, push

TOKEN = "c4nary-of-the-push"


class Hub:
    """As much of a hub as a commit takes. refuse: (path's start, status) of the first request that it refuses."""

    def __init__(self):
        self.requests, self.files, self.refuse = [], {}, None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.requests.append((self.path, self.headers.get("Authorization")))
                status, answer = outer.answer(self.path, body) if self.command == "POST" else (404, {})
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, path, body):
        if self.refuse and path.startswith(self.refuse[0]):
            return self.refuse[1], {"error": f"refused, with Bearer {TOKEN}"}
        if path == "/api/repos/create":
            self.made = json.loads(body)
            return 200, {"url": f"{self.address}/ada/mine"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            asked = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return 200, {"commitUrl": f"{self.address}/ada/mine/commit/0123", "commitOid": "0123", "success": True}


@pytest.fixture
def there(monkeypatch):
    found = Hub()
    monkeypatch.setattr(hub, "ENDPOINT", found.address)
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture(autouse=True)
def logged_in(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HF_TOKEN_PATH", str(tmp_path / "no-token"))


@pytest.fixture
def made(tmp_path):
    """Two exported directories and a file; in one of them lies what no export wrote."""
    for name in ("peft", "merged"):
        with durable.new_directory(tmp_path / name) as draft:
            draft.write("README.md", f"# {name}\n".encode())
            draft.write("weights.safetensors", name.encode() * 100)
    (tmp_path / "peft" / "events.jsonl").write_text("{}")
    (tmp_path / "peft" / "checkpoint-5").mkdir()
    (tmp_path / "peft" / "checkpoint-5" / "state.json").write_text("{}")
    (tmp_path / "mine-f16.gguf").write_bytes(b"GGUF")
    (tmp_path / ".mine-lora.gguf.1.unfinished").write_bytes(b"GG")
    return tmp_path


def test_all_that_was_exported_is_there_after_one_commit_and_nothing_else(made, there, capfd):
    files = files_of([made / "peft", made / "merged", made / "mine-f16.gguf"], made / "none")
    assert push(files, "ada/mine") == f"{there.address}/ada/mine/commit/0123"
    assert there.made.get("visibility") == "private" or there.made["private"] is True  # by the library's version
    assert there.made["name"] == "mine" and there.made["organization"] == "ada"
    assert there.files.keys() == {
        *("README.md", "weights.safetensors", "manifest.json", "mine-f16.gguf"),
        *("merged/README.md", "merged/weights.safetensors", "merged/manifest.json"),
    }
    assert there.files["README.md"] == b"# peft\n" and there.files["mine-f16.gguf"] == b"GGUF"
    assert there.files["merged/weights.safetensors"] == b"merged" * 100
    assert sum("/commit/" in path for path, _ in there.requests) == 1
    asked = [sent for path, sent in there.requests if path.startswith(("/api/repos", "/api/models"))]
    assert asked == [f"Bearer {TOKEN}"] * 3
    assert TOKEN not in "".join(capfd.readouterr())


def test_a_file_goes_with_the_adapters_card(made, tmp_path):
    card = tmp_path / "peft" / "README.md"
    assert files_of([made / "mine-f16.gguf"], card) == {"mine-f16.gguf": made / "mine-f16.gguf", "README.md": card}


def test_what_is_not_what_was_written_is_not_pushed(made):
    (made / "peft" / "weights.safetensors").write_bytes(b"tfep" * 100)
    with pytest.raises(AdapterError, match=r"peft: weights\.safetensors is not what was written.*export it again"):
        files_of([made / "peft"], made / "none")


@pytest.mark.parametrize(
    ("at", "status", "said"),
    [
        ("/api/repos/create", 401, "token is not valid"),
        ("/api/repos/create", 403, "may not write to ada"),
        ("/api/repos/create", 404, "there is no ada"),
        ("/api/models/ada/mine/commit", 403, "may not write to ada"),
        ("/api/models/ada/mine/preupload", 404, "there is no ada"),
        ("/api/models/ada/mine/commit", 413, "same command tries again"),
    ],
)
def test_what_the_hub_refuses_is_said_without_the_token(at, status, said, made, there, capfd):
    there.refuse = (at, status)
    with pytest.raises(AdapterError, match=rf"^ada/mine: cannot be pushed: (.|\n)*{status}(.|\n)*{said}") as raised:
        push(files_of([made / "peft"], made / "none"), "ada/mine")
    assert not there.files
    assert TOKEN not in str(raised.value) + "".join(capfd.readouterr())


def test_a_hub_that_cannot_be_reached_is_said(made, there, monkeypatch):
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(AdapterError, match=r"ada/mine: cannot be pushed: .*\n.*same command tries again"):
        push(files_of([made / "peft"], made / "none"), "ada/mine")


@pytest.mark.parametrize("name", ["mine", "a/b/c", "../mine", "ada/..", "ada/mi ne", "", "ada/", "/mine", "ada/x.git"])
def test_what_is_no_repository_is_refused_before_anything(name, there):
    with pytest.raises(AdapterError, match="not `user/repo`"):
        check(name)
    assert not there.requests


def test_without_a_token_or_a_network_nothing_is_tried(there, monkeypatch):
    assert check("ada/mine") == TOKEN
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterError, match="HF_HUB_OFFLINE"):
        push({}, "ada/mine")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AdapterError, match="hf auth login"):
        push({}, "ada/mine")
    assert not there.requests


def test_a_token_typed_in_the_wrong_place_is_not_repeated():
    token = "hf_" + "a1B2" * 8
    with pytest.raises(AdapterError) as raised:
        check(token)
    assert token not in "".join(traceback.format_exception_only(raised.value))
