"""What comes from outside, and what goes there: foreign text and JSON, limits, names of places on a disk.

Here a stranger's input becomes plain values or one error with a sentence. May import errors alone.
"""
