"""A checkpoint in vLLM: vllm_worker.py '{"folder": ..., "positions": 576, "batch": 1, ...}'

The request is [prompts, new tokens]; the answer are seconds until all have their first token, and from then on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def load(asked: dict[str, Any]) -> tuple[dict[str, Any], Callable[[list[Any]], dict[str, Any]]]:
    """The engine. asked: folder, positions, batch, trust_remote_code, share of a card, and dtype or None."""
    # On a CPU: no thread is bound to a processor, as two models take turns. How many there are is told from outside, by
    # OMP_NUM_THREADS.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # The engine's steps are counted here, in this process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    made = LLM(
        asked["folder"],
        dtype=asked["dtype"] or "auto",
        max_model_len=asked["positions"],
        max_num_seqs=asked["batch"],
        max_num_batched_tokens=max(2048, asked["batch"] * asked["positions"]),
        gpu_memory_utilization=asked["share"],
        enable_prefix_caching=False,  # a second prompt must cost what the first did
        skip_tokenizer_init=True,
        trust_remote_code=asked["trust_remote_code"],
        disable_log_stats=True,
    )
    engine, number = made.llm_engine, iter(range(1 << 62))

    def answer(request: list[Any]) -> dict[str, Any]:
        prompts, new_tokens = request
        # The prefill gives one token more than is timed.
        how = SamplingParams(temperature=0, max_tokens=new_tokens + 1, ignore_eos=True, detokenize=False)
        waiting, read = set(), None
        start = time.perf_counter()
        for prompt in prompts:
            name = str(next(number))
            waiting.add(name)
            engine.add_request(name, {"prompt_token_ids": prompt}, how)
        while engine.has_unfinished_requests():
            waiting -= {each.request_id for each in engine.step() if each.outputs and each.outputs[0].token_ids}
            if read is None and not waiting:
                read = time.perf_counter()
        end = time.perf_counter()
        assert read
        return {"prefill": read - start, "decode": end - read}

    computed = made.llm_engine.model_config.dtype
    said = {
        "threads": torch.get_num_threads(),
        "device": current_platform.device_type,
        "dtype": str(computed).removeprefix("torch."),
        "cache_number_bytes": computed.itemsize,
        "weight_bytes": None,
    }
    return said, answer


if __name__ == "__main__":
    # Beside this file, where it is run; llmsurgeon may not be there.
    from answering import answer_all

    answer_all(lambda: load(json.loads(sys.argv[1])), Exception)
