"""Reading, checking, changing and writing recipes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsurgeon.errors import RecipeError
from llmsurgeon.operations import OPERATIONS
from llmsurgeon.operations.fuse_ffn import FuseFFN
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.recipe.files import Dumper, parse_document
from llmsurgeon.recipe.recipe import Calibration, Gate, Recipe, builtin_recipes, dump, load, loads

GOOD = """\
version: 1
model: org/name
calibration: {text: prose.txt, tokens: 4096, sequence_length: 256}
steps:
  - {op: prune_attention, layers: [4, 7-9]}
  - op: fuse_ffn
    runs: [7-9]
    norm: last
  - {op: refit, ridge: 1e-2}
gate: {max_perplexity_ratio: 1.4}
"""


def problems(text: str, *overrides: str) -> list[str]:
    """What is wrong with a recipe that must be refused."""
    with pytest.raises(RecipeError) as caught:
        loads(text, "r.yaml", overrides)
    return caught.value.problems


def with_step(step: str) -> str:
    """A recipe whose one step, on line 3, is `step`."""
    return f"version: 1\nsteps:\n  - {step}\n"


def test_a_good_recipe():
    recipe = loads(GOOD)
    assert recipe.model == "org/name"
    assert recipe.calibration == Calibration(text="prose.txt", tokens=4096, sequence_length=256)
    assert recipe.gate == Gate(max_perplexity_ratio=1.4)
    assert recipe.format == "auto"
    attention, fuse, refit = recipe.steps
    assert attention == PruneAttention(layers=(4, 7, 8, 9))
    assert fuse == FuseFFN(runs=((7, 8, 9),), norm="last")
    assert refit.ridge == 0.01


def test_recipes_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        loads(GOOD).model = "other"


def test_every_problem_is_reported_at_its_line():
    found = problems("""\
version: 2
modle: x
steps:
  - {op: prune_attention, lyers: [1], count: true}
  - op: fuse_ffn
    norm: flod
    runs: [[66, 73]]
  - {op: fuse_fnn}
  - {op: prune_kv_heads}
