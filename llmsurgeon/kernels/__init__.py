"""Packed linears: products with ternary weights as they are stored. May import the ternary values."""
