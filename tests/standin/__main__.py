"""Every verb that computes, on the device that stands in for a card: python -m standin FOLDER.

Prints, as JSON, each command's exit code, how many operations ran on either device, and which products of matrices were
left to the CPU.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import sys
from pathlib import Path

from standin.device import NAME, StandIn, use_stand_in

LETTERS = "abcdefghij ,.klmnop"
TEXT = ("--text", "text.txt")
SHORT = ("--set", "calibration.tokens=128", "--set", "calibration.sequence_length=16")
SET_LESS = ("--set", "calibration.tokens=64")
JUDGED = ("--tokens", "64", "--seq-len", "16")
TRAINED = (*TEXT, *SHORT, "--set", "distill.steps=2", "--set", "distill.tokens=128")
COMMANDS = {
    "analyze": ("analyze", "parent", "-o", "analysis", *TEXT, "--tokens", "64", "--seq-len", "16"),
    "fuse": ("fuse", "parent", "-o", "fused", "--drop-count", "2", *TEXT, *SHORT),
    "fuse, on sampled text": ("fuse", "parent", "-o", "sampled", "--drop-attention", "1", *SHORT, *SET_LESS),
    "prune": ("prune", "parent", "-o", "pruned", "--blocks", "2", *TEXT, *SHORT),
    "ternary": ("ternary", "parent", "-o", "ternary", "--layers", "1", *TEXT, *SHORT),
    "fff": (
        *("fff", "parent", "-o", "trees", "--layers", "1", "--depth", "1", "--leaf-width", "32"),
        *(*TEXT, *SHORT, "--set", "fff.min_tokens=8"),
    ),
    "matmulfree": ("matmulfree", "parent", "-o", "mixers", "--count", "1", *TEXT, *SHORT),
    "block": ("block", "parent", "-o", "blocks", *TEXT, *SHORT),
    "search": (
        *("search", "parent", "-o", "searched", "--target", "params=0.9x", *TEXT, "--tokens", "64", "--seq-len", "16"),
        *("--allow", "prune_attention", "--self-share", "0"),
    ),
    "heal": ("heal", "fused", "--parent", "parent", "-o", "healed", *TRAINED),
    "heal, layer by layer": (
        *(
            "heal",
            "mixers",
            "--parent",
            "parent",
            "-o",
            "local",
            "--set",
            "distill.mode=local",
            "--set",
            "distill.sequence_length=16",
        ),
        *TRAINED,
    ),
    "eval": ("eval", "fused", "--against", "parent", *TEXT, *JUDGED),
    "eval of an encoder": ("eval", "encoder", "--against", "encoder", *TEXT, *JUDGED),
    "bench": ("bench", "fused", "--against", "parent", "--prompt", "8", "--new-tokens", "2", "--rounds", "1"),
}


def main(folder: Path) -> None:
    """Run all commands in a folder that holds nothing yet."""
    use_stand_in()
    from conftest import save_encoder, save_tiny

    from llmsurgeon.cli.main import main as llmsurgeon

    os.environ["LLMSURGEON_CACHE"] = str(folder / "cache")
    save_tiny(folder / "parent", "llama", tokenizer=True, num_hidden_layers=4)
    save_encoder(folder / "encoder", "bert")
    letters = random.Random(0)
    (folder / "text.txt").write_text("".join(letters.choice(LETTERS) for _ in range(9000)))
    os.chdir(folder)
    found = {}
    for name, arguments in COMMANDS.items():
        heard, code = io.StringIO(), 0
        with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard), StandIn() as card:
            try:
                llmsurgeon([*arguments, "--device", NAME])
            except SystemExit as end:
                code = int(end.code or 0)
            except Exception as error:
                code = 1
                print(f"{type(error).__name__}: {error}")
        said = heard.getvalue().splitlines()[-3:] if code else []
        found[name] = {"code": code, "said": said, **card.done, "left to the CPU": dict(card.left)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
