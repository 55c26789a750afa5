"""What the command line makes of tiny models, written down, so that two versions of the program can be compared."""
