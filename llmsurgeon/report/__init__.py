"""Pages for people: model cards, the analysis' report, charts, and what a checkpoint says of its own making."""
