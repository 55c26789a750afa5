"""An opened checkpoint and a recipe -> what will be done, known and checked before a tensor is read.

May import everything but verbs, reports and the healing itself.
"""
