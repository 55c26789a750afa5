"""Fast feedforward networks: an FFN as trees of which a token visits one path.

Leaf form (arXiv 2308.14711): a tree of hyperplanes leads to one of 2^depth small FFNs; `shared` neurons always work.
Node form (arXiv 2311.10770): each node of `trees` trees is a neuron; its pre-activation also says where to go next.
With depth 0 both are a plain FFN. In eval mode decisions are hard and only the path is computed; in training mode every
node is a sigmoid and the output is the mixture over all paths.

This file ships inside converted checkpoints. It needs torch and transformers; numba on CPUs and triton on GPUs make it
faster where they are installed. LLMSURGEON_FFF_KERNEL=torch, numba or triton forces one.

Shapes: N tokens, D model width, S shared neurons, L leaves, W neurons a leaf, K trees, M nodes a tree.
"""

import os
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

KERNELS = ("torch", "numba", "triton")
# The activations that the compiled kernels know, by the names of transformers' configs.
COMPILED_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
# Node form, torch: with fewer stored neurons than this for each visited one, computing them all costs less than
# gathering those that are needed.
GATHER_FROM = 16
# Numbers that one gather may hold.
GATHERED = 1 << 24


def fast_feed_forward(entry, hidden, activation, dropout=0.0):
    """The module that the `ffn` entry of a block in config.block_configs describes."""
    shape = (hidden, entry["depth"], activation, entry["gated"], entry["in_bias"], dropout)
    if entry["form"] == "leaf":
        return LeafFeedForward(*shape, leaf_width=entry["leaf_width"], shared=entry["shared"])
    return NodeFeedForward(*shape, trees=entry["trees"])


def activation_of(config):
    """The name of the FFN's activation, under whichever key the family has it."""
    names = ("hidden_act", "hidden_activation", "activation_function", "activation")
    return next(getattr(config, name) for name in names if hasattr(config, name))


def install_fast_feed_forward(block, entry, config):
    """Put the module in the place of a block's FFN."""
    activation = activation_of(config)
    dense = block.get_submodule(block.ffn_name)
    dropout = next((module.p for module in dense.modules() if isinstance(module, nn.Dropout)), 0.0)
    block.set_submodule(block.ffn_name, fast_feed_forward(entry, config.hidden_size, activation, dropout))
    for path in block.ffn_idle:
        block.set_submodule(path, nn.Identity())


def hardening_loss(model):
    """Sum over all trees of `model` of the nodes' mean entropies in the last forward pass in training mode.

    Added to the training loss with a factor, it makes decisions hard (arXiv 2308.14711, section 3).
    """
    found = [module.entropies.sum() for module in _trees(model) if module.entropies is not None]
    return torch.stack(found).sum() if found else torch.zeros(())


def mean_entropies(model):
    """Module name -> mean entropy of its nodes' decisions (nats, at most 0.693) in the last pass in training mode."""
    return {
        name: module.entropies.mean().item()
        for name, module in model.named_modules()
        if isinstance(module, FastFeedForward) and module.entropies is not None
    }


def _trees(model):
    return (module for module in model.modules() if isinstance(module, FastFeedForward))


def choose_kernel(device, dtype, activation, differentiable=False):
    """torch, numba or triton, for hard inference.

    Raises:
        RuntimeError: LLMSURGEON_FFF_KERNEL names one that does not exist, is not installed, or cannot run here.
    """
    forced = os.environ.get("LLMSURGEON_FFF_KERNEL", "auto")
    if forced not in ("auto", *KERNELS):
        raise RuntimeError(f"LLMSURGEON_FFF_KERNEL={forced}: no such kernel; expected auto, {', '.join(KERNELS)}")
    if forced == "torch" or differentiable or torch.compiler.is_compiling():
        return "torch"
    reasons = {kernel: _unusable(kernel, device, dtype, activation) for kernel in ("numba", "triton")}
    if forced == "auto":
        return next((kernel for kernel, reason in reasons.items() if reason is None), "torch")
    if reasons[forced] is not None:
        raise RuntimeError(f"LLMSURGEON_FFF_KERNEL={forced}: {reasons[forced]}; unset the variable or set it to torch")
    return forced


