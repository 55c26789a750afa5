"""What is run on which model: one command line a case, in the order in which they build on one another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

# The named text alone: what a tiny model writes of all kinds has a case of its own.
CALIBRATION = "{text: text.txt, self_share: 0, tokens: 256, sequence_length: 16}"
# Short training of a student, the same in every case that trains.
TRAINING = "steps: 2, batch: 2, sequence_length: 16, warmup: 0, evaluations: 1, evaluation_tokens: 64"
HEAL = (
    "--text text.txt --self-share 0 --set distill.steps=2 --set distill.batch=2 --set distill.sequence_length=16 "
    "--set distill.evaluations=1 --set calibration.tokens=256 --set calibration.sequence_length=16"
)


@dataclass(frozen=True)
class Case:
    """A command line, the recipe that it reads and what it writes.

    arguments: of the command line, run in a folder that holds `parent`, `text.txt`, `some.txt` (the start of it) and
        what earlier cases wrote.
    recipe: text of NAME.yaml, written before.
    out: name of the file or folder that is then written down.
    thorough: only for a few families; what it shows does not differ between the others.
    resolved: in place of a command line, the recipe that comes along and is to be printed with every default.
    """

    name: str
    arguments: tuple[str, ...]
    recipe: str | None = None
    out: str | None = None
    thorough: bool = False
    resolved: str | None = None


def made(name: str, *steps: str, text: bool = True, more: str = "", thorough: bool = False) -> Case:
    """The case of a recipe with these steps; `more` are further keys of the recipe."""
    lines = ["version: 1", *([f"calibration: {CALIBRATION}"] if text else ()), *([more] if more else ()), "steps:"]
    recipe = "\n".join([*lines, *(f"  - {{op: {step}}}" for step in steps)]) + "\n"
    return Case(name, ("run", f"{name}.yaml", "parent", "-o", name), recipe, name, thorough)


def command(name: str, line: str, out: bool = False, thorough: bool = False) -> Case:
    """The case of a plain command line; with `out` it also says where to write."""
    arguments = (*line.split(), *(("-o", name) if out else ()))
    return Case(name, arguments, None, name if out else None, thorough)


def looked_at(name: str, thorough: bool = False) -> tuple[Case, Case]:
    """`inspect` of something, for people and for programs."""
    told = command(f"inspect-{name}", f"inspect {name}", thorough=thorough)
    return told, command(f"inspect-{name}-json", f"inspect {name} --json", thorough=thorough)


# Every operation with its most telling settings.
OPERATIONS = (
    made("prune-attention-layers", "prune_attention, layers: [1, 3-4]", text=False),
    made("prune-attention-joint", "prune_attention, count: 2"),
    made("prune-attention-kl", "prune_attention, count: 2, score: kl", thorough=True),
    made("prune-attention-similarity", "prune_attention, count: 1, score: similarity", thorough=True),
    made("prune-ffn-layers", "prune_ffn, layers: [2]", text=False, thorough=True),
    made("prune-ffn-kl", "prune_ffn, count: 2, score: kl"),
    made("prune-blocks-layers", "prune_blocks, layers: [1, 4]", text=False),
    made("prune-blocks-rescored", "prune_blocks, count: 2, score: rescored"),
    made("prune-blocks-influence", "prune_blocks, count: 1", thorough=True),
    made("prune-blocks-window", "prune_blocks, window: 2", thorough=True),
    made("prune-kv-heads", "prune_kv_heads, kv_heads: 1", text=False),
    made("prune-kv-heads-some", "prune_kv_heads, kv_heads: 1, layers: [2, 3]", "refit"),
    made("prune-width-least-squares", "prune_width, width: 64"),
    made("prune-width-loss", "prune_width, keep: 0.5, spread: loss, multiple_of: 8", "refit"),
    made("prune-width-magnitude", "prune_width, width: 40, layers: [2], score: magnitude", text=False, thorough=True),
    made("prune-experts-reap", "prune_experts, experts: 2"),
    made("prune-experts-loss", "prune_experts, keep: 0.75, score: loss, per_token: 1", thorough=True),
    made("trim-vocab-text", "trim_vocab, keep: {text: some.txt}, multiple_of: 8"),
    made("trim-vocab-rows", "trim_vocab, keep: {tokens: 16}, rows: 40", text=False, thorough=True),
    made("fuse-fold", "prune_attention, layers: [4, 5]", "fuse_ffn, runs: [3-5]", "refit"),
    made("fuse-last", "prune_attention, count: 2", "fuse_ffn, runs: auto, max_run: 3, norm: last"),
    made("parallel-windows", "parallel_blocks, windows: [3-5]", text=False),
    made("parallel-auto", "parallel_blocks, size: 2", "refit", thorough=True),
    made("fff-leaf", "fff, depth: 1, leaf_width: 24, shared: 16, layers: [1, 2], min_tokens: 4", "refit"),
    made("fff-node", "fff, form: node, depth: 2, layers: [0, 3], min_tokens: 4"),
    made("fff-keep", "fff, keep: 0.7, depth: 1, min_tokens: 4", thorough=True),
    made("ternary-compensated", "ternary, granularity: row"),
    made("ternary-round", "ternary, method: round", text=False),
    made("ternary-packed", "ternary, method: round, scale: absmean", text=False, more="format: bitnet"),
    made("ternary-share", "ternary, linears: ffn, share: 0.4, granularity: group, group_size: 32", thorough=True),
    made("ternary-normed", "ternary, sub_norm: true, layers: [1, 4]"),
    made("ternary-all-round", "ternary, method: round, embeddings: true, head: true", text=False, thorough=True),
    made("matmulfree-float", "matmulfree, layers: [0, 3]", "refit"),
    made("matmulfree-ternary", "matmulfree, count: 1, linears: ternary", thorough=True),
    made("block-four", "block, block_length: 4", "refit"),
    made("block-one", "block, block_length: 1, decoder: summation, embedder: concat, affine: false", thorough=True),
    made("block-cross", "block, block_length: 2, decoder: cross_attention, prefix_length: 1, split: 2", thorough=True),
    made("refit-alone", "refit, ridge: 0.1", thorough=True),
    made("distill-global", "prune_attention, layers: [1]", f"distill, {TRAINING}"),
    made("distill-local", "prune_ffn, layers: [2]", f"distill, mode: local, {TRAINING}", thorough=True),
    made("distill-lora", "prune_blocks, layers: [3]", f"distill, lora: {{rank: 2}}, {TRAINING}", thorough=True),
)
# Operations behind one another, and what the recipe says beside its steps.
CHAINS = (
    made(
        "chain-fuse-prune",
        "prune_attention, layers: [4, 5]",
        "fuse_ffn, runs: [3-5]",
        "prune_blocks, layers: [1]",
        "prune_width, width: 64, layers: [0, 2], score: activation",
        "refit",
    ),
    made(
        "chain-trim-prune-ternary",
        "trim_vocab, keep: {text: some.txt}, multiple_of: 8",
        "prune_blocks, layers: [2]",
        "prune_attention, layers: [4]",
        "ternary, linears: ffn, layers: [0, 1]",
        "refit",
        thorough=True,
    ),
    made(
        "chain-block-distill",
        "block, block_length: 2",
        f"distill, hidden: 0.0, cross_entropy: 1.0, {TRAINING}",
        thorough=True,
    ),
    made("filled", "prune_attention, layers: [2]", text=False, more="format: native", thorough=True),
    made("nas", "prune_attention, layers: [2]", text=False, more="format: nemotron-nas", thorough=True),
    made("missed-gate", "prune_blocks, layers: [2, 3]", more="gate: {max_kl: 0.000001}", thorough=True),
    made("missed-encoder-gate", "prune_blocks, layers: [2]", more="gate: {min_hidden_cosine: 0.9999}", thorough=True),
    Case(
        "sampled",
        ("run", "sampled.yaml", "parent", "-o", "sampled", "--tokens", "64", "--seq-len", "16"),
        "version: 1\nsteps:\n  - {op: prune_attention, count: 1, score: kl}\n  - {op: refit, ridge: 0.1}\n",
        "sampled",
        thorough=True,
    ),
)
# Verbs with flags in place of a recipe, and what reads checkpoints.
VERBS = (
    command("verb-fuse", "fuse parent --drop-attention 4,5 --runs 3-5 --no-refit", out=True, thorough=True),
    command(
        "verb-prune",
        "prune parent --blocks 1 --width 64 --text text.txt --self-share 0 --tokens 256 --seq-len 16",
        out=True,
    ),
    command("verb-ternary", "ternary parent --linears ffn --method round", out=True, thorough=True),
    command("heal", f"heal prune-attention-layers --parent parent {HEAL}", out=True, thorough=True),
    command("to-native", "export prune-attention-layers --to native", out=True),
    command("to-surgeon", "export parent --to surgeon", out=True),
    command("to-nemotron-nas", "export prune-attention-layers --to nemotron-nas", out=True),
    command("to-bitnet", "export ternary-round --to bitnet", out=True),
    command("to-gguf", "export parent --to gguf"),
    *looked_at("parent"),
    *looked_at("prune-attention-layers", thorough=True),
    *looked_at("chain-fuse-prune", thorough=True),
    *looked_at("fff-leaf", thorough=True),
    *looked_at("ternary-normed", thorough=True),
    *looked_at("matmulfree-float", thorough=True),
    *looked_at("block-four", thorough=True),
    *looked_at("ternary-packed", thorough=True),
    command("verify", "verify chain-fuse-prune --json", thorough=True),
    command("eval", "eval prune-attention-layers --against parent --text text.txt --tokens 256 --seq-len 16 --json"),
    command("dry-run", "run chain-fuse-prune.yaml parent --dry-run", thorough=True),
    command(
        "analyze", "analyze parent --text text.txt --self-share 0 --tokens 256 --seq-len 16", out=True, thorough=True
    ),
)
ALL = (*OPERATIONS, *CHAINS, *VERBS)
BRIEF = (
    "prune-attention-layers",
    "prune-ffn-kl",
    "prune-blocks-layers",
    "prune-kv-heads-some",
    "prune-width-loss",
    "trim-vocab-text",
    "fuse-fold",
    "parallel-windows",
    "fff-leaf",
    "ternary-compensated",
    "matmulfree-float",
    "block-four",
    "distill-global",
    "to-native",
    "inspect-parent",
)
# Vision-language models have four layers, and towers whose blocks differ in some of them alone.
VISION = (
    made("prune-attention-layers", "prune_attention, layers: [0, 2]", text=False),
    made("prune-blocks-layers", "prune_blocks, layers: [1]", text=False),
    made("prune-width-loss", "prune_width, keep: 0.5, spread: loss, multiple_of: 8", "refit"),
    made("prune-kv-heads", "prune_kv_heads, kv_heads: 1", text=False),
    made("trim-vocab-text", "trim_vocab, keep: {text: some.txt}, multiple_of: 8"),
    made("fuse-fold", "prune_attention, layers: [3]", "fuse_ffn, runs: [2-3]", "refit"),
    made("filled", "prune_attention, layers: [2]", text=False, more="format: native"),
    made("ternary-round", "ternary, method: round", text=False),
    made("distill-global", "prune_blocks, layers: [1]", f"distill, {TRAINING}"),
    command("to-nemotron-nas", "export parent --to nemotron-nas", out=True),
    *looked_at("parent"),
)
# Models whose tokenizer llama.cpp knows: `parent` is a llama, `wide` one whose widths are multiples of 256.
GGUF = (
    command("llama", "export parent --to gguf -o llama.gguf"),
    command("llama-q8", "export parent --to gguf --type Q8_0 -o llama-q8.gguf"),
    made("uneven", "prune_kv_heads, kv_heads: 1, layers: [2]", "prune_attention, layers: [4]", text=False),
    command("uneven-gguf", "export uneven --to gguf --type F32 -o uneven-gguf.gguf"),
    Case(
        "ternary",
        ("run", "ternary.yaml", "wide", "-o", "ternary"),
        "version: 1\nsteps: [{op: ternary, method: round}]\n",
        "ternary",
    ),
    command("ternary-tq2", "export ternary --to gguf --type TQ2_0 -o ternary-tq2.gguf"),
    made("trimmed", "trim_vocab, keep: {text: some.txt}, multiple_of: 8"),
    command("trimmed-gguf", "export trimmed --to gguf -o trimmed-gguf.gguf"),
    *(Case(case.name, tuple(a.replace("read-", "") for a in case.arguments)) for case in looked_at("read-llama.gguf")),
    Case("from-gguf", ("run", "uneven.yaml", "llama.gguf", "-o", "from-gguf"), None, "from-gguf"),
    command("from-gguf-native", "export llama.gguf --to native", out=True),
)
GGUF_FAMILIES = ("qwen2", "qwen3", "mistral", "gpt2", "gpt_neox", "phi3", "olmo2", "granite", "stablelm", "bloom")
# The recipes that come along -> the shape of a model that they are for; the others take SHAPES["large"].
SHAPES: dict[str, tuple[str, dict[str, int | bool]]] = {
    "large": ("llama", {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336}),
    "ultra": ("llama", {"num_hidden_layers": 126, "hidden_size": 16384, "intermediate_size": 53248}),
    "nemotron-49b": ("llama", {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672}),
    "smollm2": ("llama", {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536}),
    "minilm-fff": ("bert", {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536}),
    "ultrafastbert-1x11": ("bert", {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072}),
}
# Recipes whose plan is written down as people read it, too.
PLANNED = ("ultra", "nemotron-49b", "smollm2-fused", "smollm2-healed", "minilm-fff", "bitnet-b158")
HEADS = {16384: (128, 8), 8192: (64, 8), 4096: (32, 8), 576: (9, 3), 384: (12, 12), 768: (12, 12)}


def shape_for(recipe: str) -> str:
    """The name in SHAPES of the model that a recipe is for."""
    return "smollm2" if recipe.startswith("smollm2") else recipe if recipe in SHAPES else "large"


def of_recipe(name: str) -> Iterator[Case]:
    """What is run for a recipe that comes along. One that chooses by scores has no plan without a text: it says so."""
    kind = SHAPES[shape_for(name)][0]
    plan = f"run {name} {shape_for(name)}.json --dry-run" + (" --text text.txt" if kind == "bert" else "")
    yield command(f"{name}-show", f"recipes show {name}")
    yield command(f"{name}-check", f"recipes check {name}")
    yield Case(f"{name}-resolved", (), resolved=name)
    yield command(f"{name}-plan-json", f"{plan} --json")
    if name in PLANNED:
        yield command(f"{name}-plan", plan)


def chosen(thorough: bool, brief: bool = False) -> tuple[Case, ...]:
    """The cases of a family: all of them, those that tell families apart, or for a variant a few."""
    return tuple(case for case in ALL if (case.name in BRIEF if brief else thorough or not case.thorough))


def written(case: Case) -> Case:
    """The case, with what its arguments name behind -o as what it writes."""
    if case.out is None and "-o" in case.arguments:
        return replace(case, out=case.arguments[case.arguments.index("-o") + 1])
    return case
