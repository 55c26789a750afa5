"""What a stranger named reaches terminal, card, reports and recipes as text and as nothing else."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from conftest import SMALL, TEXT, save_tiny

from llmsurgeon.boundary.places import found, relative, without_folders
from llmsurgeon.cli import console, say, tell
from llmsurgeon.recipe.recipe import load
from llmsurgeon.report.pages import fenced, prose

ODD = "m[/x]\x1b[31m[bold]:smile:"


@pytest.mark.parametrize("name", ["m[/x]", "m[bold]", ODD, "m\x9b31m\u202e"])
def test_a_name_is_no_markup_and_no_control_sequence(run, folder, name):
    shutil.copytree(folder / "parent", folder / name)
    for command in (("inspect", name), ("prune", name, "--blocks", "2", "--no-refit", "--dry-run"), ("verify", name)):
        code, out, err = run(*command)
        assert code == 0, err
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", out + err)
        assert name.split("\x1b")[0].split("\x9b")[0] in out


def test_every_exit_to_the_terminal_escapes(capsys):
    tell(ODD)
    say(ODD)
    console().print(ODD)
    out, err = capsys.readouterr()
    assert out.splitlines() == ["m[/x]\\x1b[31m[bold]:smile:"] * 2 and err == "m[/x]\\x1b[31m[bold]:smile:\n"


@pytest.mark.parametrize(("text", "shown"), [
    ("plain, 3.5 % of it", "plain, 3.5 % of it"),
    ("of `a<b>` and <img src=x>", "of `a<b>` and &lt;img src=x&gt;"),
    ("[click](http://x) & | \\", "\\[click\\](http://x) &amp; \\| \\\\"),
    ("a\n```\n# not a heading", "a ' # not a heading"),
    ("odd ` one", "odd \\` one"),
    ("of /home/me/secret/text.txt", "of text.txt"),
    ("a\x1bb", "a\\\\x1bb"),
])  # fmt: skip
def test_prose(text, shown):
    assert prose(text) == shown


def test_a_fence_is_longer_than_all_that_it_holds():
    assert fenced("a", "yaml").split("\n") == ["```yaml", "a", "```"]
    assert fenced("x: '````'", "yaml").split("\n")[0] == "`````yaml"


def test_the_card_of_a_name_with_markup(run, folder):
    name = "m<script>[x](y)`"
    shutil.copytree(folder / "parent", folder / name)
    code, _, err = run("prune", name, "--blocks", "2", "--no-refit", "-o", "out")
    assert code == 0, err
    card = (folder / "out/README.md").read_text().split("---", 2)[2]
    before_recipe = card.partition("## Recipe")[0]
    assert "<script" not in before_recipe and "m&lt;script&gt;\\[x\\](y)\\`" in before_recipe


def test_folders_are_left_out():
    assert without_folders("of /a b/c.txt; /d/e, owner/name, https://x.y/z/w, ../f/g", "/a b/c.txt") == (
        "of c.txt; e, owner/name, https://x.y/z/w, ../f/g"
    )


def test_a_path_is_found_again_from_the_file_that_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    assert relative("model", tmp_path / "a/b") == relative(str(tmp_path / "model"), tmp_path / "a/b") == "../../model"
    assert relative("owner/name", tmp_path) == found("owner/name", tmp_path) == "owner/name"
    monkeypatch.chdir(tmp_path / "a")
    assert found("../../model", tmp_path / "a/b") == "../model" and found("./none", tmp_path) == "./none"


def test_what_is_written_names_no_folder_of_this_disk_and_runs_from_another(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMSURGEON_CACHE", str(tmp_path / "cache"))
    secret = tmp_path / "secret place"
    save_tiny(secret / "parent", "llama", tokenizer=True)
    (secret / "text.txt").write_text(TEXT)
    monkeypatch.chdir(secret)
    where = (str(secret / "parent"), "--text", str(secret / "text.txt"))
    assert run("analyze", *where, "-o", secret / "found", "--tokens", 256, "--seq-len", 16)[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    suggested = "../secret place/found/suggested.yaml"
    code, _, err = run("run", suggested, "-o", secret / "out", *SMALL)
    assert code == 0, err
    assert load(secret / "out/recipe.yaml").model == "../secret place/parent"
    assert "model: ../parent" in (secret / "out/recipe.yaml").read_text()
    reports = ("report.json", "report.html", "suggested.yaml")
    for written in (*(f"found/{name}" for name in reports), "out/README.md", "out/recipe.yaml"):
        assert str(tmp_path) not in (secret / written).read_text(), written
    surgery = (secret / "out/surgery.json").read_text()
    assert "secret" not in surgery and " of text.txt" in json.loads(surgery)["calibration"]
    code, _, err = run("run", "../secret place/out/recipe.yaml", "-o", "again", *SMALL)
    assert code == 0, err


def test_an_export_that_lies_far_away_names_its_parent_by_name_alone(run, folder):
    assert run("prune", "parent", "--blocks", "2", "--no-refit", "-o", "out")[0] == 0
    (folder / "deep/er").mkdir(parents=True)
    assert run("export", "out", "--to", "surgeon", "-o", "deep/er/made")[0] == 0
    assert "model: parent\n" in (folder / "deep/er/made/recipe.yaml").read_text()
    assert run("export", "out", "--to", "surgeon", "-o", "made")[0] == 0
    assert "model: ../parent\n" in (folder / "made/recipe.yaml").read_text()
    for made in ("deep/er/made", "made"):
        assert run("recipes", "check", f"{made}/recipe.yaml")[0] == 0


def test_a_record_that_is_a_link_is_not_carried_on(run, folder):
    assert run("prune", "parent", "--blocks", "2", "--no-refit", "-o", "out")[0] == 0
    (folder / "id_rsa").write_text("private: key")
    (folder / "out/recipe.yaml").unlink()
    (folder / "out/recipe.yaml").symlink_to("../id_rsa")
    assert run("export", "out", "--to", "surgeon", "-o", "made")[0] == 0
    assert not [path for path in (folder / "made").iterdir() if b"private: key" in path.read_bytes()]
