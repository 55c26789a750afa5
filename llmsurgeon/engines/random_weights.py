"""Weights for models that are only timed: random numbers, of which one tile is laid over every matrix.

Time depends on shapes and bytes. Values only have to stay away from zeros, denormals and infinities.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from llmsurgeon.checkpoint.gguf.file import ARRAY, INT32, STRING, UINT32, Field
from llmsurgeon.checkpoint.shards import meta_weights
from llmsurgeon.checkpoint.transform import TransformedWeights
from llmsurgeon.engines.shapes import Described
from llmsurgeon.formats.gguf.kinds import chosen_kinds, known_type
from llmsurgeon.formats.gguf.model import lay_out
from llmsurgeon.formats.gguf.write import Encoder, begun, encoder_of, opened_writer

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

TILE = 1 << 18  # numbers
SPREAD = 0.02  # standard deviation


@cache
def _tile() -> Tensor:
    return torch.randn(TILE, generator=torch.Generator().manual_seed(0)) * SPREAD


class RandomWeights(Mapping[str, Tensor]):
    """A random tensor of every name; vectors, which are gains and biases, are ones."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self._shapes, self._dtype = shapes, dtype

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) < 2:
            return torch.ones(shape, dtype=self._dtype)
        made = torch.empty(prod(shape), dtype=self._dtype)
        for part in made.split(TILE):
            part.copy_(_tile()[: len(part)])
        return made.view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def write_random_gguf(path: Path, model: Described, type: str) -> None:
    """A GGUF file of this model with random weights, and a tokenizer of as many tokens that mean nothing."""
    meta = {name: torch.empty(shape, device="meta") for name, shape in model.shapes.items()}
    layout = lay_out(model.source, model.family, model.spec, meta)
    tensors = TransformedWeights(meta, layout.transforms)
    shapes = meta_weights(tensors)
    kinds = chosen_kinds(tensors, shapes, known_type(type), None)
    sizes = kinds.sizes(shapes)
    fields = [Field("general.type", "model", STRING), *layout.fields, *_tokenizer(model.spec.vocab)]
    writer = opened_writer(path, layout.architecture, fields, shapes, kinds)
    file = begun(writer)
    for name, kind in kinds.of.items():
        tile, left = _encoded(encoder_of(kinds, kind), kind, shapes[name].dim() < 2), sizes[name]
        while left > 0:
            left -= file.write(tile[:left])
        writer.write_padding(file, sizes[name])
    writer.close()


@cache
def _encoded(encode: Encoder, kind: GGMLQuantizationType, vector: bool) -> memoryview:
    """The bytes of a tile in one of GGUF's types."""
    numbers = torch.ones(TILE) if vector else _tile()
    return memoryview(np.ascontiguousarray(encode(numbers.numpy().reshape(-1, 256), kind)).view(np.uint8).tobytes())


def _tokenizer(rows: int) -> list[Field]:
    """A byte-level tokenizer of llama.cpp's: the letters first, then tokens that no text has."""
    tokens = [chr(ord("a") + i) if i < 26 else f"<{i}>" for i in range(rows)]
    return [
        Field("tokenizer.ggml.model", "gpt2", STRING),
        Field("tokenizer.ggml.pre", "default", STRING),
        Field("tokenizer.ggml.tokens", tokens, ARRAY, STRING),
        Field("tokenizer.ggml.token_type", [1] * rows, ARRAY, INT32),
        Field("tokenizer.ggml.merges", ["a b"], ARRAY, STRING),
        Field("tokenizer.ggml.bos_token_id", rows - 1, UINT32),
        Field("tokenizer.ggml.eos_token_id", rows - 1, UINT32),
    ]
