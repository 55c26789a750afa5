"""Blocks of differing shape inside a stock transformers model.

This file ships inside converted checkpoints next to `modeling_surgeon_<family>.py` and needs nothing
but torch and transformers. `config.block_configs` holds one entry per layer:

    attention: {no_op, num_attention_heads, num_key_value_heads, ...}     # kind: a key of ATTENTIONS, below
    ffn:       {no_op, intermediate_size, ...}     # kind: a key of FFNS, with sizes of its own
    either:    {sub_norm: true}     # an RMSNorm before its output projection
    parallel:  [entries]     # blocks that read the same input; their contributions add up

Shapes: B batch, T tokens, D model width.
"""

import copy
import json
import re
from typing import ClassVar

import torch
import transformers
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .surgeon_fff import install_fast_feed_forward
from .surgeon_mlgru import MLGRU, cache_types, install_bit_linears, install_mlgru, is_mlgru, pass_padding
from .surgeon_versions import TUPLES, layer_arguments, layer_call, stock_layer


class SurgeonConfigMixin:
    """Gives a family's config `block_configs`, and a KV cache with one entry per attention that exists.

    In config.json the model's width is a text, the number and `how_to_load`. A stock config class refuses a text there,
    so a stock model class named by hand raises before it makes a weight; left alone it would fill what is gone at
    random. What reads any config.json without a class of its own, as the Trainer does, looks into no width.
    """

    how_to_load: ClassVar[str] = "see block_configs; load with trust_remote_code=True through an Auto class"

    @classmethod
    def spelled_for_file(cls, values):
        """A config's values as config.json spells them."""
        width = cls.attribute_map.get("hidden_size", "hidden_size")
        return {**values, width: f"{values[width]} ({cls.how_to_load})"}

    @classmethod
    def read_from_file(cls, values):
        """The inverse of `spelled_for_file`; values that are spelled otherwise stay as they are."""
        width, layers = (cls.attribute_map.get(key, key) for key in ("hidden_size", "num_hidden_layers"))
        if str(values.get(width)).endswith(f" ({cls.how_to_load})"):
            values = {**values, width: int(values[width].split()[0])}
        # Files of the first releases have the text in the place of the number of layers.
        if values.get(layers) == cls.how_to_load:
            values = {**values, layers: len(values["block_configs"])}
        return values

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        return super().from_dict(cls.read_from_file(config_dict), **kwargs)

    def to_json_string(self, use_diff=True):
        text = super().to_json_string(use_diff)
        if not self.block_configs:
            return text
        # The width may equal the class's default, which a file leaves out.
        width = self.attribute_map.get("hidden_size", "hidden_size")
        values = {**json.loads(text), width: getattr(self, width)}
        return json.dumps(self.spelled_for_file(values), indent=2, sort_keys=True) + "\n"

    def get_text_config(self, decoder=None, encoder=None):
        # Caches are built from this view. Attentions that are gone must not hold a slot: an empty
        # first slot would report a sequence length of zero for ever.
        found = list(cache_slots(self.block_configs or []))
        slots, mixers = [index for index, _ in found], any(is_mlgru(attention) for _, attention in found)
        whole = len(slots) == len(self.block_configs or []) == len(set(slots))
        if not decoder or not self.block_configs or (whole and not mixers):
            return self
        view = copy.copy(self)
        view.block_configs = None
        view.num_hidden_layers = len(slots)
        if mixers or getattr(self, "layer_types", None) is not None:
            view.layer_types = cache_types(self, found)
        # What is changed on the view is meant for the model.
        view.__dict__["_viewed"] = self
        return view

    def __setattr__(self, key, value):
        super().__setattr__(key, value)
        if "_viewed" in self.__dict__:
            own = {self.attribute_map.get(name, name) for name in ("block_configs", "num_hidden_layers", "layer_types")}
            if self.attribute_map.get(key, key) not in own:
                setattr(self.__dict__["_viewed"], key, value)

    def __getstate__(self):
        # A copy of the view stands alone.
        return {key: value for key, value in self.__dict__.items() if key != "_viewed"}

    def to_dict(self):
        return {key: value for key, value in super().to_dict().items() if key != "_viewed"}


