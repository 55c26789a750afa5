"""What a search stands on: the text shared out, the scores that its steps need, the ground, and what all that costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmsurgeon import __version__
from llmsurgeon.analysis.divergence import KL_STRIDE
from llmsurgeon.analysis.scores import compute_scores
from llmsurgeon.checkpoint.kept import cache_folder, keep, kept
from llmsurgeon.planning.opened import OpenedCheckpoint
from llmsurgeon.planning.rates import seconds_of
from llmsurgeon.planning.texts import Texts
from llmsurgeon.processes.first import from_first
from llmsurgeon.processes.world import alone
from llmsurgeon.searching.fitting import Workshop
from llmsurgeon.searching.foresight import DRAWS
from llmsurgeon.searching.ground import Ground, shared_out
from llmsurgeon.searching.options import cuts
from llmsurgeon.searching.scoring import Scorer
from llmsurgeon.searching.space import Space
from llmsurgeon.searching.store import ScoreStore
from llmsurgeon.searching.vocabulary import Vocabularies
from llmsurgeon.walk.runner import LayerRunner

# How many options a layer a search measures, about, of those that it foresees.
MEASURED = 2.0


def scorer_of(space: Space, texts: Texts, tokens: int, batch: int, in_time: Callable[[], bool]) -> Scorer:
    """What measures the models of a space, on `tokens` tokens of the texts; as many others fit each option.

    Raises:
        SurgeryError: too little text, or the disk fails.
    """
    parent = texts.parent
    fits, scores = shared_out(texts.sequences, tokens, tokens)
    folder = _folder(texts, fits.tokens, scores.tokens)
    store = ScoreStore(folder)
    found = _orders(space, texts, folder, batch)
    with alone():  # each process fits options of its own, on all of the text
        ground = Ground.of(texts.runner, fits, scores.tokens, batch)
    made = cuts(parent.subject(found), parent.weights, space.options)
    workshop = Workshop(parent.config, parent.spec, ground, made)
    return Scorer(ground, workshop, store, in_time, Vocabularies(texts, ground))


def _folder(texts: Texts, fits: Tensor, scores: Tensor) -> Path:
    """Where what is measured of this model on this text is kept."""
    digest = sha256(f"{texts.parent_key} {__version__}".encode())
    for tokens in (texts.windows, fits, scores):
        digest.update(tokens.numpy().tobytes())
    return cache_folder("search") / digest.hexdigest()[:32]


def _orders(space: Space, texts: Texts, folder: Path, batch: int) -> Mapping[str, Any]:
    """The scores by which steps know what goes first inside a layer, as a run of the recipe measures them."""
    single = [option for option in space.options if option.single and not option.rows]
    steps = [step for option in single for offer in option.offers for step in offer.steps]
    names = sorted({name for step in steps for name in step.needs()})
    if not names:
        return {}
    wanted = sha256("\n".join(names).encode()).hexdigest()[:16]
    file = folder / f"orders-{wanted}.safetensors"
    flat = from_first(lambda: load_file(file) if kept(file) else None)
    if flat is None:
        found = compute_scores(steps, texts.runner, texts.windows, texts.parent.subject({}), batch)
        flat = {
            f"{name}/{layer}": tensor.contiguous() for name, each in found.items() for layer, tensor in each.items()
        }
        from_first(lambda: keep(file, lambda path: save_file(flat, path)))
    nested: dict[str, dict[int, Tensor]] = {}
    for key, tensor in flat.items():
        name, _, layer = key.rpartition("/")
        nested.setdefault(name, {})[int(layer)] = tensor
    return nested


@dataclass(frozen=True)
class Work:
    """What scoring a space costs: options with a score of their own, evaluations of a layer, and about how long."""

    options: int
    scored: int
    evaluations: int
    seconds: float


def work_of(space: Space, parent: OpenedCheckpoint, tokens: int, length: int, options: Any) -> Work:
    """How much there is to do, with one layer and the head timed on random tokens.

    Of what is foreseen, about MEASURED options a layer are measured.
    """
    layers = len(parent.spec.layers)
    singles = [option for option in space.options if option.single]
    foreseen = [option for option in singles if not option.rows]
    dtype = parent.computed_in(options.dtype, options.device)
    runner = LayerRunner(parent.config, parent.weights, dtype, options.device)
    batch = min(options.batch, max(1, tokens // length))
    once, head = _seconds_a_token(runner, torch.randint(0, parent.spec.vocab, (batch, length)))
    # A gradient takes about twice what a layer takes. For a vocabulary the parent reads all of the text anew.
    measured = min(round(MEASURED * layers), len(foreseen))
    walked = measured * (layers + 1) // 2 + (len(singles) - len(foreseen)) * layers
    evaluations = walked + len(foreseen) + (1 + 2 * DRAWS) * layers
    # A fit walks its layer over the tokens that fit about four times: twice for each of two updates.
    fitted = len(foreseen) * 4 * tokens
    heads = (measured + 2 * DRAWS) / KL_STRIDE + 2 * (len(singles) - len(foreseen))
    seconds = once * (evaluations * tokens + fitted) + head * heads * tokens
    return Work(len(space.options), len(singles), evaluations, seconds)


def _seconds_a_token(runner: LayerRunner, tokens: Tensor) -> tuple[float, float]:
    """What a token takes in a layer, and in the head."""
    index = len(runner.layers) // 2
    with torch.no_grad(), runner.loaded(index):
        hidden = runner.embed(tokens)
        layer = seconds_of(lambda: runner.whole(index, hidden), runner.device) / tokens.numel()
        output = runner.states if runner.family.encoder else runner.final
        return layer, seconds_of(lambda: output(hidden[0]), runner.device) / tokens.shape[1]