@cache
def installed(package):
    """True where a package is there. Looked up once: it takes longer than a token's path."""
    return find_spec(package) is not None


def _unusable(kernel, device, dtype, activation):
    """Why a compiled kernel cannot be used, None where it can."""
    if not installed(kernel):
        extra = {"numba": "cpu", "triton": "gpu"}[kernel]
        return f"{kernel} is not installed (pip install {kernel}, or llmsurgeon[{extra}])"
    interpreted = kernel == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    wanted = {"numba": "cpu", "triton": "cuda"}[kernel]
    if device.type != wanted and not interpreted:
        return f"it runs on {wanted}, the tensors are on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16) and not (kernel == "triton" and dtype == torch.float16):
        return f"it does not take {dtype}"
    if activation not in COMPILED_ACTIVATIONS:
        return f"it does not know the activation {activation}"
    return None


class Shortcuts:
    """Holds what a module's compiled kernel prepared for its next calls; copies of the module start without."""

    def __init__(self):
        self.found = None

    def __reduce__(self):
        return Shortcuts, ()


class FastFeedForward(nn.Module):
    """What both forms share: soft training, hard inference, activation and dropout.

    temperature: of the sigmoids in training; towards 0 the mixture becomes the hard decision. At 0 it is: the path
        alone is computed and learns, where it leads does not.
    region_leak: probability of swapping a decision in training, which keeps both sides of a node alive.
    entropies: mean entropy of each node's decision in the last forward pass in training mode.
    """

    # How many tokens a leaf gets is known once they are routed.
    breaks_graphs = True

    def __init__(self, hidden, depth, activation, gated, bias, dropout):
        super().__init__()
        self.hidden, self.depth, self.activation, self.gated = hidden, depth, activation, gated
        self.act_fn = ACT2FN[activation]
        self.dropout = nn.Dropout(dropout)
        self.temperature, self.region_leak, self.entropies = 1.0, 0.0, None
        self._biased, self._compiled = bias, COMPILED_ACTIVATIONS.get(activation)
        self._shortcut = Shortcuts()

    def _neurons(self, name, *shape):
        """Parameters of neurons: rows that read, rows that write, and biases where the parent had them."""
        for kind in ("gate", "up") if self.gated else ("up",):
            self._rows(f"{name}_{kind}", *shape, self.hidden)
            bias = nn.Parameter(torch.zeros(shape)) if self._biased else None
            self.register_parameter(f"{name}_{kind}_bias", bias)
        self._rows(f"{name}_down", *shape, self.hidden)

    def _rows(self, name, *shape):
        self.register_parameter(name, nn.Parameter(self._random(torch.empty(shape))))

    def _random(self, rows):
        bound = self.hidden**-0.5
        return rows.uniform_(-bound, bound)

    def initial_values(self, std):
        """(parameter, what fills it) where a file has none."""
        for name, parameter in self.named_parameters(recurse=False):
            yield parameter, nn.init.zeros_ if name.endswith("bias") else self._random

    def _part(self, name, index=()):
        """gate, up, down, gate bias, up bias at `index`; None for what there is not."""
        parts = ("gate", "up", "down", "gate_bias", "up_bias")
        found = (getattr(self, f"{name}_{part}", None) for part in parts)
        return [part if part is None or index == () else part[index] for part in found]

    def _activated(self, x_ND, gate, up, gate_bias, up_bias):
        """Inner activations [N, F] of neurons with rows [F, D]."""
        inner = F.linear(x_ND, up, up_bias)
        if gate is None:
            return self.act_fn(inner)
        return self.act_fn(F.linear(x_ND, gate, gate_bias)) * inner

    def _decide(self, scores):
        """Probability of going right from hyperplane scores [N, ..., M] in training; keeps the nodes' entropies."""
        # Decisions are taken in float32 throughout, as the hard ones are.
        right = torch.sigmoid(scores.float() / self.temperature)
        safe = right.clamp(1e-6, 1 - 1e-6)
        entropy = -(safe * safe.log() + (1 - safe) * (1 - safe).log())
        self.entropies = entropy.mean(0).flatten()
        if self.region_leak > 0:
            swap = torch.rand_like(right) < self.region_leak
            right = torch.where(swap, 1 - right, right)
        return right

    def forward(self, hidden_states):
        """[..., D] -> [..., D]: soft decisions while training with a temperature, one path for each token otherwise."""
        shortcut = self._shortcut.found
        if shortcut is not None and not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            y = shortcut(hidden_states)
            if y is not None:
                return y
        x_ND = hidden_states.reshape(-1, self.hidden)
        y_ND = self.soft(x_ND) if self.training and self.temperature else self.hard(x_ND)
        return (self.dropout(y_ND) if self.training else y_ND).view(hidden_states.shape)

    def hard(self, x_ND):
        """The output along hard paths, [N, D] -> [N, D]."""
        learns = torch.is_grad_enabled() and (x_ND.requires_grad or any(p.requires_grad for p in self.parameters()))
        kernel = choose_kernel(x_ND.device, x_ND.dtype, self.activation, learns)
        return getattr(self, f"_hard_{kernel}")(x_ND)

    def extra_repr(self):
        return f"{self.hidden}, depth={self.depth}, {self.activation}, gated={self.gated}"


