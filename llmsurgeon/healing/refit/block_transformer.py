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

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmsurgeon.checkpoint.kept import keep, kept
from llmsurgeon.errors import SurgeryError
from llmsurgeon.healing.refit.fits import Fit, stored_fits
from llmsurgeon.healing.refit.output import Outlet
from llmsurgeon.healing.refit.refit import changed, spans
from llmsurgeon.healing.refit.ridge import Moments, best_update
from llmsurgeon.model.spec import ModelSpec
from llmsurgeon.progress import Progress
from llmsurgeon.walk.runner import LayerRunner

# Maps that begin as nothing worth keeping: a ridge need not hold on to it.
MAP_RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 0.1)
FILE = "block-transformer.safetensors"


def affine_map(
    features: Tensor, wanted: Tensor, held_out: Tensor, ridges: Sequence[float] = MAP_RIDGES
) -> tuple[Tensor, Tensor, float | None, float]:
    """The affine map from features [n, F] to wanted [n, O], ridge chosen on the rows of the mask held_out [n].

    Returns (weight [O, F], bias [O], ridge, error on those rows relative to the mean's). Where no ridge beats the mean,
    the weight is zero and the ridge None.
    """
    x, y = features.float(), wanted.float()
    x_mean, y_mean = x[~held_out].mean(0), y[~held_out].mean(0)
    moments = Moments()
    for held in (False, True):
        rows = held_out == held
        moments.add(x[rows] - x_mean, y[rows] - y_mean, held)
    update, ridge, error = best_update(moments.complete(), ridges)
    weight = x.new_zeros(y.shape[1], x.shape[1]) if update is None else update.T
    return weight, y_mean - weight @ x_mean, ridge, error


