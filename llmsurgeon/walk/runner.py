"""A model whose layers are filled with weights one at a time: what the weights cost in memory is one layer.

Shapes: s sequences, T tokens each, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmsurgeon.checkpoint.finite import is_finite, not_finite
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.experts import class_form
from llmsurgeon.formats.models import embedding_rows, empty_model
from llmsurgeon.formats.surgeon import as_surgeon
from llmsurgeon.model.families import family_of
from llmsurgeon.walk.memory import room

_Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Catcher(nn.Module):
    """Stands in for a layer: keeps how the model calls it and passes the hidden state on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if hasattr(layer, "attention_type"):  # some models choose the mask by it
            self.attention_type = layer.attention_type
        self.returns_tuple = layer.returns_tuple
        self.call: _Call = ((), {})
        self.hidden: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.call, self.hidden = (args, kwargs), hidden_states
        return (hidden_states, None) if self.returns_tuple else hidden_states


class Given(nn.Module):
    """Stands in for the model's body: the hidden state that it is given is the one it returns."""

    @property
    def decoder(self) -> Given:
        """Itself: some heads call the body's decoder."""
        return self

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions as Output

        # Heads that want a pooled state beside the logits get the first position; what they pass on is not there.
        output = Output(last_hidden_state=inputs_embeds, pooler_output=inputs_embeds[:, 0])
        output.router_logits = None
        return output


