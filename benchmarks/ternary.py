"""Packed ternary linears beside transformers' own bitnet modules on the CPU: decode, prefill, resident bytes.

    python benchmarks/ternary.py --hidden 1024 --width 2816 --layers 4 --threads 1

A random Llama with ternary linears is written plain and packed, and loaded four ways: plain, packed by llmsurgeon, and
by stock transformers with autobitlinear and with bitlinear. Rounds are interleaved; times are medians. transformers
compiles its small functions (torch.compile), which the warm-up pays for; --eager leaves that out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llmsurgeon import recipe, run  # noqa: E402
from llmsurgeon.export import export  # noqa: E402
from llmsurgeon.formats.loading import load_model  # noqa: E402
from llmsurgeon.packed import pack_linears, resident_bytes  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--eager", action="store_true", help="do not compile transformers' functions")
    arguments = parser.parse_args()
    torch.compiler.set_stance("force_eager" if arguments.eager else "default")
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        models = loaded(Path(folder), arguments)
        times: dict[str, dict[str, list[float]]] = {name: {"decode": [], "prefill": []} for name in models}
        prompt = torch.randint(0, 256, (1, arguments.prompt))
        for round_ in range(arguments.rounds + 1):
            for name, model in models.items():
                for kind, ids in (("prefill", prompt), ("decode", prompt[:, :1])):
                    began = time.perf_counter()
                    model(input_ids=ids, use_cache=False)
                    if round_:  # the first warms up
                        times[name][kind].append(time.perf_counter() - began)
        for name, model in models.items():
            row = {kind: round(1000 * statistics.median(found), 2) for kind, found in times[name].items()}
            print(json.dumps({"model": name, "milliseconds": row, "resident_bytes": resident_bytes(model)}))


def loaded(folder: Path, arguments: argparse.Namespace) -> dict:  # type: ignore[type-arg]
    """Name -> the same model, loaded in each way."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    dtype = getattr(torch, arguments.dtype)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=arguments.hidden // 64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder / "dense")
    steps = recipe.loads("version: 1\nsteps:\n  - {op: ternary, method: round}\n")
    run.run(steps, str(folder / "dense"), str(folder / "plain"), run.Options())
    models = {"plain": load_model(str(folder / "plain")), "packed": load_model(str(folder / "plain"))}
    pack_linears(models["packed"])
    for kind in ("autobitlinear", "bitlinear"):
        export(str(folder / "plain"), str(folder / kind), "bitnet", linear_class=kind)  # type: ignore[arg-type]
        models[kind] = AutoModelForCausalLM.from_pretrained(folder / kind, dtype="auto").eval()
    return models


if __name__ == "__main__":
    main()
