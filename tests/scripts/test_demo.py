"""scripts/demo.py: it makes room for itself and takes nothing away from anyone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from llmsurgeon.checkpoint.writer import Stage

SCRIPT = Path(__file__).parents[2] / "scripts" / "demo.py"
SPEC = importlib.util.spec_from_file_location("demo", SCRIPT)
assert SPEC and SPEC.loader
demo = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(demo)


def test_an_earlier_demo_makes_room(tmp_path):
    out = tmp_path / "demo-out"
    demo.make_room(out)
    with Stage.open(out / "student", job={"verb": "run"}) as stage:
        stage.write_file("config.json", "{}")
        stage.commit()
    with Stage.open(out / "analysis", job={"verb": "analyze"}) as stage:  # of a demo that was killed
        (stage.scratch / "half").touch()
    demo.make_room(out)
    assert [path.name for path in out.iterdir()] == [demo.MARK]


@pytest.mark.parametrize("name", ["notes.txt", "student/notes.txt"])
def test_what_came_into_an_earlier_demo_stays(tmp_path, name):
    demo.make_room(tmp_path)
    with Stage.open(tmp_path / "student", job={"verb": "run"}) as stage:
        stage.write_file("config.json", "{}")
        stage.commit()
    (tmp_path / name).write_text("years of work")
    with pytest.raises(SystemExit, match=f"holds {name}, which no demo wrote"):
        demo.make_room(tmp_path)
    assert (tmp_path / name).read_text() == "years of work" and (tmp_path / "student" / "config.json").exists()


def test_an_empty_folder_is_taken(tmp_path):
    demo.make_room(tmp_path)
    assert (tmp_path / demo.MARK).exists()


def test_what_no_demo_wrote_stays(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit, match="holds files that no demo wrote"):
        demo.make_room(tmp_path)
    with pytest.raises(SystemExit, match="is a file"):
        demo.make_room(tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_the_texts_that_python_brings_along(tmp_path):
    """Enough of each for what the demo asks, and what judges is not in what chose."""
    language, library = (file.read_text() for file in demo.write_texts(tmp_path))
    assert len(language) > 200_000 and len(library) > 100_000
    lines = {line for line in language.splitlines() if len(line) > 40}
    shared = [line for line in library.splitlines() if line in lines]
    assert len(shared) < len(lines) / 100
    (tmp_path / demo.MARK).touch()
    demo.make_room(tmp_path)  # they are the demo's own


def test_bits_per_byte_of_one_tokenizer_and_of_two():
    one = {"parent_perplexity": 16.0, "perplexity_ratio": 2.0, "perplexity_ratio_interval": [1.0, 4.0]}
    two = {"bits": {"bits_per_byte": 1.1, "parent_bits_per_byte": 1.0, "ratio_interval": [1.05, 1.15]}}
    assert demo.bits(one) == "1.250 (1.000 to 1.500)" and demo.bits(two) == "1.100 (1.050 to 1.150)"
