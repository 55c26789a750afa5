"""Several processes of one run: who this is, its share of the sequences, sums over all, what the first does alone.

`torchrun -m llmsurgeon` and `accelerate launch -m llmsurgeon` start them. What is measured and fitted are sums over
sequences: each process walks its share through the layers, the sums are added up where they are finished, and all go on
with the same numbers. The first one alone writes, prints and holds locks. Where there is one process, or nobody has
called `world.join`, all of this is that process's own. May import errors and progress.
"""
