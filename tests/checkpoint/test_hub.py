"""Fetching from a hub: a stand-in on loopback that serves a folder as huggingface_hub asks for it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import byte_tokenizer, save_tiny

import llmsurgeon

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """One repository, owner/model, at one commit."""

    root: Path
    asked: list[str]

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/owner/model/tree/"):
            self._json([self._entry(file) for file in self._files()])
        elif path.startswith("/api/models/owner/model"):
            siblings = [{"rfilename": entry} for entry in self._files()]
            self._json({"id": "owner/model", "sha": COMMIT, "siblings": siblings, "private": False, "gated": False})
        elif path.startswith("/owner/model/resolve/"):
            name = path.split("/", 5)[5]
            self.asked.append(name)
            self._reply((self.root / name).read_bytes())
        else:
            self.send_error(404)

    def _files(self) -> list[str]:
        return sorted(p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_file())

    def _entry(self, name: str) -> dict[str, object]:
        content = (self.root / name).read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _json(self, value: object) -> None:
        self._reply(json.dumps(value).encode(), "application/json")

    def _reply(self, content: bytes, kind: str = "application/octet-stream") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path) -> Iterator[tuple[Path, list[str], dict[str, str]]]:
    """(the folder that is served, names that were asked for, the environment that leads there)."""
    root = tmp_path / "served"
    save_tiny(root, "llama", tokenizer=True)
    handler = type("Served", (Hub,), {"root": root, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    env = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(llmsurgeon.__file__).parents[1]),
    }
    env.pop("HF_HUB_OFFLINE", None)
    yield root, handler.asked, env
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_lies_beside_the_weights_comes_from_the_hub_too(hub, tmp_path):
    root, asked, env = hub
    template = "{% if tools %}with {{ tools | length }} tools{% endif %}"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "plain", "tool_use": template}
    tokenizer.save_pretrained(root)
    assert (root / "additional_chat_templates/tool_use.jinja").read_text() == template
    (root / "onnx").mkdir()
    (root / "onnx/config.json").write_text("{}")
    (root / "pytorch_model.bin").write_bytes(b"never")
    command = [
        sys.executable,
        "-m",
        "llmsurgeon",
        "prune",
        "owner/model",
        "--attention",
        "2",
        "--no-refit",
        "-o",
        "out",
    ]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "additional_chat_templates/tool_use.jinja" in asked
    assert not {"onnx/config.json", "pytorch_model.bin"} & set(asked)
    from llmsurgeon.formats.loading import load_tokenizer

    made = load_tokenizer(str(tmp_path / "out"))
    talk = [{"role": "user", "content": "hello"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert made.apply_chat_template(talk, tools=tools, tokenize=False) == "with 1 tools"
    assert made.apply_chat_template(talk, tokenize=False) == "plain"


ONE_AFTER_THE_OTHER = """
import json, sys
from pathlib import Path
from llmsurgeon.cli.main import main

for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as end:
        print(f"\\nended with {end.code or 0}, ran: {Path('ran').exists()}", file=sys.stderr)
"""


def test_code_on_the_hub_is_no_more_trusted_than_in_a_folder(hub, tmp_path):
    root, _, env = hub
    config = json.loads((root / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "tokenization_own.Own"]}
    (root / "tokenizer_config.json").write_text(json.dumps(config))
    own = f"from transformers import PreTrainedTokenizerFast\nopen({str(tmp_path / 'ran')!r}, 'w')\n"
    (root / "tokenization_own.py").write_text(own + "class Own(PreTrainedTokenizerFast): pass\n")
    (tmp_path / "text.txt").write_text("The quick brown fox. " * 99)
    judge = ["eval", "owner/model", "--text", "text.txt", "--tokens", "64", "--seq-len", "16"]
    command = [sys.executable, "-c", ONE_AFTER_THE_OTHER, json.dumps([judge, [*judge, "--trust-remote-code"]])]
    given = {"env": env, "cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, input="y\n" * 9, **given)
    refused, trusted = re.findall(r"^ended with (.*)$", done.stderr, re.MULTILINE)
    assert refused == "2, ran: False" and "needs code of its own" in done.stderr.partition("ended with")[0]
    assert trusted == "0, ran: True", done.stderr
