"""The student made better: closed-form refit, ternary codes that compensate, distillation.

May import walk, text, evaluation and the settings of the healing steps.
"""
