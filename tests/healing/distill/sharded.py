"""`llmsurgeon` in a process whose accelerate shards by FSDP2 on CPUs, where by itself it would replicate.

python sharded.py STATE_DICT_TYPE ARGUMENTS...: all that a card's `accelerate launch --use_fsdp` would do but the card.
"""

from __future__ import annotations

import sys

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from llmsurgeon.cli.main import main

start, prepare = Accelerator.__init__, Accelerator.prepare


def started(self, *arguments, **more):
    start(self, *arguments, **more)
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type=sys.argv[1],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )


def sharded(self, *arguments, **more):
    made = prepare(self, *arguments, **more)
    assert self.is_fsdp2 and {type(each.data).__name__ for each in made[0].parameters()} == {"DTensor"}
    return made


Accelerator.__init__, Accelerator.prepare = started, sharded
Accelerator.distributed_type = property(lambda self: DistributedType.FSDP)
AcceleratorState.is_fsdp2 = property(lambda self: True)
main(sys.argv[2:])