class LeafFeedForward(FastFeedForward):
    """Shared neurons, and a tree whose leaf adds its own: y = shared(x) + leaf(x) + bias of the leaf."""

    def __init__(self, hidden, depth, activation, gated, bias, dropout=0.0, *, leaf_width, shared=0):
        super().__init__(hidden, depth, activation, gated, bias, dropout)
        self.leaves = 2**depth
        if depth:
            self._rows("router_weight", self.leaves - 1, hidden)
            self.router_bias = nn.Parameter(torch.zeros(self.leaves - 1))
        self.shared_width, self.leaf_width = shared, leaf_width
        if shared:
            self._neurons("shared", shared)
        self._neurons("leaf", self.leaves, leaf_width)
        self.leaf_out_bias = nn.Parameter(torch.zeros(self.leaves, hidden))

    def route(self, x_ND):
        """The leaf of each token, int64 [N]."""
        node_N = x_ND.new_zeros(len(x_ND), dtype=torch.long)
        if not self.depth:
            return node_N
        for _ in range(self.depth):
            score_N = (self.router_weight[node_N].float() * x_ND.float()).sum(-1) + self.router_bias[node_N].float()
            node_N = 2 * node_N + 1 + (score_N >= 0)
        return node_N - (self.leaves - 1)

    def shared_activations(self, x_ND):
        """Inner activations [N, S] of the shared neurons."""
        if not self.shared_width:
            return x_ND.new_zeros(len(x_ND), 0)
        gate, up, _, *biases = self._part("shared")
        return self._activated(x_ND, gate, up, *biases)

    def shared(self, x_ND):
        """The shared neurons' output [N, D], zero where there are none."""
        return self.shared_activations(x_ND) @ self.shared_down if self.shared_width else torch.zeros_like(x_ND)

    def leaf_activations(self, x_ND, leaf):
        """Inner activations [N, W] of the neurons of one leaf."""
        gate, up, _, *biases = self._part("leaf", leaf)
        return self._activated(x_ND, gate, up, *biases)

    def _grouped(self, x_ND, leaf_N, y_ND):
        """Add to `y_ND` each token's leaf: tokens sorted by leaf, one matrix product for each leaf that has any."""
        if self.leaves == 1:
            return y_ND + self.leaf_activations(x_ND, 0) @ self.leaf_down[0] + self.leaf_out_bias[0]
        order = leaf_N.argsort()
        counts = torch.bincount(leaf_N, minlength=self.leaves).tolist()
        pieces = []
        for leaf, rows in enumerate(order.split(counts)):
            if len(rows):
                inner = self.leaf_activations(x_ND[rows], leaf)
                pieces.append(torch.addmm(self.leaf_out_bias[leaf], inner, self.leaf_down[leaf]))
        return y_ND.index_add(0, order, torch.cat(pieces)) if pieces else y_ND

    def _hard_torch(self, x_ND):
        return self._grouped(x_ND, self.route(x_ND), self.shared(x_ND))

    def _hard_numba(self, x_ND):
        from .surgeon_fff_numba import leaves, route

        if not self.depth:
            return self._hard_torch(x_ND)
        leaf_N = route(x_ND, self.router_weight, self.router_bias, self.depth, owner=self)
        y_ND = self.shared(x_ND)
        # Leaves with enough tokens are worth a matrix product each; on average is good enough to tell.
        if len(x_ND) >= GROUPED_FROM * self.leaves:
            return self._grouped(x_ND, leaf_N, y_ND)
        rows = (*self._part("leaf"), self.leaf_out_bias)
        return leaves(x_ND, leaf_N, y_ND, *rows, self._compiled, owner=self)

    def _hard_triton(self, x_ND):
        from .surgeon_fff_triton import leaves, route

        if not self.depth:
            return self._hard_torch(x_ND)
        leaf_N = route(x_ND, self.router_weight, self.router_bias, self.depth)
        y_ND = self.shared(x_ND)
        return leaves(x_ND, leaf_N, y_ND, *self._part("leaf"), self.leaf_out_bias, self._compiled)

    def soft(self, x_ND):
        """The mixture over all leaves, [N, D] -> [N, D]."""
        weight_NL = x_ND.new_ones(len(x_ND), 1, dtype=torch.float32)
        if self.depth:
            right_NM = self._decide(F.linear(x_ND.float(), self.router_weight.float(), self.router_bias.float()))
            for level in range(self.depth):
                right = right_NM[:, 2**level - 1 : 2 ** (level + 1) - 1]
                weight_NL = torch.stack([weight_NL * (1 - right), weight_NL * right], dim=-1).flatten(1)
        weight_NL = weight_NL.to(x_ND.dtype)
        y_ND = self.shared(x_ND) + weight_NL @ self.leaf_out_bias
        for leaf in range(self.leaves):
            y_ND = y_ND + (weight_NL[:, leaf, None] * self.leaf_activations(x_ND, leaf)) @ self.leaf_down[leaf]
        return y_ND


