"""Ternary linears at work: packed in Python beside transformers' own bitnet modules, and in llama.cpp.

    python benchmarks/ternary.py packed --threads 1 --prompt 1 16 128 512
    python benchmarks/ternary.py linear --threads 1 --prompt 1 16 128 512
    python benchmarks/ternary.py llamacpp --threads 2
    python benchmarks/ternary.py agree MODEL --text unseen.txt

packed: a random Llama with ternary linears is written plain and packed, and loaded four ways: plain, packed by
llmsurgeon, and by stock transformers with autobitlinear and with bitlinear. Each reads prompts of these lengths, 1 of
which is a decode step; models take turns. transformers compiles its small functions (torch.compile), which the warm-up
pays for; --eager leaves that out. linear: one packed linear beside a plain one and an AutoBitLinear alone.
llamacpp: a random Llama of 1.4 GB in bfloat16 whose rows are whole blocks of 256, all block linears ternary, as BF16,
TQ2_0 and TQ1_0: file sizes, prefill and decode in turn. For speed alone: the vocabulary is tiny.
agree: differences of log-probabilities between MODEL in transformers (float32) and in llama.cpp, which rounds what
quantised weights are multiplied with to 8 bits.
Times are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llmsurgeon import run  # noqa: E402
from llmsurgeon.evaluation.apart import Apart  # noqa: E402
from llmsurgeon.evaluation.llama_server import LlamaCpp  # noqa: E402
from llmsurgeon.export import export, export_gguf  # noqa: E402
from llmsurgeon.formats.loading import load_model, load_tokenizer  # noqa: E402
from llmsurgeon.kernels.packed import PackedLinear, pack_linears, resident_bytes  # noqa: E402
from llmsurgeon.model.ternary import Grid, taken_apart  # noqa: E402
from llmsurgeon.model.ternary import rounded as ternary_weight  # noqa: E402
from llmsurgeon.recipe import recipe  # noqa: E402
from llmsurgeon.text.files import file_text  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    packed_mode, linear_mode, engine_mode = (modes.add_parser(name) for name in ("packed", "linear", "llamacpp"))
    sizes = ((packed_mode, 1024, 2816, 4), (linear_mode, 1024, 2816, 1), (engine_mode, 2048, 5632, 16))
    for mode, hidden, width, layers in sizes:
        mode.add_argument("--hidden", type=int, default=hidden)
        mode.add_argument("--width", type=int, default=width)
        mode.add_argument("--layers", type=int, default=layers)
        mode.add_argument("--rounds", type=int, default=7)
        mode.add_argument("--threads", type=int, default=1)
    for mode in (packed_mode, linear_mode):
        mode.add_argument("--prompt", type=int, nargs="+", default=[1, 16, 128, 512])
        mode.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
        mode.add_argument("--eager", action="store_true", help="do not compile transformers' functions")
        mode.add_argument(
            "--clock", choices=["wall", "cpu"], default="wall", help="cpu: the thread's own time, for a busy machine"
        )
    engine_mode.add_argument("--prompt", type=int, default=64)
    engine_mode.add_argument("--new-tokens", type=int, default=32)
    agree_mode = modes.add_parser("agree")
    agree_mode.add_argument("model")
    agree_mode.add_argument("--text", required=True)
    agree_mode.add_argument("--types", nargs="+", default=["TQ2_0", "TQ1_0"])
    agree_mode.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 128, 256])
    agree_mode.add_argument("--places", type=int, default=3, help="of each length, so many stretches of the text")
    agree_mode.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.mode in ("packed", "linear") and arguments.clock == "cpu" and arguments.threads != 1:
        parser.error("--clock cpu counts one thread: give --threads 1")
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        work = {"packed": packed, "linear": one_linear, "llamacpp": in_llamacpp, "agree": agree}
        work[arguments.mode](Path(folder), arguments)
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}", file=sys.stderr)


def packed(folder: Path, arguments: argparse.Namespace) -> None:
    """A line for each way of loading, then one for each dtype and length of prompt."""
    torch.compiler.set_stance("force_eager" if arguments.eager else "default")
    clock = time.perf_counter if arguments.clock == "wall" else time.thread_time
    for dtype in arguments.dtype:
        models = loaded(folder / dtype, arguments, getattr(torch, dtype))
        for name, model in models.items():
            print(json.dumps({"dtype": dtype, "model": name, "resident_bytes": resident_bytes(model)}), flush=True)
        for length in arguments.prompt:
            ids = torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(length))
            # Short calls are repeated, so that what the other models left in the caches is not all that is seen.
            repeats = max(1, 16 // length)
            times: dict[str, list[float]] = {name: [] for name in models}
            for _ in range(arguments.rounds + 1):
                for name, model in models.items():
                    began = clock()
                    for _ in range(repeats):
                        model(input_ids=ids, use_cache=False)
                    times[name].append((clock() - began) / repeats)
            # The first round warms up.
            row = {name: round(1000 * statistics.median(found[1:]), 2) for name, found in times.items()}
            sizes = {"dtype": dtype, "tokens": length, "threads": arguments.threads}
            print(json.dumps({**sizes, "milliseconds": row}), flush=True)


def one_linear(folder: Path, arguments: argparse.Namespace) -> None:
    """A line for each dtype and number of tokens: median and smallest milliseconds of a linear of hidden -> width."""
    from transformers.integrations.bitnet import AutoBitLinear

    torch.compiler.set_stance("force_eager" if arguments.eager else "default")
    clock = time.perf_counter if arguments.clock == "wall" else time.thread_time
    grid, shape = Grid(), (arguments.width, arguments.hidden)
    codes, scale = taken_apart(ternary_weight(torch.randn(shape), grid), grid)
    for name in arguments.dtype:
        dtype = getattr(torch, name)
        plain = torch.nn.Linear(*reversed(shape), bias=False, dtype=dtype)
        plain.weight.data = (codes * scale).to(dtype)
        theirs = AutoBitLinear(*reversed(shape), bias=False, dtype=dtype)
        theirs.weight.data, theirs.weight_scale = codes.to(dtype), scale[0, :1].to(dtype)
        ways = {"plain": plain, "packed": PackedLinear(codes, scale[:, 0], None, dtype), "autobitlinear": theirs}
        for tokens in arguments.prompt:
            x = torch.randn(tokens, arguments.hidden).to(dtype)
            times: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(arguments.rounds + 1):
                for way, linear in ways.items():
                    began = clock()
                    linear(x)
                    times[way].append(1000 * (clock() - began))
            row = {way: [round(statistics.median(t[1:]), 2), round(min(t[1:]), 2)] for way, t in times.items()}
            print(json.dumps({"dtype": name, "tokens": tokens, "threads": arguments.threads, **row}), flush=True)


def loaded(folder: Path, arguments: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """Name -> the same model, loaded in each way."""
    from transformers import AutoModelForCausalLM

    random_llama(folder / "dense", arguments, dtype, vocabulary=256)
    rounded(folder)
    models: dict[str, Any] = {name: load_model(str(folder / "plain")) for name in ("plain", "packed")}
    pack_linears(models["packed"])
    for kind in ("autobitlinear", "bitlinear"):
        export(str(folder / "plain"), str(folder / kind), "bitnet", linear_class=kind)  # type: ignore[arg-type]
        models[kind] = AutoModelForCausalLM.from_pretrained(folder / kind, dtype="auto").eval()
    return models


def random_llama(folder: Path, arguments: argparse.Namespace, dtype: torch.dtype, vocabulary: int) -> None:
    """Write a Llama of these sizes; heads are 64 wide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=arguments.hidden // 64,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    with torch.inference_mode(False):
        LlamaForCausalLM(config).to(dtype).save_pretrained(folder)


