"""MLGRU, the token mixer of the MatMul-free language model (arXiv 2406.02528), in the place of an attention.

    f_t = lb + (1 - lb) sigmoid(W_f x_t)          what is kept, channel by channel; lb is a learnt lower bound
    h_t = f_t h_(t-1) + (1 - f_t) SiLU(W_i x_t)
    o_t = W_o (sigmoid(W_g x_t) h_t)

The state h is all that a layer remembers: its cache has one size whatever the context. A prompt is read by a scan in
two levels (`linear_recurrence`), token by token the same recurrence goes on. `BitLinear` is the paper's linear layer of
ternary weights and 8-bit activations behind a norm of its own.

This file ships inside converted checkpoints and needs nothing but torch and transformers; triton makes it faster on
GPUs where it is installed. LLMSURGEON_MLGRU_KERNEL=torch does without.

Shapes: B batch, T tokens, D model width, W state width, N tokens of a flattened batch, I and O in and out features.
"""

import inspect
import math
import os
from functools import cache, partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn
from transformers import cache_utils
from transformers.cache_utils import CacheLayerMixin

from .surgeon_versions import check_known, needs, older_than, pop_asked_cache

# The type of a cache layer that holds an MLGRU's state.
CACHE_TYPE = "mlgru"
SMALLEST_SCALE = 1e-5
# sigmoid of it is what is kept at the least.
LOWER_BOUND = -4.0


class MLGRU(nn.Module):
    """The token mixer. Called as an attention is; gives (output [B, T, D], None).

    token_mask [B, T] is 0 where a position is padding: such a position leaves the state as it was. Where there is none,
    a sequence begins wherever position_ids do not go on by one: several may be packed into a row, as for attention.
    """

    # Chunks of the recurrence are as long as the sequence asks for.
    breaks_graphs = True
    # Channels know nothing of each other: each rank has its own, and their states.
    tensor_parallel = {"i_proj": "colwise", "f_proj": "colwise", "g_proj": "colwise", "o_proj": "rowwise"}
    if not older_than("5.21"):  # before, it summed the gradients of the projections, too
        tensor_parallel[""] = "replicated_with_grad_allreduce"  # of the module itself: `lower_bound`

    def __init__(self, hidden, entry, eps):
        super().__init__()
        width, ternary = entry["width"], entry["linears"] == "ternary"

        def linear(inputs, outputs, bias):
            return BitLinear(inputs, outputs, bias, eps) if ternary else nn.Linear(inputs, outputs, bias)

        self.i_proj = linear(hidden, width, entry["in_bias"])
        self.f_proj = linear(hidden, width, True)
        self.g_proj = linear(hidden, width, entry["in_bias"])
        self.o_proj = linear(width, hidden, entry["out_bias"])
        # lb = sigmoid(lower_bound): one number a layer.
        self.lower_bound = nn.Parameter(torch.full((1,), LOWER_BOUND))
        self.layer_idx = None

    def initial_values(self, std):
        """(parameter, what fills it) where a file has none."""
        yield self.lower_bound, lambda parameter: parameter.fill_(LOWER_BOUND)

    def forward(self, hidden_states, token_mask=None, **kwargs):
        """hidden_states [B, T, D] -> (output [B, T, D], None); token_mask [B, T] is 0 for padding.

        Of what attentions are called with beside it, the cache counts, by any of its names.

        Raises:
            TypeError: an argument that is not understood, or a cache that was asked for and is not there.
        """
        cache = pop_asked_cache("MLGRU", kwargs)
        check_known("MLGRU", kwargs)
        mixed_BTW, gate_BTW = self.mixed(hidden_states, cache, token_mask, kwargs.get("position_ids"))
        return self.o_proj(gate_BTW * mixed_BTW), None

    def mixed(self, x_BTD, cache=None, token_mask=None, position_ids=None):
        """States and the gates on them, [B, T, W] each."""
        low = torch.sigmoid(self.lower_bound.float())
        score_BTW = self.f_proj(x_BTD).float()
        keep_BTW = low + (1 - low) * torch.sigmoid(score_BTW)
        # 1 - keep, without the rounding of a difference to a number near 1.
        write_BTW = (1 - low) * torch.sigmoid(-score_BTW) * F.silu(self.i_proj(x_BTD)).float()
        if token_mask is not None:
            real_BT1 = token_mask[:, -x_BTD.shape[1] :, None].to(x_BTD.device, torch.bool)
            keep_BTW, write_BTW = keep_BTW.where(real_BT1, 1.0), write_BTW.where(real_BT1, 0.0)
        elif position_ids is not None and position_ids.dim() == 2 and x_BTD.shape[1] > 1:
            begins = F.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0))
            keep_BTW = keep_BTW.masked_fill(begins[..., None].to(keep_BTW.device), 0.0)
        slot = None if cache is None else state_slot(cache, self.layer_idx)
        start_BW = torch.zeros_like(keep_BTW[:, 0]) if slot is None or slot.state is None else slot.state
        h_BTW = linear_recurrence(keep_BTW, write_BTW, start_BW)
        if slot is not None:
            slot.advance(h_BTW[:, -1], x_BTD.shape[1])
        return h_BTW.to(x_BTD.dtype), torch.sigmoid(self.g_proj(x_BTD))


