"""The student made better: closed-form refit, ternary codes that compensate, distillation.

`healers.HEALERS` finds the one that a step asks for, and what its result says of itself. May import walk, text,
evaluation, the settings of the healing steps, and the curves of report.
"""
