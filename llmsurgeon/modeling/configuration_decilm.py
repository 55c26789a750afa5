"""DeciLM (Nemotron-NAS): Llama whose blocks differ in shape. Ships inside converted checkpoints.

`block_configs` holds one entry per layer:

    attention: {no_op, n_heads_in_group, ...}    # query heads that share a key/value head
    ffn:       {no_op, ffn_mult, ...}            # width = 2 / 3 * ffn_mult * hidden_size, up to a multiple of 256

Engines read this class without the modeling file, on transformers 4 and 5: it needs transformers and nothing else.
"""

import copy
import json
from dataclasses import is_dataclass

from transformers import LlamaConfig


class Entry(dict):
    """A mapping whose keys are attributes, too: readers of block_configs use either."""

    def __init__(self, values):
        super().__init__({key: Entry(value) if isinstance(value, dict) else value for key, value in values.items()})

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"
    # Some engines put a list with one number per layer here.
    num_key_value_heads: int | list | None = None
    block_configs: list | None = None

    def __init__(self, block_configs=None, **kwargs):
        self.block_configs = None if block_configs is None else [Entry(entry) for entry in block_configs]
        if block_configs:
            heads, hidden = kwargs.get("num_attention_heads", 32), kwargs.get("hidden_size", 4096)
            sizes = [sizes_of(entry, heads, hidden) for entry in self.block_configs]
            if kwargs.get("num_hidden_layers", len(sizes)) != len(sizes):
                raise ValueError(f"block_configs has {len(sizes)} entries, num_hidden_layers differs")
            # For the model as a whole: what memory has to be planned for.
            kwargs["num_key_value_heads"] = max(kv_heads or 1 for kv_heads, _ in sizes)
            kwargs["intermediate_size"] = max(width or 256 for _, width in sizes)
        super().__init__(**kwargs)
        # Older engines look for the rotary base and scaling here, newer ones in rope_parameters.
        rope = dict(getattr(self, "rope_parameters", None) or {})
        if rope:
            self.rope_theta = rope.pop("rope_theta", 10000.0)
            self.rope_scaling = None if rope.get("rope_type", "default") == "default" else rope

    @property
    def rope_scaling(self):
        return self.__dict__.get("rope_scaling")

    @rope_scaling.setter
    def rope_scaling(self, value):
        self.__dict__["rope_scaling"] = value

    def get_text_config(self, decoder=None, encoder=None):
        # Caches are built from this view. An attention that is gone must not hold a slot.
        slots = sum(not entry["attention"]["no_op"] for entry in self.block_configs or [])
        if not decoder or not self.block_configs or slots == len(self.block_configs):
            return self
        view = copy.copy(self)
        view.block_configs = None
        view.num_hidden_layers = slots
        # What is changed on the view is meant for the model.
        view.__dict__["_viewed"] = self
        return view

    def __setattr__(self, key, value):
        super().__setattr__(key, value)
        if "_viewed" in self.__dict__ and key not in ("block_configs", "num_hidden_layers"):
            setattr(self.__dict__["_viewed"], key, value)

    def __getstate__(self):
        # A copy of the view stands alone.
        return {key: value for key, value in self.__dict__.items() if key != "_viewed"}

    def to_dict(self):
        return {key: value for key, value in super().to_dict().items() if key != "_viewed"}

    def to_json_string(self, use_diff=True):
        text = super().to_json_string(use_diff)
        if not self.block_configs:
            return text
        # A stock LlamaConfig refuses null: a stock class named by hand must not fill what is gone at random.
        values = {**json.loads(text), "intermediate_size": None, "num_key_value_heads": None}
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def sizes(self):
        """(key/value heads, FFN width) of each block; None for a part that is absent."""
        for index, entry in enumerate(self.block_configs):
            for part in (entry["attention"], entry["ffn"]):
                if unknown := [key for key in UNSUPPORTED if part.get(key)]:
                    raise ValueError(f"block_configs[{index}]: {unknown[0]} is not supported by this modeling file")
        return [sizes_of(entry, self.num_attention_heads, self.hidden_size) for entry in self.block_configs]


UNSUPPORTED = ("replace_with_linear", "sparsify", "window_length", "num_sink_tokens", "unshifted_sink")


def sizes_of(entry, heads, hidden):
    """(key/value heads, FFN width) of one entry."""
    group, mult = entry["attention"].get("n_heads_in_group"), entry["ffn"].get("ffn_mult")
    kv_heads = heads // group if group and not entry["attention"]["no_op"] else None
    width = -(-int(2 * mult * hidden / 3) // 256) * 256 if mult and not entry["ffn"]["no_op"] else None
    return kv_heads, width


if is_dataclass(LlamaConfig):  # transformers 5 checks the types of fields
    from huggingface_hub.dataclasses import strict

    strict(DeciLMConfig)

DeciLMConfig.register_for_auto_class()
