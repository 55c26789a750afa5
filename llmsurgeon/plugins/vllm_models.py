"""Models of the surgeon form in vLLM: vLLM's own model of the family, each layer of the shape that its entry says.

vLLM's class of a layer reads the family's config. Here each layer reads a copy with its own numbers of heads and
channels, as the blocks in transformers do, and a part that its entry leaves out adds zeros: no weights, no products, no
KV cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index

from llmsurgeon.plugins.vllm_families import FAMILIES, Family

# Of a part's entry in block_configs, what vLLM's own layers compute.
STOCK = (None, "dense", "moe")
MODELS = "vllm.model_executor.models"


class Absent(nn.Module):
    """A part that is not there: zeros of the shape that it would have given.

    pair: with None for the bias, as layers of vLLM give it beside what they compute.
    """

    def __init__(self, pair: bool) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, read: torch.Tensor | None = None, **more: Any) -> Any:
        """Attention is called by keyword, an FFN by position."""
        zeros = torch.zeros_like(more["hidden_states"] if read is None else read)
        return (zeros, None) if self.pair else zeros


class Model:
    """Mixed in before vLLM's model of a family."""

    family: ClassVar[Family]
    # vLLM then counts layers that have an attention by block_configs.
    has_noops: ClassVar[bool] = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        refuse(self.family, config)
        with layers_shaped(self.family, config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """The names of what was loaded, and of the norms of absent parts, which no file has."""
        loaded: set[str] = super().load_weights(weights)  # type: ignore[misc]
        return loaded | {
            f"{name}.{norm}.{parameter}"
            for name, layer in self.named_modules()  # type: ignore[attr-defined]
            for norm in getattr(layer, "norms_of_absent", ())
            for parameter, _ in layer.get_submodule(norm).named_parameters()
        }


def refuse(family: Family, config: Any) -> None:
    """Raise ValueError for what vLLM's layers cannot compute."""
    for setting, needed in family.settings.items():
        if getattr(config, setting, needed) != needed:
            raise ValueError(
                f"{setting} of this {family.model_type} checkpoint is {getattr(config, setting)}, and vLLM's layers "
                f"compute {needed}; run it in transformers"
            )
    for index, entry in enumerate(config.block_configs):
        ways = {
            "runs blocks in parallel": entry.parallel,
            "has an attention of another kind": entry.attention.kind not in STOCK and entry.attention.kind,
            "has an FFN of another kind": entry.ffn.kind not in STOCK and entry.ffn.kind,
            "has norms before its output projections": entry.attention.sub_norm or entry.ffn.sub_norm,
            "has an FFN with a norm of its own": entry.ffn.own_norm,
            "has an FFN with biases": entry.ffn.bias,
        }
        for how, found in ways.items():
            if found:
                kind = f" ({found})" if isinstance(found, str) else ""
                raise ValueError(
                    f"layer {index} of this {family.model_type} checkpoint {how}{kind}, which vLLM has no layers for; "
                    "run it in transformers"
                )


@contextmanager
def layers_shaped(family: Family, config: Any) -> Iterator[None]:
    """While this is open, layers of the family's class are made in the shapes of `config.block_configs`."""
    file, _, name = family.layer.rpartition(".")
    layer_class: Any = getattr(import_module(f"{MODELS}.{file or family.module}"), name)
    stock: Callable[..., None] = layer_class.__init__
    block_class = family.shipped().Swapped.block_class
    shaped = import_module("llmsurgeon.modeling.surgeon_blocks").shaped

    def made(layer: Any, *args: Any, **kwargs: Any) -> None:
        index = extract_layer_index(kwargs["prefix"])
        entry = config.block_configs[index]
        shape = shaped(config, entry, block_class.width_key, block_class.kv_heads_key)
        args = tuple(shape_given(value, config, shape) for value in args)
        stock(layer, *args, **{key: shape_given(value, config, shape) for key, value in kwargs.items()})
        fit(layer, family, block_class, entry, config)

    layer_class.__init__ = made
    try:
        yield
    finally:
        layer_class.__init__ = stock


def shape_given(value: Any, config: Any, shape: Any) -> Any:
    """An argument of a layer, with `shape` in the place of the model's config, also inside vLLM's own config."""
    if value is config:
        return shape
    if getattr(getattr(value, "model_config", None), "hf_config", None) is not config:
        return value
    narrow = copy.copy(value)
    narrow.model_config = copy.copy(value.model_config)
    narrow.model_config.hf_config = narrow.model_config.hf_text_config = shape
    return narrow


def fit(layer: nn.Module, family: Family, block_class: Any, entry: Any, config: Any) -> None:
    """Give a layer that was just made what its class does not take from a config.

    Raises:
        ValueError: its heads are wider than they should be, where the class divides the model's width by their number.
    """
    attention = getattr(layer, block_class.attention_name)
    wanted = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not entry.attention.no_op and getattr(attention, "head_dim", wanted) != wanted:
        raise ValueError(
            f"vLLM's {type(attention).__name__} takes no heads of {wanted} where there are "
            f"{entry.attention.num_attention_heads}; run this {family.model_type} checkpoint in transformers"
        )
    if not entry.ffn.no_op:
        widen(layer, family, block_class, entry.ffn.intermediate_size)
    absent: list[str | None] = []
    if entry.attention.no_op:
        remove(layer, [block_class.attention_name], family)
        absent += [block_class.attention_norm_name, block_class.attention_post_norm_name]
        absent += family.norms.get("attention", ())
    if entry.ffn.no_op:
        # OPT's FFN is projections of the layer itself; of other families the list holds the norms, too.
        paths = [path for path in block_class.ffn_parts if "norm" not in path] or [block_class.ffn_name]
        remove(layer, [family.parts.get(path, path) for path in paths], family)
        absent += [block_class.ffn_norm_name, block_class.ffn_post_norm_name, *family.norms.get("ffn", ())]
    layer.norms_of_absent = [name for name in absent if name and hasattr(layer, name)]  # type: ignore[assignment]


def remove(layer: nn.Module, paths: list[str], family: Family) -> None:
    """Put zeros in the place of a part, and take its attention off vLLM's list of those that have a KV cache."""
    registered = get_current_vllm_config().compilation_config.static_forward_context
    for path in paths:
        gone = {id(module) for module in layer.get_submodule(path).modules()}
        for name in [name for name, module in registered.items() if id(module) in gone]:
            del registered[name]
        # A projection gives (output, bias).
        setattr(layer, path, Absent(pair=family.pairs or len(paths) > 1))


def widen(layer: nn.Module, family: Family, block_class: Any, width: int) -> None:
    """Make an FFN's projections anew where vLLM's class has four times the model's width, whatever the config says."""
    ffn: Any = getattr(layer, family.parts.get(block_class.ffn_name, block_class.ffn_name), None)
    if not hasattr(ffn, "dense_4h_to_h") or ffn.dense_4h_to_h.input_size == width:
        return
    first, last = ffn.dense_h_to_4h, ffn.dense_4h_to_h
    how = {"skip_bias_add": first.skip_bias_add, "quant_config": first.quant_config, "bias": first.bias is not None}
    ffn.dense_h_to_4h = type(first)(first.input_size, width, prefix=first.prefix, **how)
    how["reduce_results"] = last.reduce_results
    ffn.dense_4h_to_h = type(last)(width, last.output_size, prefix=last.prefix, **how)


def __getattr__(name: str) -> Any:
    """The class of a model by its architecture, as vLLM asks for it."""
    for family in FAMILIES:
        if name == family.architecture:
            stock = getattr(import_module(f"{MODELS}.{family.module}"), family.model)
            made = type(name, (Model, stock), {"family": family, "__module__": __name__})
            globals()[name] = made
            return made
    raise AttributeError(name)
