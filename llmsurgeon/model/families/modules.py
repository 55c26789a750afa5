"""Where a family's parts are: module paths, which double as tensor-name prefixes, and what kind of module is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Experts:
    """How a mixture of experts is stored: a tensor for each expert in files, all of them stacked in today's class.

    gate, up, down are the names of an expert's projections in files, `module` that of the FFN in the class.
    """

    gate: str
    up: str
    down: str
    count_key: str
    per_token_key: str
    module: str = "mlp"
    # How published configs spell `count_key`, where today's class spells it otherwise.
    published_count_key: str = ""


@dataclass(frozen=True, kw_only=True)
class Modules:
    """Paths of a family's modules; those of a layer's parts are inside the layer.

    `ffn_in` are the projections that read the normed input (for a gated FFN: gate, then up), `ffn_out`
    the one that writes the residual stream. `transposed` marks GPT-2's Conv1D, which stores [in, out].
    A norm is "" where the family has none; `ffn` is "" where the projections are the layer's own.
    """

    model_type: str
    model_class: str
    layers: str
    embedding: str
    final_norm: str
    attention: str
    attention_norm: str
    ffn: str
    ffn_norm: str
    ffn_in: tuple[str, ...]
    ffn_out: str
    attention_out: str
    # Modules of attention whose rows belong to key/value heads.
    kv: tuple[str, ...] = ()
    # Module of attention whose rows belong to query heads, where they are apart from keys and values.
    queries: str = ""
    # In place of `kv`: one projection, and how its rows lie: all queries, all keys, all values; or per key/value
    # head its queries, its key, its value.
    fused_qkv: tuple[str, Literal["by kind", "by head"]] | None = None
    # Queries, keys and values have biases whatever the config says, and attention's output projection has none.
    biased_qkv: bool = False
    # Each of `ffn_in` stacks so many projections of one width along its rows (gate over up: 2).
    ffn_stacked: int = 1
    # Norms on what attention and FFN give, before it is added to the stream.
    attention_post_norm: str = ""
    ffn_post_norm: str = ""
    # Attention and FFN read through one norm, `attention_norm`; a fused FFN gets `ffn_norm` of its own.
    shares_norm: bool = False
    head: str = "lm_head"
    norm: Literal["rms", "layer"] = "rms"
    transposed: bool = False
    # Norms follow the residual sums, LN(x + f(x)), where others precede the parts, x + f(LN(x)). A part that goes
    # leaves its norm behind, LN(x): what comes next was trained to read that norm's output.
    post_norm: bool = False
    # Path of a projection behind the final norm, which some sizes have.
    final_projection: str = ""
    # The FFN is a mixture of experts; `ffn` is then its name in files, `ffn_in` and `ffn_out` are not used.
    experts: Experts | None = None

    def layer(self, index: int) -> str:
        """Tensor-name prefix of layer `index`, with its final dot."""
        return f"{self.layers}.{index}."

    @property
    def sub_norms(self) -> dict[str, tuple[str, str]]:
        """Output projection's path inside a layer -> (part, path of the norm that may stand before it)."""
        return {
            f"{self.attention}.{self.attention_out}": ("attention", f"{self.attention}.attn_sub_norm"),
            self.ffn_module(self.ffn_out): ("ffn", self.ffn_module("ffn_sub_norm")),
        }

    def is_attention(self, suffix: str) -> bool:
        """True where `suffix` (a tensor name inside a layer) belongs to attention or its norm."""
        return _inside(suffix, self.attention, self.attention_norm, self.attention_post_norm)

    def is_ffn(self, suffix: str) -> bool:
        """True where `suffix` belongs to the FFN or its norm."""
        own = (self.ffn,) if self.ffn else (*self.ffn_in, self.ffn_out)
        return _inside(suffix, *own, self.ffn_norm, self.ffn_post_norm)

    def ffn_module(self, projection: str) -> str:
        """Path inside a layer of one of the FFN's projections."""
        return f"{self.ffn}.{projection}" if self.ffn else projection

    @property
    def fast_ffn(self) -> str:
        """Path inside a layer of the module that computes a whole FFN, where trees take its place."""
        return self.ffn or self.ffn_in[0].rpartition(".")[0]

    def ffn_tensor(self, projection: str, kind: str = "weight") -> str:
        """Name inside a layer of one of the FFN's tensors."""
        return f"{self.ffn_module(projection)}.{kind}"


def _inside(suffix: str, *modules: str) -> bool:
    return suffix.startswith(tuple(f"{module}." for module in modules if module))
