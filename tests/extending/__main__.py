"""llmsurgeon's command line with the extension: python -m extending run recipe.yaml MODEL -o OUT."""

import extending.operation
import extending.part
import extending.score
import extending.update  # noqa: F401 - each adds a line to a table
from llmsurgeon.cli.main import main

if __name__ == "__main__":
    main()
