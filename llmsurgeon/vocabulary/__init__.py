"""Trimmed vocabularies: which tokens can go, the tokenizer's files without them, and the ids that move.

closure.py        what must stay beside the tokens that are wanted, for each kind of tokenizer
keep.py           the tokens that texts and lists ask for
likely.py         tokens that did not occur in a text, by how likely they are in more of it
tokenizer_files.py  tokenizer.json and the files beside it, rewritten
ids.py            ids in configs
trimmed.py        a checkpoint with a smaller vocabulary, as any other checkpoint

May import model, checkpoint and formats; the fast tokenizers' library does the encoding.
"""