class NodeFeedForward(FastFeedForward):
    """Trees of neurons: y = bias + sum over trees and over the path's nodes of activation(x) * row that writes.

    A node branches right where its pre-activation (the gate's, where there is one) is above zero.
    """

    def __init__(self, hidden, depth, activation, gated, bias, dropout=0.0, *, trees):
        super().__init__(hidden, depth, activation, gated, bias, dropout)
        self.trees, self.nodes = trees, 2 ** (depth + 1) - 1
        self._neurons("node", trees, self.nodes)
        self.out_bias = nn.Parameter(torch.zeros(hidden))

    def _scores(self, x_ND):
        """Branching pre-activations and activations of all neurons, [N, K, M] each."""
        gate, up, _, gate_bias, up_bias = (part if part is None else part.flatten(0, 1) for part in self._part("node"))
        inner = F.linear(x_ND, up, up_bias)
        branch = inner if gate is None else F.linear(x_ND, gate, gate_bias)
        active = self.act_fn(branch) if gate is None else self.act_fn(branch) * inner
        shape = (len(x_ND), self.trees, self.nodes)
        return branch.view(shape), active.view(shape)

    def visited(self, x_ND):
        """Activations [N, K, M] of all neurons, zero off the path."""
        branch_NKM, active_NKM = self._scores(x_ND)
        on_path = torch.zeros_like(active_NKM, dtype=torch.bool)
        node_NK1 = torch.zeros(len(x_ND), self.trees, 1, dtype=torch.long, device=x_ND.device)
        for level in range(self.depth + 1):
            on_path.scatter_(2, node_NK1, True)
            if level < self.depth:
                node_NK1 = 2 * node_NK1 + 1 + (branch_NKM.gather(2, node_NK1) > 0)
        return active_NKM.where(on_path, 0)

    def _hard_torch(self, x_ND):
        if self.nodes < GATHER_FROM * (self.depth + 1):
            return torch.addmm(self.out_bias, self.visited(x_ND).flatten(1), self.node_down.flatten(0, 1))
        rows = max(1, GATHERED // (self.trees * self.hidden))
        return torch.cat([self._gathered(part) for part in x_ND.split(rows)]) if len(x_ND) else x_ND

    def _gathered(self, x_ND):
        """Level by level, the rows of the nodes that the tokens stand on."""
        tree_K = torch.arange(self.trees, device=x_ND.device)
        node_NK = torch.zeros(len(x_ND), self.trees, dtype=torch.long, device=x_ND.device)
        x_N1D = x_ND.float()[:, None]
        y_ND = self.out_bias.float().expand(len(x_ND), -1)
        for _ in range(self.depth + 1):
            gate, up, down, gate_bias, up_bias = self._part("node", (tree_K, node_NK))
            inner_NK = (up.float() * x_N1D).sum(-1) + (0 if up_bias is None else up_bias.float())
            branch_NK = inner_NK
            if gate is not None:
                branch_NK = (gate.float() * x_N1D).sum(-1) + (0 if gate_bias is None else gate_bias.float())
            active_NK = self.act_fn(branch_NK) if gate is None else self.act_fn(branch_NK) * inner_NK
            y_ND = y_ND + torch.einsum("nk,nkd->nd", active_NK, down.float())
            node_NK = 2 * node_NK + 1 + (branch_NK > 0)
        return y_ND.to(x_ND.dtype)

    def _hard_numba(self, x_ND):
        from .surgeon_fff_numba import Shortcut, nodes

        if len(x_ND) > self.loop_up_to():
            return self._hard_torch(x_ND)
        if self._shortcut.found is None or not self._shortcut.found.holds():
            self._shortcut.found = Shortcut(self)
        return nodes(x_ND, *self._part("node"), self.out_bias, self.depth, self._compiled, owner=self)

    def loop_up_to(self):
        """The number of tokens up to which a compiled loop over them is fastest: of few neurons a path, the dense
        product of them all is faster for all but a few tokens."""
        return DENSE_FROM if self.nodes < GATHER_FROM * (self.depth + 1) else float("inf")

    def _hard_triton(self, x_ND):
        from .surgeon_fff_triton import nodes

        return nodes(x_ND, *self._part("node"), self.out_bias, self.depth, self._compiled)

    def soft(self, x_ND):
        """The mixture over all paths, [N, D] -> [N, D]: each neuron counts as much as it is likely to be visited."""
        branch_NKM, active_NKM = self._scores(x_ND)
        reach = torch.ones_like(branch_NKM[..., :1], dtype=torch.float32)
        reached = [reach]
        if self.depth:
            right_NKM = self._decide(branch_NKM[..., : 2**self.depth - 1])
            for level in range(self.depth):
                right = right_NKM[..., 2**level - 1 : 2 ** (level + 1) - 1]
                reach = torch.stack([reach * (1 - right), reach * right], dim=-1).flatten(2)
                reached.append(reach)
        weighted = active_NKM * torch.cat(reached, dim=-1).to(active_NKM.dtype)
        return torch.addmm(self.out_bias, weighted.flatten(1), self.node_down.flatten(0, 1))


# Tokens a leaf from which a matrix product for each leaf beats the compiled loop over tokens; measured in
# benchmarks/fff.py, as is the number of tokens from which a dense product beats the loop over many shallow trees.
GROUPED_FROM = 8
DENSE_FROM = 2