gate: {max_kl: -1}
""")
    expected = [
        ("r.yaml:1: version:", "expected 1, got 2"),
        ("r.yaml:2: modle:", "unknown key; did you mean 'model'?"),
        ("r.yaml:4: steps[0].lyers:", "unknown key; did you mean 'layers'?"),
        ("r.yaml:4: steps[0].count:", "expected a valid integer, got True"),
        ("r.yaml:6: steps[1].norm:", "expected 'fold' or 'last', got 'flod'; did you mean 'fold'?"),
        ("r.yaml:7: steps[1].runs:", 'write "66-73"'),
        ("r.yaml:8: steps[2]:", "unknown op 'fuse_fnn'; did you mean 'fuse_ffn'?"),
        ("r.yaml:9: steps[3]:", "the key 'kv_heads' is missing"),
        ("r.yaml:10: gate.max_kl:", "greater than or equal to 0, got -1"),
    ]
    for place, message in expected:
        assert [p for p in found if p.startswith(place) and message in p], (place, message, found)
    assert len(found) == len(expected)
    assert [int(p.split(":")[1]) for p in found] == sorted(int(p.split(":")[1]) for p in found)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("{op: fuse_ffn, runs: atuo}", "steps[0].runs: expected 'auto', got 'atuo'; did you mean 'auto'?"),
        ("{op: fuse_ffn, runs: [3-4], max_run: 1}", "steps[0].max_run: expected greater than or equal to 2, got 1"),
        ("{op: fuse_ffn, max_run: '3'}", "steps[0].max_run: expected a valid integer, got '3'"),
        ("{op: fuse_ffn, max_run: 2.5}", "steps[0].max_run: expected a valid integer"),
        ("{op: prune_attention, layers: {a: 1}}", "steps[0].layers: expected a layer number"),
        ("{op: prune_attention, layers: [5, 5]}", "steps[0].layers: layer 5 is named twice"),
        ("{op: prune_attention, layers: [5], count: 2}", "exactly one of layers, count"),
        ("{op: prune_attention}", "exactly one of layers, count"),
        ("{op: refit, ridge: much}", "steps[0].ridge: expected a valid number, got 'much'"),
        ("{layers: [5]}", "a step needs `op:`, one of trim_vocab"),
        ("{op: 5}", "unknown op '5'"),
        ("{op: [a]}", "unknown op"),
        ("7", "steps[0]: expected a mapping of keys, got 7"),
        ("prune_attention", "steps[0]: expected a mapping of keys, got the text 'prune_attention'"),
        ("!!python/object:os.system {op: refit}", "the YAML tag 'tag:yaml.org,2002:python/object:os.system'"),
        ("{? [a] : 1, op: refit}", "a key must be a word"),
        ("{op: refit, tokens: 5, tokens: 6}", "steps[0].tokens: given twice, first at r.yaml:3"),
    ],
)
def test_a_bad_step(step, message):
    (problem,) = problems(with_step(step))
    assert problem.startswith("r.yaml:3: ")
    assert message in problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml: expected a mapping of keys (version, model, steps, ...), the file is empty"),
        ("# nothing but a comment\n", "the file is empty"),
        ("- a\n- b\n", "found a list"),
        ("just words", "found the text 'just words'"),
        ("version: 1\nsteps: [\n", "r.yaml:3: not valid YAML"),
        ("version: 1\n\tsteps: 3\n", "r.yaml:2: not valid YAML"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2: not valid YAML"),
        ("\x00", "r.yaml: not valid YAML"),
        ("a: &a [*a]", "nested too deeply, or an alias refers to itself"),
        ("[" * 3000, "nested too deeply"),
        ("version: 1\nsteps: []\n", "r.yaml:2: steps: expected at least one entry"),
        ("version: 1\nsteps: 3\n", "r.yaml:2: steps: expected a list, got 3"),
        ("version: 1\n", "r.yaml:1: the key 'steps' is missing"),
        ("steps: [{op: refit}]\n", "r.yaml:1: the key 'version' is missing"),
        (
            "version: 1\nsteps: [{op: refit}]\nformat: nativ\n",
            "r.yaml:3: format: expected 'auto', 'native', 'bitnet', 'nemotron-nas' or",
        ),
        ("version: 1\nsteps: [{op: refit}]\nsteps: [{op: refit}]\n", "r.yaml:3: steps: given twice, first at r.yaml:2"),
        (
            "version: 1\nsteps: [{op: refit}]\ncalibration: {text: a, dataset: b}\n",
            "r.yaml:3: calibration: takes text or dataset, not both",
        ),
        (
            "version: 1\nsteps: [{op: refit}]\ncalibration: {tokens: 100, sequence_length: 512}\n",
            "must cover one sequence_length",
        ),
        ("version: 1\nsteps: [{op: refit}]\ncalibration: 5\n", "calibration: expected a mapping of keys, got 5"),
    ],
)
def test_a_bad_file(text, message):
    (problem,) = problems(text)
    assert message in problem


def test_aliases_cannot_blow_up():
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    (problem,) = problems("\n".join(["a0: &a0 1", *levels]))
    assert "more than 100,000 values" in problem


def test_yaml_words_stay_words_and_numbers_are_numbers():
    data = parse_document("{a: no, b: 1e-2, c: 010, d: 1:30, e: 65_536, f: 2024-01-02, g: ~, h: true}", "x").data
    assert data == {
        "a": "no", "b": 0.01, "c": "010", "d": "1:30", "e": 65536, "f": "2024-01-02", "g": None, "h": True,
    }  # fmt: skip


@given(st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()))
def test_what_is_written_is_read_back(data):
    import yaml

    finite = {k: v for k, v in data.items() if v not in (float("inf"), float("-inf"))}
    assert parse_document(yaml.dump(finite, Dumper=Dumper, allow_unicode=True), "x").data == finite


def test_dump_reads_back_the_same():
    recipe = loads(GOOD)
    assert loads(dump(recipe)) == recipe
    assert "runs: [7-9]" in dump(recipe)


@pytest.mark.parametrize(
    ("change", "read"),
    [
        ("fuse_ffn.norm=fold", lambda r: r.steps[1].norm == "fold"),
        ("fuse_ffn.max_run=3", lambda r: r.steps[1].max_run == 3),
        ("fuse_ffn.runs=auto", lambda r: r.steps[1].runs == "auto"),
        ("fuse_ffn.runs=[4-5, 7-9]", lambda r: r.steps[1].runs == ((4, 5), (7, 8, 9))),
        ("steps[0].layers=66-68", lambda r: r.steps[0].layers == (66, 67, 68)),
        ("refit.ridge=1e-3", lambda r: r.steps[2].ridge == 0.001),
        ("calibration.tokens=512", lambda r: r.calibration.tokens == 512),
        ("calibration.text=null", lambda r: r.calibration.text is None),
        ("gate.max_kl=.1", lambda r: r.gate == Gate(max_perplexity_ratio=1.4, max_kl=0.1)),
        ("gate=null", lambda r: r.gate is None),
        ("model=a=b", lambda r: r.model == "a=b"),
        ("format=native", lambda r: r.format == "native"),
    ],
)
def test_set(change, read):
    assert not read(loads(GOOD))
    assert read(loads(GOOD, "r.yaml", [change]))


def test_set_makes_a_section_that_the_file_lacks():
    assert loads(with_step("{op: refit}"), "r", ["gate.max_kl=1", "calibration.seed=3"]).calibration.seed == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("fuse_fnn.norm=last", "the recipe has no step or section 'fuse_fnn'; did you mean 'fuse_ffn'?"),
        ("gaet.max_kl=1", "did you mean 'gate'?"),
        ("fuse_ffn.nrm=last", "steps[1].nrm: unknown key; did you mean 'norm'?"),
        ("fuse_ffn.norm=lst", "steps[1].norm: expected 'fold' or 'last', got 'lst'; did you mean 'last'?"),
        ("calibration.tokens=many", "calibration.tokens: expected a valid integer, got 'many'"),
        ("fromat=native", "fromat: unknown key; did you mean 'format'?"),
        ("steps[3].norm=last", "there is no steps[3]; the recipe has 3 steps, counted from steps[0]"),
        ("fuse_ffn.runs=[1", "not valid YAML"),
        ("model.x=1", "model is not a mapping of keys"),
        ("fuse_ffn.norm", "expected step.key=value"),
        ("", "expected step.key=value"),
    ],
)
def test_a_bad_set(change, message):
    (problem,) = problems(GOOD, change)
    assert problem.startswith(f"--set {change}: ")
    assert message in problem


def test_set_of_a_step_that_is_there_twice():
    text = "version: 1\nsteps:\n  - {op: refit}\n  - {op: refit}\n"
    assert problems(text, "refit.tokens=5")[0].endswith("2 steps are 'refit'; write steps[0] or steps[1] instead")
    assert loads(text, "r", ["steps[1].tokens=5"]).steps[1].tokens == 5


def test_set_repairs_a_bad_value():
    assert loads(GOOD.replace("norm: last", "norm: lost"), "r", ["fuse_ffn.norm=last"]) == loads(GOOD)


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_built_in_recipes_load(name):
    recipe = load(name)
    assert recipe.description
    assert load(f"{name}.yaml") == recipe == load(builtin_recipes()[name])
    assert loads(dump(recipe)) == recipe


def test_the_built_in_recipes_are_there():
    papers = "ultra nemotron-49b shortgpt deeper-layers attention-drop minitron-width parallel-blocks"
    assert set(papers.split()) <= set(builtin_recipes())


def test_ultra_is_the_published_cut():
    attention, fuse = load("ultra").steps
    assert attention.layers == tuple(range(66, 116))
    assert [(run[0], run[-1]) for run in fuse.runs] == [(66, 73), (74, 85), (86, 100), (101, 114)]


def test_nemotron_leaves_the_last_ffn_of_each_stretch():
    attention, fuse = load("nemotron-49b").steps
    assert set(attention.layers) - {layer for run in fuse.runs for layer in run} == {51, 70}


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match=r"no built-in recipe 'ulta'; did you mean 'ultra'\?"):
        load("ulta")
    with pytest.raises(RecipeError, match=r"^recipe: in/ultra\.yaml: no such file$"):
        load("in/ultra.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        load(tmp_path)
    binary = tmp_path / "model.safetensors"
    binary.write_bytes(b"\xff\xfe\x00\xff")
    with pytest.raises(RecipeError, match="not UTF-8 text"):
        load(binary)
    binary.write_bytes(b" " * 1_000_001)
    with pytest.raises(RecipeError, match="larger than"):
        load(binary)


def test_a_file_wins_over_a_built_in_name(tmp_path, monkeypatch):
    (tmp_path / "ultra.yaml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    assert load("ultra.yaml") == loads(GOOD)
    assert load("ultra") != loads(GOOD)


def test_every_operation_is_registered_under_its_own_name():
    for name, operation in OPERATIONS.items():
        assert operation.model_fields["op"].default == name


def test_a_recipe_can_be_built_in_python():
    recipe = Recipe(version=1, steps=(PruneAttention(layers=(1, 3)), FuseFFN(runs=((1, 3),))))
    assert loads(dump(recipe)) == recipe
