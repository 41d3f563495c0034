"""`pipe push` against a stand-in of the hub on this machine, and the card that it sends."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants

from teacher_cache.cache.manifest import read_manifest
from teacher_cache.stages import train_student
from tests.command_line import done, refused
from tests.tiny_runs import student_config


class Hub:
    """What the stand-in was sent: repositories that were made, and files of each."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []
        self.files: dict[str, dict[str, bytes]] = {}
        self.tokens: set[str | None] = set()
        self.refuses = False
        self.endpoint = ""

    def answer(self, path: str, body: bytes, token: str | None) -> tuple[int, Any]:
        self.tokens.add(token)
        if self.refuses:
            return 403, {"error": "no"}
        _, _, *words = path.partition("?")[0].split("/")
        if words == ["repos", "create"]:
            self.made.append(json.loads(body))
            made = self.made[-1]
            kind = "datasets/" if made.get("type") == "dataset" else ""
            return 200, {"url": f"{self.endpoint}/{kind}{made['organization']}/{made['name']}"}
        if words[-2:] == ["preupload", "main"]:
            asked = json.loads(body)["files"]
            return 200, {
                "files": [
                    {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for one in asked
                ]
            }
        if words[-2:] == ["commit", "main"]:
            repo = "/".join(words[:-2])
            for line in body.decode().splitlines():
                one = json.loads(line)
                if one["key"] == "file":
                    value = one["value"]
                    assert value["encoding"] == "base64"
                    kept = self.files.setdefault(repo, {})
                    kept[value["path"]] = base64.b64decode(value["content"])
            kind, _, name = repo.partition("/")
            of_kind = {"models": name, "datasets": repo}[kind]
            url = f"{self.endpoint}/{of_kind}/commit/{'1' * 40}"
            return 200, {"success": True, "commitOid": "1" * 40, "commitUrl": url}
        return 200, {"warnings": [], "errors": []}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            code, answer = found.answer(self.path, body, self.headers.get("Authorization"))
            data = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found.endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "pushed"
    config = student_config(tiny_cache, out, max_steps=2, eval_fraction=0.3)
    return train_student.run(config).run


def test_the_card_says_what_the_hub_reads(run: Path, tiny_cache: Path) -> None:
    card = ModelCard.load(run / "README.md")
    data: Any = card.data
    assert data.pipeline_tag == "text-classification"
    results = {one.metric_type: one.metric_value for one in data.eval_results}
    evaluation = json.loads((run / "run.json").read_text())["result"]["evaluation"]
    assert results["accuracy"] == pytest.approx(100 * evaluation["eval_accuracy"], abs=1e-3)
    manifest = read_manifest(tiny_cache)
    assert manifest.fingerprint in card.text and "AutoModelForSequenceClassification" in card.text
    assert Path(manifest.about["teacher"]).name in card.text
    assert str(tiny_cache.parent) not in str(card), "no path of this machine"


def test_student_card_and_cache_arrive_as_they_are(run: Path, tiny_cache: Path, hub: Hub) -> None:
    printed = done("push", run, "me/student", "--with-cache", "--private")
    assert "✓ model me/student" in printed and "✓ dataset me/student-cache" in printed
    assert [(one["name"], one.get("type", "model")) for one in hub.made] == [
        ("student", "model"),
        ("student-cache", "dataset"),
    ]
    assert all(one.get("private") or one.get("visibility") == "private" for one in hub.made)
    assert hub.tokens == {"Bearer hf_of_nobody"}
    (model,) = [files for repo, files in hub.files.items() if repo.endswith("me/student")]
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md"):
        assert model[name] == (run / name).read_bytes()
    assert not {"report.html", ".lock"} & model.keys()
    assert not any(name.startswith("checkpoint") for name in model)
    assert str(tiny_cache.parent).encode() not in model["run.json"]
    (cached,) = [files for repo, files in hub.files.items() if repo.endswith("me/student-cache")]
    manifest = read_manifest(tiny_cache)
    assert cached["manifest.json"] == (tiny_cache / "manifest.json").read_bytes()
    assert manifest.fingerprint in cached["README.md"].decode()
    there = {one.relative_to(tiny_cache).as_posix() for one in tiny_cache.rglob("*.arrow")}
    assert there <= cached.keys()


def test_what_was_pushed_predicts(run: Path, hub: Hub, tmp_path: Path) -> None:
    done("push", run, "me/student")
    (model,) = hub.files.values()
    for name, content in model.items():
        (tmp_path / name).write_bytes(content)
    assert done("predict", tmp_path, "a film") == done("predict", run, "a film")


def test_without_a_token_or_for_a_dry_run_it_says_what_it_would_do(
    run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = done("push", run, "me/student", "--dry-run")
    assert "model.safetensors" in printed and "nothing was sent" in printed
    monkeypatch.setattr("teacher_cache.pipeline.pushing.get_token", lambda: None)
    refused("push", run, "me/student", saying="nothing was uploaded, since there is no token")
    assert hub.made == [] and hub.files == {}


def test_what_cannot_be_pushed_is_refused(
    run: Path, hub: Hub, tiny_cache: Path, tmp_path: Path
) -> None:
    refused("push", tmp_path, "me/student", saying="is no run")
    refused("push", run, "a b", saying="is no name of a repository")
    asked = ("push", run, "me/student", "--with-cache", "--cache", tmp_path)
    refused(*asked, saying="has no manifest.json")
    hub.refuses = True
    refused("push", run, "me/student", saying="the hub refused model me/student")
