"""A search that is done, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from llmsurgeon.evaluation.decoders import Evaluation
from llmsurgeon.evaluation.encoders import EncoderEvaluation
from llmsurgeon.model.spec import LayerSpec
from llmsurgeon.report.card import collapse
from llmsurgeon.searching.found import Bound, Chosen, Found, Point, Scored, Shape, Table
from llmsurgeon.searching.making import Made
from llmsurgeon.searching.options import rows_of
from llmsurgeon.searching.scoring import Measured
from llmsurgeon.searching.seeking import Model, Seeker
from llmsurgeon.searching.space import Space

# Options of a layer that are named beside the chosen one.
RUNNERS_UP = 3


def described(found: Found, seeker: Seeker, best: Model, made: Sequence[Made], alone: Mapping[str, Model]) -> Found:
    """`found` with all that a search measured; `alone` are models that one operation made."""
    space = seeker.space
    single = list(alone.values())
    points = [_point(space, "measured", model) for model in seeker.models.values() if model not in single]
    points += [replace(_point(space, "single", model), name=op) for op, model in alone.items()]
    points += [replace(_made(seeker, each), chosen=each.model == best) for each in made]
    if not made:
        points.append(replace(_point(space, "measured", best), chosen=True))
    costs = next((each.costs for each in made if each.model == best), None)
    return replace(
        found,
        distance=space.distance,
        operations=space.operations,
        parent=tuple(map(_shape, space.parent.spec.layers)),
        bounds=_bounds(space, best, costs),
        options=_options(seeker),
        layers=_layers(seeker, best),
        table=_table(seeker, best),
        points=points,
        notes=[*found.notes, *_collapsed(made), *_unfinished(seeker, best, made), *_unsure(seeker)],
    )


def _collapsed(made: Sequence[Made]) -> list[str]:
    """What is to be said of a best model that is none any more."""
    judged = made[0].evaluation if made else None
    warning = collapse(judged.to_dict()) if judged else None
    return [f"WARNING: {warning}"] if warning else []


def _bounds(space: Space, best: Model, costs: Sequence[float] | None) -> tuple[Bound, ...]:
    parent = space.total([place for place, option in enumerate(space.options) if not option.changed])
    predicted = space.total(best.places)
    return tuple(
        Bound(
            target=meter.target.written,
            name=meter.target.name,
            unit=meter.unit,
            budget=meter.budget(),
            parent=parent[place],
            predicted=predicted[place],
            measured=costs[place] if costs else None,
            ratio=meter.ratio(costs[place] if costs else predicted[place]),
        )
        for place, meter in enumerate(space.meters)
    )


def _options(seeker: Seeker) -> tuple[Scored, ...]:
    found, more = [], seeker.more_than_foreseen()
    for option, costs in zip(seeker.space.options, seeker.space.costs, strict=True):
        scored = seeker.scored(option, more)
        if scored is not None:
            named = dict(zip(_names(seeker.space), costs, strict=True))
            layers = () if option.layers[0] == len(seeker.space.parent.spec.layers) else option.layers
            measured = seeker.scorer.known([option]) is not None
            found.append(Scored(layers, option.name, scored.kl, scored.low, scored.high, named, measured))
    return tuple(found)


def _layers(seeker: Seeker, best: Model) -> tuple[Chosen, ...]:
    space, alone = seeker.space, seeker.alone()
    chosen = []
    for place in best.places:
        option = space.options[place]
        if option.layers[0] < len(space.parent.spec.layers):
            shares, stands = _shares(space, place), tuple(map(_shape, option.instead))
            others = _rivals(seeker, place)
            chosen.append(Chosen(option.layers, option.name, float(alone[place]), others, stands, shares))
    return tuple(chosen)


def _table(seeker: Seeker, best: Model) -> Table | None:
    """What became of the table, where there was a choice."""
    space, parent = seeker.space, seeker.space.parent.spec
    for place in best.places:
        option = space.options[place]
        if option.layers[0] == len(parent.layers):
            saved = zip(_names(space), space.costs[place], space.meters, strict=True)
            shares = {name: -cost / meter.parent_total for name, cost, meter in saved}
            kl = float(seeker.alone()[place])
            return Table(option.rows or parent.vocab, parent.vocab, kl, _rivals(seeker, place), shares)
    return None


def _rivals(seeker: Seeker, place: int) -> tuple[tuple[str, float], ...]:
    """The best of what else might have stood there, as (name, KL alone)."""
    options, alone = seeker.space.options, seeker.alone()
    rivals = [p for p, each in enumerate(options) if each.layers == options[place].layers and p != place]
    ranked = sorted((float(alone[p]), options[p].name) for p in rivals if alone[p] == alone[p])
    return tuple((name, kl) for kl, name in ranked[:RUNNERS_UP])


def _shares(space: Space, place: int) -> dict[str, float]:
    """What an option costs, by target name, as a share of what the parent's layers there cost."""
    layers = space.options[place].layers
    parent = [space.costs[p] for p, o in enumerate(space.options) if not o.changed and o.layers[0] in layers]
    whole = [sum(costs) for costs in zip(*parent, strict=True)]
    return {n: c / w if w else 1.0 for n, c, w in zip(_names(space), space.costs[place], whole, strict=True)}


