"""Recipes: the types of their YAML, their files, `--set`. May import operations (a step is an operation's settings)."""
