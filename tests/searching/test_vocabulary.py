"""Smaller vocabularies in a search, against checkpoints that really have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmsurgeon import run as run_recipe
from llmsurgeon import search
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.bits_per_byte import texts_of
from llmsurgeon.model.costs import Costs
from llmsurgeon.operations.trim_vocab import TrimVocab
from llmsurgeon.planning.opened import open_model
from llmsurgeon.planning.options import Options
from llmsurgeon.planning.texts import Texts
from llmsurgeon.recipe.recipe import calibration, load, loads
from llmsurgeon.search import Wanted, preview
from llmsurgeon.searching.costs import meters, parse_targets
from llmsurgeon.searching.options import key_of
from llmsurgeon.searching.setting import scorer_of
from llmsurgeon.searching.space import Space, chosen_operations
from tests.operations.test_trim_vocab import parent_in
from tests.prose import sentences

LENGTH = 24
OPS = ("trim_vocab", "prune_width")
PAGES = "\n".join(sentences(400, seed=3))[:20_000]


@pytest.fixture
def scene(tmp_path, monkeypatch):
    """A tiny parent whose tokenizer can be trimmed, and a text of many words."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMSURGEON_CACHE", str(tmp_path / "cache"))
    parent_in(tmp_path / "parent", "llama")
    (tmp_path / "text.txt").write_text(PAGES)
    return tmp_path


