"""Run by test_two_ranks.py under torchrun: loads checkpoints in halves, by the plan that each brings, and reports.

torchrun --nproc-per-node 2 two_ranks.py REPORT FOLDER ...      REPORT.RANK: folder -> what this rank found
"""

import json
import sys
from pathlib import Path

sys.modules["llmsurgeon"] = None  # the code in the checkpoints alone
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from tensor_parallel import Collectives  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.distributed import DistributedConfig  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
IDS = torch.randint(3, 64, (2, 18), generator=torch.Generator().manual_seed(1))


def held(model):
    """The share of the model's numbers that this rank holds."""
    parameters = list(model.parameters())
    mine = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
    return mine / sum(p.numel() for p in parameters)


@torch.no_grad()
def logits(model):
    """Of all tokens at once, and of the last four read one by one behind the others."""
    whole = model(input_ids=IDS, use_cache=False).logits
    out = model(input_ids=IDS[:, :14], use_cache=True)
    name = "cache" if "cache" in out else "past_key_values"  # renamed in transformers 5.24
    pieces = [out.logits]
    for at in range(14, IDS.shape[1]):
        pieces.append(model(input_ids=IDS[:, at : at + 1], use_cache=True, **{name: out[name]}).logits)
    return torch.stack([whole, torch.cat(pieces, 1)])


def gradient(model):
    """The norm of each gradient, by name."""
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: (g.full_tensor() if isinstance(g, DTensor) else g).norm() for name, g in grads.items()}


@torch.no_grad()
def reductions(model):
    """How often the ranks sum something for one token."""
    with Collectives() as seen:
        model(input_ids=IDS[:, :1], use_cache=False)
    return seen.calls["all_reduce"]


def examine(folder):
    alone = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    shared = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, distributed_config=DistributedConfig(tp_plan="auto")
    )
    ours, theirs = gradient(shared.eval()), gradient(alone.eval())
    off = [name for name in theirs if (ours[name] - theirs[name]).abs() > 1e-7 + 1e-3 * theirs[name]]
    return {
        "difference": (logits(shared) - logits(alone)).abs().max().item(),
        "held": held(shared),
        "reductions": reductions(shared),
        "gradients": off,
        "divided": sorted(name for name, p in shared.named_parameters() if isinstance(p, DTensor)),
    }


dist.init_process_group("gloo")
found = {folder: examine(folder) for folder in sys.argv[2:]}
Path(f"{sys.argv[1]}.{dist.get_rank()}").write_text(json.dumps(found))
dist.destroy_process_group()
