"""Greedy tokens of a checkpoint in vLLM, by ranks of their own: generated.py NAME RANKS [compile]"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
sys.path.insert(0, str(Path(__file__).parent))
from compared import expected


def main(name: str, ranks: str, how: str = "eager") -> None:
    from vllm import LLM, SamplingParams

    wanted = expected()[name]
    model = LLM(
        wanted["folder"],
        dtype=wanted["dtype"],
        tensor_parallel_size=int(ranks),
        enforce_eager=how != "compile",
        max_model_len=128,
        skip_tokenizer_init=True,
    )
    greedy = SamplingParams(temperature=0, max_tokens=len(wanted["follow"][0]), ignore_eos=True, detokenize=False)
    made = model.generate([{"prompt_token_ids": prompt} for prompt in wanted["prompts"]], greedy, use_tqdm=False)
    print("TOKENS", json.dumps([list(each.outputs[0].token_ids) for each in made]), flush=True)


if __name__ == "__main__":  # the ranks import this file
    main(*sys.argv[1:])
