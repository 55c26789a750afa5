"""Where a model comes from and under which terms: read of cards, the hub's cache and GGUF files; passed on by cards."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from conftest import save_tiny
from gguf_models import save_uniform

from llmsurgeon.checkpoint.card_file import Heritage, heritage_of, read_card
from llmsurgeon.checkpoint.opening import open_checkpoint
from llmsurgeon.report.licences import TERMS, asked_name, terms_of
from llmsurgeon.report.origin import inherited, origin_of

CARD = """---
license: llama3.2
license_link: LICENSE.txt
language: [en, de, zh-Hans]
base_model: meta-llama/Llama-3.2-1B
tags: [a]
---
# A model
"""
CUT = ("prune", "parent", "--blocks", "2", "--no-refit", "-o")


def front(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def test_terms_language_and_parents_go_along(run, folder):
    (folder / "parent/README.md").write_text(CARD)
    (folder / "parent/LICENSE.txt").write_text("the licence")
    (folder / "parent/USE_POLICY.md").write_text("the policy")
    assert run(*CUT, "out")[0] == 0
    card = front(folder / "out")
    assert card["license"] == "llama3.2" and card["license_link"] == "LICENSE.txt"
    assert card["language"] == ["en", "de", "zh-Hans"]
    assert card["base_model"] == ["meta-llama/Llama-3.2-1B"] and card["base_model_relation"] == "finetune"
    assert (folder / "out/LICENSE.txt").read_text() == "the licence" and (folder / "out/USE_POLICY.md").exists()
    assert "Llama 3.2 Community License" in (folder / "out/NOTICE").read_text()
    body = (folder / "out/README.md").read_text().split("---", 2)[2]
    assert "**Built with Llama**" in body and "passed on begin with 'Llama'." in body

    (folder / "out/NOTICE").write_text("as it was")
    assert run("export", "out", "--to", "surgeon", "-o", "Llama-cut")[0] == 0
    assert front(folder / "Llama-cut") == {**card, "tags": ["llmsurgeon", "model-surgery", "custom_code"]}
    assert (folder / "Llama-cut/NOTICE").read_text() == "as it was"


def test_a_model_that_is_only_written_anew_is_the_hubs_quantized(run, folder):
    (folder / "parent/README.md").write_text(CARD)
    assert run("export", "parent", "--to", "surgeon", "-o", "out")[0] == 0
    assert front(folder / "out")["base_model_relation"] == "quantized"


def test_a_parent_of_the_hub_is_named_with_its_commit(run, folder):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = folder / "cache/models--lab--small/snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    (folder / "parent").rename(snapshot)
    assert run("prune", snapshot, "--blocks", "2", "--no-refit", "-o", "out")[0] == 0
    assert front(folder / "out")["base_model"] == ["lab/small"]
    surgery = json.loads((folder / "out/surgery.json").read_text())
    assert surgery["parent"] == "lab/small" and surgery["origin"]["revision"] == commit
    assert "Made from lab/small at revision 0123456789ab by" in (folder / "out/README.md").read_text()
    assert "model: lab/small" in (folder / "out/recipe.yaml").read_text()
    assert run("export", "out", "--to", "surgeon", "-o", "again")[0] == 0
    assert "Made from lab/small at revision 0123456789ab by" in (folder / "again/README.md").read_text()


def test_copies_of_a_folder_have_one_fingerprint_and_others_another(tmp_path):
    first = save_tiny(tmp_path / "one", "llama")
    shutil.copytree(first, tmp_path / "two/one")
    one, two = (origin_of(open_checkpoint(str(path))) for path in (first, tmp_path / "two/one"))
    assert one == two and str(one) == f"one (fingerprint {one.fingerprint[:12]})"
    other = origin_of(open_checkpoint(str(save_tiny(tmp_path / "three/one", "llama", intermediate_size=64))))
    assert other.name == "one" and other.fingerprint != one.fingerprint


def test_no_folder_of_the_makers_is_in_anything_that_is_written(run, folder, monkeypatch):
    secret = folder / "home/of somebody"
    secret.mkdir(parents=True)
    (folder / "parent").rename(secret / "model")
    (folder / "text.txt").rename(secret / "text.txt")
    (folder / "work/deep").mkdir(parents=True)
    monkeypatch.chdir(folder / "work/deep")
    few = ("--set", "calibration.tokens=512", "--set", "calibration.sequence_length=16")
    cut = ("prune", secret / "model", "--attention", "2", "--text", secret / "text.txt")
    assert run(*cut, *few, "-o", "out")[0] == 0
    few = (*few, "--set", "distill.steps=1", "--set", "distill.sequence_length=16")
    assert run("heal", "out", "--parent", secret / "model", "--text", secret / "text.txt", *few, "-o", "healed")[0] == 0
    for file in [*(folder / "work/deep/out").iterdir(), *(folder / "work/deep/healed").iterdir()]:
        content = file.read_bytes()
        for word in (b"somebody", b"home/", str(folder).encode()):
            assert word not in content, (file.name, word)


def test_results_stand_in_the_metadata(run, folder):
    few = ("--set", "calibration.tokens=512", "--set", "calibration.sequence_length=16")
    assert run("prune", "parent", "--attention", "2", "--text", "text.txt", *few, "-o", "out")[0] == 0
    (entry,) = front(folder / "out")["model-index"]
    found = json.loads((folder / "out/surgery.json").read_text())["evaluation"]
    metrics = {m["name"]: m["value"] for result in entry["results"] for m in result["metrics"]}
    assert entry["name"] == "parent" and metrics["perplexity"] == pytest.approx(found["perplexity"], abs=1e-6)
    assert metrics["top-1 agreement with the parent"] == pytest.approx(found["top1_agreement"], abs=1e-6)
    assert "of text.txt" in entry["results"][0]["dataset"]["name"]


def test_a_gguf_file_says_its_terms_and_is_read_again(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_uniform(tmp_path / "parent", "llama")
    (tmp_path / "parent/README.md").write_text(CARD)
    assert run("export", "parent", "--to", "gguf", "-o", "m.gguf")[0] == 0
    read = open_checkpoint("m.gguf")
    assert inherited(read) == heritage_of(read_card(tmp_path / "parent"))
    assert origin_of(read).name == "m.gguf" and origin_of(read).fingerprint == read.content
    assert run("export", "m.gguf", "--to", "native", "-o", "back")[0] == 0
    assert front(tmp_path / "back")["license"] == "llama3.2"


@pytest.mark.parametrize("text", [
    "", "no block", "---\nlicense: mit\n", "---\n[1, 2]\n---\n", "---\n: : :\n---\n", "---\na: &a [*a]\n---\n",
    "---\nlicense: {a: b}\nlanguage: 3\nbase_model: [1, /etc/passwd, ../x/y, a b/c]\n---\n",
    "---\nlicense_link: 'x\"><script>'\n---\n",
    "---\nmodel-index: [[]]\n---\n", "---\nmodel-index: {name: a/b}\n---\n", "---\n" + "[" * 5000 + "\n---\n",
])  # fmt: skip
def test_a_card_can_say_anything(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert heritage_of(read_card(tmp_path)) == Heritage()


def test_which_names_a_licence_asks_for():
    assert terms_of(Heritage(license="other", license_name="llama-3.1-community")) is TERMS["llama3.1"]
    assert terms_of(Heritage(license="apache-2.0")) is None and terms_of(Heritage()) is None
    llama = Heritage(license="llama3")
    assert asked_name(llama, "lab/Llama-3-8B-cut") is None and asked_name(llama, "lab/llama_3 x") is None
    assert "'Llama 3'" in (asked_name(llama, "lab/Meta-Llama-3-8B-cut") or "")
    assert "begin with 'Llama 3'." in (asked_name(llama, None) or "")
    assert asked_name(Heritage(license="gemma"), "lab/x") is None