class SurgeonModelMixin:
    """Mixed in before a family's own model classes: what transformers asks of a model, answered for its blocks, too.

    A class with a `block_class` has the blocks of its config in its body, at the path `stack`. A head that makes its
    body through AutoModel gets one that has them already.
    """

    block_class = None
    stack = "layers"

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        body = self.base_model
        if self.block_class is not None and (body is self or not isinstance(body, SurgeonModelMixin)):
            self.swap(body)
            self.post_init()

    def swap(self, body):
        """Put the blocks of the config in the place of the layers of `body`."""
        swap_blocks(body.get_submodule(self.stack), self.config, self.block_class)
        pass_padding(body)

    def post_init(self):
        super().post_init()
        if any(isinstance(module, MLGRU) for module in self.modules()):
            # What is read is one state: generation that takes tokens back, as assisted decoding does, refuses.
            self._is_stateful = True
        if any(getattr(module, "breaks_graphs", False) for module in self.modules()):
            self._can_compile_fullgraph = False
        self._tp_plan = parallel_plan(self, self._tp_plan or {})
        count_parallel_blocks_once(self)

    @torch.no_grad()
    def initialize_weights(self):
        # Files may lack some of what no stock model has: the stock class would leave it as memory happened to be.
        std = getattr(self.config.get_text_config(), "initializer_range", None) or 0.02
        for module in self.modules():
            for parameter, fill in module.initial_values(std) if hasattr(module, "initial_values") else ():
                if not getattr(parameter, "_is_hf_initialized", False):
                    fill(parameter)
                    parameter._is_hf_initialized = not parameter.is_meta
        super().initialize_weights()

    @classmethod
    def _stock_class(cls):
        return next(base for base in cls.__mro__ if base.__module__.startswith("transformers.models."))

    # transformers answers these from the source of the file where a class is: of ours the stock file tells.

    @classmethod
    def _can_set_attn_implementation(cls):
        return cls._stock_class()._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls):
        return cls._stock_class()._can_set_experts_implementation()

    def init_continuous_batching(self, *args, **kwargs):
        # It makes pages for keys and values of one shape, as many as the config has layers, and keeps no states.
        raise ValueError(
            f"{type(self).__name__} has blocks of differing shape, which continuous batching has no place for: call "
            "generate on a batch of prompts, padded on the left"
        )


def parallel_plan(model, plan):
    """The tensor-parallel plan of a family, path of a module -> style, for the blocks that stand in its layers.

    Each branch of a parallel block is divided as a layer is. A part that is divided in another way says how in
    `tensor_parallel`, name -> style. What needs all of a row or of a matrix, `undivided`, leaves the part that it is in
    whole on every rank, in all layers: plans know no single ones.
    """
    made, whole = dict(plan), []
    for path, module in model.named_modules() if plan else ():
        name = re.sub(r"\.\d+(?=\.|$)", ".*", path)
        if isinstance(module, ParallelBlock):
            made |= {
                f"{name}.branches.*{key.removeprefix(name)}": plan[key] for key in plan if key.startswith(f"{name}.")
            }
        made |= {f"{name}.{part}".rstrip("."): style for part, style in getattr(module, "tensor_parallel", {}).items()}
        if getattr(module, "undivided", False):
            whole.append(name.rpartition(".")[0] + ".")
    return {key: style for key, style in made.items() if not f"{key}.".startswith(tuple(whole))}


def offer(**classes):
    """Let these classes, by the Auto class that finds each, be saved with their code and found from now on."""
    for auto, made in classes.items():
        made.register_for_auto_class(auto)
    if "AutoModel" in classes:
        # Heads make their body through it.
        AutoModel.register(classes["AutoModel"].config_class, classes["AutoModel"], exist_ok=True)


def cache_slots(block_configs):
    """(layer index, entry) of every attention or MLGRU, in the order in which they take cache slots."""
    for index, entry in enumerate(block_configs):
        branches = entry.get("parallel") or [entry]
        yield from ((index, branch["attention"]) for branch in branches if not branch["attention"]["no_op"])


