"""Tiny models of every family, built in seconds, with weights large enough that every part matters."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

LAYERS = 6
# Alike within the windows of blocks that tests run in parallel.
MIXED = [
    "sliding_attention",
    "sliding_attention",
    "full_attention",
    "sliding_attention",
    "sliding_attention",
    "sliding_attention",
]
# A shell starts background jobs with SIGINT ignored, which processes inherit; tests of interrupts want it back.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TINY: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 96},
    "mistral": {"num_key_value_heads": 2, "intermediate_size": 96, "sliding_window": 8},
    "qwen2": {
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 3,
    },
    "qwen3": {"num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 16},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 96},
    "phi3": {"num_key_value_heads": 2, "intermediate_size": 96, "pad_token_id": 0},
    "gemma2": {
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "layer_types": MIXED,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 4.0,
    },
    "gemma3_text": {
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "layer_types": MIXED,
    },
    "olmo2": {"num_key_value_heads": 2, "intermediate_size": 96},
    "granite": {
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 0.5,
    },
    "smollm3": {
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "pad_token_id": 0,
        "no_rope_layers": [1, 1, 0, 1, 1, 1],
    },
    "stablelm": {"num_key_value_heads": 2, "intermediate_size": 96, "use_qkv_bias": True},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 96, "bias": True},
    "bloom": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 16, "pad_token_id": 0},
}
FAMILY_NAMES = tuple(TINY)
# Mixtures of experts have tests of their own: operations on dense FFNs do not apply.
TINY_MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
    },
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}
MIXTURE_NAMES = tuple(TINY_MIXTURES)
# Encoders have tests of their own: no next token, no cache, a class for each task.
TINY_ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {"intermediate_size": 96, "pad_token_id": 0},
    "roberta": {"intermediate_size": 96, "pad_token_id": 0},
    "distilbert": {"hidden_dim": 96, "pad_token_id": 0},
    "modernbert": {
        "intermediate_size": 96,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "local_attention": 8,
        "layer_types": MIXED,
    },
}
ENCODER_NAMES = tuple(TINY_ENCODERS)


def masked_head(family: str) -> str:
    """The class of an encoder with a masked-LM head."""
    from llmsurgeon.model.families import FAMILIES

    return next(head for head, auto in FAMILIES[family].heads if auto == "AutoModelForMaskedLM")


def tiny_config(family: str, **changes: Any) -> dict[str, Any]:
    """config.json of a tiny model: 6 layers, 32 wide, 4 heads, 64 tokens in the vocabulary."""
    from transformers import AutoConfig

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(family, **{**sizes, **{**TINY, **TINY_MIXTURES}[family], **changes})
    return {**config.to_dict(), "model_type": family}


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model whose norms, biases and projections all matter to its output."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = tiny_config(family, **changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in name or ("ln_" in name and name.endswith("weight")) else noise)
            if parameter.dim() > 1:
                parameter.mul_(0.6 / parameter.shape[-1] ** 0.5)
    return model.to(dtype).eval()


def tiny_encoder(family: str, head: str | None = None, seed: int = 0, **changes: Any) -> Any:
    """A random encoder of 6 layers whose parts all matter; `head` is its class, the one without head by default."""
    import transformers

    from llmsurgeon.model.families import FAMILIES

    head = head or FAMILIES[family].heads[0][0]
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    config = transformers.AutoConfig.for_model(family, **{**sizes, **TINY_ENCODERS[family], **changes})
    config.architectures = [head]
    torch.manual_seed(seed)
    model = getattr(transformers, head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.25)
    return model


def encoder_tokenizer() -> Any:
    """The tokenizer of 64 tokens with [CLS], [SEP] and [MASK], as BERT's frames a text."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    inner = byte_tokenizer()._tokenizer
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        mask_token="\n",
        model_max_length=64,
    )


