"""The most that anyone may ask for, on the command line and in recipes: beyond it is a slip of the hand."""

from __future__ import annotations

MOST_TOKENS = 1_000_000_000
LONGEST_SEQUENCE = 1 << 20
MOST_SEQUENCES = 1 << 16  # of a batch
MOST_ROUNDS = 1_000_000
MOST_PROCESSES = 1024
LARGEST_SEED = (1 << 32) - 1
