"""Perplexity over one stream of a text, as llama.cpp's `llama-perplexity` does. T tokens of the stream, L a window's.

With a stride, windows begin that many tokens apart and of each the last that many are scored, so that every scored
token has at least L - stride before it. Without, windows follow one another and of each the second half is scored.
Source: tools/perplexity/perplexity.cpp of llama.cpp, build 11434.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsurgeon.boundary.foreign import token_ids
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.perplexity import Interval, perplexity, perplexity_interval, token_losses
from llmsurgeon.processes.share import Share
from llmsurgeon.progress import track
from llmsurgeon.text.windows import window_start

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Strided:
    """Perplexity of `tokens` scored tokens, in windows of `window`; stride 0: the second halves of all windows."""

    window: int
    stride: int
    tokens: int
    perplexity: float
    perplexity_interval: Interval | None
    parent_perplexity: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As `eval --json` prints it."""
        return asdict(self)


def stream(text: str, tokenizer: PreTrainedTokenizerBase, most: int, where: str) -> Tensor:
    """The first `most` tokens of a text, with what the tokenizer puts before it: int64 [T].

    "<unk>" and the like that stand in the text are text, as llama-perplexity reads it, and no special tokens.
    """
    # A token has rarely more than a few characters; what is cut off here is far behind the last one.
    ids = token_ids(tokenizer, text[: most * 64], verbose=False, split_special_tokens=True)[:most]
    if len(ids) < 2:
        raise SurgeryError(f"{where}: {len(ids)} tokens are too few to measure on; give a longer text")
    return torch.tensor(ids)


def strided(
    model: PreTrainedModel,
    stream_T: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    stride: int,
    parent: PreTrainedModel | None = None,
) -> Strided:
    """Perplexity of a model, and of its parent, over a stream of tokens.

    Raises:
        SurgeryError: the stride is longer than the window, or the text shorter than one.
    """
    if stride >= window:
        raise SurgeryError(f"--stride {stride}: expected fewer than the {window} tokens of a window")
    starts, scored = _windows(len(stream_T), window, stride)
    if not starts:
        raise SurgeryError(f"{len(stream_T)} tokens are fewer than one window of {window}; lower --seq-len")
    # As llama-perplexity: each window begins like a text, the first one does already.
    begin = window_start(tokenizer) if not stride else []
    losses = _losses(model, stream_T, starts, (window, scored), begin)
    theirs = perplexity(_losses(parent, stream_T, starts, (window, scored), begin).mean().item()) if parent else None
    interval = perplexity_interval(losses.mean(1))
    return Strided(window, stride, losses.numel(), perplexity(losses.mean().item()), interval, theirs)


def _windows(count: int, window: int, stride: int) -> tuple[list[int], int]:
    """(where windows begin, how many tokens at the end of each are scored)."""
    if stride:
        return list(range(0, count - window, stride)), stride
    return list(range(0, count - window + 1, window)), window - window // 2 - 1


@torch.no_grad()
def _losses(
    model: PreTrainedModel, stream_T: Tensor, starts: list[int], sizes: tuple[int, int], begin: list[int]
) -> Tensor:
    """The losses of the scored tokens of each window, [windows, scored]."""
    window, scored = sizes
    found, share = [], Share.of(len(starts))
    for start in track([starts[row] for row in share.rows], "perplexity", unit="windows"):
        targets = stream_T[start : start + window].to(model.device)
        seen = targets.clone()
        seen[: len(begin)] = torch.tensor(begin, dtype=seen.dtype, device=seen.device)
        logits = model(input_ids=seen[None], use_cache=False).logits[0, -scored - 1 : -1]
        found.append(token_losses(logits, targets[-scored:]).cpu())
    return share.every(torch.stack(found))
