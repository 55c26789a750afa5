"""The forward of a linear map in the place of an FFN; ships inside checkpoints that have one."""

from torch import nn


def install(block, entry, config):
    """Put the map, [D] -> [D] with a bias, in the place of a block's FFN, behind the FFN's own norm."""
    block.set_submodule(block.ffn_name, nn.Linear(config.hidden_size, config.hidden_size))