class SurgeonBlock(GradientCheckpointingLayer):
    """A decoder layer whose attention or FFN may be absent.

    Mixed in before a family's own decoder layer, which builds the parts. Subclasses name them; a part's contribution is
    residual_multiplier * post_norm(part(norm(x))), where a norm named None is not there.
    """

    attention_name = "self_attn"
    attention_norm_name = "input_layernorm"
    ffn_name = "mlp"
    ffn_norm_name = "post_attention_layernorm"
    # Keys of the family's config.
    width_key = "intermediate_size"
    kv_heads_key = "num_key_value_heads"
    # Paths of the modules that go with attention or FFN, where these are not the two named above.
    attention_parts = ()
    ffn_parts = ()
    # Projections that write the stream, which a block's config may give a norm on what they read.
    attention_out_name = "o_proj"
    ffn_out_name = "down_proj"
    # Of an FFN that has no module of its own: what a fast feedforward network at `ffn_name` leaves without work.
    ffn_idle = ()
    attention_post_norm_name = None
    ffn_post_norm_name = None
    residual_multiplier = 1.0
    parallel_residual = False
    # The FFN reads through attention's norm, unless the block's config gives it one of its own.
    shares_norm = False
    # Paths of the projections that read the FFN's input, where the block's config may give them biases.
    ffn_in_names = ()
    # The family's own layer returns (stream, attention weights): in every release, or in transformers 4.
    returns_tuple = False
    returned_tuple = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if any(base.__module__.startswith("transformers.models.") for base in cls.__mro__):
            cls.argument_names, cls.cache_name = layer_arguments(cls)
            cls.returns_tuple = cls.returns_tuple or (TUPLES and cls.returned_tuple)

    def normed(self, name, hidden_BTD):
        """What one of the layer's norms gives, the input itself where the family has no such norm."""
        return hidden_BTD if name is None else getattr(self, name)(hidden_BTD)

    def attention_input(self, hidden_BTD):
        """What attention's projections read."""
        return self.normed(self.attention_norm_name, hidden_BTD)

    def ffn_input(self, hidden_BTD):
        """What the FFN's projections read."""
        own = not self.shares_norm or getattr(self, self.ffn_norm_name, None) is not None
        return self.normed(self.ffn_norm_name if own else self.attention_norm_name, hidden_BTD)

    def added(self, post_norm_name, output_BTD):
        """What a part's output adds to the stream."""
        output_BTD = self.normed(post_norm_name, output_BTD)
        return output_BTD if self.residual_multiplier == 1 else output_BTD * self.residual_multiplier

    def attend(self, hidden_BTD, *args, weights=None, **kwargs):
        """Attention's contribution [B, T, D], None where there is no attention.

        Its weights, None where they were not asked for, are appended to the list `weights`.

        Raises:
            TypeError: an argument that is not understood, whether there is an attention or not.
        """
        call = layer_call(self, args, kwargs)
        attention = getattr(self, self.attention_name, None)
        if attention is None:
            return None
        if not isinstance(attention, MLGRU):
            call.pop("token_mask", None)  # it has a mask of its own
        output, *more = attention(self.attention_input(hidden_BTD), **call)
        if weights is not None:
            weights += more
        return self.added(self.attention_post_norm_name, output)

    def feed_forward(self, hidden_BTD):
        """The FFN's contribution [B, T, D], None where there is no FFN."""
        ffn = getattr(self, self.ffn_name, None)
        if ffn is None:
            return None
        return self.added(self.ffn_post_norm_name, ffn(self.ffn_input(hidden_BTD)))

    def forward(self, hidden_states, *args, **kwargs):
        weights = []
        if self.returns_tuple:
            kwargs["weights"] = weights
        contribution = self.attend(hidden_states, *args, **kwargs)
        attended = hidden_states if contribution is None else hidden_states + contribution
        contribution = self.feed_forward(hidden_states if self.parallel_residual else attended)
        output = attended if contribution is None else attended + contribution
        return (output, weights[0] if weights else None) if self.returns_tuple else output


