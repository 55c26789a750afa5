"""Is it still good, is it really faster: perplexity, bits per byte, agreement with the parent, latency, the gate.

`pair` loads a model and its parent and judges the one by the other, `judge` does so with layers read one at a time;
what they give answers to the keys of a recipe's `gate`. `latency` times in transformers and `llamacpp` in llama.cpp, in
the figures of `speed`. May import walk, text, vocabulary and the recipe's types; knows no operation.
"""
