"""Block Transformer (arXiv 2406.02657) out of a family's own decoder layers; ships inside converted checkpoints.

The text is cut into blocks of L tokens. The block decoder, the layers before `split`, attends over one embedding a
block: global context, with a KV cache of one entry a block. The token decoder, the other layers, writes the tokens of
the next block from the context that the block decoder gives, and attends within that block alone: its cache is used
anew for each block. config.block_transformer holds

    block_length, split
    embedder        projected: a linear map of L whole embeddings; concat: L embeddings of D / L numbers side by side
    decoder         how the token decoder reads the context c: prefix (`prefix_length` tokens before the block's own),
                    summation (a map of c is added to each token), cross_attention (to `prefix_length` vectors)
    affine          whether the map of c has a bias, and the token decoder reads embeddings through an affine map

Where blocks begin: `block_padding` says how many masked places, 0 to L - 1, the first block has before the first
column. Left out it is L - 1: the first token is alone in its block, and all others are predicted, as in any causal
model. A prompt of `generate` ends where a block ends. No token of a row's first block is predicted: the logits there
are zeros, and a loss leaves them out. All rows of a batch share the grid of blocks; padding on the left moves a row on
that grid, and whole blocks of padding change nothing.

Shapes: B batch, T tokens, L tokens a block, n blocks, M = B * n rows of the token decoder, D model width.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .surgeon_blocks import SurgeonBlock, SurgeonModelMixin, cache_slots, follow, shaped, swap_blocks
from .surgeon_versions import CACHE_NAMES, OUTPUT_CACHE, causal_mask, check_known, pop_cache

# What the body may be called with beside its own arguments and makes nothing of.
TAKEN = frozenset(["cache_position", "num_items_in_batch"])
# What it has not got to give: asked not to, it does not.
OPTIONS = frozenset(["output_attentions", "output_hidden_states", "output_router_logits"])


class BlockLayer(DynamicLayer):
    """Keys and values that `reset` drops. Before transformers 5.18 it zeroed them, and they still counted."""

    def reset(self):
        self.keys = self.values = None
        self.is_initialized = False


class BlockCache(Cache):
    """Keys and values of both decoders, and the block that is being written.

    Beside them [B, ...]: tokens of the open block and which of them are real (`ids`, `real`), which of the closed
    blocks hold a real token (`blocks`), the last closed block's context and last token.
    """

    def __init__(self, block_slots, token_slots):
        self.over_blocks = Cache(layers=[BlockLayer() for _ in range(block_slots)])
        self.within_block = Cache(layers=[BlockLayer() for _ in range(token_slots)])
        super().__init__(layers=[*self.over_blocks.layers, *self.within_block.layers])
        self._begin()

    state = ("ids", "real", "blocks", "context", "last")

    def _begin(self):
        self.seen, self.masked = 0, False
        for name in self.state:
            setattr(self, name, None)

    def open(self, like_BT, padding):
        """Begin with `padding` masked places."""
        rows = len(like_BT)
        self.ids = like_BT.new_zeros(rows, padding)
        self.real = torch.zeros(rows, padding, dtype=torch.bool, device=like_BT.device)
        self.blocks = self.real[:, :0]

    def _map(self, change):
        for name in self.state:
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))

    def get_seq_length(self, layer_idx=0):
        return self.seen

    def reset(self):
        super().reset()
        self._begin()

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self._map(lambda tensor: tensor[indices, ...])

    @property
    def is_croppable(self):
        return False

    def crop(self, tokens_to_remove):
        raise NotImplementedError("the cache of a block transformer cannot go back: closed blocks keep no tokens")


class BlockTransformerLayer(SurgeonBlock):
    """A decoder layer that may have a cross-attention to the block's context behind its self-attention."""

    def attend(self, hidden_BTD, *args, context_BCD=None, **kwargs):
        contribution = super().attend(hidden_BTD, *args, **kwargs)
        if context_BCD is None:
            return contribution
        norm = self.cross_attn_layernorm
        attended = hidden_BTD + contribution
        return contribution + cross_attend(self.cross_attn, norm(attended), norm(context_BCD))

    def add_cross_attention(self, config, entry):
        """Modules of the shapes of the layer's own attention, which `entry` of the config describes."""
        attention, norm = getattr(self, self.attention_name), getattr(self, self.attention_norm_name)
        shape = shaped(config, entry, self.width_key, self.kv_heads_key)
        self.cross_attn = type(attention)(shape, attention.layer_idx)
        self.cross_attn_layernorm = type(norm)(len(norm.weight), norm.variance_epsilon)
        follow(self.cross_attn, shape, config)


