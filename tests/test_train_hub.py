"""The trained model on the Hub: reached before training, refused in one line, sent again alone. A server of this machine stands for the Hub."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import pytest
from click.testing import CliRunner
from huggingface_hub import constants
from one_rank import one_rank
from train_setup import make_world

import cli
from train import record


class Hub(BaseHTTPRequestHandler):
    """Repositories can be made; commits are refused with 403 as long as `refuses`, then kept in `commits`."""

    refuses, asked, commits = True, [], []

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        Hub.asked.append(self.path)
        code, answer = 403, {"error": "Forbidden: your token may not write"}
        if self.path == "/api/repos/create":
            code, answer = 200, {"url": "http://127.0.0.1/me/x", "id": "me/x"}
        elif self.path == "/api/validate-yaml":
            code, answer = 200, {"errors": [], "warnings": []}
        elif not Hub.refuses and "/preupload/" in self.path:
            files = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in json.loads(body)["files"]]
            code, answer = 200, {"files": files}
        elif not Hub.refuses and "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            Hub.commits.append(sorted(line["value"]["path"] for line in lines if line["key"] == "file"))
            code, answer = 200, {"commitUrl": "http://127.0.0.1/me/x/commit/1", "commitOid": "1", "success": True}
        self.answer(code, answer)

    def do_GET(self):
        self.answer(404, {"error": "Not found"})

    do_HEAD = do_GET

    def answer(self, code: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.refuses, Hub.asked, Hub.commits = True, [], []
    reach(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


def reach(monkeypatch, address: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def train(world, folder: Path, *more: str, code: int) -> str:
    options = {
        "--ref-store": world.store,
        "--output-dir": folder / "run",
        "--loss-type": "sigmoid",
        "--beta": 0.1,
        "--max-steps": 1,
    }
    options |= {"--effective-batch-size": 4, "--save-strategy": "no", "--hub-model-id": "me/x"}
    words = ["train", *(str(word) for pair in options.items() for word in pair), "--push-to-hub", *more]
    with one_rank(), mock.patch.dict(os.environ, {"HF_TOKEN": "none"}):
        result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == code and (result.exception is None or isinstance(result.exception, SystemExit)), result.output
    return result.output


def errors(output: str) -> list[str]:
    assert "Traceback" not in output
    return [line for line in output.splitlines() if line.startswith("Error:")]


def test_a_refused_push_is_one_line_and_is_repeated_alone(endpoint, tmp_path):
    world = make_world(tmp_path / "world", num_rows=8)
    output = train(world, tmp_path, code=1)
    assert "trained 1 steps" in output
    (error,) = errors(output)
    assert "me/x: the Hub refused" in error and "403" in error and "to send it alone: " in error
    assert record.finished(tmp_path / "run") is not None and "pushed" not in record.read(tmp_path / "run")
    weights = (tmp_path / "run" / "model.safetensors").stat()

    again = errors(train(world, tmp_path, "--resume-or-start", code=1))
    assert len(again) == 1 and "the Hub refused" in again[0]
    for name in ("checkpoint-1/optimizer.pt", "runs/events", ".half/model.safetensors"):
        (tmp_path / "run" / name).parent.mkdir()
        (tmp_path / "run" / name).write_text("stays here")
    Hub.refuses = False
    assert "pushed to http://127.0.0.1/me/x/commit/1" in train(world, tmp_path, "--resume-or-start", code=0)
    assert "nothing to do" in train(world, tmp_path, "--resume-or-start", code=0)
    assert (tmp_path / "run" / "model.safetensors").stat() == weights  # nothing was trained or saved again
    (files,) = Hub.commits
    assert {"README.md", "config.json", "model.safetensors", "run.json", "tokenizer.json"} <= set(files)
    assert not any(name.startswith(("checkpoint", "runs/", ".")) for name in files)

    card = (tmp_path / "run" / "README.md").read_text()
    assert "Fine-tuned from `model` (a local folder or file)" in card and "None" not in card
    assert str(tmp_path) not in card
    assert 'model="me/x"' in card and "| `loss_type` | sigmoid |\n| `beta` | 0.1 |" in card


def test_an_unreachable_hub_is_seen_before_training(tmp_path, monkeypatch):
    world = make_world(tmp_path / "world", num_rows=8)
    reach(monkeypatch, "http://127.0.0.1:9")
    (error,) = errors(train(world, tmp_path, code=2))
    assert "cannot be reached: ConnectError" in error and "without --push-to-hub" in error
    assert not (tmp_path / "run").exists()
