"""Ternary codes that compensate: a dense student and its ternary twin walk side by side, layer after layer."""
