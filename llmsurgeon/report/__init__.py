"""Pages for people: model cards, the analysis' report, charts, and what a checkpoint says of its own making.

Pages are templates (templates/) that escape all that they are given; drawings are made here. Shows what it is told and
measures nothing. May import evaluation, formats, model and checkpoint.
"""