def linear_recurrence(keep_BTW, write_BTW, start_BW):
    """h_t = keep_t h_(t-1) + write_t for all t at once, from h_0 = start [B, W]; [B, T, W].

    Two levels: about sqrt(T) chunks advance side by side, then each takes over what the one before it ended with.
    Only products of factors in [0, 1] are formed, so nothing overflows and what is forgotten underflows to zero.
    """
    return _LinearRecurrence.apply(keep_BTW, write_BTW, start_BW)


def on_triton(tensor):
    """Whether triton's kernels compute: they are not switched off, triton is installed, and the tensor is on a GPU."""
    forced = os.environ.get("LLMSURGEON_MLGRU_KERNEL", "auto")
    if forced not in ("auto", "torch", "triton"):
        raise RuntimeError(f"LLMSURGEON_MLGRU_KERNEL={forced}: no such kernel; expected auto, torch, triton")
    possible = tensor.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if forced == "triton" and not (possible and _installed()):
        reason = f"the tensors are on {tensor.device.type}" if _installed() else "triton is not installed"
        raise RuntimeError(f"LLMSURGEON_MLGRU_KERNEL=triton: {reason}; unset the variable or set it to torch")
    return forced != "torch" and possible and _installed() and not torch.compiler.is_compiling()


@cache
def _installed():
    return find_spec("triton") is not None


class _LinearRecurrence(torch.autograd.Function):
    """Keeps factors and states; the gradient is a recurrence of the same kind that runs backwards."""

    @staticmethod
    def forward(ctx, keep, write, start):
        states = _scan(keep, write, start)
        ctx.save_for_backward(keep, states, start)
        return states

    @staticmethod
    def backward(ctx, grad):
        keep, states, start = ctx.saved_tensors
        # What reaches h_t: its own gradient, and keep_(t+1) of what reaches h_(t+1).
        later = torch.cat([keep[:, 1:], torch.zeros_like(keep[:, :1])], dim=1)
        reached = _scan(later, grad, torch.zeros_like(start), backwards=True)
        before = torch.cat([start[:, None], states[:, :-1]], dim=1)
        return reached * before, reached, reached[:, 0] * keep[:, 0]


