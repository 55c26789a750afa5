"""Closed-form start of a block transformer: what is linear in it is fitted to the parent's hidden states.

The paper (arXiv 2406.02657) leaves to training what its start gets wrong: contexts of mean embeddings, a token decoder
that reads raw embeddings where its first layer read the hidden states of half a model, and attentions that have lost
the text's first token, which takes most of their weight in a trained decoder. Each has a counterpart in the parent, and
ridge regression on calibration text brings it there, in the order in which the model computes:

    embedder        `projected`: a block's embedding becomes its last token's, which is what the parent reads there
    block decoder   the stream of block i, to the parent's at the block's last token, layer after layer
    expansion       of a prefix of two, the first vector becomes the parent's hidden state at a text's first token, a
                    constant; the other is the affine map of the context that comes nearest to the parent's hidden
                    state at the block's last token, both as they are in front of layer `split`
    tokens          the affine map of embeddings nearest to the parent's hidden states there
    token decoder   the stream at each place that says something, to the parent's at the same token

A stream is fitted behind each attention and each FFN by its output projection: W_o + dW with dW = argmin ||A (W_o +
dW)^T - Y||^2 + ridge ||dW||^2, A the student's own. Held-out sequences choose the ridge, and refuse what does not help.

S sequences, T tokens, D model width, L tokens a block, n closed blocks, P vectors of prefix, R rows of a sequence in a
decoder (1, or a row for each block), K places of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmsurgeon.errors import SurgeryError
from llmsurgeon.healing.batches import embedded, passes
from llmsurgeon.healing.refit.context import Context, Update
from llmsurgeon.healing.refit.projection import OutputProjection, attention_out, ffn_out
from llmsurgeon.healing.refit.refit import Refitted
from llmsurgeon.healing.refit.ridge import Moments, best_update
from llmsurgeon.healing.spans import changed, spans
from llmsurgeon.healing.store import moved
from llmsurgeon.model.spec import BlockTransformerSpec
from llmsurgeon.progress import Progress

# Maps that begin as nothing worth keeping: a ridge need not hold on to it.
MAP_RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 0.1)
NAME = "block-transformer"


def affine_map(
    features: Tensor, wanted: Tensor, held_out: Tensor, ridges: Sequence[float] = MAP_RIDGES
) -> tuple[Tensor, Tensor, float | None, float]:
    """The affine map from features [n, F] to wanted [n, O], ridge chosen on the rows of the mask held_out [n].

    Returns (weight [O, F], bias [O], ridge, error on those rows relative to the mean's). Where no ridge beats the mean,
    the weight is zero and the ridge None.
    """
    x, y = features.float(), wanted.float()
    x_mean, y_mean = x[~held_out].mean(0), y[~held_out].mean(0)
    judging = int(held_out.sum())
    moments = Moments(len(x) - judging, judging)
    for held in (False, True):
        rows = held_out == held
        moments.add(x[rows] - x_mean, y[rows] - y_mean, held)
    update, ridge, error = best_update(moments.complete(), ridges)
    weight = x.new_zeros(y.shape[1], x.shape[1]) if update is None else update.T
    return weight, y_mean - weight @ x_mean, ridge, error


@dataclass
class Reading:
    """A block transformer and its parent over the same text, and how each of them reads it.

    spec: block lengths and the like; blocks: how many blocks are closed. The first token is alone in its block, as the
    model counts by default. p: the parent's stream [S, T, D], in front of the layers that are not fitted yet.
    """

    context: Context[Any]
    spec: BlockTransformerSpec
    blocks: int
    p: Tensor
    updates: list[Update] = field(default_factory=list)

    @classmethod
    def of(cls, context: Context[Any]) -> Reading:
        """Of a student with decoder prefix that is affine.

        Raises:
            SurgeryError: sequences are too short.
        """
        spec, tokens = context.spec.block_transformer, context.batches.tokens.shape[1]
        assert spec is not None
        length = spec.block_length
        blocks = (tokens + length - 1) // length
        if blocks < 3:
            raise SurgeryError(
                f"refit: sequences of {tokens} tokens hold fewer than the three blocks of {length} that the "
                f"fit needs; raise calibration.sequence_length to {2 * length + 1} or more"
            )
        return cls(context, spec, blocks, torch.empty(0))

    def ends(self, stream: Tensor) -> Tensor:
        """The parent's stream [S, T, D] at the last token of each block but the first: [S, 1, n - 1, D]."""
        length = self.spec.block_length
        return stream[:, length : (self.blocks - 1) * length + 1 : length][:, None]

    def said(self, stream: Tensor) -> Tensor:
        """The parent's stream at the tokens behind which the token decoder says something: [S, n - 2, L, D].

        Row j is of block j + 2, said from block j + 1: the first block is the text's first token, like no other.
        """
        length = self.spec.block_length
        return stream[:, length : (self.blocks - 1) * length].unflatten(1, (self.blocks - 2, length))

    def ids(self) -> Tensor:
        """Tokens of the closed blocks, [S, n, L]; what lies before the first token is 0."""
        length, tokens = self.spec.block_length, self.context.batches.tokens
        padded = torch.cat([tokens.new_zeros(len(tokens), length - 1), tokens], 1)
        return padded[:, : self.blocks * length].unflatten(1, (self.blocks, length))

    def computed(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        """What a module of the student gives."""
        output: Tensor = module(*(tensor.to(self.context.student.device) for tensor in inputs))
        return output.cpu()


@dataclass(frozen=True)
class Decoder:
    """One of the two decoders: what the parent's stream has for the places of its rows that are fitted."""

    of_parent: Callable[[Tensor], Tensor]
    places: slice


def refit_block_transformer(context: Context[Any]) -> Refitted:
    """Fit both decoders and what lies between them; the student's parameters are moved in place.

    What was found is kept in one file: a killed run goes on behind the refit, and leaves the student as it came.

    Raises:
        SurgeryError: sequences are too short, a hidden state is not finite, or the disk fails.
    """
    reading, student = Reading.of(context), context.student
    stored = context.store.found(NAME)
    if stored is None:
        before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        fit_decoders(reading)
        stored = context.store.keep(NAME, moved(student, before), reading.updates)
    return Refitted(stored.files, tuple(Update.of_record(record) for record in stored.records))


def fit_decoders(reading: Reading) -> None:
    """Everything that is fitted, in the order in which the model computes."""
    context, spec = reading.context, reading.spec
    layers, parents = context.spec.layers, context.parent_spec
    through = spans(context.spec, len(parents.layers))
    over_blocks, within = Decoder(reading.ends, slice(1, None)), Decoder(reading.said, slice(spec.lead - 1, None))
    # Blocks of one token are the parent's own tokens: nothing is amiss but what was cut.
    drifted = spec.block_length > 1
    with torch.no_grad(), Progress("refit", len(layers), "layers") as progress:
        reading.p = embedded(context.parent, context.batches)
        x = embed_blocks(reading)
        for index in range(spec.split):
            drifted = drifted or changed(layers[index], through[index], parents)
            x = through_layer(reading, over_blocks, index, x, drifted)
            progress.advance()
        x = fit_between(reading, x)
        for index in range(spec.split, len(layers)):
            x = through_layer(reading, within, index, x, True)
            progress.advance()


def embed_blocks(reading: Reading) -> Tensor:
    """What enters the block decoder, [S, 1, n, D]; a projected embedding becomes that of the block's last token."""
    embedder, ids = reading.context.student.model.block_embedder, reading.ids()
    if reading.spec.embedder == "projected":
        weight = embedder.projection.weight
        weight.zero_()[:, -len(weight) :] = torch.eye(len(weight))
    real = torch.ones_like(ids, dtype=torch.bool)
    real[:, 0, :-1] = False
    parts = reading.context.batches.parts
    return torch.cat([reading.computed(embedder, ids[part], real[part]) for part, _ in parts])[:, None]


def fit_between(reading: Reading, contexts: Tensor) -> Tensor:
    """Fit expansion and token map; what enters the token decoder, [S, n - 2, P + L - 1, D], from [S, 1, n, D]."""
    spec, text, body = reading.spec, reading.context.batches, reading.context.student.model
    count, hidden = spec.prefix_length, reading.p.shape[-1]
    c, wanted = contexts[:, 0, 1:-1], reading.ends(reading.p)[:, 0, :-1]
    held = text.held_out[:, None].expand(c.shape[:2]).flatten()
    weight, bias, ridge, error = affine_map(c.flatten(0, 1), wanted.flatten(0, 1), held)
    reading.updates.append(Update(spec.split, (), "context_expansion", ridge, error))
    if count > 1:
        first = reading.p[:, 0].float().mean(0)
        weight = torch.cat([weight.new_zeros((count - 1) * hidden, hidden), weight])
        bias = torch.cat([first.repeat(count - 1), bias])
    _fill(body.context_expansion, weight, bias)
    embeddings = torch.cat([reading.computed(body.embed_tokens, text.tokens[part]) for part, _ in text.parts])
    held = text.held_out[:, None].expand(len(text.tokens), text.tokens.shape[1] - 1).flatten()
    weight, bias, ridge, error = affine_map(embeddings[:, 1:].flatten(0, 1), reading.p[:, 1:].flatten(0, 1), held)
    if spec.block_length > 1:
        reading.updates.append(Update(spec.split, (), "token_projection", ridge, error))
        _fill(body.token_projection, weight, bias)
    mine = reading.ids()[:, 2:, :-1]
    entering = []
    for part, _ in text.parts:
        prefix = reading.computed(body.context_expansion, c[part]).unflatten(-1, (count, hidden))
        tokens = reading.computed(body.token_projection, reading.computed(body.embed_tokens, mine[part]))
        entering.append(torch.cat([prefix, tokens], 2))
    return torch.cat(entering)


def through_layer(reading: Reading, decoder: Decoder, index: int, x: Tensor, fit: bool) -> Tensor:
    """Take the parent's stream over a span and the student's, x [S, R, K, D], through the layer that stands for it,
    which is fitted on the way."""
    layer = reading.context.spec.layers[index]
    attended = walk_span(reading, index)
    if layer.attention is not None:
        wanted = attended if layer.ffn is not None else reading.p
        x = through_part(reading, decoder, (index, "attention"), x, decoder.of_parent(wanted) if fit else None)
    if layer.ffn is not None:
        x = through_part(reading, decoder, (index, "ffn"), x, decoder.of_parent(reading.p) if fit else None)
    return x


def walk_span(reading: Reading, index: int) -> Tensor:
    """Take the parent's stream over the span of layer `index`. Returns it behind the attention of the layer that this
    one was, [S, T, D]."""
    context, behind = reading.context, reading.p
    own = context.spec.layers[index].parents[0]
    for number in spans(context.spec, len(context.parent_spec.layers))[index]:
        attended = torch.empty_like(reading.p)
        with context.parent.loaded(number):
            for part, layer in passes(context.parent, context.batches, number, reading.p):
                attended[part], reading.p[part] = layer.attended.cpu(), layer.left.cpu()
        behind = attended if number == own else behind
    return behind


def through_part(
    reading: Reading, decoder: Decoder, which: tuple[int, Literal["attention", "ffn"]], x: Tensor, wanted: Tensor | None
) -> Tensor:
    """The stream behind a layer's attention or FFN, whose output projection is moved towards `wanted` first."""
    context, (index, part_name) = reading.context, which
    layer, family, text = context.student.model.layers[index], context.family, context.batches
    attends = part_name == "attention"
    name = attention_out(family) if attends else ffn_out(family)
    out, call = OutputProjection(layer, name, "", family.transposed), _call(reading, x) if attends else {}
    moments, kept = Moments(), []
    with out:
        for part, held in text.parts:
            rows = x[part].flatten(0, 1).to(context.student.device)
            contribution = layer.attend(rows, **call) if attends else layer.feed_forward(rows)
            kept.append((out.read, contribution))
            if wanted is not None:
                reached = (rows + contribution)[:, decoder.places].float()
                missing = wanted[part].flatten(0, 1).to(rows.device).float() - reached
                features = out.features().unflatten(0, rows.shape[:2])[:, decoder.places]
                moments.add(features.flatten(0, 1), missing.flatten(0, 1), held)
    update = None
    if wanted is not None:
        update, ridge, error = best_update(moments.complete(), context.options.ridges)
        reading.updates.append(Update(index, context.spec.layers[index].parents, name, ridge, error))
        if update is not None:
            out.move(update)
    behind = []
    for (part, _), (read, contribution) in zip(text.parts, kept, strict=True):
        added = contribution if update is None else out.contribution(read)
        behind.append(x[part] + added.unflatten(0, x[part].shape[:2]).cpu())
    return torch.cat(behind)


def _call(reading: Reading, x: Tensor) -> dict[str, Any]:
    """What attention is called with beside rows of K places: causal, positions from 0."""
    from transformers.masking_utils import create_causal_mask

    student = reading.context.student
    like = x[0, :1].to(student.device)
    positions = torch.arange(like.shape[1], device=like.device)[None]
    mask = create_causal_mask(student.config, like, None, None)
    rotary = student.model.rotary_emb(like, position_ids=positions)
    return {"attention_mask": mask, "position_embeddings": rotary, "position_ids": positions}


def _fill(linear: Any, weight: Tensor, bias: Tensor) -> None:
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