def save_encoder(folder: Path, family: str, head: str | None = None, **changes: Any) -> Path:
    """A tiny encoder on disk, as transformers writes it, with its tokenizer."""
    tiny_encoder(family, head, **changes).save_pretrained(folder)
    encoder_tokenizer().save_pretrained(folder)
    return folder


def save_tiny(folder: Path, family: str, tokenizer: bool = False, **changes: Any) -> Path:
    """A tiny checkpoint on disk, as transformers writes it."""
    model = tiny_model(family, **changes)
    model.save_pretrained(folder)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == family
    return folder


def byte_tokenizer() -> Any:
    """A tokenizer of 64 tokens that needs no download: letters and a few signs."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123.,; \n"]
    tokenizer = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(signs[:64])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=128
    )


# Files that take long, the longest first: none of them is left to one process when the others are done.
LONG = (
    "test_readme.py",
    "searching/test_search.py",
    "healing/distill/test_distill.py",
    "formats/test_loads_alone.py",
    "standin/test_placement.py",
    "cli/test_heal.py",
    "scripts/test_attack.py",
    "cli/test_ending.py",
    "test_library.py",
    "test_positions.py",
    "checkpoint/test_writer.py",
    "golden/test_golden.py",
    "extending/test_extending.py",
    "scripts/test_gpu_benchmark.py",
    "modeling/test_two_ranks.py",
    "test_run.py",
    "test_threads.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first."""
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


@pytest.fixture(autouse=True, scope="session")
def cache_of_the_session(tmp_path_factory) -> Iterator[None]:
    """What is kept for later is kept in a folder of the session, and never in that of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMSURGEON_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def rates_at_a_glance() -> Iterator[None]:
    """What a dry run measures of this machine is measured once each, on little."""
    from llmsurgeon.planning import rates

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "ENOUGH", 0.0)
        patch.setattr(rates, "FILE_BYTES", rates.BLOCK)
        yield


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """No test leaves torch with another number of threads: sums would round otherwise in those behind it."""
    before = torch.get_num_threads()
    yield
    now = torch.get_num_threads()
    torch.set_num_threads(before)
    assert now == before, f"the test left torch with {now} threads instead of {before}"


@pytest.fixture(autouse=True)
def not_quiet() -> Iterator[None]:
    """A command line with --quiet quiets its whole process, which here goes on with other tests."""
    from llmsurgeon.progress import set_quiet

    yield
    set_quiet(False)


@pytest.fixture(params=FAMILY_NAMES)
def family_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """tiny("llama") -> folder of a fresh tiny checkpoint."""

    def make(family: str = "llama", name: str = "parent", **changes: Any) -> Path:
        return save_tiny(tmp_path / name, family, **changes)

    return make


# A text, and what keeps calibration on it short.
TEXT = "The quick brown fox jumps over the lazy dog; 0123, and so on.\n" * 60
SMALL = ("--set", "calibration.tokens=512", "--set", "calibration.sequence_length=16")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with a parent, a text and nothing else."""
    save_tiny(tmp_path / "parent", "llama", tokenizer=True)
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMSURGEON_CACHE", str(tmp_path.parent / "cache"))
    return tmp_path


@pytest.fixture
def little_text(monkeypatch) -> None:
    """Commands read, or sample from the model, 8,192 tokens at most, whatever their defaults or recipes say."""
    from llmsurgeon.evaluation import pair
    from llmsurgeon.planning import texts

    for module in (texts, pair):
        every = module.calibration_sequences

        def some(name: str, tokenizer: Any, wanted: Any, *more: Any, every: Any = every) -> Any:
            return every(name, tokenizer, replace(wanted, tokens=min(wanted.tokens, 8192)), *more)

        monkeypatch.setattr(module, "calibration_sequences", some)


@pytest.fixture
def run(capsys) -> Callable[..., tuple[int, str, str]]:
    """Exit code, stdout and stderr of a command line."""
    from llmsurgeon.cli.main import main

    def invoke(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return invoke
