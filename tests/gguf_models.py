"""Tiny models with a byte-level tokenizer, uniform and uneven, and their way into llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from conftest import tiny_config, tiny_model
from safetensors.torch import save_file

from llmsurgeon.checkpoint.gguf.architectures import file_name, tensor_map
from llmsurgeon.checkpoint.gguf.file import GGUFFile
from llmsurgeon.formats.configs import load_config, normalised
from llmsurgeon.formats.gguf.write import Asked, Exported, Model, write_gguf
from llmsurgeon.formats.models import expected_shapes
from llmsurgeon.formats.surgeon import surgeon_classes
from llmsurgeon.formats.write import write_config
from llmsurgeon.model.families import FAMILIES
from llmsurgeon.model.parts import FFNSpec
from llmsurgeon.planning.opened import open_model

VOCAB = 320
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|file_sep|>", "<|eot_id|>", "<bos>"]
# (heads, KV heads, FFN width) of each block; no heads: no attention.
UNEVEN = ((4, 2, 96), (4, 1, 64), (0, 0, 200), (4, 2, 32), (4, 4, 96), (0, 0, 128))


@cache
def trained(texts: tuple[str, ...], size: int) -> str:
    """tokenizer.json of a byte-level BPE whose merges cross everything: where two pre-tokenizers cut differently, the
    tokens differ."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet)
    made.train_from_iterator(texts, trainer)
    return str(made.to_str())


def byte_level_tokenizer(
    texts: Sequence[str] = ("the cat sat on the mat",), size: int = 280, pre: Any = None, ignore_merges: bool = False
) -> Any:
    """A byte-level BPE tokenizer trained on `texts`; `pre` is tokenizer.json's pre_tokenizer, GPT-2's if not given."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    description = json.loads(trained(tuple(texts), size))
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    description["pre_tokenizer"] = pre or plain
    description["model"]["ignore_merges"] = ignore_merges
    tokenizer = Tokenizer.from_str(json.dumps(description))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save_uniform(folder: Path, family: str, **changes: Any) -> Path:
    """A tiny checkpoint of a family with a tokenizer that llama.cpp knows."""
    sizes = {key: size for key, size in SIZES.items() if family != "bloom" or key != "intermediate_size"}
    tiny_model(family, **{**sizes, **changes}).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def save_uneven(folder: Path, family: str = "llama", shapes: Sequence[Any] = UNEVEN, **changes: Any) -> Path:
    """A checkpoint in the surgeon format whose blocks have these shapes (width None: no FFN)."""
    config = normalised(tiny_config(family, **{**SIZES, "num_hidden_layers": len(shapes), **changes}))
    spec = FAMILIES[family].describe(config)
    attention = spec.layers[0].attention
    assert attention
    blocks = [
        replace(
            block,
            attention=replace(attention, heads=heads, kv_heads=kv) if heads else None,
            ffn=FFNSpec(width) if width else None,
        )
        for block, (heads, kv, width) in zip(spec.layers, shapes, strict=True)
    ]
    written = write_config(spec.with_layers(blocks), FAMILIES[family], config, "surgeon")
    torch.manual_seed(0)
    model = surgeon_classes(FAMILIES[family])[1](load_config(written.config))
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        scaled = noise * 0.6 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else noise
        parameter.data = 1 + 0.2 * noise if "norm" in name else scaled
    model.tie_weights()
    folder.mkdir(parents=True)
    state = model.state_dict()
    save_file({name: state[name].clone() for name in expected_shapes(model)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(written.config, default=str))
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def ternary_folder(folder: Path, **step: Any) -> Path:
    """A checkpoint beside `folder` whose linears are ternary, by rounding."""
    from llmsurgeon.recipe.recipe import loads
    from llmsurgeon.run import Options, run

    recipe = {"version": 1, "steps": [{"op": "ternary", "method": "round", **step}]}
    run(loads(json.dumps(recipe)), str(folder), f"{folder}-ternary", Options())
    return folder.with_name(f"{folder.name}-ternary")


def export(model: Path, out: Path, type: str = "F32", overwrite: bool = False, **more: Any) -> Exported:
    """The checkpoint as a GGUF file."""
    parent = open_model(str(model))
    written = Model(parent.config, parent.family, parent.spec, parent.weights, parent.checkpoint.path)
    asked = Asked(type, **{key: more.pop(key) for key in ("float_type", "pre", "name") if key in more})
    return write_gguf(out, written, asked, place={"overwrite": overwrite}, **more)


def largest_difference(model: Any, gguf: Path, lengths: Sequence[int] = (5, 19, 40), context: int = 256) -> float:
    """max |log p - log p'| of the next token between a transformers model and llama.cpp, over the whole vocabulary."""
    from llmsurgeon.evaluation.llama_server import LlamaCpp

    worst = 0.0
    with LlamaCpp(gguf, context=context, threads=1, exact_cache=True) as engine:
        for length in lengths:
            ids = torch.randint(len(SPECIAL), VOCAB, (length,), generator=torch.Generator().manual_seed(length))
            with torch.no_grad():
                expected = model(ids[None]).logits[0, -1].log_softmax(-1)
            found = engine.next_logprobs(ids.tolist(), top=VOCAB)
            assert len(found) == VOCAB
            worst = max(worst, *(abs(expected[i].item() - value) for i, value in found.items()))
    return worst


def round_inputs(model: Any, path: Path) -> None:
    """Hook the linears to read what llama.cpp reads for their types in this file: codes of 8 bits, a scale a block."""
    from gguf import GGMLQuantizationType

    entries, names = GGUFFile(path).entries, tensor_map("llama", model.config.num_hidden_layers)
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        target, _ = file_name(names, f"{name}.weight")
        kind = GGMLQuantizationType(entries[target].kind).name if target in entries else "F32"
        if kind in BLOCKS:
            size, scale = BLOCKS[kind]
            module.register_forward_pre_hook(partial(in_eight_bits, size, scale))


# Numbers that share a scale in what a type is multiplied with (Q8_K, Q8_0), and what the scale is kept in.
BLOCKS = {"TQ1_0": (256, torch.float32), "TQ2_0": (256, torch.float32)}
BLOCKS |= {kind: (32, torch.float16) for kind in ("Q4_0", "Q8_0")}


def in_eight_bits(size: int, kept: torch.dtype, module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """The input in blocks of `size` numbers, each a code from -127 to 127 times the block's scale."""
    blocks = inputs[0].unflatten(-1, (-1, size))
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    return (((blocks / scale).round() * scale.to(kept).float()).flatten(-2),)
