"""What releases of transformers call things, and what a layer does with a call that it does not understand.

Ships inside converted checkpoints, which outlive releases. A model hands its layers masks, positions and a cache by
name, and stock layers take any name with `**kwargs`: a name that changed would be ignored, and the model would go on
without its cache. So the layers of this package take what they know, by each name that it has had, and raise for the
rest. Releases that were run: docs/formats.md of the package that wrote the checkpoint.
"""

import dataclasses
import inspect

import torch
import transformers
from huggingface_hub import dataclasses as hub_dataclasses
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers 5.24 on; before; bloom, falcon and gpt_neox between model and layers; before 4.56.
CACHE_NAMES = ("cache", "past_key_values", "layer_past", "past_key_value")
# What a layer may be handed beside its hidden state and its cache, and what attention makes of it itself.
UNDERSTOOD = frozenset(
    [
        *("attention_mask", "position_ids", "position_embeddings", "cache_position", "alibi", "use_cache"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "num_items_in_batch"),
        # Sequences that are packed into one row.
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "is_causal", "seq_idx"),
        # transformers 4.
        *("head_mask", "layer_head_mask"),
        # Of this package: which positions are padding.
        "token_mask",
    ]
)
# Labels that losses read, which models pass on to their layers all the same.
IGNORED = frozenset(["labels", "shift_labels", "return_dict"])


# Layers of some families returned (stream, attention weights, ...) before transformers 5.
TUPLES = int(transformers.__version__.split(".")[0]) < 5


def older_than(release):
    """Whether transformers is older than `release`, "5.14" say."""
    have = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    return have < tuple(int(part) for part in release.split("."))


def needs(release, what):
    """Raise an ImportError, while the checkpoint loads, where transformers is older than `release`."""
    if older_than(release):
        raise ImportError(f"{what} needs transformers {release} or newer, and this is {transformers.__version__}")


def not_understood(who, name):
    """The error for an argument that nothing here knows."""
    return TypeError(
        f"{who} was handed an argument that it does not understand: {name!r}. Leave it out; if it is transformers "
        f"{transformers.__version__} itself that passes it, this code is older than that release: take an earlier one"
    )


def pop_cache(who, arguments):
    """The cache out of a call's keyword arguments, by whichever name it has there; None where there is none.

    Raises:
        TypeError: two of them.
    """
    found = [(name, arguments.pop(name)) for name in CACHE_NAMES if name in arguments]
    given = [(name, cache) for name, cache in found if cache is not None]
    if len(given) > 1:
        raise TypeError(f"{who} was handed two caches, {given[0][0]!r} and {given[1][0]!r}: give one")
    return given[0][1] if given else None


def pop_asked_cache(who, arguments):
    """The same for a layer that keeps a state: a model that uses a cache hands one to each layer.

    Raises:
        TypeError: two of them, or `use_cache` and none.
    """
    cache = pop_cache(who, arguments)
    if cache is None and arguments.get("use_cache"):
        names = ", ".join(CACHE_NAMES)
        raise TypeError(
            f"{who} was called with use_cache=True and no cache under a name that it knows ({names}); transformers "
            f"{transformers.__version__} may be newer than this code: take an earlier release, or use_cache=False"
        )
    return cache


def check_known(who, arguments, known=UNDERSTOOD):
    """Raise a TypeError where a call's keyword arguments hold one that is neither known nor None."""
    for name, value in arguments.items():
        if name not in known and name not in IGNORED and value is not None:
            raise not_understood(who, name)


def stock_layer(block_class):
    """The class of transformers that a block is made of."""
    return next(
        c for c in block_class.__mro__ if c.__module__.startswith("transformers.models.") and "forward" in vars(c)
    )


def layer_arguments(block_class):
    """(names of a layer's arguments behind the hidden state in their order, the cache's name) in this release.

    The cache's name is None for a layer that has none.
    """
    names = list(inspect.signature(stock_layer(block_class).forward).parameters)[2:]
    return names, cache_name(names)


def cache_name(names):
    """Which of these names is the cache's; None without one."""
    return next((name for name in CACHE_NAMES if name in names), None)


def layer_call(block, args, kwargs):
    """The keyword arguments that `block`'s attention is called with, from those that the block was called with.

    Raises:
        TypeError: one of them is not known here.
    """
    who = type(block).__name__
    if len(args) > len(block.argument_names):
        raise TypeError(f"{who} was handed {len(args)} arguments, its family's layer takes {len(block.argument_names)}")
    # Of one length: torch 2.7's compiler takes no others.
    call = {**dict(zip(block.argument_names[: len(args)], args, strict=True)), **kwargs}
    cache = pop_cache(who, call)
    check_known(who, call)
    call = {name: value for name, value in call.items() if name in UNDERSTOOD}
    if block.cache_name is not None:
        call[block.cache_name] = cache
    elif cache is not None:
        raise not_understood(who, "cache")
    return call


# The name of the cache in a model's output.
OUTPUT_CACHE = cache_name([field.name for field in dataclasses.fields(CausalLMOutputWithPast)])


MASK_ARGUMENTS = frozenset(inspect.signature(create_causal_mask).parameters)
MASK_CACHE = cache_name(MASK_ARGUMENTS)


def causal_mask(config, hidden_BTD, real_BT, cache):
    """transformers' causal mask for attention, of its own choice of form, by the arguments that this release has.

    real_BT [B, positions so far] is 0 for padding, None without any.
    """
    given = {"config": config, "attention_mask": real_BT, MASK_CACHE: cache}
    given["inputs_embeds" if "inputs_embeds" in MASK_ARGUMENTS else "input_embeds"] = hidden_BTD
    if "cache_position" in MASK_ARGUMENTS:
        seen = 0 if cache is None else cache.get_seq_length()
        given["cache_position"] = torch.arange(seen, seen + hidden_BTD.shape[1], device=hidden_BTD.device)
    return create_causal_mask(**given)


def strict(config_class):
    """transformers 5 checks the types of a config's fields, those that a class of this package adds included."""
    return hub_dataclasses.strict(config_class) if dataclasses.is_dataclass(config_class) else config_class


def read_names_as(model_type, stock):
    """Let files of `model_type` spell their tensors as those of the `stock` type do.

    transformers 5 keeps a table for that; in transformers 4 it is the class that says so, and ours inherit it.
    """
    try:
        from transformers import conversion_mapping as table
    except ImportError:
        return
    table.register_checkpoint_conversion_mapping(
        model_type, table.get_checkpoint_conversion_mapping(stock), overwrite=True
    )