class PostNormBlock(SurgeonBlock):
    """A layer whose norms follow the residual sums: y = LN(x + Attn(x)), z = LN(y + FFN(y)).

    A part that is absent leaves its norm behind: y = LN(x). Subclasses say what the parts are.
    """

    # Nothing is normed before a part reads it.
    attention_norm_name = None
    ffn_norm_name = None

    def attended(self, hidden_BTD, *args, **kwargs):
        """LN(x + Attn(x)) [B, T, D]."""
        raise NotImplementedError

    def fed_forward(self, hidden_BTD):
        """LN(x + FFN(x)) [B, T, D]."""
        raise NotImplementedError

    def attend(self, hidden_BTD, *args, **kwargs):
        return self.attended(hidden_BTD, *args, **kwargs) - hidden_BTD

    def feed_forward(self, hidden_BTD):
        return self.fed_forward(hidden_BTD) - hidden_BTD

    def forward(self, hidden_states, *args, **kwargs):
        # Not as a sum of contributions: subtracting and adding again would round.
        output = self.fed_forward(self.attended(hidden_states, *args, **kwargs))
        return (output, None) if self.returns_tuple else output


class BertShapedBlock(PostNormBlock):
    """The layout that BERT's layer and RoBERTa's share; mixed in before either."""

    returned_tuple = True
    attention_name = "attention"
    attention_parts = ("attention.self", "attention.output.dense")
    ffn_parts = ("intermediate", "output.dense")
    ffn_name = "intermediate"
    ffn_idle = ("output.dense",)

    def attended(self, hidden_BTD, *args, **kwargs):
        call = layer_call(self, args, kwargs)
        if not hasattr(self.attention, "self"):
            return self.attention.output.LayerNorm(hidden_BTD)
        return self.attention(hidden_BTD, **call)[0]

    def fed_forward(self, hidden_BTD):
        if not hasattr(self, "intermediate"):
            return self.output.LayerNorm(hidden_BTD)
        return self.feed_forward_chunk(hidden_BTD)


class ParallelBlock(GradientCheckpointingLayer):
    """Blocks that read one input: x + sum over branches of (branch(x) - x). FFN Fusion, arXiv 2503.18908, section 5."""

    def __init__(self, branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.returns_tuple = branches[0].returns_tuple
        if hasattr(branches[0], "attention_type"):  # some models choose the mask by it
            self.attention_type = branches[0].attention_type

    def forward(self, hidden_states, *args, **kwargs):
        outputs = [branch(hidden_states, *args, **kwargs) for branch in self.branches]
        if not self.returns_tuple:
            return joined(hidden_states, outputs)
        return joined(hidden_states, [output for output, _ in outputs]), None


def count_parallel_blocks_once(model):
    """Let `hidden_states` in the outputs of `model` have one entry for the embeddings and one for each layer.

    transformers records what each of a family's layers gives: the branches of a parallel block, and not their sum.
    """
    bodies = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and any(isinstance(part, ParallelBlock) for part in module.modules())
    ]
    # The innermost is the one whose outputs the others pass on.
    if bodies and _one_state_a_layer not in bodies[-1]._forward_hooks.values():
        bodies[-1].register_forward_pre_hook(_no_choice_of_states, with_kwargs=True)
        bodies[-1].register_forward_hook(_one_state_a_layer)


def _no_choice_of_states(body, args, kwargs):
    wanted = kwargs.get("output_hidden_states")
    if wanted is not None and not isinstance(wanted, bool):
        raise ValueError(
            f"output_hidden_states={wanted!r}: a model with parallel blocks gives the hidden states of all layers or "
            "none; ask with True and choose from the output"
        )