def cross_attend(attention, hidden_BTD, context_BCD):
    """Attention of the hidden states to the context by the projections of a family's self-attention; no positions."""

    def heads(projection, norm, inputs):
        split = projection(inputs).unflatten(-1, (-1, attention.head_dim))
        return (norm(split) if norm is not None else split).transpose(1, 2)

    query = heads(attention.q_proj, getattr(attention, "q_norm", None), hidden_BTD)
    key = heads(attention.k_proj, getattr(attention, "k_norm", None), context_BCD)
    value = heads(attention.v_proj, None, context_BCD)
    key, value = (part.repeat_interleave(attention.num_key_value_groups, dim=1) for part in (key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, scale=attention.scaling)
    return attention.o_proj(mixed.transpose(1, 2).flatten(2))


class BlockEmbedder(nn.Module):
    """One vector for each block [B, n, D] from its tokens [B, n, L]; places that are not `real` count as zeros."""

    def __init__(self, config):
        super().__init__()
        length, hidden = config.block_transformer["block_length"], config.hidden_size
        projected = config.block_transformer["embedder"] == "projected"
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden if projected else hidden // length)
        # A convolution of kernel and stride L, its taps side by side.
        self.projection = nn.Linear(length * hidden, hidden) if projected else nn.Identity()

    def forward(self, ids_BnL, real_BnL):
        """One input for each block, [B, n, D], from its tokens; padding counts as nothing."""
        return self.projection((self.embed_tokens(ids_BnL) * real_BnL[..., None]).flatten(2))


class BlockTransformer(SurgeonModelMixin):
    """What bodies and heads share; by itself mixed in before a family's head that makes its body through AutoModel."""

    # Closed blocks keep no tokens: generation that takes some back, as assisted decoding does, refuses.
    _is_stateful = True

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """Both tables of embeddings: the token decoder's, which this returns, and the one that blocks are made of."""
        made = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        embedder = self.base_model.block_embedder
        embedder.embed_tokens = resized(embedder.embed_tokens, made.num_embeddings, self.config, mean_resizing)
        return made


class BlockTransformerBody(BlockTransformer):
    """Mixed in before a family's model class, whose embedding, layers, final norm and rotary positions it uses."""

    layer_class = None

    def __init__(self, config):
        super().__init__(config)
        halves, hidden = config.block_transformer, config.hidden_size
        self.block_length, self.split, self.decoder = (halves[key] for key in ("block_length", "split", "decoder"))
        self.lead = halves["prefix_length"] if self.decoder == "prefix" else 1
        swap_blocks(self.layers, config, self.layer_class)
        slots = [index for index, _ in cache_slots(config.block_configs)]
        self.block_slots = sum(index < self.split for index in slots)
        self.token_slots = len(slots) - self.block_slots
        for layer, entry in list(zip(self.layers, config.block_configs, strict=True))[self.split :]:
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx -= self.block_slots
            if self.decoder == "cross_attention":
                layer.add_cross_attention(config, entry)
        self.block_embedder = BlockEmbedder(config)
        contexts = self.block_length if self.decoder == "summation" else halves["prefix_length"]
        affine = halves.get("affine", False)
        self.context_expansion = nn.Linear(hidden, contexts * hidden, bias=affine)
        self.token_projection = nn.Linear(hidden, hidden) if affine else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        block_padding=None,
        last=0,
        **kwargs,
    ):
        """Hidden states behind the final norm, of the `last` columns alone where that is not 0.

        The cache may come by any of its names.

        Raises:
            TypeError: an argument that is not understood.
            ValueError: one that a block transformer has no answer to, also where its config asks for it.
        """
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name, getattr(self.config, name, False)):
                raise ValueError(f"a block transformer's two decoders read sequences of differing length: no {name}")
        who, others = type(self).__name__, {"cache": cache, **kwargs}
        given = pop_cache(who, others)
        check_known(who, {name: value for name, value in others.items() if name not in OPTIONS or value}, TAKEN)
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("a block transformer embeds tokens in two ways: give input_ids, not inputs_embeds")
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        cache = self._cache(input_ids, attention_mask, given, block_padding)
        keep = given is not None or use_cache
        length, tokens = self.block_length, input_ids.shape[1]
        real_BT = attention_mask[:, -tokens:].bool() if attention_mask is not None else None
        real_BT = torch.ones_like(input_ids, dtype=torch.bool) if real_BT is None else real_BT
        # Columns that began the open block, then the new ones.
        opened = cache.ids.shape[1]
        ids, real = torch.cat([cache.ids, input_ids], 1), torch.cat([cache.real, real_BT], 1)
        count = ids.shape[1] // length
        closed_BnL, ids = ids[:, : count * length].unflatten(1, (count, length)), ids[:, count * length :]
        closed_real, real = real[:, : count * length].unflatten(1, (count, length)), real[:, count * length :]
        old = cache.context, cache.last
        contexts_BnD = self._over_blocks(closed_BnL, closed_real, cache, keep)
        cache.ids, cache.real, cache.seen = ids, real, cache.seen + tokens
        if count:
            cache.context, cache.last = contexts_BnD[:, -1], closed_BnL[:, -1, -1]
        open_part = self._open_block(input_ids, cache, opened, count, keep)
        parts = [open_part]
        if (last or tokens) > open_part[0].shape[1] and count:
            parts.insert(0, self._closed_blocks(closed_BnL, contexts_BnD, cache.blocks, old))
        hidden_BTD, said_BT = (torch.cat(each, 1)[:, -(last or tokens) :] for each in zip(*parts, strict=True))
        hidden_BTD = self.norm(hidden_BTD).masked_fill(~said_BT[..., None], 0)
        return BlockTransformerOutput(hidden_BTD, cache if keep else None, said=said_BT)

    def _cache(self, input_ids, attention_mask, cache, padding):
        """The state that this call starts from."""
        if cache is None:
            cache = BlockCache(self.block_slots, self.token_slots)
        if not isinstance(cache, BlockCache):
            raise ValueError(
                f"a block transformer makes a cache of its own: give none at first, not one of {type(cache).__name__}"
            )
        if cache.ids is None:
            padding = self.block_length - 1 if padding is None else padding
            if not 0 <= padding < self.block_length:
                raise ValueError(f"block_padding {padding}: expected 0 to {self.block_length - 1}")
            cache.open(input_ids, padding)
        limit = self.config.max_position_embeddings
        if cache.seen + input_ids.shape[1] > limit:
            raise ValueError(f"{cache.seen + input_ids.shape[1]} tokens: this model was made for at most {limit}")
        cache.masked = cache.masked or attention_mask is not None
        return cache

    def _over_blocks(self, ids_BnL, real_BnL, cache, keep):
        """The block decoder: contexts [B, n, D] of the blocks that this call closes."""
        before, count = cache.blocks.shape[1], ids_BnL.shape[1]
        hidden = self.block_embedder(ids_BnL, real_BnL)
        if not count:
            return hidden
        cache.blocks = torch.cat([cache.blocks, real_BnL.any(-1)], 1)
        past = cache.over_blocks if keep and self.block_slots else None
        if cache.masked:
            positions = (cache.blocks.cumsum(1) - 1).clamp_min(0)[:, before:]
        else:
            positions = torch.arange(before, before + count, device=hidden.device)[None]
        mask = causal_mask(self.config, hidden, cache.blocks.long() if cache.masked else None, past)
        return self._through(self.layers[: self.split], hidden, mask, positions, past)

    def _closed_blocks(self, ids_BnL, contexts_BnD, blocks, old):
        """The token decoder over all blocks that this call closes, each from the context before it: [B, n * L, D]."""
        context, previous = old
        count = ids_BnL.shape[1]
        contexts = contexts_BnD[:, :-1] if context is None else torch.cat([context[:, None], contexts_BnD[:, :-1]], 1)
        ids, lasts = ids_BnL[:, count - contexts.shape[1] :], ids_BnL[:, :-1, -1]
        previous = lasts if context is None else torch.cat([previous[:, None], lasts], 1)
        said = blocks[:, -count - 1 : -1] if context is not None else blocks[:, -count:-1]
        hidden = contexts.new_zeros(len(ids), 0, contexts.shape[-1])
        if contexts.shape[1]:
            made = self._token_decoder(contexts.flatten(0, 1), previous.flatten(), ids[..., :-1].flatten(0, 1))
            hidden = made.reshape(len(ids), -1, made.shape[-1])
        said = said.repeat_interleave(self.block_length, 1)
        if context is None:
            # Nothing comes before the first block.
            hidden = F.pad(hidden, (0, 0, self.block_length, 0))
            said = F.pad(said, (self.block_length, 0))
        return hidden, said

    def _open_block(self, input_ids, cache, opened, count, keep):
        """The token decoder over the block that is being written: ([B, t, D], whether it could say anything [B, t])."""
        past = cache.within_block if keep and self.token_slots else None
        if cache.context is None:
            columns = input_ids.shape[1]
            # In the dtype of the model, which a quantised linear's weight does not have.
            hidden = self.norm.weight.new_zeros(len(input_ids), columns, self.config.hidden_size)
            return hidden, torch.zeros_like(input_ids, dtype=torch.bool)
        if count:
            cache.within_block.reset()
            hidden = self._token_decoder(cache.context, cache.last, cache.ids, past)
        else:
            hidden = self._go_on(cache.context, input_ids, opened, past)
        return hidden, cache.blocks[:, -1:].expand(-1, hidden.shape[1])

    def _token_decoder(self, context_MD, previous_M, ids_Mt, past=None):
        """What follows the block's first t tokens, t from 0: hidden states [M, t + 1, D]."""
        if self.decoder == "prefix":
            hidden = torch.cat([self._expanded(context_MD), self._embedded(ids_Mt)], 1)
        else:
            hidden = self._embedded(torch.cat([previous_M[:, None], ids_Mt], 1))
        return self._within_block(hidden, context_MD, 0, past)[:, self.lead - 1 :]

    def _go_on(self, context_BD, ids_Bt, opened, past):
        """The same for t tokens behind the `opened` ones whose keys and values are kept: [B, t, D]."""
        return self._within_block(self._embedded(ids_Bt), context_BD, self.lead + opened, past)

    def _within_block(self, hidden, context_MD, start, past):
        more = {}
        if self.decoder == "summation":
            hidden = hidden + self._expanded(context_MD)[:, start : start + hidden.shape[1]]
        elif self.decoder == "cross_attention":
            more["context_BCD"] = self._expanded(context_MD)
        positions = torch.arange(start, start + hidden.shape[1], device=hidden.device)[None]
        mask = causal_mask(self.config, hidden, None, past)
        return self._through(self.layers[self.split :], hidden, mask, positions, past, **more)

    def _embedded(self, ids):
        return self.token_projection(self.embed_tokens(ids))

    def _expanded(self, context_MD):
        return self.context_expansion(context_MD).unflatten(-1, (-1, context_MD.shape[-1]))

    def _through(self, layers, hidden, mask, positions, past, **more):
        rotary = self.rotary_emb(hidden, position_ids=positions)
        for layer in layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=rotary,
                position_ids=positions,
                cache=past,
                use_cache=past is not None,
                **more,
            )
        return hidden


