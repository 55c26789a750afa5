"""An operation with a part of its own kind, a score and a closed-form update, added to the tables from outside."""
