"""Entry points that other people's engines call. Imports nothing of ours."""
