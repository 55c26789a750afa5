"""Fast feedforward layers (arXiv 2308.14711, 2311.10770) at UltraFastBERT's shape, beside cuBLAS's dense layers.

768 wide, 4095 neurons in a tree of depth 11, 12 of them visited: every token has an input and a path of its own. Dense
layers of as many neurons in float32, tf32 and bfloat16. Then BERT-base whole: encoders of 12 layers, dense ones and
such whose FFNs are trees, on sequences of 128 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from gpu_parts.timing import Setting, copies_of, freed, in_turn, per_copy, rotated

HIDDEN, DEPTH = 768, 11
BATCHES = (1, 4, 16, 64, 128, 1024, 4096, 16384)


def rows(setting: Setting) -> Iterator[dict[str, Any]]:
    """The layer at each batch, then whole encoders."""
    hidden, depth = (32, 3) if setting.dry else (HIDDEN, DEPTH)
    for batch in (1, 20) if setting.dry else (1, 128, 16384) if setting.quick else BATCHES:
        yield {"what": "layer", "batch": batch, **layer(setting, hidden, depth, batch)}
    for batch in (1,) if setting.dry else (1, 32) if setting.quick else (1, 8, 32, 128):
        yield {"what": "BERT-base", "batch": batch, "length": 128, **encoders(setting, batch)}
        freed()


def tree(hidden: int, depth: int, setting: Setting, dtype: torch.dtype) -> Any:
    """A node-form layer of random weights."""
    from llmsurgeon.modeling.surgeon_fff import NodeFeedForward

    torch.manual_seed(0)
    made = NodeFeedForward(hidden, depth, "gelu", False, False, trees=1)
    return made.to(setting.device, dtype).eval().requires_grad_(False)


@torch.inference_mode()
def layer(setting: Setting, hidden: int, depth: int, batch: int) -> dict[str, Any]:
    """Microseconds of one layer by each way."""
    device, neurons = setting.device, 2 ** (depth + 1) - 1
    x = torch.randn(batch, hidden, device=device)
    narrow = x.to(torch.bfloat16)
    # As many layers as no cache holds, in turn, as the layers of a model are.
    copies = copies_of(2 * neurons * hidden * 2, device)
    trees = {kind: [tree(hidden, depth, setting, kind) for _ in range(copies)] for kind in (x.dtype, narrow.dtype)}
    weights = {kind: [dense_of(each, hidden) for each in many] for kind, many in trees.items()}

    def dense(number: int, x: torch.Tensor, tf32: bool = False) -> torch.Tensor:
        up, down = weights[x.dtype][number]
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            return F.linear(F.gelu(F.linear(x, up)), down)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    ways = {
        "dense float32": lambda number: dense(number, x),
        "dense tf32": lambda number: dense(number, x, True),
        "dense bfloat16": lambda number: dense(number, narrow),
        "tree float32": lambda number: trees[x.dtype][number](x),
        "tree bfloat16": lambda number: trees[narrow.dtype][number](narrow),
    }
    if not setting.dry and batch <= 128:
        for name, ahead in (("ahead", True), ("not ahead", False)):
            ways[f"tree float32, {name}"] = lambda number, ahead=ahead: direct(trees[x.dtype][number], x, ahead)
    times = in_turn({name: rotated(way, copies) for name, way in ways.items()}, device, 0.5)
    times = {name: per_copy(each, copies) for name, each in times.items()}
    one = trees[x.dtype][0]
    far = float((one(x) - one._gathered(x)).norm() / one._gathered(x).norm())
    return {"copies": copies, "times": times, "speedup": _beside(times), "from_torch": far}


def direct(made: Any, x: torch.Tensor, ahead: bool) -> torch.Tensor:
    """A tree's kernel, which asks for rows ahead or does not."""
    from llmsurgeon.modeling.surgeon_fff_triton import nodes

    parts = (None, made.node_up, made.node_down, None, None, made.out_bias)
    found: torch.Tensor = nodes(x, *parts, made.depth, "gelu", ahead=ahead)
    return found


def dense_of(made: Any, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(up [neurons, hidden], down [hidden, neurons]) of a dense layer with a tree's numbers, in memory of their own."""
    up, down = (part.reshape(-1, hidden) for part in (made.node_up, made.node_down))
    return up.clone(), down.T.contiguous()


def _beside(times: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The better tree's speedup over each dense way."""
    best = min(each["us"] for name, each in times.items() if name.startswith("tree"))
    return {name: each["us"] / best for name, each in times.items() if name.startswith("dense")}


def _instead(made: Any, norm: Any) -> Any:
    """What a layer of BERT does behind its attention, with a tree; transformers counts its arguments."""
    return lambda attended: norm(attended + made(attended))


@torch.inference_mode()
def encoders(setting: Setting, batch: int) -> dict[str, Any]:
    """Microseconds of whole encoders."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(**sizes if setting.dry else {}, vocab_size=1000)
    ids = torch.randint(1000, (batch, 8 if setting.dry else 128), device=setting.device)
    dense, trees = (BertModel(config).to(setting.device, setting.dtype).eval() for _ in range(2))
    for each in trees.encoder.layer:
        made = tree(config.hidden_size, 3 if setting.dry else DEPTH, setting, setting.dtype)
        each.feed_forward_chunk = _instead(made, each.output.LayerNorm)
    ways = {"dense": lambda: dense(input_ids=ids), "tree": lambda: trees(input_ids=ids)}
    times = in_turn(ways, setting.device, 1.0)
    return {"times": times, "speedup": times["dense"]["us"] / times["tree"]["us"]}
