"""Which tokens are likely in more of a text, though they did not occur in it.

What a model expects somewhere in a text ranks words of other languages among the rare words of its own: each of them is
a little likely everywhere. So the text itself says how to weigh that. Its tokens that occurred once stand for those
that might as well not have occurred (Good and Turing); a logistic regression tells them from those that did not, by

    what the model expects        log of its probabilities, summed over positions
    the place in the vocabulary   its log, and the square of that
    the spelling                  mean and least log probability of its characters, each by the three before it, in
                                  the text's other tokens

That is what the text says, and whoever serves the model meets other text, too: code, names, other languages. Its
tokenizer was made for all of it, and tokens stand in it in the order in which they were merged, by how often they
occurred. So a share of what is likely is of any text, by the place in the vocabulary, as words are spread by their rank
(Zipf, with Mandelbrot's shift), and a little by what the model expects in text of all kinds that it writes itself:

    likely = (1 - ANY) * chance that it occurs in as much text again / tokens of the text + ANY * any
    any    = expected^TOLD * (1 / (place + SHIFT))^(1 - TOLD), divided by the sum over all

Shapes: V tokens, F features.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Characters that the next one is predicted by, and how often the shorter context's prediction counts as seen.
CONTEXT, PRIOR = 3, 2.0
# Damping of the coefficients of features of unit variance.
RIDGE = 3.0
# Of probabilities summed over thousands of positions: below it they are rounding.
LEAST = 1e-9
# The share of text that is of any kind; how much of what is likely there is by what the model expects, and by how much
# places are shifted.
ANY, TOLD, SHIFT = 0.25, 0.25, 100


@dataclass(frozen=True)
class Expected:
    """How often a model expects each token: its next-token probabilities, summed over positions.

    read: in all text that was read; written: in the part of it that the model wrote, nothing where it wrote none.
    """

    read: Mapping[int, float]
    written: Mapping[int, float] = field(default_factory=dict)


def likely_tokens(names: Mapping[str, int], counts: Mapping[int, int], expected: Expected) -> dict[int, float]:
    """Token -> how likely it is, in text like the one that was read and in any other; of those that have a name.

    Meant for tokens that did not occur: those that did are known by their counts.

    Args:
        names: token -> id. counts: how often each occurred.
    """
    spelled = {i: name for name, i in names.items() if i in expected.read}
    if not spelled:
        return {}
    here, read = _chances(spelled, counts, expected.read), max(1, sum(counts.values()))
    told = expected.written or expected.read
    elsewhere = {i: (max(told[i], 0) + LEAST) ** TOLD * (1 / (i + SHIFT)) ** (1 - TOLD) for i in spelled}
    whole = sum(elsewhere.values())
    return {i: (1 - ANY) * here[i] / read + ANY * elsewhere[i] / whole for i in sorted(spelled)}


def _chances(
    spelled: Mapping[int, str], counts: Mapping[int, int], expected: Mapping[int, float]
) -> Mapping[int, float]:
    """Token -> the chance that it occurs in as much text again.

    Where nothing occurred once, or everything did, it is what the model expects of as many tokens.
    """
    ids = sorted(spelled)
    seen = torch.tensor([counts.get(i, 0) for i in ids])
    once, doubtful = (seen == 1).double(), seen <= 1
    if not 0 < once.sum() < doubtful.sum():
        share = sum(counts.values()) / max(sum(expected.values()), LEAST)
        return {i: share * expected[i] for i in ids}
    common = [
        torch.tensor([math.log(max(expected[i], 0) + LEAST) for i in ids], dtype=torch.float64),
        torch.tensor(ids, dtype=torch.float64).add(SHIFT).log(),
    ]
    common.append(common[1].square())

    def features(least: int) -> Tensor:
        spelling = Spelling(spelled[i] for i, count in zip(ids, seen.tolist(), strict=True) if count >= least)
        told = torch.tensor([spelling.of(spelled[i]) for i in ids], dtype=torch.float64)
        return torch.cat([torch.stack(common, 1), told], 1)

    # A token that occurred once must not be known by its own spelling.
    learned = features(least=2)[doubtful]
    centre, scale = learned.mean(0), learned.std(0)
    scale[scale < 1e-6] = torch.inf  # what is alike for all of them tells nothing
    weights = logistic((learned - centre) / scale, once[doubtful])
    odds = (features(least=1) - centre) / scale @ weights[:-1] + weights[-1]
    return dict(zip(ids, torch.sigmoid(odds).tolist(), strict=True))


class Spelling:
    """How tokens are spelled: what character follows which, from all of some tokens, each once."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self.counts: Counter[str] = Counter()
        for token in tokens:
            text = "\n" + token  # no token's own character: where it begins
            for stop in range(1, len(text) + 1):
                self.counts.update(text[start:stop] for start in range(max(0, stop - CONTEXT - 1), stop))
        self.characters = max(1, sum(count for part, count in self.counts.items() if len(part) == 1))

    def of(self, token: str) -> tuple[float, float]:
        """Mean and least log probability of its characters."""
        text = "\n" + token
        logs = [math.log(self._next(text[max(0, at - CONTEXT) : at], text[at])) for at in range(1, len(text))]
        return (sum(logs) / len(logs), min(logs)) if logs else (0.0, 0.0)

    def _next(self, context: str, character: str) -> float:
        """Probability of a character, a longer context's count smoothed by what the shorter ones say."""
        chance = (self.counts[character] + 0.01) / (self.characters + 300)
        for length in range(1, len(context) + 1):
            before = context[-length:]
            if before in self.counts:
                chance = (self.counts[before + character] + PRIOR * chance) / (self.counts[before] + PRIOR)
        return chance


def logistic(features: Tensor, answers: Tensor) -> Tensor:
    """argmin over w of sum log(1 + e^z) - answer z + RIDGE/2 ||w||^2, z = w x + w_0, by Newton's method. [F + 1]

    Args:
        features: [V, F] of unit variance, float64; answers: 0 or 1, both of them there, [V].
    """
    x = torch.cat([features, features.new_ones(len(features), 1)], 1)
    damping = x.new_full((x.shape[1],), RIDGE)
    damping[-1] = 0
    weights = x.new_zeros(x.shape[1])
    share = answers.mean()
    weights[-1] = (share / (1 - share)).log()

    def loss(w: Tensor) -> float:
        z = x @ w
        return float((torch.nn.functional.softplus(z) - answers * z).sum() + (damping * w * w).sum() / 2)

    now = loss(weights)
    for _ in range(50):
        chance = torch.sigmoid(x @ weights)
        curvature = (x * (chance * (1 - chance))[:, None]).T @ x + torch.diag(damping + 1e-9)
        step = torch.linalg.solve(curvature, x.T @ (answers - chance) - damping * weights)
        size = 1.0
        while size > 1e-6 and loss(weights + size * step) > now:
            size /= 2
        before, weights = now, weights + size * step
        now = loss(weights)
        if before - now < 1e-6 * abs(before):
            break
    return weights
