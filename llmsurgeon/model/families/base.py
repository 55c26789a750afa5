"""What a model family declares: where its parts are, what its norms are, which config keys hold its sizes.

Nothing here computes. A new family is one instance of `Family` in a file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmsurgeon.errors import SurgeryError
from llmsurgeon.model.families.config import ConfigKeys

# Families with a modeling file of the block form, modeling_block_<model_type>.py.
BLOCK_FORMS = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, kw_only=True)
class Family(ConfigKeys):
    """A family of transformers: its modules, its config's keys, its classes, and what it cannot take."""

    # Buffers that old checkpoints carry and today's classes do not have.
    ignored: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)
    # (name in published checkpoints, name in today's class), where the two differ.
    legacy_names: tuple[tuple[str, str], ...] = ()
    # Old spellings in tensor names, read and not written: (pattern, replacement).
    old_names: tuple[tuple[str, str], ...] = ()
    # Why the first layer must stay where it is, "" where it need not.
    first_stays: str = ""
    # Reads text in both directions: no cache, no next token, hidden states are what it is for.
    encoder: bool = False
    # Classes that an encoder's checkpoints name in `architectures`, with the Auto class of each; the first has no head.
    # Paths above are those of the first; the others hold it under `prefix`.
    heads: tuple[tuple[str, str], ...] = ()
    prefix: str = ""
    # Operations that this family's maths or classes cannot take: (operation, reason).
    unsupported: tuple[tuple[str, str], ...] = ()
    # (settings, fields): where the config has all the settings, these fields differ.
    layouts: tuple[tuple[Mapping[str, Any], Mapping[str, Any]], ...] = ()
    examples: tuple[str, ...] = ()

    def laid_out(self, config: Mapping[str, Any]) -> Family:
        """The declaration as it is for this (normalised) config."""
        changes: dict[str, Any] = {}
        for settings, fields in self.layouts:
            if all(config.get(key) == value for key, value in settings.items()):
                changes |= fields
        return replace(self, **changes) if changes else self

    @property
    def auto_class(self) -> str:
        """The Auto class of transformers that loads it."""
        return dict(self.heads).get(self.model_class, "AutoModelForCausalLM")

    def with_head(self, architectures: Sequence[str] | None) -> Family:
        """The family as the checkpoint's own class has it.

        Raises:
            SurgeryError: a class that the family does not know.
        """
        if not self.heads:
            return self
        base = self.heads[0][0]
        name = (architectures or [base])[0].removeprefix("Surgeon")
        if name not in dict(self.heads):
            raise SurgeryError(
                f"config.json: architectures names {name}, supported of {self.model_type} are "
                + ", ".join(head for head, _ in self.heads)
            )
        if name == base:
            return replace(self, head="")
        return replace(
            self,
            model_class=name,
            head=self.head if dict(self.heads)[name] in ("AutoModelForMaskedLM", "AutoModelForPreTraining") else "",
            layers=self.prefix + self.layers,
            embedding=self.prefix + self.embedding,
            final_norm=self.final_norm and self.prefix + self.final_norm,
        )

    def no_block_form(self) -> str | None:
        """Why it cannot become a block transformer, None where it can."""
        if self.encoder:
            return "it is an encoder: it predicts no next token, and so no next block"
        if self.model_type not in BLOCK_FORMS:
            return f"its class has no block form; {', '.join(BLOCK_FORMS)} have one"
        return None

    def no_sub_norm(self) -> str | None:
        """Why an RMSNorm cannot stand before the output projections, None where it can."""
        if self.norm != "rms" or self.encoder or self.experts:
            return "a norm before output projections is an RMSNorm, in a decoder of RMSNorms and dense FFNs"
        return None
