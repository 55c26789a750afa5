"""Attacks on the command line: mutated files, texts, recipes and arguments, and kills, each a repeatable try.

`python -m tests.attack` (scripts/attack) runs them. A file here is a kind of attack: it has a function `attempt(draw,
scene)` that takes a seeded random generator and a folder to work in, and gives a Verdict.

    ground.py     the healthy models and files that tries start from, built once
    scene.py      one try: its folder, the command in a forked process, and what counts as clean
    mutations.py  what is done to bytes and to JSON, whatever they mean
    commands.py   command lines of every verb over a model
"""