def _shape(layer: LayerSpec) -> Shape:
    heads, kv_heads = (layer.attention.heads, layer.attention.kv_heads) if layer.attention else (0, 0)
    return heads, kv_heads, layer.ffn.width if layer.ffn else 0


def _point(space: Space, kind: str, model: Model) -> Point:
    ratios = [meter.ratio(total) for meter, total in zip(space.meters, space.total(model.places), strict=True)]
    named = dict(zip(_names(space), ratios, strict=True))
    kl: Measured = model.measured
    return Point(kind, _name(space, model), named, kl.kl, kl.low, kl.high, model.predicted)


def _made(seeker: Seeker, made: Made) -> Point:
    space = seeker.space
    ratios = [meter.ratio(cost) for meter, cost in zip(space.meters, made.costs, strict=True)]
    figures, found = made.evaluation, replace(_point(space, "made", made.model), low=float("nan"), high=float("nan"))
    found = replace(found, ratios=dict(zip(_names(space), ratios, strict=True)))
    if isinstance(figures, EncoderEvaluation) and figures.hidden_cosine is not None:
        near = (figures.hidden_cosine, *(figures.hidden_cosine_interval or (figures.hidden_cosine,) * 2))
        kl, high, low = (1 - cosine for cosine in near)
        return replace(found, kl=kl, low=low, high=high, pooled=figures.pooled_cosine, held_out=True)
    if not isinstance(figures, Evaluation) or figures.kl is None:
        return found
    # Its KL is to the parent with the same tokens, a token of those.
    rows = rows_of(space.options[place] for place in made.model.places)
    reading = seeker.scorer.reading(rows)
    lost = float(reading.lost.mean())
    kl, low, high = (lost + reading.longer * kl for kl in (figures.kl, *(figures.kl_interval or (figures.kl,) * 2)))
    perplexity = figures.perplexity_ratio
    if figures.bits:
        perplexity = figures.bits.word_perplexity / figures.bits.parent_word_perplexity
    return replace(found, kl=kl, low=low, high=high, perplexity=perplexity, held_out=True)


def _name(space: Space, model: Model) -> str:
    changed = [space.options[place] for place in model.places if space.options[place].changed]
    rows = "".join(f", {option.name}" for option in changed if option.rows)
    count = sum(len(option.layers) for option in changed if not option.rows)
    return f"{count} of {len(space.parent.spec.layers)} layers changed{rows}"


def _names(space: Space) -> list[str]:
    return [meter.target.name for meter in space.meters]


def _unfinished(seeker: Seeker, best: Model, made: Sequence[Made]) -> list[str]:
    """What there was no time for."""
    left, count = len(seeker.unscored), sum(option.single for option in seeker.space.options)
    notes = []
    if left:
        notes.append(
            f"time was up when {count - left} of {count} options were scored: what is chosen is the best of those; the "
            "same search goes on with the others"
        )
    changed = [option for option in map(seeker.space.options.__getitem__, best.places) if option.changed]
    foreseen = sum(seeker.scorer.known([option]) is None for option in changed)
    if foreseen:
        notes.append(
            f"{foreseen} of {len(changed)} chosen options were not measured alone: what is told of them is foreseen to "
            "second order; the whole model was measured"
        )
    if not made:
        notes.append(
            "time was up before the model was made: what it costs is predicted; run the recipe, and `bench` it"
        )
    return notes


def _unsure(seeker: Seeker) -> list[str]:
    """What the text is too short to tell apart, and how much would do."""
    models = sorted((model.measured for model in seeker.models.values()), key=lambda measured: measured.kl)
    if len(models) < 2:
        return []
    first = models[0]
    # Paired: both were measured on the same sequences.
    rivals = [Measured.of(other.each - first.each) for other in models[1:]]
    alike = [rival for rival in rivals if rival.low <= 0]
    if not alike:
        return []
    widest = max(alike, key=lambda rival: rival.kl)
    more = ((widest.kl - widest.low) / max(widest.kl, 1e-9)) ** 2
    tokens = seeker.scorer.ground.scores.numel()
    return [
        f"{len(alike)} of {len(rivals)} other models that were measured are no worse than the chosen one as far as "
        f"{tokens:,} tokens can tell; about {tokens * max(more, 1):,.0f} (--tokens) would tell the clearest of them"
    ]