class LayerRunner:
    """A model whose layers are filled with weights one at a time.

    Args:
        config: normalised config.json, of a stock or a converted model.
        weights: canonical names -> tensors; a layer's tensors are read when the layer is entered.
        padding: token that fills sequences up to a common length; None where all are of one length. Its places hold
            exact zeros in every stream, by which they are known: see `real`.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: str = "cpu",
        padding: int | None = None,
    ) -> None:
        self.padding = padding
        self.family = family_of(config)
        if config.get("block_transformer"):
            raise SurgeryError(
                "a block transformer is not one stack of layers, and cannot be walked layer by layer; analyse and "
                "refit the model that it is made from, before the block step"
            )
        weights = class_form(weights, self.family)
        self.weights, self.dtype, self.device = weights, dtype, device
        self.parallel_residual = self.family.parallel_residual(config)
        # In the surgeon form each layer answers for its attention and its FFN on their own, whatever the family.
        detailed = as_surgeon(config)
        self.entries: list[dict[str, Any]] = detailed["block_configs"]
        self.model = empty_model(detailed)
        self.layers = list(self.model.get_submodule(self.family.layers))
        # Heads and towers that go along beside the model stay on the disk.
        own = self.model.state_dict()
        names = [name for name in weights if name in own and not name.startswith(f"{self.family.layers}.")]
        self._refuse_too_large(sum(own[name].numel() for name in names) * dtype.itemsize)
        outside = {name: weights[name].to(device=device, dtype=dtype) for name in names}
        self.model.load_state_dict(outside, strict=False, assign=True)
        self.model.tie_weights()
        self.base = self.model.base_model
        self.catchers = nn.ModuleList(_Catcher(layer) for layer in self.layers)
        self.model.set_submodule(self.family.layers, self.catchers)
        for buffer_owner in self.base.modules():
            for name, buffer in buffer_owner.named_buffers(recurse=False):
                setattr(buffer_owner, name, buffer.to(device))
        self._calls: dict[Any, list[_Call]] = {}
        self._length = 0

    def _refuse_too_large(self, outside: int) -> None:
        """Raise SurgeryError where one layer beside the `outside` bytes is more than this process may take."""
        free = room() if torch.device(self.device).type == "cpu" else None
        largest = max((sum(t.numel() for t in layer.state_dict().values()) for layer in self.layers), default=0)
        layer = largest * self.dtype.itemsize
        if free and free.bytes < layer + outside:
            fewer = "" if self.dtype.itemsize == 2 else ", or compute in --dtype bfloat16"
            raise SurgeryError(
                f"one layer of this model takes {layer:,} bytes, beside {outside:,} of embedding and head, and this "
                f"process may take {free.bytes:,} more ({free.limit}); give it more memory{fewer}"
            )

    def embed(self, tokens: Tensor) -> Tensor:
        """What enters the first layer, [s, T] -> [s, T, D]; also learns how the model calls each layer."""
        given: dict[str, Any] = {} if self.family.encoder else {"use_cache": False}
        if self.padding is not None:
            given["attention_mask"] = (tokens != self.padding).long().to(self.device)
        with torch.no_grad():
            self.base(input_ids=tokens.to(self.device), **given)
        catchers: list[_Catcher] = list(self.catchers)  # type: ignore[arg-type]
        if tokens.shape[1] != self._length:
            self._calls, self._length = {}, tokens.shape[1]
        hidden = catchers[0].hidden
        assert hidden is not None
        for catcher in catchers:
            catcher.hidden = None
        self._finite("the embedding", (self.family.embedding,), hidden)
        if self.padding is not None:
            hidden = hidden * given["attention_mask"][..., None].to(hidden.dtype)
        self._calls[self._key(hidden)] = [catcher.call for catcher in catchers]
        return hidden

    @property
    def vocab(self) -> int:
        """Rows of the embedding."""
        return embedding_rows(self.base)

    def real(self, hidden: Tensor) -> Tensor:
        """Which places of a stream [s, T, D] hold tokens and no padding, bool [s, T]."""
        if self.padding is None:
            return torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
        return hidden.any(-1)

    def _finite(self, where: str, prefixes: tuple[str, ...], state: Tensor | None) -> Tensor | None:
        """The state, which must be finite; `prefixes` are those of the weights that made it.

        Raises:
            SurgeryError: NaN or infinity; the message names the place, the dtype and what to do.
        """
        if state is not None and not is_finite(state):
            made = {name: self.weights[name] for name in self.weights if name.startswith(prefixes)}
            raise not_finite(where, self.dtype, made)
        return state

    def _only_real(self, hidden: Tensor, contribution: Tensor | None) -> Tensor | None:
        """A contribution to `hidden`, or what it becomes, with zeros where there is padding."""
        if contribution is None or self.padding is None:
            return contribution
        return contribution * self.real(hidden)[..., None].to(contribution.dtype)

    def _key(self, hidden: Tensor) -> Any:
        """What tells the calls of one batch from another's: how many sequences, or which places are padding."""
        return len(hidden) if self.padding is None else self.real(hidden).cpu().numpy().tobytes()

    def _call(self, index: int, hidden: Tensor) -> _Call:
        if self.padding is None:
            return self.call_of(index, len(hidden))
        key = self._key(hidden)
        if key not in self._calls:
            # Any other token will do: how layers are called depends on lengths alone.
            self.embed(torch.where(self.real(hidden).cpu(), int(self.padding == 0), self.padding))
        return self._calls[key][index]

    def call_of(self, index: int, sequences: int) -> _Call:
        """What layer `index` is called with beside the hidden state of so many sequences, as long as the last ones."""
        if sequences not in self._calls:
            self.embed(torch.zeros(sequences, self._length, dtype=torch.long))
        return self._calls[sequences][index]

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """Layer `index` with its weights, which leave memory again at the end."""
        layer = self.layers[index]
        prefix = self.family.layer(index)
        state = {
            name: self.weights[prefix + name].to(device=self.device, dtype=self.dtype) for name in layer.state_dict()
        }
        layer.load_state_dict(state, assign=True)
        try:
            yield layer
        finally:
            layer.to("meta")

    def attends(self, index: int) -> bool:
        """True where layer `index` has an attention, its own and not a parallel branch's."""
        return not self.entries[index].get("parallel") and not self.entries[index]["attention"]["no_op"]

    def feeds_forward(self, index: int) -> bool:
        """True where layer `index` has an FFN of its own."""
        return not self.entries[index].get("parallel") and not self.entries[index]["ffn"]["no_op"]

    def attend(self, index: int, hidden: Tensor) -> Tensor | None:
        """Attention's contribution at the loaded layer, [s, T, D] -> [s, T, D]; None where there is none."""
        layer = self.layers[index]
        if hasattr(layer, "branches"):
            return None
        args, kwargs = self._call(index, hidden)
        made = self._only_real(hidden, layer.attend(hidden, *args, **kwargs))
        return self._finite(f"layer {index}, attention", (self.family.layer(index),), made)

    def feed_forward(self, index: int, hidden: Tensor) -> Tensor | None:
        """The FFN's contribution at the loaded layer, norm included; None where there is none.

        A parallel layer's contribution, its attentions included, counts as its FFN's: all of it reads one input.
        """
        layer = self.layers[index]
        if hasattr(layer, "branches"):
            return self.whole(index, hidden) - hidden
        made = self._only_real(hidden, layer.feed_forward(hidden))
        return self._finite(f"layer {index}, FFN", (self.family.layer(index),), made)

    def instead(self, index: int, part: Literal["attention", "ffn"], hidden: Tensor) -> Tensor | None:
        """What the loaded layer would contribute in place of a part that goes: LN(x) - x where the norm stays."""
        if not self.family.post_norm:
            return None
        norm = self.family.attention_norm if part == "attention" else self.family.ffn_norm
        return self._only_real(hidden, self.layers[index].get_submodule(norm)(hidden) - hidden)

    def whole(self, index: int, hidden: Tensor) -> Tensor:
        """The loaded layer as the model itself runs it."""
        args, kwargs = self._call(index, hidden)
        output: Any = self.layers[index](hidden, *args, **kwargs)
        stream = self._only_real(hidden, output[0] if self.layers[index].returns_tuple else output)
        stream = self._finite(f"layer {index}", (self.family.layer(index),), stream)
        assert stream is not None
        return stream

    def states(self, hidden: Tensor) -> Tensor:
        """The model's last hidden state from what left the last layer: the final norm, where there is one."""
        states = hidden
        if self.family.final_norm:
            states = self.model.get_submodule(self.family.final_norm)(states)
        holder, _, name = self.family.final_projection.rpartition(".")
        projection = getattr(self.model.get_submodule(holder), name) if name else None
        made = states if projection is None else projection(states)
        self._finite("the final norm", (f"{self.family.final_norm}.",), made)
        return made

    def final(self, hidden: Tensor) -> Tensor:
        """Final norm and head, as the model's own class computes them: [T, D] -> logits [T, V]."""
        states, body = self.states(hidden)[None], self.model.base_model_prefix
        setattr(self.model, body, Given())
        try:
            output = self.model(inputs_embeds=states)
        finally:
            setattr(self.model, body, self.base)
        logits: Tensor = output["logits" if "logits" in output else "prediction_logits"]
        outside = tuple(name for name in self.model.state_dict() if not name.startswith(f"{self.family.layers}."))
        self._finite("the head", outside, logits)
        return logits[0]

    def expected(self, hidden: Tensor) -> Tensor:
        """How often each token is expected to come next, summed over positions, from what left the last layer.

        [T, D] -> [V] on the CPU, float32.
        """
        return self.final(hidden.to(self.device)).float().softmax(-1).sum(0).cpu()
