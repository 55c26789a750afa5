"""vLLM on a CPU loads what this tool writes, and computes what transformers does. Started by scripts/engines."""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

sys.path.insert(0, str(Path(__file__).parent))
from compared import BASE, expected, held

pytest.importorskip("vllm")
pytestmark = pytest.mark.engines
PLUGIN = any(point.name == "llmsurgeon" for point in entry_points(group="vllm.general_plugins"))
NEW = 12


# The surgeon form is the plugin's; without it vLLM has no class for it.
LOADED = [name for name in expected() if not name.startswith("refused") and (PLUGIN or "surgeon" not in name)]


@pytest.mark.skipif(not PLUGIN or not expected(), reason="the plugin refuses")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("refused-parallel", "layer 2 of this surgeon_llama checkpoint runs blocks in parallel"),
        ("refused-heads", "Qwen2Attention takes no heads of 32 where there are 2"),
        ("refused-settings", "use_parallel_residual of this surgeon_stablelm checkpoint is True"),
    ],
)
def test_what_vllm_has_no_layers_for_is_refused_with_the_reason(name, message):
    from vllm import LLM

    with pytest.raises(Exception, match=message):
        LLM(str(BASE / name), enforce_eager=True, max_model_len=64, skip_tokenizer_init=True)


@pytest.mark.parametrize("name", LOADED)
def test_a_checkpoint_is_computed_as_by_transformers(name):
    from vllm import LLM, SamplingParams

    wanted = expected()[name]
    model = LLM(
        wanted["folder"],
        dtype=wanted["dtype"],
        enforce_eager=True,
        max_model_len=256,
        enable_prefix_caching=True,
        skip_tokenizer_init=wanted["texts"] is None,
        trust_remote_code=not PLUGIN,
    )
    how = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, prompt_logprobs=0, detokenize=False)
    prompts = wanted["texts"] or [{"prompt_token_ids": prompt} for prompt in wanted["prompts"]]
    # All in one call are batched; once more, alone and with what the first call has left in the prefix cache.
    batched = model.generate(prompts, how, use_tqdm=False)
    assert [list(each.prompt_token_ids) for each in batched] == wanted["prompts"]
    logs = [
        [place[token].logprob for place, token in zip(each.prompt_logprobs[1:], prompt[1:], strict=True)]
        for each, prompt in zip(batched, wanted["prompts"], strict=True)
    ]
    follow = [list(each.outputs[0].token_ids) for each in batched]
    held("vllm", name, "plugin" if PLUGIN else "checkpoint's", logs, follow)
    plain = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    again = [list(model.generate([prompt], plain, use_tqdm=False)[0].outputs[0].token_ids) for prompt in prompts[:4]]
    if wanted["dtype"] == "float32":
        assert again == follow[:4]
