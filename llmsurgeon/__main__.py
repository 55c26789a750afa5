"""`python -m llmsurgeon`, and the command `llmsurgeon`."""

import os
import sys

PACKAGE_PARENT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# `python -m` looks for every module in the working folder first, where downloaded models and recipes lie: a file there
# that is called as a package would run in its place.
if __name__ == "__main__" and sys.path and os.path.abspath(sys.path[0]) not in (PACKAGE_PARENT, sys.prefix):
    del sys.path[0]

from llmsurgeon.cli.ending import EXIT_INTERRUPTED, EXIT_STOPPED, leave, prepare, say  # noqa: E402


def main() -> None:
    """Run the command line, interruptible from the first import on, and exit."""
    code = 0
    prepare()
    try:
        from llmsurgeon.cli.main import main as run
    except KeyboardInterrupt:
        code = say(EXIT_INTERRUPTED)
    except SystemExit:
        code = say(EXIT_STOPPED)
    else:
        try:
            run()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
    leave(code)


if __name__ == "__main__":
    main()
