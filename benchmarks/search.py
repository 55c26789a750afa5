"""A searched model beside every method alone at the same speed, and beside the parent quantised, on several texts.

    python benchmarks/search.py MODEL --engine llama.cpp:q8_0 --speeds 1.15 1.3 1.5 --text calibration.txt \
        --judge news.txt code.txt --out search.json --plot search.svg

For each speed: a search, its recipe run; each method cut as far as its decode step is predicted to be that fast, then
refitted on the same text. All are timed in turn with the parent in the engine, and judged on texts that chose and
fitted nothing: bits per byte, as a ratio to the parent's. The parent and the searched models are tried at other types,
too; a file of llama-quantize is a row of the parent where --files names it. Models that lie in --work are not made
again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import log
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llmsurgeon.evaluate import evaluate  # noqa: E402
from llmsurgeon.evaluation.decoders import Evaluation  # noqa: E402
from llmsurgeon.evaluation.llamacpp import benchmark_llamacpp  # noqa: E402
from llmsurgeon.evaluation.speed import Speedup  # noqa: E402
from llmsurgeon.export import export_gguf  # noqa: E402
from llmsurgeon.planning.opened import OpenedCheckpoint, open_model  # noqa: E402
from llmsurgeon.recipe import recipe  # noqa: E402
from llmsurgeon.recipe.recipe import Recipe  # noqa: E402
from llmsurgeon.report.scatter import Dot, Frame, scatter  # noqa: E402
from llmsurgeon.run import Options, preview, run  # noqa: E402
from llmsurgeon.search import Wanted, search  # noqa: E402
from llmsurgeon.searching.costs import Engine, meters, parse_targets  # noqa: E402
from llmsurgeon.searching.costs.measured import SecondsMeter  # noqa: E402


@dataclass(frozen=True)
class Method:
    """One method alone: the step that cuts, N the amount, and one whose result is as large, whatever is measured."""

    step: str
    as_large: str
    widths: bool = False

    def amounts(self, layers: int, width: int) -> Iterator[int]:
        """Every amount, from the least cut on."""
        return iter(range(width - 32, 31, -32) if self.widths else range(1, layers - 1))


BLOCKS, WIDTH = '{op: prune_blocks, layers: ["1-N"]}', "{op: prune_width, width: N, score: magnitude}"
METHODS = {
    "attention-drop": Method(
        "{op: prune_attention, count: N, score: similarity}", '{op: prune_attention, layers: ["1-N"]}'
    ),
    "shortgpt": Method("{op: prune_blocks, count: N, score: influence}", BLOCKS),
    "deeper-layers": Method("{op: prune_blocks, window: N}", BLOCKS),
    "minitron-width": Method("{op: prune_width, width: N, score: activation}", WIDTH, widths=True),
    "uniform width": Method("{op: prune_width, width: N, score: least_squares}", WIDTH, widths=True),
}
STYLE = """text{font:12px sans-serif;fill:#646b73}.mid{text-anchor:middle}.end{text-anchor:end}
.grid{stroke:#e4e6e9;fill:none}
.span,.leader{stroke:#98a1ab;fill:none}.front{stroke:#1f6feb;fill:none;stroke-dasharray:5 4}
.dot-made circle{fill:#1f6feb}.dot-single circle{fill:#c2500c}.dot-quantised circle{fill:#2e7d5b}
text.name-made{fill:#1f6feb}text.name-single{fill:#c2500c}text.name-quantised{fill:#2e7d5b}"""


@dataclass(frozen=True)
class Row:
    """One model. decode: times as fast as the parent; quality: text -> (bits per byte ratio, low, high)."""

    name: str
    kind: str
    wanted: float
    decode: float
    decode_low: float
    decode_high: float
    quality: dict[str, tuple[float, float, float]]


class Benchmark:
    """What all rows share: the parent, the engine, the texts, and where models lie."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.work = Path(arguments.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.engine = Engine.parse(arguments.engine, threads=arguments.threads)
        self.parent: OpenedCheckpoint = open_model(arguments.model)
        self.rows: list[Row] = []

    def meter(self, speed: float) -> SecondsMeter:
        """What predicts how fast a model decodes."""
        (made,) = meters(parse_targets([f"decode={speed}x"]), self.engine, self.parent)
        assert isinstance(made, SecondsMeter)
        return made

    def searched(self, speed: float) -> None:
        """The row of the search for this speed."""
        a = self.arguments
        folder, out = self.work / f"search-{speed}", self.work / f"searched-{speed}"
        if not (folder / "recipe.yaml").exists():
            how = {"tokens": a.tokens, "refit_tokens": a.refit_tokens, "minutes": a.minutes, "allow": tuple(a.allow)}
            wanted = Wanted(engine=a.engine, threads=a.threads, text=a.text, **how)
            search(a.model, f"decode={speed}x", folder, wanted, overwrite=True, say=print)
        found = recipe.load(folder / "recipe.yaml")
        # All are refitted on as many tokens.
        read = found.calibration.model_copy(update={"tokens": a.refit_tokens})
        self.made(found.model_copy(update={"calibration": read}), out)
        self.add(f"searched {speed}", "made", speed, out)

    def single(self, method: str, speed: float) -> None:
        """The row of one method, cut as little as the speed allows."""
        how, meter, layers = METHODS[method], self.meter(speed), self.parent.spec.layers
        width = layers[0].ffn.width if layers[0].ffn else 0
        for amount in how.amounts(len(layers), width):
            large = preview(self.recipe_of(how.as_large.replace("N", str(amount))), self.arguments.model)
            if meter.total(large.spec) <= meter.budget():
                out = self.work / f"{method.replace(' ', '-')}-{speed}"
                self.made(self.recipe_of(how.step.replace("N", str(amount))), out)
                self.add(f"{method} {speed}", "single", speed, out)
                return
        print(f"{method}: never {speed} times as fast", file=sys.stderr)

    def recipe_of(self, step: str) -> Recipe:
        """One cut, and the refit that the searched model has."""
        a = self.arguments
        text = f"{{text: {Path(a.text).absolute()}, tokens: {a.refit_tokens}, sequence_length: 256}}"
        return recipe.loads(f"version: 1\ncalibration: {text}\nsteps:\n  - {step}\n  - {{op: refit}}\n")

    def quantised(self, type_: str) -> None:
        """The rows of the parent and of the searched models at another type."""
        for name, path in [("parent", Path(self.arguments.model)), *self.searched_models()]:
            file = self.work / f"{name}-{type_}.gguf"
            if not file.exists():
                export_gguf(path, file, type=type_)
            self.add(f"{name} at {type_}", "quantised", 1.0, file)

    def searched_models(self) -> list[tuple[str, Path]]:
        """What was searched, by name."""
        return [(f"searched-{speed}", self.work / f"searched-{speed}") for speed in self.arguments.speeds]

    def made(self, wanted: Recipe, out: Path) -> None:
        """Run a recipe, unless its result is there."""
        if not (out / "config.json").exists():
            run(wanted, self.arguments.model, out, Options(discard_partial=True))

    def add(self, name: str, kind: str, wanted: float, path: Path) -> None:
        """Time and judge a model, and write what is known so far."""
        speed = self.speedup(path)
        judged = {Path(text).stem: self.judged(path, text) for text in self.arguments.judge}
        self.rows.append(Row(name, kind, wanted, speed.median, *speed.interval, judged))
        print(json.dumps(asdict(self.rows[-1])), flush=True)
        write(self.rows, self.arguments)

    def speedup(self, path: Path) -> Speedup:
        """How much faster the model decodes than the parent in the engine, timed in turn; files keep their type."""
        parent = self.work / "parent.gguf"
        if path.suffix == ".gguf":
            if not parent.exists():
                export_gguf(self.arguments.model, parent, type=self.engine.setting.type or "F16")
            found = benchmark_llamacpp(path, parent, rounds=self.arguments.rounds, threads=self.arguments.threads)
        else:
            source = self.parent.checkpoint.path
            found = self.engine.bench(path, source, self.arguments.rounds)
        assert found.decode_speedup
        return found.decode_speedup

    def judged(self, path: Path, text: str) -> tuple[float, float, float]:
        """Bits per byte over the parent's on a text, with the ends of its 95 % interval."""
        found = evaluate(path, self.arguments.model, text=text, tokens=self.arguments.judge_tokens).evaluation
        assert isinstance(found, Evaluation) and found.bits_ratio and found.parent_perplexity
        if found.bits:
            return found.bits_ratio, *(found.bits.ratio_interval or (found.bits_ratio,) * 2)
        # With one tokenizer bits are logarithms of perplexity.
        ratios = found.perplexity_ratio_interval or (found.perplexity_ratio or 1.0,) * 2
        low, high = (1 + log(ratio) / log(found.parent_perplexity) for ratio in ratios)
        return found.bits_ratio, low, high


def write(rows: list[Row], arguments: argparse.Namespace) -> None:
    """The rows as JSON, and a drawing of each text."""
    Path(arguments.out).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    if arguments.plot:
        plot = Path(arguments.plot)
        for text in rows[0].quality:
            plot.with_name(f"{plot.stem}-{text}{plot.suffix}").write_text(drawing(rows, text))


def drawing(rows: list[Row], text: str) -> str:
    """Bits per byte on one text against decode speed, as an SVG file."""
    dots = [
        Dot(
            row.decode,
            row.quality[text][0],
            row.kind,
            f"{row.name}: {row.decode:.3f} x, {row.quality[text][0]:.3f}",
            name=row.name,
            low=row.quality[text][1],
            high=row.quality[text][2],
            left=row.decode_low,
            right=row.decode_high,
        )
        for row in rows
    ]
    front = sorted((dot.x, dot.y) for dot in dots if dot.kind == "made")
    frame = Frame("decode speed, of the parent's", f"bits per byte on {text}, of the parent's", 960, 480)
    drawn = str(scatter(dots, frame, f"quality on {text} against decode speed", front))
    return drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
        ">", f"><style>{STYLE}</style>", 1
    )


def main() -> None:
    """Every row that is asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--engine", default="llama.cpp:q8_0")
    parser.add_argument("--speeds", type=float, nargs="+", default=[1.15, 1.3, 1.5])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--quantised", nargs="*", default=["Q4_0"], help="types, of the parent and of searched models")
    parser.add_argument("--files", nargs="*", default=[], help="GGUF files of the parent at types of llama-quantize")
    parser.add_argument("--text", required=True, help="text that chooses and fits")
    parser.add_argument("--judge", nargs="+", required=True, help="texts to judge on")
    parser.add_argument("--tokens", type=int, default=4096, help="that score options")
    parser.add_argument("--refit-tokens", type=int, default=65_536)
    parser.add_argument("--judge-tokens", type=int, default=8192)
    parser.add_argument("--allow", nargs="*", default=[], help="operations of searches; all: the vocabulary, too")
    parser.add_argument("--minutes", type=float, help="of each search")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", default="search-work", help="folder of the models")
    parser.add_argument("--out", required=True)
    parser.add_argument("--plot")
    benchmark = Benchmark(parser.parse_args())
    for speed in benchmark.arguments.speeds:
        benchmark.searched(speed)
        for method in benchmark.arguments.methods:
            benchmark.single(method, speed)
    for type_ in benchmark.arguments.quantised:
        benchmark.quantised(type_)
    for file in benchmark.arguments.files:
        benchmark.add(Path(file).stem, "quantised", 1.0, Path(file))


if __name__ == "__main__":
    main()
