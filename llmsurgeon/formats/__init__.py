"""The forms a checkpoint is written and read in, a file each: native, nemotron-nas, surgeon, bitnet, GGUF.

Also what a form needs of transformers: empty models, their shapes, loading. May import model and checkpoint.
"""
