"""`python -m llmsurgeon`."""

from llmsurgeon.cli.main import main

main()
