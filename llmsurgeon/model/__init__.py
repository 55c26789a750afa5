"""What a model is, without a file or a tensor: layers and their parts, families, costs, layer numbers, ternary values.

Knows no operation and no form. May import errors alone.
"""
