"""The `llmsurgeon` command: global options, every verb, and the one place where errors become exit codes."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from llmsurgeon import __version__
from llmsurgeon.cli import (
    analyze,
    bench,
    block,
    convert,
    evaluate,
    export,
    fff,
    fuse,
    heal,
    inspect,
    matmulfree,
    output,
    prune,
    recipes,
    search,
    ternary,
    verify,
)
from llmsurgeon.cli.ending import EXIT_INTERRUPTED, EXIT_STOPPED, hush, say, tell_error
from llmsurgeon.errors import GateFailed, Stopped, SurgeryError
from llmsurgeon.processes import world
from llmsurgeon.progress import set_quiet

# At the end the interpreter would search all that torch and transformers made for cycles: over a second for nothing.
atexit.register(gc.freeze)

QUIET = ("--quiet", "-q")
EXIT_ERROR, EXIT_GATE = 2, 3
# Verbs whose work several processes share.
SHARED = ("analyze", "search", "run", "fuse", "prune", "heal", "fff", "ternary", "matmulfree", "block", "eval")

# Plain help: importing rich's formatter alone would take longer than everything else that --help does.
app = typer.Typer(
    name="llmsurgeon",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"llmsurgeon {__version__}")
        raise typer.Exit


@app.callback(
    epilog="Exit codes: 0 done, 2 error, 3 finished but the gate was missed, 130 interrupted, 143 stopped by SIGTERM."
)
def _global_options(
    context: typer.Context,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Surgery on pretrained Hugging Face checkpoints: measure, cut, heal, prove, ship."""
    from llmsurgeon.walk.memory import keep_freed_memory

    output.quiet = quiet
    set_quiet(quiet)
    keep_freed_memory()
    if world.several():
        _meet(context.invoked_subcommand or "llmsurgeon")


def _meet(verb: str) -> None:
    """Meet the other processes that a launcher started; all but the first are silent from now on.

    Raises:
        SurgeryError: they cannot do this together.
    """
    world.join()
    if verb not in SHARED:
        raise SurgeryError(f"{verb} runs in one process: start it without torchrun or accelerate launch")
    if not world.first():
        output.quiet = True
        hush()


# In the order in which --help lists their commands.
MODULES = (
    *(analyze, search, convert, fuse, prune, heal, fff, ternary, matmulfree, block),
    *(evaluate, bench, export, inspect, verify, recipes),
)
for _module in MODULES:
    _module.register(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit. Expected errors are one message on stderr; bugs keep their traceback."""
    try:
        app(args=_quiet_first(sys.argv[1:] if arguments is None else arguments), prog_name="llmsurgeon")
    except GateFailed as error:
        _fail(error, EXIT_GATE)
    except Stopped as error:
        _fail(error, EXIT_STOPPED)
    except SurgeryError as error:
        _fail(error, EXIT_ERROR)
    except KeyboardInterrupt:
        _say(EXIT_INTERRUPTED)
        sys.exit(EXIT_INTERRUPTED)
    except SystemExit as end:
        # SIGTERM, or an interrupt that Typer has turned into its code without a word.
        if end.code in (EXIT_INTERRUPTED, EXIT_STOPPED):
            _say(end.code)
        raise


def _quiet_first(arguments: Sequence[str]) -> list[str]:
    """`llmsurgeon analyze MODEL --quiet` means the same as `llmsurgeon --quiet analyze MODEL`."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    rest = [a for a in own if a not in QUIET] + list(arguments[len(own) :])
    return ["--quiet", *rest] if any(a in QUIET for a in own) else rest


def _fail(error: SurgeryError, code: int) -> None:
    if world.speaks(error):
        tell_error(str(error))
    sys.exit(code)


def _say(code: int) -> None:
    """Tell of a signal, unless another process has told why it came."""
    if world.speaks(Stopped()):
        say(code)
