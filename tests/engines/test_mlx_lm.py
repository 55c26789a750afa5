"""mlx-lm loads what this tool writes, and computes what transformers does. Started by scripts/engines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from compared import expected, held

pytest.importorskip("mlx_lm")
pytestmark = pytest.mark.engines
NEW = 12


@pytest.mark.parametrize("name", [name for name in expected() if not name.startswith(("surgeon", "bitnet", "refused"))])
def test_a_checkpoint_is_computed_as_by_transformers(name):
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model, load_tokenizer

    wanted = expected()[name]
    folder = Path(wanted["folder"])
    model, _ = load_model(folder)
    model.set_dtype(getattr(mx, wanted["dtype"]))
    if wanted["texts"]:
        tokenizer = load_tokenizer(folder)
        assert [tokenizer.encode(text) for text in wanted["texts"]] == wanted["prompts"]
    logs, follow = [], []
    for prompt in wanted["prompts"]:
        cache = make_prompt_cache(model)
        logits = model(mx.array([prompt]), cache=cache)[0].astype(mx.float32)
        normed = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        logs.append([normed[place, token].item() for place, token in enumerate(prompt[1:])])
        made = [mx.argmax(logits[-1]).item()]
        while len(made) < NEW:
            made.append(mx.argmax(model(mx.array([[made[-1]]]), cache=cache)[0, -1]).item())
        follow.append(made)
    held("mlx-lm", name, "mlx-lm's", logs, follow)
