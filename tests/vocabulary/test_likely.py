"""Which tokens are likely in more of a text: the regression, the spelling, and what they are for."""

from __future__ import annotations

import math
import random

import pytest
import torch

from llmsurgeon.vocabulary.likely import (
    ANY,
    PRIOR,
    RIDGE,
    SHIFT,
    TOLD,
    Expected,
    Spelling,
    _chances,
    likely_tokens,
    logistic,
)


def words(letters: str, count: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    made = {"".join(chance.choices(letters, k=chance.randint(3, 6))) for _ in range(3 * count)}
    return sorted(made)[:count]


def test_regression_is_at_its_minimum() -> None:
    """Beside plain gradient descent on the loss as it is written down."""
    seeded = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=seeded, dtype=torch.float64)
    truth = torch.tensor([1.5, -2.0, 0.0], dtype=torch.float64)
    answers = (torch.rand(400, generator=seeded) < torch.sigmoid(x @ truth - 1)).double()
    found = logistic(x, answers)
    slow = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS([slow], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        descent.zero_grad()
        chance = torch.sigmoid(x @ slow[:3] + slow[3])
        made = (
            -(answers * chance.log() + (1 - answers) * (1 - chance).log()).sum() + RIDGE / 2 * slow[:3].square().sum()
        )
        made.backward()
        return made

    descent.step(loss)
    torch.testing.assert_close(found, slow.detach(), atol=1e-4, rtol=1e-4)
    # One feature tells all apart: damping keeps the coefficients finite.
    assert logistic(x, (x[:, 0] > 0).double()).isfinite().all()


def test_spelling_counts_what_follows() -> None:
    spelling = Spelling(["ab", "ac", "ab"])
    # By hand: characters without context, then behind "a", then behind the beginning and "a".
    alone = (2 + 0.01) / (9 + 300)
    behind = (2 + PRIOR * alone) / (3 + PRIOR)
    beginning = (2 + PRIOR * behind) / (3 + PRIOR)
    start = (3 + PRIOR * (3 + 0.01) / (9 + 300)) / (3 + PRIOR)
    mean, least = spelling.of("ab")
    assert least == pytest.approx(math.log(min(start, beginning)))
    assert mean == pytest.approx((math.log(start) + math.log(beginning)) / 2)
    assert spelling.of("zz")[0] < spelling.of("ac")[0] < spelling.of("ab")[0]


def test_words_of_the_texts_language_come_first() -> None:
    """The model expects words of another language as much; their spelling and use in the text tell them apart."""
    mine, others = words("abcde", 240, 1), words("vwxyz", 240, 2)
    chance = random.Random(3)
    names = [*mine, *others]
    chance.shuffle(names)
    ids = {name: i for i, name in enumerate(names)}
    seen = mine[::2]
    counts = {ids[name]: 1 + (place % 3) for place, name in enumerate(seen)}
    expected = {i: chance.random() for i in ids.values()}
    odds = likely_tokens(ids, counts, Expected(expected))
    unseen = sorted((name for name in names if ids[name] not in counts), key=lambda name: -odds[ids[name]])
    found = set(unseen[:120])
    # Some places are those of any text; what is likely in this one alone leaves it none.
    assert len(found & set(mine)) > 90
    here = _chances({i: name for name, i in ids.items()}, counts, expected)
    unseen.sort(key=lambda name: -here[ids[name]])
    assert len(set(unseen[:120]) & set(mine)) > 110
    by_expectation = sorted((name for name in names if ids[name] not in counts), key=lambda name: -expected[ids[name]])
    assert len(set(by_expectation[:120]) & set(mine)) < 80


def test_what_is_expected_counts() -> None:
    """Of tokens spelled alike, those that the model expects more."""
    names = {name: i for i, name in enumerate(words("abcdefg", 300, 4))}
    chance = random.Random(5)
    expected = {i: chance.random() for i in names.values()}
    counts = {i: 1 for i, share in expected.items() if share > 0.7 and chance.random() < 0.5}
    found = likely_tokens(names, counts, Expected(expected))
    likely, unlikely = ([i for i in expected if low < expected[i] < low + 0.1] for low in (0.9, 0.0))

    def means(by: dict[int, float]) -> list[float]:
        return [sum(by[i] for i in part) / len(part) for part in (likely, unlikely)]

    more, less = means(found)
    assert more > math.e * less
    here = _chances({i: name for name, i in names.items()}, counts, expected)
    more, less = means({i: math.log(each / (1 - each)) for i, each in here.items()})
    assert more > less + 1


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("written", [{}, {0: 0.125, 1: 0.5, 7: 3.0}])
def test_without_an_example_of_each_expectation_tells(count: int, written: dict[int, float]) -> None:
    """By hand: half of all words are expected to be "a"; row 7 has no name, and is told of nothing."""
    found = likely_tokens({"a": 0, "b": 1}, {0: count, 1: count}, Expected({0: 0.5, 1: 0.25, 7: 0.25}, written))
    share = 1 if count else 0
    told = written or {0: 0.5, 1: 0.25}
    other = {i: told[i] ** TOLD / (i + SHIFT) ** (1 - TOLD) for i in (0, 1)}
    by_hand = {i: (1 - ANY) * share * e + ANY * other[i] / sum(other.values()) for i, e in ((0, 0.5), (1, 0.25))}
    assert found == pytest.approx(by_hand)


def test_a_share_is_of_any_text() -> None:
    """Tokens that the text tells nothing apart of stand in the vocabulary's order, spread as Zipf has it."""
    names = {name: i for i, name in enumerate(words("abcdefg", 400, 6))}
    counts = {i: 1 + i % 2 for i in range(0, 200, 2)}
    found = likely_tokens(names, counts, Expected(dict.fromkeys(names.values(), 0.01)))
    assert sum(found.values()) < 1.001
    unseen = [i for i in names.values() if i not in counts]
    first, last = ([found[i] for i in unseen if low <= i < low + 100] for low in (0, 300))
    assert min(first) > max(last)
    # The text still outweighs the order where it tells much: of tokens of one rank those that it expects.
    told = likely_tokens(
        names, counts, Expected({i: 5.0 if i in counts or i % 4 == 1 else 1e-6 for i in names.values()})
    )
    late = [i for i in unseen if i >= 300]
    assert min(told[i] for i in late if i % 4 == 1) > max(told[i] for i in late if i % 4 != 1)
