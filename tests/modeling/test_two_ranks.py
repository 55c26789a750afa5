"""Two ranks that hold half of a model each compute what one does that holds it all: tensor parallelism, over gloo."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from modeling.forms import built, mixed
from modeling.test_decilm import config, entry

from llmsurgeon.modeling.modeling_decilm import DeciLMForCausalLM
from llmsurgeon.operations.fuse_ffn import FuseFFN
from llmsurgeon.operations.prune_attention import PruneAttention

# Blocks of every shape, two of them in parallel; fused FFNs; NVIDIA's form; trees; blocks of text; recurrent mixers
# beside attentions, and out of ternary linears, which are left whole; norms before output projections, likewise.
NAMES = ("llama", "fused", "decilm", "llama-leaf-trees", "block-llama", "mlgru-hybrid", "mlgru-ternary", "llama-normed")
CLOSE = 1e-5


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Of each rank, what two_ranks.py found: one start for all."""
    base = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    made = {
        "fused": mixed("llama", PruneAttention(layers=(2, 3)), FuseFFN(runs=((1, 2, 3),))),
        "decilm": DeciLMForCausalLM(config(block_configs=[entry(2, 12.0), entry(None, 24.0), entry(2, None)])),
    }
    for name in NAMES:
        (made.get(name) or built(name)).save_pretrained(base / name)
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(base / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    script, folders = Path(__file__).with_name("two_ranks.py"), [str(base / name) for name in NAMES]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(script), str(base / "report"), *folders], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [
        {Path(folder).name: found for folder, found in json.loads((base / f"report.{rank}").read_text()).items()}
        for rank in (0, 1)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_compute_what_one_does(reports, name):
    for report in reports:
        assert report[name]["difference"] < (0.05 if "ternary" in name else CLOSE)
        assert report[name]["gradients"] == []


def test_one_sum_over_ranks_for_each_attention_and_ffn(reports):
    """And one for the embedding: what fusing saves, and what the benchmark counts on."""
    counts = {name: reports[0][name]["reductions"] for name in ("llama", "fused", "decilm", "mlgru-hybrid")}
    # Of six layers: an attention and an FFN less, two of them in parallel; two attentions gone and three FFNs in one.
    assert counts == {"llama": 11, "fused": 9, "decilm": 5, "mlgru-hybrid": 13}


def divided(reports, name):
    """Modules that each rank has a share of, layers' numbers left out."""
    return {re.sub(r"\.\d+\.", ".*.", path.rpartition(".")[0]) for path in reports[0][name]["divided"]}


def test_what_is_divided(reports):
    part = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", *(f"self_attn.{x}_proj" for x in "qkvo")}
    layer = {f"model.layers.*.{name}" for name in part}
    assert divided(reports, "llama") >= layer | {f"model.layers.*.branches.*.{name}" for name in part}
    assert divided(reports, "mlgru-hybrid") >= layer | {f"model.layers.*.self_attn.{x}_proj" for x in "ifgo"}
    # Of one layer of ternary linears, and of one with norms before its output projections, both parts need whole rows.
    for name in ("mlgru-ternary", "llama-normed"):
        assert not any("layers" in path for path in divided(reports, name))
    # Embedding and head beside half of the layers.
    for name in ("llama", "fused", "decilm", "mlgru-hybrid"):
        assert all(report[name]["held"] < 0.56 for report in reports), (name, [r[name]["held"] for r in reports])
