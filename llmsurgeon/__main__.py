"""`python -m llmsurgeon`, and the command `llmsurgeon`."""

from llmsurgeon.cli.ending import EXIT_INTERRUPTED, EXIT_STOPPED, leave, prepare, say


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