def _one_state_a_layer(body, args, output):
    stacks = (
        part
        for part in body.modules()
        if isinstance(part, nn.ModuleList) and any(isinstance(layer, ParallelBlock) for layer in part)
    )
    layers = next(stacks, None)
    if layers is None:
        return output  # something stands in for the layers, and what it gives is its own
    branches = [len(layer.branches) if isinstance(layer, ParallelBlock) else 1 for layer in layers]

    def mended(states, last):
        kept, at = list(states[:1]), 1
        for layer, count in zip(layers, branches, strict=True):
            mine = states[at : at + count]
            # The last one is replaced by what is behind the final norm, as a rule.
            final = mine[-1] is last
            kept.append(joined(kept[-1], mine) if isinstance(layer, ParallelBlock) and not final else mine[-1])
            at += count
        return tuple(kept)

    def recorded(value):
        sizes = isinstance(value, tuple) and all(isinstance(each, torch.Tensor) and each.dim() == 3 for each in value)
        return sizes and len(value) == 1 + sum(branches)

    if isinstance(output, tuple):
        return tuple(mended(value, output[0]) if recorded(value) else value for value in output)
    if recorded(output.get("hidden_states")):
        output["hidden_states"] = mended(output["hidden_states"], output[0])
    return output


def joined(hidden_BTD, outputs):
    """x + sum over branches of (branch(x) - x)."""
    output = hidden_BTD
    for made in outputs:
        output = output + (made - hidden_BTD)
    return output


class SubRMSNorm(nn.Module):
    """RMSNorm on what a projection reads: SubLN (arXiv 2210.06423), as BitNet b1.58 has it."""

    undivided = True

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)

    def before(self, module, inputs):
        """The projection's hook: it reads the normed input."""
        return (self(inputs[0]),)

    def initial_values(self, std):
        """(parameter, what fills it) where a file has none."""
        yield self.weight, torch.nn.init.ones_


class StaysBefore:
    """The hook of a part of a block: what stands in the place of its projection reads through the norm.

    Quantisers and adapters put another module there, and the old one's hooks are lost, or inside the new one.
    """

    def __init__(self, projection, norm):
        self.projection, self.norm = projection, norm

    def __call__(self, part, inputs):
        module, norm = getattr(part, self.projection), getattr(part, self.norm)
        for inner in module.modules():
            # Told by whose they are: methods are not compared while a compiler traces.
            found = [key for key, hook in inner._forward_pre_hooks.items() if getattr(hook, "__self__", None) is norm]
            if inner is module and not found:
                inner.register_forward_pre_hook(norm.before)
            elif inner is not module:
                for key in found:
                    del inner._forward_pre_hooks[key]


def install_sub_norms(block, attention, ffn, eps):
    """Put an RMSNorm before the output projections of the parts whose config asks for one, under BitNet's names."""
    parts = (
        (attention, block.attention_name, block.attention_out_name, "attn_sub_norm"),
        (ffn, block.ffn_name, block.ffn_out_name, "ffn_sub_norm"),
    )
    for config, part, projection, name in parts:
        if config.get("sub_norm") and not config["no_op"]:
            holder = getattr(block, part)
            linear = getattr(holder, projection)
            norm = SubRMSNorm(linear.in_features, eps)
            setattr(holder, name, norm)
            linear.register_forward_pre_hook(norm.before)
            holder.register_forward_pre_hook(StaysBefore(projection, name))


def remove_parts(block, paths):
    """Delete the modules at `paths`."""
    for path in paths:
        holder, _, name = path.rpartition(".")
        delattr(block.get_submodule(holder), name)


def check_parts(block):
    """Raise an AttributeError where this release's layer lacks a module that this file knows it by.

    A part under another name would be taken for one that is gone.
    """
    modules = dict(block.named_modules())
    for path in (*(block.attention_parts or (block.attention_name,)), *(block.ffn_parts or (block.ffn_name,))):
        if path not in modules:
            raise AttributeError(
                f"{stock_layer(type(block)).__name__} has no {path} in transformers {transformers.__version__}: this "
                "checkpoint's code was written for another release"
            )