def nats(model, ids):
    """-log p of each token but the first."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


def pieces(tokenizer, text):
    """The first tokens of a text, and where each begins."""
    made = tokenizer(text, return_offsets_mapping=True)
    return made["input_ids"][:LENGTH], [begin for begin, _ in made["offset_mapping"]][:LENGTH]


def test_scores_against_models_that_have_the_vocabulary(scene):
    parent = open_model("parent")
    made = meters(parse_targets(["params=0.8x"]), None, parent)
    space = Space.of(parent, made, OPS).priced()
    texts = Texts(
        parent, calibration(text="text.txt", tokens=2048, sequence_length=LENGTH), 2048, Options(device="cpu")
    )
    scorer = scorer_of(space, texts, 192, 4, lambda: True)
    rows = [option.rows for option in space.options if option.rows]
    assert rows == [1152, 768, 576, 384] and space.groups == 7
    table = next(option for option in space.options if option.rows == 768)
    narrow = next(option for option in space.options if option.layers == (2,) and option.name == "48 channels")
    scorer.measure([[table], [narrow], [narrow, table]], "test")
    lost, alone, both = (scorer.known(options) for options in ([table], [narrow], [narrow, table]))

    (scene / "tokens.json").write_text(scorer.vocabularies.listed(768))
    recipe = "version: 1\nsteps:\n  - {op: trim_vocab, keep: {file: tokens.json}, rows: 768}\n"
    run_recipe(loads(recipe), "parent", "trimmed")
    theirs, mine = (AutoModelForCausalLM.from_pretrained(name).eval() for name in ("parent", "trimmed"))
    their_words, my_words = (AutoTokenizer.from_pretrained(name) for name in ("parent", "trimmed"))
    more, counts, texts_read = [], [], texts_of(scorer.ground.scores, their_words)
    for text in texts_read:
        (my_ids, my_begins), (ids, begins) = pieces(my_words, text), pieces(their_words, text)
        common = sorted(set(my_begins[1:]) & set(begins[1:]))
        here, there = ([where.index(at, 1) for at in (common[0], common[-1])] for where in (my_begins, begins))
        my_nats, their_nats = nats(mine, my_ids), nats(theirs, ids)
        more.append(float(my_nats[here[0] - 1 : here[1] - 1].sum() - their_nats[there[0] - 1 : there[1] - 1].sum()))
        counts.append((here[1] - here[0], there[1] - there[0]))
    my_tokens, their_tokens = (sum(each) for each in zip(*counts, strict=True))
    assert my_tokens > their_tokens and lost.kl == pytest.approx(sum(more) / their_tokens, rel=1e-4)
    assert len(lost.each) == len(texts_read)

    # What the layers add is the KL between the two models that have these rows.
    student = AutoModelForCausalLM.from_pretrained("trimmed").eval()
    with scorer.workshop.standing(narrow) as beside:
        state = beside.layers[2].state_dict()
        layer = student.model.layers[2]
        for name in ("gate_proj", "up_proj", "down_proj"):
            layer.mlp.get_submodule(name).weight.data = state[f"mlp.{name}.weight"].clone()
    kls = []
    for text in texts_read:
        ids, _ = pieces(my_words, text)
        at = list(range(LENGTH - 1, -1, -4))
        with torch.no_grad():
            p, q = (F.log_softmax(m(torch.tensor([ids])).logits[0].double(), -1) for m in (mine, student))
        kl = (p.exp() * (p - q)).sum(-1)
        kls.append(torch.stack([kl[place] for place in at if place < len(ids)]).mean())
    inside = float(torch.stack(kls).mean()) * my_tokens / their_tokens
    assert both.kl - lost.kl == pytest.approx(inside, rel=1e-3) and both.kl > lost.kl and alone.kl > 0


def test_a_search_that_may_trim_the_vocabulary_does(scene):
    few = {"tokens": 128, "sequence_length": 32, "text": "text.txt", "self_share": 0.0}
    (scene / "tokens.json").write_text('["a", "b"]')  # of somebody else
    found = search("parent", "params=0.7x", "out", Wanted(allow=OPS, **few))
    kept = json.loads((scene / "out" / "tokens.json").read_text())
    assert "../text.txt" in (scene / "out" / "recipe.yaml").read_text()
    recipe = load(scene / "out" / "recipe.yaml")
    first = recipe.steps[0]
    assert isinstance(first, TrimVocab) and first.rows == len(kept) == found.table.rows < found.table.parent
    made = run_recipe(recipe, None, "made")
    (scene / "elsewhere").mkdir()
    search("parent", "params=0.7x", "second", Wanted(allow=OPS, **few), make="elsewhere/whole")
    mine = load(scene / "elsewhere" / "whole" / "recipe.yaml").steps[0].keep.file
    assert json.loads((scene / mine).read_text()) == kept and Path(mine).parent.name == "whole"
    costs: Costs = made.planned.after
    assert costs.parameters == found.bounds[0].predicted == found.bounds[0].measured <= found.bounds[0].budget
    assert open_model("made").spec.vocab == first.rows
    chosen = next(point for point in found.points if point.chosen)
    assert chosen.kind == "made" and chosen.perplexity > 0 and "rows" in chosen.name
    assert all(layer < 6 for each in found.layers for layer in each.layers)
    html = (scene / "out" / "report.html").read_text()
    assert f"{first.rows:,} of {found.table.parent:,}" in html
    # Nobody asked for it: the tokenizer stays.
    assert "trim_vocab" not in chosen_operations((), ()) and "trim_vocab" in chosen_operations(("all",), ())
    assert search("parent", "params=0.95x", "plain", Wanted(allow=("prune_width",), **few)).table is None
    assert not (scene / "plain" / "tokens.json").exists()


def test_without_a_text_the_vocabulary_stays(scene):
    said: list = []
    preview("parent", "params=0.8x", Wanted(allow=OPS), said.append)
    assert any("trim_vocab is not used" in line and "--text FILE" in line for line in said)
    operations = preview("parent", "params=0.8x", Wanted(allow=OPS)).space.options
    assert operations and not any(option.rows for option in operations)
    with pytest.raises(SurgeryError, match="trim_vocab: text that is sampled from the model tells too little"):
        search("parent", "params=0.8x", "out", Wanted(allow=("trim_vocab",)))


def test_tokens_stay_by_text_that_neither_scores_nor_judges(scene):
    parent = open_model("parent")
    texts = Texts(
        parent,
        calibration(text="text.txt", self_share=0.0, tokens=2048, sequence_length=LENGTH),
        2048,
        Options(device="cpu"),
    )
    space = Space.of(parent, meters(parse_targets(["params=0.8x"]), None, parent), OPS).priced()
    scorer = scorer_of(space, texts, 192, 4, lambda: True)
    counts = scorer.vocabularies._counts
    tokenizer = AutoTokenizer.from_pretrained("parent")
    whole = tokenizer(PAGES, add_special_tokens=False)["input_ids"]
    scored = scorer.ground.scores.flatten().tolist()
    # A token that occurs where the text scores, and nowhere else, does not stay for that.
    only = [token for token in set(scored) if whole.count(token) == scored.count(token)]
    assert only and not any(counts[token] for token in only)
    assert sum(counts.values()) > 0.5 * len(whole)
    assert key_of([option for option in space.options if option.rows][:1]) == '[{"rows":1152,"op":"trim_vocab"}]'


def test_a_tokenizer_that_cannot_be_trimmed_is_said(scene):
    file = scene / "parent" / "tokenizer.json"
    made = json.loads(file.read_text())
    made["pre_tokenizer"], made["model"] = (
        None,
        {"type": "WordLevel", "vocab": made["model"]["vocab"], "unk_token": "a"},
    )
    file.write_text(json.dumps(made))
    few = {"text": "text.txt", "self_share": 0.0, "sequence_length": 32, "tokens": 128}
    with pytest.raises(SurgeryError, match="WordLevel"):
        search("parent", "params=0.8x", "out", Wanted(allow=("all",), **few))
    assert not (scene / "out").exists()


def test_what_is_expected_in_text_that_the_model_wrote_is_told_apart(scene):
    parent = open_model("parent")
    wanted = calibration(text="text.txt", self_share=0.5, tokens=2048, sequence_length=LENGTH)
    texts = Texts(parent, wanted, 2048, Options(device="cpu"))
    space = Space.of(parent, meters(parse_targets(["params=0.8x"]), None, parent), OPS).priced()
    scorer = scorer_of(space, texts, 192, 4, lambda: True)
    ground, found = scorer.ground, scorer.vocabularies._expected
    model = AutoModelForCausalLM.from_pretrained("parent").eval()
    with torch.no_grad():
        each = model(ground.fits.tokens).logits.softmax(-1).sum(1)
    own = torch.tensor([kind != "text.txt" for kind in ground.fits.kinds])
    assert 0 < own.sum() < len(own)
    for mine, rows in ((found.read, each), (found.written, each[own])):
        torch.testing.assert_close(torch.tensor(list(mine.values())), rows.sum(0), atol=1e-3, rtol=1e-3)
