"""--push-to-hub, against a stand-in for the hub: what is refused before the work, what is sent, how it goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import save_tiny
from stand_in_hub import Repo, served

MANIFEST = "checksums.b3"

# huggingface_hub's own way to send a file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")
CUT = ("prune", "parent", "--blocks", "2", "--no-refit", "-o", "out")
SHARDS = ("--max-shard-size", "100KB")


@pytest.fixture
def hub(monkeypatch):
    """A hub, and a user who is logged in there."""
    with served() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_good")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        for waits in ("WAITS", "SHORT_WAITS"):
            monkeypatch.setattr(f"llmsurgeon.checkpoint.push.{waits}", (0.01, 0.01))
        yield hub


def test_what_is_written_is_what_the_hub_has(run, folder, hub):
    code, _, err = run(*CUT, *SHARDS, "--push-to-hub", "cut", "--private")
    assert code == 0 and f"pushed to {hub.url}/me/cut" in err, err
    repo = hub.repos["me/cut"]
    assert repo.private and len(repo.commits) == 1
    here = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    assert repo.files == here and sum(name.endswith(".safetensors") for name in here) > 2
    assert hub.validated == [here["README.md"].decode()]
    card = yaml.safe_load(here["README.md"].decode().split("---")[1])
    assert card["model_name"] == "me/cut"


def test_every_verb_that_writes_a_checkpoint_pushes(run, folder, hub):
    assert run(*CUT, "--push-to-hub", "lab/one")[0] == 0
    few = ("calibration.tokens=256", "calibration.sequence_length=16", "distill.steps=1", "distill.sequence_length=16")
    heal = ("heal", "out", "--parent", "parent", "--text", "text.txt", "-o", "healed", "--push-to-hub", "lab/two")
    code, _, err = run(*heal, *(word for value in few for word in ("--set", value)))
    assert code == 0, err
    assert run("export", "out", "--to", "surgeon", "-o", "again", "--push-to-hub", "lab/three")[0] == 0
    for name, made in (("lab/one", "out"), ("lab/two", "healed"), ("lab/three", "again")):
        assert hub.repos[name].files[MANIFEST] == (folder / made / MANIFEST).read_bytes()


def test_a_push_that_broke_off_goes_on_and_sends_nothing_twice(run, folder, hub):
    hub.failures["PUT /store"] = 1
    assert run(*CUT, *SHARDS, "--push-to-hub", "cut")[0] == 0
    shards = len(list((folder / "out").glob("*.safetensors")))
    assert hub.count("PUT /store") == shards + 1 and len(hub.repos["me/cut"].commits) == 1

    hub.failures["POST /api/models/me/late/commit"] = 3
    code, _, err = run(*CUT[:-1], "late", "--push-to-hub", "late")
    assert code == 2 and (folder / "late" / MANIFEST).exists()
    assert "late is written, and whole; it could not be pushed to me/late (" in err and "hf upload me/late" in err
    sent = hub.count("PUT /store")
    command = [sys.executable, "-m", "huggingface_hub.cli.hf", "upload", "me/late", str(folder / "late")]
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    env.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    files = hub.repos["me/late"].files
    assert hub.count("PUT /store") == sent
    assert files == {path.name: path.read_bytes() for path in (folder / "late").iterdir()}


REFUSED = {
    "no token": ("cut", "there is no token for the hub; log in with `hf auth login`"),
    "a token that nobody knows": ("cut", "the hub does not know this token"),
    "a token that may read": ("cut", "this token of me may only read"),
    "a name that cannot be": ("me/a b", "not the name of a repository"),
    "too many parts": ("me/a/b", "not the name of a repository"),
    "two points": ("me/a..b", "not the name of a repository"),
    "somebody else's name": ("other/cut", "this token may not write there"),
    "somebody else's repository": ("lab/theirs", "this token may not write there"),
    "another model": ("me/another", "holds a model that llmsurgeon did not write"),
    "a public one": ("me/public", "this repository is there, and public"),
    "no line": ("cut", "HF_HUB_OFFLINE is set"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_pushed_is_told_before_the_work(run, folder, hub, monkeypatch, case):
    name, message = REFUSED[case]
    hub.repos = {
        "lab/theirs": Repo(),
        "me/another": Repo(files={"model.safetensors": b"theirs"}),
        "me/public": Repo(),
    }
    hub.readonly = {"lab/theirs"}
    if case == "no token":
        monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    elif case == "a token that nobody knows":
        monkeypatch.setenv("HF_TOKEN", "hf_bad")
    elif case == "a token that may read":
        hub.role = "read"
    elif case == "no line":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = {name: dict(repo.files) for name, repo in hub.repos.items()}
    code, out, err = run(*CUT, "--push-to-hub", name, *(["--private"] if case == "a public one" else []))
    assert code == 2 and message in err and not out, err
    assert not (folder / "out").exists() and not (folder / "out.partial").exists()
    assert {name: repo.files for name, repo in hub.repos.items()} == before


def test_what_an_earlier_push_left_goes_and_what_others_put_there_stays(run, folder, hub):
    assert run(*CUT, *SHARDS, "--push-to-hub", "cut")[0] == 0
    repo = hub.repos["me/cut"]
    repo.files["notes.md"] = b"mine"
    assert run(*CUT[:-1], "whole", "--push-to-hub", "me/cut")[0] == 0
    here = {path.name: path.read_bytes() for path in (folder / "whole").iterdir()}
    assert repo.files == {**here, "notes.md": b"mine"}
    assert len(repo.commits) == 2


def test_a_missed_gate_is_not_pushed(run, folder, hub):
    recipe = "version: 1\nsteps: [{op: prune_blocks, layers: [2]}]\ngate: {max_perplexity_ratio: 0.001}\n"
    (folder / "gate.yaml").write_text(recipe)
    command = ("run", "gate.yaml", "parent", "--text", "text.txt", "--tokens", 256, "--seq-len", 16, "-o", "out")
    code, _, err = run(*command, "--push-to-hub", "cut")
    assert code == 3 and "it was not pushed, which `hf upload me/cut out` does" in err, err
    assert hub.repos["me/cut"].files == {}


def test_private_alone_is_refused(run, folder):
    code, _, err = run(*CUT, "--private")
    assert code == 2 and "give --push-to-hub REPO, too" in err


def test_a_gguf_file_lies_beside_others_and_the_first_brings_a_card(run, tmp_path, monkeypatch, hub):
    from gguf_models import save_uniform

    monkeypatch.chdir(tmp_path)
    save_uniform(tmp_path / "parent", "llama")
    (tmp_path / "parent/README.md").write_text("---\nlicense: llama3.2\nbase_model: meta/base\n---\n")
    for kind in ("F16", "Q8_0"):
        command = ("export", "parent", "--to", "gguf", "--type", kind, "-o", f"m-{kind}.gguf")
        code, _, err = run(*command, "--push-to-hub", "lab/Llama-small")
        assert code == 0, err
    repo = hub.repos["lab/Llama-small"]
    assert set(repo.files) == {"README.md", "m-F16.gguf", "m-Q8_0.gguf"}
    assert repo.files["m-F16.gguf"] == Path("m-F16.gguf").read_bytes()
    head, body = repo.files["README.md"].decode().split("---")[1:3]
    assert yaml.safe_load(head)["base_model"] == ["meta/base"]
    assert "Built with Llama" in body and "begin with" not in body and "llama-cli -hf lab/Llama-small" in body


def test_the_record_of_a_pushed_model_is_where_its_children_find_it(run, folder, hub):
    assert run(*CUT, "--push-to-hub", "lab/cut")[0] == 0
    assert run("prune", "out", "--blocks", "1", "--no-refit", "-o", "twice")[0] == 0
    card = yaml.safe_load((folder / "twice/README.md").read_text().split("---")[1])
    assert card["base_model"] == ["lab/cut"] and card["base_model_relation"] == "finetune"
    surgery = json.loads((folder / "twice/surgery.json").read_text())
    assert surgery["parent"] == "lab/cut"
    assert "model: lab/cut" in (folder / "twice/recipe.yaml").read_text()


def test_a_family_of_its_own_is_pushed_with_its_code(run, tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "parent", "qwen3", tokenizer=True)
    code, _, err = run("prune", "parent", "--attention", "2", "--no-refit", "-o", "out", "--push-to-hub", "cut")
    assert code == 0 and "surgeon_blocks.py" in hub.repos["me/cut"].files, err
