"""Is it still good, is it really faster: perplexity, bits per byte, agreement with the parent, latency, the gate.

May import walk, text and the recipe's types.
"""