def rounded(folder: Path) -> None:
    """The model in `dense` with ternary linears, as `plain`."""
    steps = recipe.loads("version: 1\nsteps:\n  - {op: ternary, method: round}\n")
    run.run(steps, str(folder / "dense"), str(folder / "plain"), run.Options())


def in_llamacpp(folder: Path, arguments: argparse.Namespace) -> None:
    """One line for each type of file."""
    random_llama(folder / "dense", arguments, torch.bfloat16, vocabulary=320)
    tiny_tokenizer(folder / "dense")
    rounded(folder)
    files = {kind: export_gguf(str(folder / "plain"), str(folder / f"{kind}.gguf"), type=kind) for kind in KINDS}
    ids = torch.randint(8, 256, (arguments.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    times: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    with ExitStack() as stack:
        context = arguments.prompt + arguments.new_tokens + 1
        engines = {
            kind: stack.enter_context(Apart(file.path, context=context, threads=arguments.threads))
            for kind, file in files.items()
        }
        for round_ in range(arguments.rounds + 1):
            for kind, engine in engines.items():
                timing = engine.time(ids, arguments.new_tokens)
                if round_:
                    times[kind].append(timing)
    decode = {kind: statistics.median(t.decode for t in found) / arguments.new_tokens for kind, found in times.items()}
    for kind, file in files.items():
        prefill = statistics.median(t.prefill for t in times[kind])
        row = {"type": kind, "file_bytes": file.size, "threads": arguments.threads, "prompt": arguments.prompt}
        row |= {"prefill_ms": round(1000 * prefill, 1), "decode_ms": round(1000 * decode[kind], 2)}
        print(json.dumps({**row, "decode_times_BF16": round(decode["BF16"] / decode[kind], 2)}), flush=True)


KINDS = ("BF16", "TQ2_0", "TQ1_0")


def tiny_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer that llama.cpp takes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    made.train_from_iterator(["the cat sat on the mat"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def agree(folder: Path, arguments: argparse.Namespace) -> None:
    """One line for each type: differences over whole distributions of next tokens, and over their likely part."""
    ids = load_tokenizer(arguments.model)(file_text(arguments.text))["input_ids"]
    model = load_model(arguments.model, dtype=torch.float32)
    cuts = [(place * len(ids) // arguments.places, n) for n in arguments.lengths for place in range(arguments.places)]
    stretches = [ids[start : start + length] for start, length in cuts]
    expected = [model(torch.tensor([part])).logits[0, -1].log_softmax(-1) for part in stretches]
    for kind in arguments.types:
        float_type = {"float_type": "F32"} if kind.startswith("TQ") else {}
        file = export_gguf(arguments.model, str(folder / f"{kind}.gguf"), type=kind, **float_type)
        with LlamaCpp(file.path, context=512, threads=arguments.threads, exact_cache=True) as engine:
            given = [engine.next_logprobs(part, top=len(expected[0])) for part in stretches]
        found = [torch.tensor([each[token] for token in range(len(each))]) for each in given]
        pairs = list(zip(expected, found, strict=True))
        changes = [(a - b).abs() for a, b in pairs]
        likely = [change[a.topk(10).indices].max().item() for change, (a, _) in zip(changes, pairs, strict=True)]
        row = {"type": kind, "file_bytes": file.size, "contexts": len(stretches)}
        row |= {"largest": max(change.max().item() for change in changes), "largest_of_10_likeliest": max(likely)}
        row |= {"mean_kl": statistics.mean((a.exp() * (a - b)).sum().item() for a, b in pairs)}
        print(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
        for note in file.notes:
            print(f"  {note}", flush=True)


if __name__ == "__main__":
    main()