def resized(table, rows, config, mean):
    """An embedding table with this number of rows: new ones are the mean of the old, or small random numbers."""
    old = table.weight
    if rows == len(old):
        return table
    made = nn.Embedding(rows, old.shape[1], device=old.device, dtype=old.dtype).requires_grad_(old.requires_grad)
    with torch.no_grad():
        kept = min(rows, len(old))
        made.weight[:kept] = old[:kept]
        made.weight[kept:] = old.float().mean(0).to(old.dtype) if mean else 0.0
        if not mean:
            made.weight[kept:].normal_(0.0, config.initializer_range)
    return made


@dataclass
class BlockTransformerOutput(BaseModelOutputWithPast):
    """With `said` [B, T]: whether the column's hidden state says anything of the next token."""

    said: torch.Tensor | None = None


class BlockTransformerForCausalLM(BlockTransformer):
    """Mixed in before a family's causal language model. Logits at column t are those of token t + 1, as ever."""

    body_class = None

    def __init__(self, config):
        # The family's own __init__ would build a stock body first.
        PreTrainedModel.__init__(self, config)
        self.model = self.body_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        block_padding=None,
        cache=None,
        **kwargs,
    ):
        """Logits [B, T, V] of the next token at each place, of the last `logits_to_keep` places where that is not 0."""
        if kwargs.get("position_ids") is not None:
            raise ValueError(
                "a block transformer counts its own positions, from attention_mask: leave position_ids out"
            )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            cache=cache,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            block_padding=block_padding,
            last=logits_to_keep if isinstance(logits_to_keep, int) else 0,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if isinstance(logits_to_keep, torch.Tensor):
            hidden_states = hidden_states[:, logits_to_keep]
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            said = F.pad(outputs.said[:, :-1], (1, 0))
            labels = labels.masked_fill(~said, -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{OUTPUT_CACHE: getattr(outputs, OUTPUT_CACHE)})

    @torch.no_grad()
    def generate(self, inputs=None, *args, **kwargs):
        prompt = kwargs.get("input_ids") if inputs is None else inputs
        if prompt is not None and all(kwargs.get(name) is None for name in CACHE_NAMES):
            # The prompt ends where a block ends, so that reading it takes the block decoder alone.
            kwargs.setdefault("block_padding", -prompt.shape[1] % self.config.block_transformer["block_length"])
        return super().generate(inputs, *args, **kwargs)

    @classmethod
    def _supports_default_dynamic_cache(cls):
        # The body makes its own: generation finds it in the outputs of the first step.
        return False
