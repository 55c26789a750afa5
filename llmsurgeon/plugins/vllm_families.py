"""Families in the surgeon form that vLLM has layers for: which classes of ours and of vLLM belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Family:
    """A family of decoders.

    name: as in `modeling_surgeon_NAME.py`.
    classes: as in `Surgeon...ForCausalLM`, the class in that file.
    module, model, layer: vLLM's file, its class of a causal language model there, and its class of a layer, which has
        the file's name before it where it is in another one.
    parts: modules of a layer that have another name in vLLM than in transformers.
    norms: further norms of attention and of the FFN, that some layouts of the family have.
    pairs: attention and FFN give (output, bias), and the layer adds the bias.
    settings: of config.json, what they have to be for vLLM's layers to compute the model.
    """

    name: str
    classes: str
    module: str
    model: str
    layer: str
    parts: Mapping[str, str] = field(default_factory=dict, hash=False)
    norms: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    pairs: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def model_type(self) -> str:
        """As in config.json."""
        return f"surgeon_{self.name}"

    @property
    def config(self) -> str:
        """The config's class in the modeling file."""
        return f"Surgeon{self.classes}Config"

    @property
    def architecture(self) -> str:
        """The model's class there, as in config.json's `architectures`."""
        return f"Surgeon{self.classes}ForCausalLM"

    def shipped(self) -> Any:
        """The modeling file that goes along in checkpoints."""
        return import_module(f"llmsurgeon.modeling.modeling_{self.model_type}")


FAMILIES = (
    Family("llama", "Llama", "llama", "LlamaForCausalLM", "LlamaDecoderLayer"),
    Family("mistral", "Mistral", "mistral", "MistralForCausalLM", "MistralDecoderLayer"),
    Family("qwen2", "Qwen2", "qwen2", "Qwen2ForCausalLM", "Qwen2DecoderLayer"),
    Family("qwen3", "Qwen3", "qwen3", "Qwen3ForCausalLM", "Qwen3DecoderLayer"),
    Family("phi3", "Phi3", "phi3", "Phi3ForCausalLM", "llama.LlamaDecoderLayer"),
    Family("granite", "Granite", "granite", "GraniteForCausalLM", "GraniteDecoderLayer"),
    Family("gemma2", "Gemma2", "gemma2", "Gemma2ForCausalLM", "Gemma2DecoderLayer"),
    Family("gemma3_text", "Gemma3Text", "gemma3", "Gemma3ForCausalLM", "Gemma3DecoderLayer"),
    Family("gpt2", "GPT2", "gpt2", "GPT2LMHeadModel", "GPT2Block"),
    Family("bloom", "Bloom", "bloom", "BloomForCausalLM", "BloomBlock"),
    Family("opt", "OPT", "opt", "OPTForCausalLM", "OPTDecoderLayer"),
    Family(
        *("falcon", "Falcon", "falcon", "FalconForCausalLM", "FalconDecoderLayer"),
        norms={"attention": ("ln_attn",), "ffn": ("ln_mlp",)},
        pairs=True,
    ),
    Family(
        *("stablelm", "StableLm", "stablelm", "StablelmForCausalLM", "StablelmDecoderLayer"),
        settings={"use_parallel_residual": False, "qk_layernorm": False},
    ),
    Family(
        *("mixtral", "Mixtral", "mixtral", "MixtralForCausalLM", "MixtralDecoderLayer"),
        parts={"mlp": "block_sparse_moe"},
    ),
    Family("qwen3_moe", "Qwen3Moe", "qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoeDecoderLayer"),
)
