"""Closed-form refit: linear maps of the student fitted, layer by layer, to what the parent's layers give."""