class BlockRefit:
    """Parent and block transformer side by side over one calibration batch.

    Args:
        parent: runner over the parent's weights.
        student: the block transformer, whole in memory; its parameters are moved in place.
        spec: its description: decoder prefix, affine; its layers name those of the parent that they stand for.
        tokens: [S, T]; `held_out` [S] marks the sequences that only judge.
        ridges: candidates, as multiples of the mean diagonal of the Gram matrix.
        store: folder in which what was found is kept: a killed run goes on behind the refit.
    """

    def __init__(
        self,
        parent: LayerRunner,
        student: Any,
        parent_spec: ModelSpec,
        spec: ModelSpec,
        tokens: Tensor,
        held_out: Tensor,
        ridges: Sequence[float],
        batch: int,
        store: Path,
    ) -> None:
        assert spec.block_transformer is not None
        self.parent, self.student, self.body = parent, student, student.model
        self.parent_spec, self.spec = parent_spec, spec
        self.halves, self.ridges, self.store, self.family = spec.block_transformer, ridges, store, parent.family
        length = self.halves.block_length
        # As the model counts by default: the first token is alone in its block.
        self.blocks = (tokens.shape[1] + length - 1) // length
        if self.blocks < 3:
            raise SurgeryError(
                f"refit: sequences of {tokens.shape[1]} tokens hold fewer than the three blocks of {length} that the "
                f"fit needs; raise calibration.sequence_length to {2 * length + 1} or more"
            )
        # Batches hold either fitting or judging sequences, never both.
        order = torch.cat([torch.nonzero(~held_out).flatten(), torch.nonzero(held_out).flatten()])
        self.tokens = tokens[order]
        fitting = int((~held_out).sum())
        edges = [*range(0, fitting, batch), *range(fitting, len(tokens), batch), len(tokens)]
        self.parts = [(slice(a, b), a >= fitting) for a, b in pairwise(edges)]
        self.held_out = torch.arange(len(tokens)) >= fitting
        self.fits: list[Fit] = []

    def run(self) -> dict[str, Path]:
        """Fit both decoders and what lies between. Returns name -> safetensors file of every tensor that changed."""
        from safetensors import safe_open
        from safetensors.torch import save_file

        file, split, drifted = self.store / FILE, self.halves.split, self.halves.block_length > 1
        todo = spans(self.spec, len(self.parent_spec.layers))
        if not kept(file):
            before = {name: tensor.clone() for name, tensor in self.student.state_dict().items()}
            with torch.no_grad(), Progress("refit", len(self.spec.layers), "layers") as progress:
                self.p = torch.cat([self.parent.embed(self.tokens[part]).cpu() for part, _ in self.parts])
                x = self._embed_blocks()
                for index in range(split):
                    # Blocks of one token are the parent's own tokens: nothing is amiss but what was cut.
                    drifted = drifted or changed(self.spec.layers[index], todo[index], self.parent_spec)
                    x = self._layer(index, todo[index], x, self._block_ends, slice(1, None), drifted)
                    progress.advance()
                x = self._between(x)
                for index in range(split, len(self.spec.layers)):
                    x = self._layer(index, todo[index], x, self._said, slice(self.halves.lead - 1, None), True)
                    progress.advance()
            after = self.student.state_dict()
            moved = [name for name in before if not torch.equal(after[name], before[name])]
            new = {name: after[name].cpu().contiguous() for name in moved}
            fits = json.dumps([vars(fit) for fit in self.fits])
            keep(file, lambda path: save_file(new, path, metadata={"fits": fits}))
        self.fits = stored_fits(file)
        with safe_open(file, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), file)

    def _block_ends(self, stream: Tensor) -> Tensor:
        """The parent's stream [S, T, D] at the last token of each block but the first: [S, 1, n - 1, D]."""
        length = self.halves.block_length
        return stream[:, length : (self.blocks - 1) * length + 1 : length][:, None]

    def _said(self, stream: Tensor) -> Tensor:
        """The parent's stream at the tokens behind which the token decoder says something: [S, n - 2, L, D].

        Row j is of block j + 2, said from block j + 1: the first block is the text's first token, like no other.
        """
        length = self.halves.block_length
        return stream[:, length : (self.blocks - 1) * length].unflatten(1, (self.blocks - 2, length))

    def _ids(self) -> Tensor:
        """Tokens of the closed blocks, [S, n, L]; what lies before the first token is 0."""
        length = self.halves.block_length
        padded = torch.cat([self.tokens.new_zeros(len(self.tokens), length - 1), self.tokens], 1)
        return padded[:, : self.blocks * length].unflatten(1, (self.blocks, length))

    def _embed_blocks(self) -> Tensor:
        """What enters the block decoder, [S, 1, n, D]."""
        if self.halves.embedder == "projected":
            weight = self.body.block_embedder.projection.weight
            weight.zero_()[:, -len(weight) :] = torch.eye(len(weight))
        ids = self._ids()
        real = torch.ones_like(ids, dtype=torch.bool)
        real[:, 0, :-1] = False
        return torch.cat([self._computed(self.body.block_embedder, ids[p], real[p]) for p, _ in self.parts])[:, None]

    def _computed(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        output: Tensor = module(*(tensor.to(self.student.device) for tensor in inputs))
        return output.cpu()

    def _between(self, contexts: Tensor) -> Tensor:
        """Fit expansion and token map; what enters the token decoder, [S, n - 2, P + L - 1, D], from [S, 1, n, D]."""
        count, hidden = self.halves.prefix_length, self.p.shape[-1]
        c, wanted = contexts[:, 0, 1:-1], self._block_ends(self.p)[:, 0, :-1]
        held = self.held_out[:, None].expand(c.shape[:2]).flatten()
        weight, bias, ridge, error = affine_map(c.flatten(0, 1), wanted.flatten(0, 1), held)
        self.fits.append(Fit(self.halves.split, (), "context_expansion", ridge, error))
        if count > 1:
            first = self.p[:, 0].float().mean(0)
            weight = torch.cat([weight.new_zeros((count - 1) * hidden, hidden), weight])
            bias = torch.cat([first.repeat(count - 1), bias])
        _fill(self.body.context_expansion, weight, bias)
        embedded = torch.cat([self._computed(self.body.embed_tokens, self.tokens[part]) for part, _ in self.parts])
        held = self.held_out[:, None].expand(len(self.tokens), self.tokens.shape[1] - 1).flatten()
        weight, bias, ridge, error = affine_map(embedded[:, 1:].flatten(0, 1), self.p[:, 1:].flatten(0, 1), held)
        if self.halves.block_length > 1:
            self.fits.append(Fit(self.halves.split, (), "token_projection", ridge, error))
            _fill(self.body.token_projection, weight, bias)
        mine = self._ids()[:, 2:, :-1]
        entering = []
        for part, _ in self.parts:
            prefix = self._computed(self.body.context_expansion, c[part]).unflatten(-1, (count, hidden))
            tokens = self._computed(self.body.token_projection, self._computed(self.body.embed_tokens, mine[part]))
            entering.append(torch.cat([prefix, tokens], 2))
        return torch.cat(entering)

    def _walk_parent(self, span: Iterable[int], own: int) -> Tensor:
        """Take the parent's stream over a span of layers. Returns it behind the attention of `own`, [S, T, D]."""
        kept = self.p
        for layer in span:
            attended = torch.empty_like(self.p)
            with self.parent.loaded(layer):
                for part, _ in self.parts:
                    entered = self.p[part].to(self.parent.device)
                    attention = self.parent.attend(layer, entered)
                    middle = entered if attention is None else entered + attention
                    ffn = self.parent.feed_forward(layer, middle)
                    attended[part] = middle.cpu()
                    self.p[part] = (middle if ffn is None else middle + ffn).cpu()
            kept = attended if layer == own else kept
        return kept

    def _layer(self, index: int, span: tuple[int, ...], x: Tensor, of_parent: Any, places: slice, fit: bool) -> Tensor:
        """Take the parent's stream over a span and the student's, x [S, R, K, D], through the layer that stands for it,
        which is fitted on the way."""
        layer = self.spec.layers[index]
        attended = self._walk_parent(span, layer.parents[0])
        if layer.attention is not None:
            wanted = attended if layer.ffn is not None else self.p
            x = self._half(index, "attention", x, of_parent(wanted) if fit else None, places)
        if layer.ffn is not None:
            x = self._half(index, "ffn", x, of_parent(self.p) if fit else None, places)
        return x

    def _half(
        self, index: int, which: Literal["attention", "ffn"], x: Tensor, wanted: Tensor | None, places: slice
    ) -> Tensor:
        """The stream behind a layer's attention or FFN, whose output projection is moved towards `wanted` first."""
        layer, family = self.body.layers[index], self.family
        attends = which == "attention"
        name = f"{family.attention}.{family.attention_out}" if attends else family.ffn_module(family.ffn_out)
        outlet = Outlet(layer, name, "", family.transposed)
        call = self._call(x) if attends else {}
        moments, kept = Moments(), []
        for part, held in self.parts:
            rows = x[part].flatten(0, 1).to(self.student.device)
            contribution = layer.attend(rows, **call) if attends else layer.feed_forward(rows)
            kept.append((outlet.read, contribution))
            if wanted is not None:
                missing = wanted[part].flatten(0, 1).to(rows.device).float() - (rows + contribution)[:, places].float()
                features = outlet.features().unflatten(0, rows.shape[:2])[:, places]
                moments.add(features.flatten(0, 1), missing.flatten(0, 1), held)
        outlet.close()
        update = None
        if wanted is not None:
            update, ridge, error = best_update(moments.complete(), self.ridges)
            self.fits.append(Fit(index, self.spec.layers[index].parents, name, ridge, error))
            if update is not None:
                outlet.move(update)
        behind = []
        for (part, _), (read, contribution) in zip(self.parts, kept, strict=True):
            added = contribution if update is None else outlet.contribution(read)
            behind.append(x[part] + added.unflatten(0, x[part].shape[:2]).cpu())
        return torch.cat(behind)

    def _call(self, x: Tensor) -> dict[str, Any]:
        """What attention is called with beside rows of K places: causal, positions from 0."""
        from transformers.masking_utils import create_causal_mask

        like = x[0, :1].to(self.student.device)
        positions = torch.arange(like.shape[1], device=like.device)[None]
        mask = create_causal_mask(self.student.config, like, None, None)
        rotary = self.body.rotary_emb(like, position_ids=positions)
        return {"attention_mask": mask, "position_embeddings": rotary, "position_ids": positions}


def _fill(linear: Any, weight: Tensor, bias: Tensor) -> None:
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
