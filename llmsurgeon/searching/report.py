"""A search that is done, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from llmsurgeon.model.spec import LayerSpec
from llmsurgeon.searching.found import Bound, Chosen, Found, Point, Scored, Shape
from llmsurgeon.searching.making import Made
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
    points += [replace(_made(space, each), chosen=each.model == best) for each in made]
    costs = next((each.costs for each in made if each.model == best), None)
    return replace(
        found,
        parent=tuple(map(_shape, space.parent.spec.layers)),
        bounds=_bounds(space, best, costs),
        options=_options(seeker),
        layers=_layers(seeker, best),
        points=points,
        notes=[*found.notes, *_unsure(seeker)],
    )


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
    found = []
    for option, costs in zip(seeker.space.options, seeker.space.costs, strict=True):
        measured = seeker.scorer.known([option])
        if measured is not None:
            named = dict(zip(_names(seeker.space), costs, strict=True))
            found.append(Scored(option.layers, option.name, measured.kl, measured.low, measured.high, named))
    return tuple(found)


def _layers(seeker: Seeker, best: Model) -> tuple[Chosen, ...]:
    space, alone = seeker.space, seeker.alone()
    chosen = []
    for place in best.places:
        option = space.options[place]
        rivals = [p for p, each in enumerate(space.options) if each.layers == option.layers and p != place]
        ranked = sorted((float(alone[p]), space.options[p].name) for p in rivals if alone[p] == alone[p])
        others = tuple((name, kl) for kl, name in ranked[:RUNNERS_UP])
        stands = tuple(map(_shape, option.instead))
        chosen.append(Chosen(option.layers, option.name, float(alone[place]), others, stands, _shares(space, place)))
    return tuple(chosen)


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


def _made(space: Space, made: Made) -> Point:
    ratios = [meter.ratio(cost) for meter, cost in zip(space.meters, made.costs, strict=True)]
    figures = made.evaluation
    low, high = getattr(figures, "kl_interval", None) or (float("nan"), float("nan"))
    return replace(
        _point(space, "made", made.model),
        ratios=dict(zip(_names(space), ratios, strict=True)),
        kl=getattr(figures, "kl", None) or made.model.measured.kl,
        low=low,
        high=high,
        perplexity=getattr(figures, "perplexity_ratio", None),
    )


def _name(space: Space, model: Model) -> str:
    changed = [space.options[place] for place in model.places if space.options[place].changed]
    return f"{len(changed)} of {len(space.parent.spec.layers)} layers changed"


def _names(space: Space) -> list[str]:
    return [meter.target.name for meter in space.meters]


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
