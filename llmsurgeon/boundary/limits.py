"""The most that anyone may ask for, on the command line and in recipes: beyond it is a slip of the hand."""

from __future__ import annotations

import os

from llmsurgeon.errors import SurgeryError

MOST_TOKENS = 1_000_000_000
LONGEST_SEQUENCE = 1 << 20
MOST_SEQUENCES = 1 << 16  # of a batch
MOST_ROUNDS = 1_000_000
MOST_PROCESSES = 1024
MOST_MINUTES = 100_000.0  # of training, or of a search: ten weeks
# Of what a config or a GGUF file describes. The deepest model that is known has some hundred layers, the most experts
# of one layer are 512, the longest context is of ten million tokens; empty models of more take minutes to build.
MOST_LAYERS = 4096
MOST_EXPERTS = 4096
LARGEST_SIZE = 1 << 24
LONGEST_TOKEN = 4096  # characters of one token of a GGUF file's tokenizer
MOST_FIELDS, MOST_TENSORS, MOST_VALUES = 1 << 16, 1 << 20, 1 << 24
LARGEST_SEED = (1 << 32) - 1


def check_threads(count: int | None) -> int | None:
    """A number of threads, None for as many as there are CPUs.

    Raises:
        SurgeryError: more than there are, or none.
    """
    there = os.cpu_count() or 1
    if count is not None and not 1 <= count <= there:
        raise SurgeryError(f"--threads {count}: expected 1 to {there}, as many as this machine has")
    return count
