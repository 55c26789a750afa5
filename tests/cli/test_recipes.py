"""`llmsurgeon recipes`."""

from __future__ import annotations

import pytest

from llmsurgeon.cli.main import main
from llmsurgeon.recipe.files import builtin_recipes


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `llmsurgeon recipes ...`."""
    with pytest.raises(SystemExit) as exit_:
        main(["recipes", *arguments])
    out, err = capsys.readouterr()
    return exit_.value.code or 0, out, err


def test_ls_names_every_recipe(capsys):
    code, out, _ = run(capsys, "ls")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(builtin_recipes())
    assert all(len(line.split()) > 3 for line in out.splitlines())


def test_show_prints_the_file(capsys):
    assert run(capsys, "show", "ultra") == (0, builtin_recipes()["ultra"].read_text(), "")


def test_show_unknown(capsys):
    code, out, err = run(capsys, "show", "ulrta")
    assert (code, out) == (2, "")
    assert "did you mean 'ultra'?" in err


def test_cp(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    original = builtin_recipes()["shortgpt"].read_text()
    assert run(capsys, "cp", "shortgpt") == (0, "shortgpt.yaml\n", "")
    assert (tmp_path / "shortgpt.yaml").read_text() == original
    assert run(capsys, "cp", "shortgpt", "mine.yaml")[0] == 0
    assert (tmp_path / "mine.yaml").read_text() == original


def test_cp_refuses_to_overwrite(capsys, tmp_path):
    target = tmp_path / "mine.yaml"
    target.write_text("mine")
    code, _, err = run(capsys, "cp", "shortgpt", str(target))
    assert code == 2
    assert "exists; name another file or pass --overwrite" in err
    assert target.read_text() == "mine"
    assert run(capsys, "cp", "shortgpt", str(target), "--overwrite")[0] == 0
    assert target.read_text() == builtin_recipes()["shortgpt"].read_text()


def test_cp_onto_itself_keeps_the_recipe(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(capsys, "cp", "shortgpt")
    run(capsys, "cp", "shortgpt.yaml", "--overwrite")
    assert (tmp_path / "shortgpt.yaml").read_text() == builtin_recipes()["shortgpt"].read_text()


def test_cp_into_a_folder_that_is_not_there(capsys, tmp_path):
    code, _, err = run(capsys, "cp", "shortgpt", str(tmp_path / "no" / "such.yaml"))
    assert code == 2
    assert "cannot be written" in err
    assert not list(tmp_path.iterdir())


def test_check(capsys):
    assert run(capsys, "check", "ultra") == (0, "ultra: fine, 2 steps: prune_attention, fuse_ffn\n", "")


def test_check_names_every_problem(capsys, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("version: 1\nsteps:\n  - {op: refit, tokns: 5}\n")
    code, out, err = run(capsys, "check", str(bad), "--set", "formt=native")
    assert (code, out) == (2, "")
    assert f"{bad}:3: steps[0].tokns: unknown key; did you mean 'tokens'?" in err
    assert "--set formt=native: formt: unknown key; did you mean 'format'?" in err


def test_check_with_set(capsys):
    assert run(capsys, "check", "shortgpt", "--set", "prune_blocks.count=2")[0] == 0
