"""An opened checkpoint and a recipe -> what will be done, known and checked before a tensor is read.

What `run`, `heal` and `export` share: opening, checks, the plan and its last part (`student.py`), the inputs that make
a job, the calibration text, healing and judging step by step, and the records beside the weights. May import every room
but cli.
"""