def complete_ffn(block, ffn):
    """Give a fused FFN what its family's class lacks: a norm of its own, biases on what reads it."""
    if ffn.get("own_norm"):
        setattr(block, block.ffn_norm_name, copy.deepcopy(getattr(block, block.attention_norm_name)))
    if ffn.get("bias"):
        for name in block.ffn_in_names:
            projection = block.get_submodule(name)
            projection.bias = nn.Parameter(torch.zeros_like(projection.weight[:, 0]))


def shaped(config, entry, width_key, kv_heads_key):
    """A copy of the config that makes a family's own layer in the shape that `entry` describes."""
    attention, ffn = entry["attention"], entry["ffn"]
    shape = copy.copy(config)
    shape.block_configs = None
    if not attention["no_op"]:
        heads = config.num_attention_heads
        if attention["num_attention_heads"] != heads:
            # Heads are as wide as they were, however many there are.
            shape.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        shape.num_attention_heads = attention["num_attention_heads"]
        if hasattr(shape, kv_heads_key):
            setattr(shape, kv_heads_key, attention["num_key_value_heads"])
    if not ffn["no_op"]:
        # What is about to be replaced need not take memory.
        replaced = ffn.get("kind") not in STOCK | CHANGED
        setattr(shape, width_key, 1 if replaced else ffn["intermediate_size"])
    return shape


def follow(block, shape, config):
    """Let all modules of a block that was made from `shape` read the model's own config from now on.

    Sizes are fixed in what was made. What may change while a model lives, such as the attention's implementation, has
    to reach blocks and masks alike.
    """
    for module in block.modules():
        for name in [name for name, value in vars(module).items() if value is shape]:
            setattr(module, name, config)


# Parts that no family's own layer has, by the `kind` of their entry in block_configs: what puts one into a block that
# the family has made, called with (block, entry, config). A file of its own adds a kind by a line such as
# `FFNS["linear"] = install_linear`; the file goes along where the part's declaration names it.
ATTENTIONS = {"mlgru": install_mlgru}
FFNS = {"fff": install_fast_feed_forward, "bitlinear": install_bit_linears}
# The kinds of FFN that start from what the family made. The others take its place, so it is made of width 1.
CHANGED = {"bitlinear"}
# Kinds that say more of the family's own part, and nothing else.
STOCK = {"dense", "moe", None}


def install(block, entry, table, config):
    """Put the part that an entry describes into a block, where it is none of the family's own.

    Raises:
        ValueError: this code does not know the kind.
    """
    kind = entry.get("kind")
    if kind in STOCK:
        return
    if kind not in table:
        raise ValueError(f"block_configs: kind {kind!r} is unknown to this checkpoint's code ({', '.join(table)})")
    table[kind](block, entry, config)


def swap_blocks(layers, config, block_class):
    """Replace each entry of `layers` (an nn.ModuleList) by the block that `config.block_configs` describes."""
    slot = 0

    def build(entry, index):
        nonlocal slot
        attention, ffn = entry["attention"], entry["ffn"]
        shape = shaped(config, entry, block_class.width_key, block_class.kv_heads_key)
        block = block_class(shape, index)
        check_parts(block)
        follow(block, shape, config)
        complete_ffn(block, ffn)
        # A norm that both parts read stays for the one that is there.
        shared = block.shares_norm and not ffn.get("own_norm")
        if attention["no_op"]:
            norm = () if shared else (block.attention_norm_name,)
            remove_parts(block, block.attention_parts or (block.attention_name, *norm))
        else:
            install(block, attention, ATTENTIONS, config)
            getattr(block, block.attention_name).layer_idx = slot
            slot += 1
        if ffn["no_op"]:
            norm = () if shared else (block.ffn_norm_name,)
            remove_parts(block, block.ffn_parts or (block.ffn_name, *norm))
        else:
            install(block, ffn, FFNS, config)
        if attention.get("sub_norm") or ffn.get("sub_norm"):
            install_sub_norms(block, attention, ffn, config.rms_norm_eps)
        return block

    for index, entry in enumerate(config.block_configs):
        branches = entry.get("parallel")
        layers[index] = ParallelBlock([build(b, index) for b in branches]) if branches else build(entry, index)
