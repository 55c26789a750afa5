"""What a closed-form fit of wide FFNs takes in memory: the peak of a process of its own, beside what the plan says.

    python benchmarks/refit_memory.py --width 1024 --run 6 --hidden 256

makes a random Llama of as many layers as are fused and two more, fuses them, and refits on random text. With --ternary
it makes two FFNs of the model ternary instead, with codes that compensate.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIGNS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz .,"]


def make(folder: Path, arguments: argparse.Namespace) -> None:
    """A random model with a tokenizer of letters, and a text."""
    import random

    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.width,
        num_hidden_layers=arguments.run + 2,
        num_attention_heads=arguments.hidden // 64,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(SIGNS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    letters = random.Random(0).choices(SIGNS[3:], k=2 * arguments.tokens)
    (folder / "text.txt").write_text("".join(letters))


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    """Run the recipe in this process and print what it took, as JSON."""
    from llmsurgeon.planning.plan import Planned
    from llmsurgeon.recipe.recipe import loads
    from llmsurgeon.run import Options, run
    from llmsurgeon.walk.memory import keep_freed_memory

    keep_freed_memory()
    layers = list(range(1, arguments.run + 1))
    fused = f"{{op: prune_attention, layers: {layers[1:]}}}, {{op: fuse_ffn, runs: [{layers[0]}-{layers[-1]}]}}"
    steps = f"{{op: ternary, layers: {layers[-2:]}}}" if arguments.ternary else f"{fused}, {{op: refit}}"
    calibration = f"{{text: {folder}/text.txt, self_share: 0, tokens: {arguments.tokens}, sequence_length: 128}}"
    recipe = loads(f"version: 1\ncalibration: {calibration}\nsteps: [{steps}]\n")
    said: dict[str, int] = {}

    def planned(plan: Planned) -> None:
        said["baseline"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        said["planned"] = getattr(plan, "healing_bytes", 0)

    start = time.monotonic()
    outcome = run(recipe, str(folder), str(folder / "out"), Options(planned=planned))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    refitted = outcome.results.get("refit")
    errors = [update.error_ratio for update in refitted.updates] if refitted else []
    print(
        json.dumps({**said, "measured": peak - said["baseline"], "seconds": time.monotonic() - start, "fits": errors})
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="of one FFN")
    parser.add_argument("--run", type=int, default=6, help="FFNs that are fused")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--ternary", action="store_true", help="ternary codes in place of a refit")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        measure(Path(arguments.inside), arguments)
        return
    with tempfile.TemporaryDirectory(prefix="llmsurgeon-") as folder:
        make(Path(folder), arguments)
        command = [sys.executable, __file__, "--inside", folder]
        for name in ("width", "run", "hidden", "tokens"):
            command += [f"--{name}", str(getattr(arguments, name))]
        command += ["--ternary"] if arguments.ternary else []
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    width = arguments.width * (1 if arguments.ternary else arguments.run)
    print(f"{width:,} channels, one Gram matrix in float32: {4 * width**2 / 1e9:.2f} GB")
    print(f"planned: {found['planned'] / 1e9:.2f} GB beside what the process took before")
    print(f"measured: {found['measured'] / 1e9:.2f} GB, {found['seconds']:.0f} s")
    if found["fits"]:
        print("held-out errors: " + ", ".join(f"{error:.6f}" for error in found["fits"]))


if __name__ == "__main__":
    main()
