"""The model card of a written checkpoint: what was cut, what it cost, how to load it."""

from __future__ import annotations

from typing import Any

import yaml

from llmsurgeon import __version__
from llmsurgeon.formats.write import Written
from llmsurgeon.summary import Costs, human

LOADS = {
    "native": "It is a plain `{model_type}` checkpoint and loads wherever the original does: transformers, vLLM, "
    "llama.cpp's converter.",
    "surgeon": "Its blocks differ in shape, so its forward pass ships in the checkpoint: read `{code}`, then load with "
    "`trust_remote_code=True`. AutoModelForCausalLM refuses to load it without; do not name a stock class such as "
    "LlamaForCausalLM by hand, which would fill what is gone at random. It runs in transformers.",
}


def model_card(
    base_model: str,
    written: Written,
    before: Costs,
    after: Costs,
    recipe: str,
    evaluation: dict[str, Any] | None,
    text: str | None,
    notes: list[str],
    gate: list[str],
) -> str:
    """README.md of a checkpoint, with the metadata block that the hub reads."""
    meta: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    # A path on somebody's disk means nothing to a reader, and the hub refuses it as base_model.
    if base_model.count("/") <= 1 and not base_model.startswith((".", "/")) and not base_model.endswith(".gguf"):
        meta["base_model"] = base_model
    meta["tags"] = ["llmsurgeon", "model-surgery", *(["custom_code"] if written.format == "surgeon" else [])]
    name = base_model.rstrip("/").rpartition("/")[2]
    lines = ["---", yaml.safe_dump(meta, sort_keys=False).strip(), "---", "", f"# {name}, operated on", ""]
    if gate:
        lines += ["> **The quality gate of the recipe failed:** " + "; ".join(gate), ""]
    lines += [
        f"Made from `{name}` by llmsurgeon {__version__} with the recipe below.",
        "",
        "| | parent | this model |",
        "|---|---:|---:|",
        f"| blocks | {before.blocks} | {after.blocks} |",
        f"| attentions | {before.attentions} | {after.attentions} |",
        f"| parameters | {human(before.parameters)} | {human(after.parameters)} |",
        f"| FLOPs a token (weights) | {human(before.flops_per_token)} | {human(after.flops_per_token)} |",
        f"| KV cache bytes a token | {before.kv_bytes_per_token:,} | {after.kv_bytes_per_token:,} |",
    ]
    if evaluation:
        lines += [
            f"| perplexity | {evaluation['parent_perplexity']:.2f} | {evaluation['perplexity']:.2f} |",
            f"| KL to the parent, nats a token | 0 | {evaluation['kl']:.3f} |",
            f"| same most likely token | 100 % | {100 * evaluation['top1_agreement']:.1f} % |",
            "",
            f"Measured on {evaluation['tokens']:,} tokens held out from the calibration text ({text}). "
            "Other text can fare worse.",
        ]
    else:
        lines += ["", "Its quality has not been measured: `llmsurgeon eval THIS --against PARENT`."]
    lines += ["", "## Loading", "", LOADS[written.format].format(
        model_type=written.config["model_type"], code=", ".join(path.name for path in written.code)
    )]  # fmt: skip
    trust = ", trust_remote_code=True" if written.format == "surgeon" else ""
    lines += [
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("PATH"{trust})',
        f'tokenizer = AutoTokenizer.from_pretrained("PATH"{trust})',
        "```",
        "",
        f"Format: {written.format} ({written.why}).",
    ]
    if notes:
        lines += ["", "## What was done", "", *(f"- {note}" for note in notes)]
    lines += ["", "## Recipe", "", "```yaml", recipe.strip(), "```", ""]
    return "\n".join(lines)
