"""GGUF files written: architecture, tensors and their types, tokenizer."""
