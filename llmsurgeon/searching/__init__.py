"""The best model under a budget: options from the operations, each scored after its own fit, and a choice among them.

costs/ knows what a layer costs, in bytes or in an engine's seconds. May import every room but cli, and the verbs that
run a recipe and time its result.
"""