def _scan(keep_BTW, write_BTW, start_BW, backwards=False):
    batch, tokens, width = keep_BTW.shape
    if tokens == 1:
        return keep_BTW * start_BW[:, None] + write_BTW
    if keep_BTW.dtype == torch.float32 and on_triton(keep_BTW):
        from .surgeon_mlgru_triton import scan

        return scan(keep_BTW, write_BTW, start_BW, backwards)
    if backwards:
        return _scan(keep_BTW.flip(1), write_BTW.flip(1), start_BW).flip(1)
    size = math.isqrt(tokens - 1) + 1
    chunks = -(-tokens // size)
    padding = (0, 0, 0, chunks * size - tokens)
    # C chunks of S tokens: [B, C, S, W]. `reach` is how much of the state before a chunk is left at each token.
    reach = F.pad(keep_BTW, padding, value=1.0).view(batch, chunks, size, width).clone()
    states = F.pad(write_BTW, padding).view(batch, chunks, size, width).clone()
    for place in range(1, size):
        states[:, :, place].addcmul_(reach[:, :, place], states[:, :, place - 1])
        reach[:, :, place] *= reach[:, :, place - 1]
    for chunk in range(chunks):
        states[:, chunk].addcmul_(reach[:, chunk], start_BW[:, None])
        start_BW = states[:, chunk, -1]
    return states.flatten(1, 2)[:, :tokens]


class BitLinear(nn.Module):
    """A linear layer of ternary weights (times one scale) and 8-bit activations, behind an RMSNorm of its own.

    In training, `share` of the way from float to ternary is gone: W + share (W_hat - W), activations likewise; the
    training loop raises it from 0 to 1. Gradients pass rounding as if it were not there. In eval mode all of the way is
    gone. `fused` keeps 8-bit activations for the backward pass in place of float ones.

    No subclass of nn.Linear: what replaces or wraps those, a quantiser or an adapter, knows of no norm and of no
    rounding. They leave it as it is, or refuse it.
    """

    # One scale for all of the matrix, one for all that a token reads.
    undivided = True

    def __init__(self, inputs, outputs, bias, eps):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.gain = nn.Parameter(torch.ones(inputs))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Linear's
        self.eps, self.share, self.fused = eps, 1.0, True

    def initial_values(self, std):
        """(parameter, what fills it) where a file has none."""
        yield self.weight, lambda parameter: parameter.normal_(0.0, std)
        yield self.gain, nn.init.ones_
        if self.bias is not None:
            yield self.bias, nn.init.zeros_

    def forward(self, x):
        """[..., I] -> [..., O]; while training, ternary by `share` and dense for the rest."""
        compute = _FusedBitLinear.apply if self.fused else bit_linear
        return compute(x, self.gain, self.weight, self.bias, self.share if self.training else 1.0, self.eps)

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def ternary(weight_OI):
    """The nearest of -s, 0, s for each weight, s = mean |weight|. [O, I], arXiv 2402.17764, equations 1 to 3."""
    scale = weight_OI.abs().mean(dtype=torch.float32).clamp_min(SMALLEST_SCALE).to(weight_OI.dtype)
    return (weight_OI / scale).round().clamp(-1, 1) * scale


def eight_bits(y):
    """(codes from -127 to 127 in y's dtype, scale [..., 1]) of each token: y is nearly codes * scale."""
    scale = (y.abs().amax(-1, keepdim=True) / 127).clamp_min(SMALLEST_SCALE / 127)
    return (y / scale).round().clamp(-127, 127), scale


def _rms(x, eps):
    """1 / root of the mean square of each token, float32 [..., 1]."""
    return (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()


def bit_linear(x, gain, weight_OI, bias, share, eps):
    """BitLinear step by step, [..., I] -> [..., O]: what the fused form is held against."""
    y = (x.float() * _rms(x, eps)).to(x.dtype) * gain
    codes, scale = eight_bits(y.detach())
    y = y + share * (codes * scale - y).detach()
    return F.linear(y, weight_OI + share * (ternary(weight_OI) - weight_OI).detach(), bias)


class _FusedBitLinear(torch.autograd.Function):
    """RMSNorm, rounding and product as one step that keeps a byte an activation and computes the rest again.

    The backward pass reads activations as their 8-bit codes say, so gradients differ from `bit_linear`'s by the
    rounding (a 254th of a token's largest activation at most); the output does not.
    """

    @staticmethod
    def forward(ctx, x, gain, weight, bias, share, eps):
        ctx.share, ctx.biased, ctx.dtype = share, bias is not None, x.dtype
        ctx.triton = share == 1 and on_triton(x)
        if ctx.triton:
            return _forward_on_triton(ctx, x, gain, weight, bias, eps)
        rms = _rms(x, eps)
        y = (x.float() * rms).to(x.dtype) * gain
        codes, scale = eight_bits(y)
        y = y + share * (codes * scale - y)
        ctx.save_for_backward(codes.to(torch.int8), scale, rms, gain, weight)
        return F.linear(y, weight + share * (ternary(weight) - weight), bias)

    @staticmethod
    def backward(ctx, grad):
        codes, scale, rms, gain, weight = ctx.saved_tensors
        dtype = grad.dtype
        grad_NO = grad.flatten(0, -2)
        y = codes.to(scale.dtype) * scale
        blended = weight + ctx.share * (ternary(weight) - weight)
        grad_y = (grad_NO @ blended.to(dtype)).view(y.shape).float()
        grad_weight = (grad_NO.T @ y.flatten(0, -2).to(dtype)).to(weight.dtype)
        grad_bias = grad_NO.sum(0).to(weight.dtype) if ctx.biased else None
        if ctx.triton:
            from .surgeon_mlgru_triton import normed_back

            rows = (each.flatten(0, -2) for each in (grad_y, codes, scale, rms))
            grad_x, grad_gain = normed_back(*rows, gain, ctx.dtype)
            return grad_x.view(y.shape), grad_gain.to(gain.dtype), grad_weight, grad_bias, None, None
        # The normed input; a closed channel passes nothing on and says nothing about itself.
        open_gain = torch.where(gain.abs() < 1e-12, torch.inf, gain.float())
        normed = y.float() / open_gain
        grad_gain = (grad_y * normed).flatten(0, -2).sum(0).to(gain.dtype)
        grad_y = grad_y * gain.float()
        grad_x = rms * (grad_y - normed * (grad_y * normed).mean(-1, keepdim=True))
        return grad_x.to(ctx.dtype), grad_gain, grad_weight, grad_bias, None, None


def _forward_on_triton(ctx, x, gain, weight, bias, eps):
    """The forward pass where all is ternary: norm and rounding in one pass, and a product of whole numbers."""
    from .surgeon_mlgru_triton import codes_product, normed_codes, ternary_codes

    codes_NI, scale_N1, rms_N1 = normed_codes(x.flatten(0, -2), gain, eps, SMALLEST_SCALE / 127)
    whole = [each.view(*x.shape[:-1], each.shape[-1]) for each in (codes_NI, scale_N1, rms_N1)]
    ctx.save_for_backward(*whole, gain, weight)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.result_type(x, weight)
    made_NO = codes_product(codes_NI, scale_N1, *ternary_codes(weight, SMALLEST_SCALE), bias, dtype)
    return made_NO.view(*x.shape[:-1], len(weight))


class Absent:
    """In the place of what this release lacks: all families import this file, and few need it."""


LinearAttentionCacheLayerMixin = getattr(cache_utils, "LinearAttentionCacheLayerMixin", Absent)


class MLGRUState(LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """An MLGRU's layer of a cache: its state [B, W] in float32, and how many positions went by.

    The count answers for the sequence's length where a model has no attention left that could.
    """

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, **kwargs):
        CacheLayerMixin.__init__(self)
        self.state, self.seen = None, 0

    @property
    def recurrent_states(self):
        """The state by the name that transformers has for it."""
        return {0: self.state}

    @property
    def has_previous_state(self):
        """Whether anything was read yet."""
        return {0: self.state is not None}

    def advance(self, state_BW, tokens):
        """Take over the state behind so many more positions."""
        self.state, self.seen = state_BW, self.seen + tokens

    def get_seq_length(self):
        return self.seen

    def get_mask_sizes(self, query_length):
        return self.seen + query_length, 0

    def get_max_length(self):
        return -1

    def reset(self):
        self.state, self.seen = None, 0

    def offload(self):
        """The state is too small to be worth a copy."""

    def prefetch(self):
        """It has not gone anywhere."""

    def reorder_cache(self, beam_idx):
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices):
        if self.state is not None:
            self.state = self.state[indices.to(self.state.device)]

    def batch_repeat_interleave(self, repeats):
        if self.state is not None:
            self.state = self.state.repeat_interleave(repeats, dim=0)

    def crop(self, tokens_to_remove):
        if tokens_to_remove:
            raise RuntimeError("an MLGRU cannot take tokens back: what it has read is one state")

    def lazy_initialization(self, *args, **kwargs):
        """Nothing is known before the first tokens."""

    def update(self, *args, **kwargs):
        raise NotImplementedError("an MLGRU has no keys and values")

    def update_conv_state(self, *args, **kwargs):
        raise NotImplementedError("an MLGRU has no convolution")

    def update_recurrent_state(self, recurrent_states, state_idx=0, **kwargs):
        self.state = recurrent_states
        return recurrent_states


class NoStaticState:
    """In the place of a static cache's layer: such caches come with masks made beforehand, which hide the padding."""

    def __init__(self, **kwargs):
        raise ValueError(
            "a model with MLGRUs takes no static cache; leave cache_implementation out: states have one size whatever "
            "the length"
        )


# What builds caches looks layer types up here.
getattr(cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING", {})[CACHE_TYPE] = MLGRUState
getattr(cache_utils, "STATIC_LAYER_TYPE_MAPPING", {})[CACHE_TYPE] = NoStaticState


def state_slot(cache, index):
    """The cache's layer for this MLGRU.

    Raises:
        ValueError: the cache was made without the model's config, for keys and values alone.
    """
    layers = getattr(cache, "layers", ())
    slot = layers[index] if index < len(layers) else None
    # By name: every loaded checkpoint brings this file, and caches are made of the class that came last.
    if type(slot).__name__ != MLGRUState.__name__:
        raise ValueError(
            f"layer {index} of this cache cannot hold the state of an MLGRU; make the cache for the model, as in "
            "DynamicCache(config=model.config)"
        )
    return slot


def cache_types(config, slots):
    """Layer types of a cache with these slots, (layer index, attention entry) each."""
    known = getattr(config, "layer_types", None)
    plain = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return [
        CACHE_TYPE if is_mlgru(attention) else known[index] if known is not None else plain
        for index, attention in slots
    ]


def is_mlgru(attention):
    """Whether the `attention` entry of a block in config.json describes an MLGRU."""
    return attention.get("kind") == "mlgru" and not attention["no_op"]


def install_mlgru(block, entry, config):
    """Put an MLGRU in the place of a block's attention.

    Raises:
        ImportError: this release of transformers has no caches for layers of other kinds than attention.
    """
    needs("5.14", "a model with MLGRUs")
    setattr(block, block.attention_name, MLGRU(config.hidden_size, entry, config.rms_norm_eps))


def install_bit_linears(block, entry, config):
    """Make BitLinears of the FFN's projections that the entry names."""
    for name in entry["projections"]:
        old = block.get_submodule(name)
        biased = old.bias is not None
        block.set_submodule(name, BitLinear(old.in_features, old.out_features, biased, config.rms_norm_eps))


def pass_padding(body):
    """Let the layers of a transformer's body know which positions are padding, as `token_mask`.

    Attention learns it from the mask of scores, which an MLGRU has none of. The hook goes where the body is called, by
    the model with a head or directly.

    Raises:
        TypeError: this release's body has no `attention_mask` to read it from.
    """
    if not any(isinstance(module, MLGRU) for module in body.modules()):
        return
    names = list(inspect.signature(body.forward).parameters)
    if "attention_mask" not in names:
        raise TypeError(
            f"{type(body).__name__} takes no attention_mask in this release of transformers, and MLGRUs learn from it "
            "which positions are padding: take an earlier release"
        )
    body.register_forward_pre_hook(partial(_with_token_mask, names.index("attention_mask")), with_kwargs=True)


def _with_token_mask(place, body, args, kwargs):
    mask = kwargs["attention_mask"] if "attention_mask" in kwargs else args[place] if len(args) > place else None
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        found = f"of shape {list(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask {found}: a model with MLGRUs takes one of [batch, positions], 0 where there is padding"
        )
    return args, {**kwargs, "token_mask": mask}
