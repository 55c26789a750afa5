"""GGUF files read: header, tensors, the model's description and its tokenizer in the terms of transformers."""
