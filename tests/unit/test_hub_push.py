"""Pushing a folder: the hub's own client against a server on this machine that answers as the hub does."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from command_line import call
from spectrim import cli_push
from spectrim.integrations import hub_push
from spectrim.store import write_manifest, write_text

TOKEN = "hf_" + "x" * 20


class Hub(ThreadingHTTPServer):
    """What it was asked for, what it holds now, and how it is to answer."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.asked: list[str] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refuse: dict[str, int] = {}  # part of a path -> HTTP status
        self.private: bool | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    """The calls that one push makes."""

    server: Hub

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self.answer({"sha": "0" * 40, "id": "ada/small", "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.path.endswith("/repos/create"):
            self.server.private = json.loads(body).get("private", json.loads(body).get("visibility") == "private")
            self.answer({"url": f"{self.server.address}/ada/small", "name": "ada/small"})
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            address = f"{self.server.address}/ada/small/commit/{'1' * 40}"
            self.answer({"commitOid": "1" * 40, "commitUrl": address, "success": True})
        else:
            self.answer({})

    def answer(self, data: dict[str, Any]) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        status = next((code for part, code in self.server.refuse.items() if part in self.path), 200)
        raw = json.dumps(data if status == 200 else {"error": "no"}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "small"
    (made / "sub").mkdir(parents=True)
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    for name in ("README.md", "report.html", "report.json"):
        write_text(made / name, f"{name}\n")
    write_manifest(made, facts={"tool": "spectrim"})
    return made


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_push_creates_the_repository_and_uploads_every_file(hub: Hub, folder: Path) -> None:
    before = contents(folder)
    answer = call("push", folder, "ada/small", "--private", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["repo"] == "ada/small"
    assert answer.json["commit"] == "1" * 40
    assert {name: hashlib.sha256(data).hexdigest() for name, data in hub.files.items()} == before
    assert hub.private is True
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert hub.asked[0] == "POST /api/repos/create"
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("refuse", "code", "says"),
    [
        ({"/repos/create": 401, "/api/models/": 404}, 2, "does not let this token write to ada/small"),
        ({"/repos/create": 403, "/api/models/": 404}, 2, "does not let this token write"),
        ({"/repos/create": 500}, 4, "with HTTP 500"),
        ({"/preupload/": 404}, 4, "refused the push to ada/small with HTTP 404"),
        ({"/commit/": 403}, 2, "does not let this token write"),
        ({"/commit/": 400}, 4, "with HTTP 400"),
    ],
)
def test_a_hub_that_refuses_is_told_and_the_folder_stays(
    hub: Hub, folder: Path, refuse: dict[str, int], code: int, says: str
) -> None:
    hub.refuse = refuse
    before = contents(folder)
    answer = call("push", folder, "ada/small")
    assert answer.code == code, answer.err
    assert says in answer.message
    assert f"{folder} is whole; to push it later: spectrim push {folder} ada/small" in answer.message
    assert TOKEN not in answer.err
    assert contents(folder) == before
    assert hub.files == {} or "/commit/" in next(iter(refuse))


def test_a_hub_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    answer = call("push", folder, "ada/small")
    assert answer.code == 4
    assert "the hub cannot be reached" in answer.message
    assert "is whole" in answer.message


def test_without_a_token_nothing_is_asked(hub: Hub, folder: Path) -> None:
    with mock.patch.object(hub_push, "get_token", return_value=None):
        answer = call("push", folder, "ada/small")
        compressed = call("compress", "builtin:tiny", "--out", folder.parent / "new", "--push-to", "ada/small")
    for got in (answer, compressed):
        assert got.code == 2
        assert "no Hugging Face token was found" in got.message
    assert not (folder.parent / "new").exists()
    assert hub.asked == []


def test_a_folder_that_is_no_result_is_told_before_a_missing_token(hub: Hub, tmp_path: Path) -> None:
    with mock.patch.object(hub_push, "get_token", return_value=None):
        dense, none = call("push", tmp_path, "ada/small"), call("push", tmp_path / "none", "ada/small")
    assert (dense.code, none.code) == (3, 3)
    assert "has no manifest.json; only folders that spectrim wrote can be pushed" in dense.message
    assert "none: no such folder" in none.message
    assert hub.asked == []


@pytest.mark.parametrize("name", ["small", "a/b/c", "ada/..", "ada/sm all", "-ada/small", ""])
def test_a_name_that_no_repository_can_have(hub: Hub, folder: Path, name: str) -> None:
    answer = call("push", folder, "--", name) if name.startswith("-") else call("push", folder, name)
    assert answer.code == 2
    assert "USER/NAME" in answer.message
    assert hub.asked == []


def test_a_damaged_folder_is_not_pushed(hub: Hub, folder: Path) -> None:
    (folder / "README.md").write_text("other")
    answer = call("push", folder, "ada/small")
    assert answer.code == 3
    assert "changed: 'README.md'" in answer.message
    assert hub.asked == []


def test_compress_pushes_what_it_has_written(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli_push.push_result(folder, None)
    assert hub.asked == []
    cli_push.push_result(folder, "ada/small")
    assert set(hub.files) == set(contents(folder))
