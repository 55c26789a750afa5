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

from gpu_parts.timing import Setting, freed, in_turn

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
    up, down = (torch.randn(shape, device=device) / 28 for shape in ((neurons, hidden), (hidden, neurons)))
    narrow = [each.to(torch.bfloat16) for each in (x, up, down)]
    trees = {kind: tree(hidden, depth, setting, kind) for kind in (torch.float32, torch.bfloat16)}

    def dense(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, tf32: bool = False) -> torch.Tensor:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            return F.linear(F.gelu(F.linear(x, up)), down)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    ways = {
        "dense float32": lambda: dense(x, up, down),
        "dense tf32": lambda: dense(x, up, down, True),
        "dense bfloat16": lambda: dense(*narrow),
        "tree float32": lambda: trees[torch.float32](x),
        "tree bfloat16": lambda: trees[torch.bfloat16](narrow[0]),
    }
    times = in_turn(ways, device, 1.0)
    return {"times": times, "speedup": _beside(times)}


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
