"""Bytes: sources on disk and on the hub, safetensors and GGUF files, weight edits, the staged writer, checksums.

Knows names and shapes of tensors, never what they mean. May import boundary, errors and progress.
"""
