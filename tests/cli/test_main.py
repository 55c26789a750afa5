"""The command line: help, global options, exit codes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llmsurgeon import __version__
from llmsurgeon.cli import main as cli
from llmsurgeon.errors import GateFailed, SurgeryError


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return exit_.value.code or 0, out, err


@pytest.fixture
def failing(monkeypatch):
    """Make `llmsurgeon recipes ls` raise what the test gives."""

    def fail_with(error: BaseException) -> None:
        def fail() -> dict:
            raise error

        monkeypatch.setattr("llmsurgeon.recipe.files.builtin_recipes", fail)

    return fail_with


def commands(app, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command's words."""
    names = [(*prefix, command.name or command.callback.__name__) for command in app.registered_commands]
    for group in app.registered_groups:
        names += [(*prefix, group.name), *commands(group.typer_instance, (*prefix, group.name))]
    return names


def test_help_lists_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    listed = out.partition("Commands:")[2]
    for name in {words[0] for words in commands(cli.app)}:
        assert f"\n  {name} " in listed


@pytest.mark.parametrize("words", commands(cli.app), ids=" ".join)
def test_every_command_has_help(capsys, words):
    code, out, _ = run(capsys, *words, "--help")
    assert code == 0
    assert f"Usage: llmsurgeon {' '.join(words)}" in out
    description = out.split("\n\n")[1]
    assert description.strip().endswith(".") and "Options:" not in description


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"llmsurgeon {__version__}\n", "")


def test_without_arguments_it_helps(capsys):
    _, out, err = run(capsys)
    assert "Usage: llmsurgeon" in out + err


def test_a_misspelt_command(capsys):
    code, _, err = run(capsys, "recipse")
    assert code == 2
    assert "recipes" in err


def test_expected_errors_are_one_message(capsys, failing):
    failing(SurgeryError("layer 7 is missing"))
    assert run(capsys, "recipes", "ls") == (2, "", "error: layer 7 is missing\n")


def test_a_missed_gate_is_exit_code_3(capsys, failing):
    failing(GateFailed("perplexity ratio 1.6, the gate allows 1.4"))
    assert run(capsys, "recipes", "ls") == (3, "", "error: perplexity ratio 1.6, the gate allows 1.4\n")


def test_an_interrupt_is_exit_code_130(capsys, failing):
    failing(KeyboardInterrupt())
    code, out, err = run(capsys, "recipes", "ls")
    assert (code, out) == (130, "") and err.strip().startswith("error: interrupted; ")


def test_bugs_keep_their_traceback(failing):
    failing(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        cli.main(["recipes", "ls"])


@pytest.mark.parametrize(
    "arguments", [("--quiet", "recipes", "ls"), ("recipes", "ls", "--quiet"), ("recipes", "ls", "-q")]
)
def test_quiet_may_stand_anywhere(capsys, arguments):
    from llmsurgeon.cli import say

    run(capsys, *arguments)
    say("not shown")
    assert capsys.readouterr().err == ""
    run(capsys, "recipes", "ls")
    say("shown")
    assert capsys.readouterr().err == "shown\n"


def test_python_dash_m():
    result = subprocess.run([sys.executable, "-m", "llmsurgeon", "--version"], capture_output=True, text=True)
    assert result.stdout == f"llmsurgeon {__version__}\n"


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from llmsurgeon.cli.main import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pydantic', 'numpy', 'yaml', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
