"""A checkpoint in OpenVINO through optimum-intel: openvino_worker.py '{"folder": ..., "encoder": false, ...}'

The request of a decoder is [prompts, new tokens], of an encoder [prompts, 0]; the answer are seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
# Of widths that are no multiples of a group, smaller groups are made.
ROUNDINGS: dict[str, dict[str, Any]] = {"int8": {"bits": 8}, "int4": {"bits": 4, "group_size_fallback": "adjust"}}


def load(asked: dict[str, Any]) -> tuple[dict[str, Any], Callable[[list[Any]], dict[str, Any]]]:
    """The checkpoint, exported and compiled. asked: folder, encoder, and threads, dtype, type or None."""
    import torch
    from optimum.intel import OVModelForCausalLM, OVModelForFeatureExtraction, OVWeightQuantizationConfig

    config: dict[str, Any] = {"INFERENCE_NUM_THREADS": asked["threads"]} if asked["threads"] else {}
    if asked["dtype"]:
        config["INFERENCE_PRECISION_HINT"] = PRECISIONS[asked["dtype"]]
    # Left to itself, it would round the weights of models above a size.
    how: dict[str, Any] = {"load_in_8bit": False}
    if asked["type"]:
        how = {"quantization_config": OVWeightQuantizationConfig(**ROUNDINGS[asked["type"]])}
    kind = OVModelForFeatureExtraction if asked["encoder"] else OVModelForCausalLM
    model = kind.from_pretrained(asked["folder"], export=True, ov_config=config, **how)
    model.compile()
    compiled = model.request.get_compiled_model() if hasattr(model.request, "get_compiled_model") else model.request
    constants = (each for each in model.model.get_ops() if each.get_type_name() == "Constant")

    def answer(request: list[Any]) -> dict[str, Any]:
        prompts, new_tokens = request
        ids = torch.tensor(prompts)
        mask = torch.ones(len(ids), ids.shape[1] + new_tokens, dtype=torch.long)
        start = time.perf_counter()
        output = model(input_ids=ids, attention_mask=mask[:, : ids.shape[1]])
        read = time.perf_counter()
        for step in range(new_tokens):
            output = model(
                input_ids=output.logits[:, -1:].argmax(-1),
                attention_mask=mask[:, : ids.shape[1] + step + 1],
                past_key_values=output.past_key_values,
            )
        end = time.perf_counter()
        return {"prefill": read - start, "decode": end - read if new_tokens else None}

    said = {
        "threads": compiled.get_property("INFERENCE_NUM_THREADS"),
        "device": " ".join(compiled.get_property("EXECUTION_DEVICES")).lower(),
        "dtype": compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name(),
        "cache_number_bytes": compiled.get_property("KV_CACHE_PRECISION").size,
        "weight_bytes": sum(each.get_byte_size() for each in constants),
    }
    return said, answer


if __name__ == "__main__":
    # Beside this file, where it is run; llmsurgeon may not be there.
    from answering import answer_all

    answer_all(lambda: load(json.loads(sys.argv[1])), Exception)
