"""Everything that a result depends on is in its job, and nothing of it may change meanwhile."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from conftest import TEXT, save_tiny, tiny_model

from llmsurgeon.checkpoint import writer
from llmsurgeon.checkpoint.job import differences
from llmsurgeon.checkpoint.journal import JOURNAL
from llmsurgeon.checkpoint.opening import open_checkpoint
from llmsurgeon.errors import CheckpointError, SurgeryError
from llmsurgeon.export import export, export_gguf
from llmsurgeon.heal import heal
from llmsurgeon.healing.refit import refit
from llmsurgeon.planning import inputs as inputs_module
from llmsurgeon.planning.inputs import Inputs, leaves
from llmsurgeon.recipe.recipe import loads
from llmsurgeon.run import Options, run
from llmsurgeon.text.cache import cached_self_text
from llmsurgeon.text.self_text import SelfText


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMSURGEON_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def parent(tmp_path):
    return save_tiny(tmp_path / "parent", "llama", tokenizer=True)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def recipe(text, *steps, seed=0):
    calibration = f"calibration: {{text: {text}, tokens: 768, sequence_length: 16, seed: {seed}}}"
    return loads(f"version: 1\n{calibration}\nsteps: [{', '.join(steps or ('{op: prune_blocks, layers: [2]}',))}]\n")


REFIT = ("{op: prune_blocks, layers: [2]}", "{op: refit}")


def job(parent, wanted, options=None):
    return Inputs.of("run", {"model": open_checkpoint(parent)}, wanted, options or Options()).job(wanted)


def test_a_recipe_is_taken_apart_by_name():
    found = dict(
        leaves(
            loads(
                "version: 1\ndescription: x\ncalibration: {tokens: 99, sequence_length: 9}\ngate: {max_kl: 1}\n"
                "steps: [{op: prune_ffn, layers: [1]}, {op: prune_ffn, layers: [2]}, {op: distill, minutes: 3, "
                "learning_rate: 0.5, data: [{text: a.txt}]}]\n"
            )
        )
    )
    assert found["steps"] == "prune_ffn, prune_ffn, distill"
    assert found["prune_ffn[0].layers"] == [1] and found["prune_ffn[1].layers"] == [2]
    assert found["distill.learning_rate"] == 0.5 and found["distill.data[0].text"] == "a.txt"
    assert found["calibration.tokens"] == 99
    # What may change from one run to the next, and what no weight depends on.
    assert not {"distill.minutes", "description", "gate.max_kl", "version", "model"} & set(found)


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def other_weights(folder):
    """Written over the file: the same header, size and time."""
    path = folder / "model.safetensors"
    before = path.stat()
    tiny_model("llama", seed=1).save_pretrained(folder.parent / "others")
    shutil.copyfile(folder.parent / "others" / "model.safetensors", path)
    assert path.stat().st_size == before.st_size and path.stat().st_ino == before.st_ino
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    "model": lambda parent, text: other_weights(parent),
    "model's tokenizer": lambda parent, text: edit(parent / "tokenizer.json", '"a"', '"~"'),
    "calibration.text": lambda parent, text: edit(text, "fox", "cat"),
    "model's records": lambda parent, text: (parent / "recipe.yaml").write_text("version: 1\n"),
}


@pytest.mark.parametrize("part", CHANGES)
def test_every_file_that_is_read_is_a_part_of_the_job(parent, text, part):
    wanted = recipe(text, *REFIT)
    before = job(parent, wanted)
    assert before == job(parent, wanted)
    CHANGES[part](parent, text)
    now = job(parent, wanted)
    assert [name for name in {*before, *now} if before.get(name) != now.get(name)] == [part]
    assert differences(before, now)[0].startswith(part)


def test_settings_and_libraries_are_parts_of_the_job(parent, text, monkeypatch):
    before = job(parent, recipe(text, *REFIT))
    assert differences(before, job(parent, recipe(text, *REFIT, seed=1))) == ["calibration.seed is 1 and was 0"]
    found = differences(before, job(parent, recipe(text, *REFIT), Options(dtype=torch.bfloat16)))
    assert found == ["dtype is torch.bfloat16 and was None"]
    found = differences(before, job(parent, recipe(text, *REFIT), Options(device="cuda:1")))
    assert found == ["device is cuda and was cpu"]
    real = inputs_module.version
    monkeypatch.setattr(inputs_module, "version", lambda name: "0" if name == "transformers" else real(name))
    assert len(differences(before, job(parent, recipe(text, *REFIT)))) == 1


def test_a_cut_that_computes_nothing_depends_on_no_text(parent):
    wanted = loads("version: 1\nsteps: [{op: prune_blocks, layers: [2]}]\n")
    found = job(parent, wanted)
    assert "torch" not in found and "model's tokenizer" not in found
    CHANGES["model's tokenizer"](parent, None)
    assert job(parent, wanted) == found


def test_a_dataset_counts_by_its_revision(parent, monkeypatch):
    wanted = loads(f"version: 1\ncalibration: {{dataset: a/b}}\nsteps: [{', '.join(REFIT)}]\n")
    monkeypatch.setattr(inputs_module, "dataset_revision", lambda name: "1")
    before = job(parent, wanted)
    monkeypatch.setattr(inputs_module, "dataset_revision", lambda name: "2")
    found = differences(before, job(parent, wanted))
    assert found == ["calibration.dataset is a/b at 2 and was a/b at 1"] and "datasets" in before


@pytest.mark.parametrize("part", ["calibration.text", "model's tokenizer"])
def test_a_killed_run_with_another_input_is_another_run(parent, text, tmp_path, monkeypatch, part):
    wanted = recipe(text, *REFIT)
    with monkeypatch.context() as patch:
        patch.setattr("llmsurgeon.planning.healed.judge", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(wanted, str(parent), str(tmp_path / "out"), Options())
    assert list((tmp_path / "out.partial").rglob("layer-*.safetensors")), "there is something to go on from"
    CHANGES[part](parent, text)
    with pytest.raises(SurgeryError, match=f"{part} changed.*--discard-partial"):
        run(wanted, str(parent), str(tmp_path / "out"), Options())
    out = run(wanted, str(parent), str(tmp_path / "out"), Options(discard_partial=True)).out
    fresh = run(wanted, str(parent), str(tmp_path / "fresh"), Options()).out
    assert (out / "model.safetensors").read_bytes() == (fresh / "model.safetensors").read_bytes()


def swapped_by(change, monkeypatch, place, name):
    """`name` of `place` does `change` once, before it goes on."""
    real, done = getattr(place, name), []

    def then(*args, **kwargs):
        if not done:
            done.append(True)
            change()
        return real(*args, **kwargs)

    monkeypatch.setattr(place, name, then)


def another_file(folder):
    """Another file under the same name: same size, same time."""
    path = folder / "model.safetensors"
    before = path.stat()
    tiny_model("llama", seed=1).save_pretrained(folder.parent / "others")
    os.utime(folder.parent / "others" / path.name, ns=(before.st_atime_ns, before.st_mtime_ns))
    (folder.parent / "others" / path.name).replace(path)


@pytest.mark.parametrize("change", [another_file, other_weights])
def test_a_source_that_changes_under_a_copy(parent, tmp_path, monkeypatch, change):
    """Bytes are copied from file to file, and nothing else would tell."""
    real, written = writer.write_shard, []

    def write(*args):
        written.append(args[1].file)
        if len(written) == 2:
            change(parent)
        return real(*args)

    monkeypatch.setattr(writer, "write_shard", write)
    with pytest.raises(CheckpointError, match=r"parent/model.safetensors: the file changed while it was being read"):
        run(
            loads("version: 1\nsteps: [{op: prune_blocks, layers: [2]}]\n"),
            str(parent),
            str(tmp_path / "out"),
            Options(max_shard_size="20KB"),
        )
    assert len(written) > 2 and not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("model-0*")), "no later run takes them for whole"


@pytest.mark.parametrize("name", ["tokenizer.json", "text.txt", "config.json"])
def test_other_files_that_change_during_a_run(parent, text, tmp_path, monkeypatch, name):
    path = text if name == "text.txt" else parent / name
    swapped_by(lambda: path.write_text(path.read_text() + " "), monkeypatch, refit, "fitted_layer")
    with pytest.raises(CheckpointError, match=f"{name}: the file changed while it was being read .*bytes and has"):
        run(recipe(text, *REFIT), str(parent), str(tmp_path / "out"), Options())
    assert not (tmp_path / "out").exists()


def test_models_that_change_while_one_is_healed(parent, text, tmp_path, monkeypatch):
    student = run(recipe(text), str(parent), str(tmp_path / "student"), Options()).out
    wanted = recipe(text, "{op: distill, steps: 1, batch: 2, sequence_length: 16, evaluations: 0}")
    swapped_by(lambda: other_weights(parent), monkeypatch, writer, "write_shard")
    with pytest.raises(CheckpointError, match=r"parent/model.safetensors: the file changed"):
        heal(str(student), str(parent), wanted, str(tmp_path / "healed"), Options())
    assert not (tmp_path / "healed").exists()


def test_exports_of_a_source_that_changes(parent, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        swapped_by(lambda: other_weights(parent), patch, writer, "write_shard")
        with pytest.raises(CheckpointError, match=r"model.safetensors: the file changed"):
            export(str(parent), str(tmp_path / "out"), "surgeon")
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_of_a_source_that_changes(tmp_path, monkeypatch):
    from gguf_models import save_uniform

    from llmsurgeon.formats.gguf import write as gguf

    parent = save_uniform(tmp_path / "parent", "llama")
    path = parent / "model.safetensors"
    swapped_by(lambda: os.utime(path), monkeypatch, gguf, "_write_tensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors: the file changed while it was being read"):
        export_gguf(str(parent), str(tmp_path / "out.gguf"))
    assert not list(tmp_path.glob("out.gguf*"))


def test_a_gguf_source_that_changes(tmp_path, monkeypatch):
    from gguf_models import save_uniform

    source = export_gguf(str(save_uniform(tmp_path / "parent", "llama")), str(tmp_path / "in.gguf")).path
    swapped_by(lambda: os.utime(source), monkeypatch, writer, "write_shard")
    with pytest.raises(CheckpointError, match=r"in.gguf: the file changed while it was being read"):
        export(str(source), str(tmp_path / "out"), "native")
    assert not (tmp_path / "out").exists()


def test_sampled_text_is_kept_by_model_and_tokenizer(tmp_path):
    from conftest import byte_tokenizer

    model, sampled = tiny_model("llama"), []
    wanted = SelfText(64, 16, kinds=("prose",))

    def get(key, tokenizer):
        return cached_self_text(lambda: sampled.append(key) or model, tokenizer, key, wanted)

    tokenizer, other = byte_tokenizer(), byte_tokenizer()
    other.bos_token = "a"
    get("a", tokenizer), get("a", tokenizer), get("b", tokenizer), get("a", other)
    assert sampled == ["a", "b", "a"]


def test_the_parent_is_named_as_it_computes(parent, monkeypatch):
    from llmsurgeon.planning import texts
    from llmsurgeon.planning.opened import open_model
    from llmsurgeon.planning.texts import Texts
    from llmsurgeon.recipe.recipe import Calibration

    opened = open_model(str(parent))

    def key(**options):
        return Texts(opened, Calibration(), 512, Options(**options)).parent_key

    assert key() == key(batch=3)
    found = {key(), key(dtype=torch.bfloat16), key(device="cuda")}
    monkeypatch.setattr(texts, "version", lambda name: "0")
    assert len(found | {key()}) == 4


def test_a_text_that_is_not_there_is_said_before_any_work(parent, tmp_path):
    with pytest.raises(SurgeryError, match=r"none\.txt: no such text file"):
        run(recipe(tmp_path / "none.txt", *REFIT), str(parent), str(tmp_path / "out"), Options())
    assert not (tmp_path / "out.partial").exists()


def test_the_journal_says_what_a_job_depends_on(parent, text, tmp_path, monkeypatch):
    monkeypatch.setattr("llmsurgeon.planning.healed.judge", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(recipe(text, *REFIT), str(parent), str(tmp_path / "out"), Options())
    found = json.loads((tmp_path / "out.partial" / JOURNAL).read_text())["job"]
    assert found["verb"] == "run" and found["refit.align"] == "true" and len(found["calibration.text"]) == 64
