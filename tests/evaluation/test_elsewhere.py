"""Engines in environments of their own. Stand-ins for the packages run the real workers, and write down their calls.

The engines themselves run these workers in tests/engines/.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import typer
from conftest import save_encoder, save_tiny
from gguf_models import export, save_uniform
from typer.testing import CliRunner

from llmsurgeon.bench import bench
from llmsurgeon.cli import bench as command
from llmsurgeon.cli import evaluate
from llmsurgeon.engines import Engine
from llmsurgeon.errors import SurgeryError
from llmsurgeon.recipe.recipe import loads
from llmsurgeon.run import Options, run

INTEL = """
import json, os
import torch

def note(**what):
    with open(os.environ["STAND_IN_LOG"], "a") as file:
        file.write(json.dumps(what) + "\\n")

class Named:
    def __init__(self, name=None, size=None):
        self.size, self.get_type_name = size, lambda: name
        self.get_byte_size = lambda: size

class Request:
    def get_compiled_model(self): return self
    def get_property(self, name):
        return {"INFERENCE_NUM_THREADS": 3, "EXECUTION_DEVICES": ["CPU"], "INFERENCE_PRECISION_HINT": Named("bf16"),
                "KV_CACHE_PRECISION": Named(size=2)}[name]

class Output:
    pass

class OVModelForCausalLM:
    @classmethod
    def from_pretrained(cls, folder, **how):
        if "quantization_config" in how:
            how["quantization_config"] = how["quantization_config"].bits
        note(loads=folder, kind=cls.__name__, **how)
        print("to stdout, where answers go")
        made = cls()
        made.folder, made.model, made.request = folder, made, Request()
        return made
    def compile(self): pass
    def get_ops(self): return [Named("Constant", 600), Named("Add", 5), Named("Constant", 400)]
    def __call__(self, input_ids, attention_mask, past_key_values=None):
        note(folder=self.folder, read=list(input_ids.shape), mask=list(attention_mask.shape), behind=past_key_values)
        made = Output()
        made.logits = torch.randn(*input_ids.shape, 7)
        made.past_key_values = (past_key_values or 0) + input_ids.shape[1]
        return made

class OVModelForFeatureExtraction(OVModelForCausalLM): pass

class OVWeightQuantizationConfig:
    def __init__(self, bits, **how): self.bits = bits
"""
VLLM = """
import json, os
import torch

class SamplingParams:
    def __init__(self, **how): self.__dict__.update(how)

class Given:
    def __init__(self, name, tokens):
        self.request_id, self.outputs = name, [self]
        self.token_ids = tokens

class Core:
    class model_config: dtype = torch.bfloat16
    def __init__(self): self.left, self.first = {}, 1
    def note(self, **what):
        with open(os.environ["STAND_IN_LOG"], "a") as file:
            file.write(json.dumps(what) + "\\n")
    def add_request(self, name, prompt, how):
        assert how.ignore_eos and how.temperature == 0
        self.note(asked=len(prompt["prompt_token_ids"]), new=how.max_tokens)
        self.left[name] = how.max_tokens
    def has_unfinished_requests(self): return bool(self.left)
    def step(self):
        if os.environ.get("STAND_IN_FAILS") == "step": raise RuntimeError("a kernel of this is missing")
        # The first prompt is read in a step of its own, and gives nothing yet where there are several.
        names = list(self.left)[:1] if len(self.left) > 1 and self.first else list(self.left)
        self.first = 0
        for name in names: self.left[name] -= 1
        self.left = {name: left for name, left in self.left.items() if left}
        return [Given(name, [1]) for name in names]

class LLM:
    def __init__(self, folder, **how):
        if os.environ.get("STAND_IN_FAILS") == "error": raise ValueError("no class for it\\nand more")
        if os.environ.get("STAND_IN_FAILS") == "code": raise ValueError("pass trust_remote_code=True")
        if os.environ.get("STAND_IN_FAILS") == "death":
            print("the last words", file=__import__("sys").stderr, flush=True)
            os.kill(os.getpid(), 9)
        self.llm_engine = Core()
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 5)))
        self.llm_engine.note(loads=folder, **how)
"""
PLATFORMS = "class current_platform: device_type = 'cpu'\n"


@pytest.fixture
def python(tmp_path, monkeypatch):
    """The Python of an environment that has both engines; it does not see what this process is told of paths."""
    packages = tmp_path / "packages"
    for name, text in {"optimum/intel": INTEL, "vllm": VLLM}.items():
        (packages / name).mkdir(parents=True)
        (packages / name / "__init__.py").write_text(text)
    (packages / "vllm" / "platforms.py").write_text(PLATFORMS)
    made = tmp_path / "python"
    made.write_text(f'#!/bin/sh\ntest -z "$PYTHONPATH" || exit 9\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
    made.chmod(0o755)
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "elsewhere"))
    return str(made)


def logged(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]


def test_openvino_reads_the_prompt_and_decodes_behind_it_in_turn_with_the_parent(tmp_path, python):
    model, parent = save_tiny(tmp_path / "model", "llama"), save_tiny(tmp_path / "parent", "llama")
    found = bench(model, parent, engine="openvino", prompt=5, new_tokens=2, rounds=2, engine_python=python, batch=2)
    loads, calls = logged(tmp_path)[:2], logged(tmp_path)[2:]
    assert [each["loads"] for each in loads] == [str(parent), str(model)]
    assert loads[0]["kind"] == "OVModelForCausalLM" and loads[0]["export"] and loads[0]["load_in_8bit"] is False
    one_round = [([2, 5], [2, 5], None), ([2, 1], [2, 6], 5), ([2, 1], [2, 7], 6)]
    # One round before the first warms up.
    expected = [(str(folder), *call) for _ in range(3) for folder in (parent, model) for call in one_round]
    assert [(call["folder"], call["read"], call["mask"], call["behind"]) for call in calls] == expected
    assert (found.engine, found.device, found.dtype, found.threads) == ("openvino", "cpu", "bf16", 3)
    assert found.model.parameter_bytes == 1000 and found.decode_speedup and found.decode_speedup.median > 0
    config = json.loads((model / "config.json").read_text())
    width = config["num_key_value_heads"] * (config["hidden_size"] // config["num_attention_heads"])
    numbers = 2 * config["num_hidden_layers"] * width
    assert found.model.kv_bytes_per_token == 2 * numbers
    assert found.model.kv_cache_bytes == 2 * numbers * 2 * 7


def test_openvino_is_told_threads_precision_and_type(tmp_path, python):
    model = save_tiny(tmp_path / "model", "llama")
    how = dict(engine="openvino", prompt=4, new_tokens=1, rounds=1, engine_python=python)
    bench(model, threads=1, dtype="float32", **how)
    bench(model, type="int8", **how)
    first, second = (each for each in logged(tmp_path) if "loads" in each)
    assert first["ov_config"] == {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    assert second["quantization_config"] == 8 and second["ov_config"] == {}


def test_openvino_reads_an_encoder_once(tmp_path, python):
    model = save_encoder(tmp_path / "model", "bert")
    found = bench(model, engine="openvino", prompt=6, rounds=1, engine_python=python)
    loads, *calls = logged(tmp_path)
    assert loads["kind"] == "OVModelForFeatureExtraction"
    assert [(call["read"], call["behind"]) for call in calls] == [([1, 6], None)] * 2
    assert found.model.decode_tokens_per_second is None and found.model.kv_cache_bytes == 0


def test_vllm_is_stepped_until_every_sequence_has_its_first_token(tmp_path, python):
    model = save_tiny(tmp_path / "model", "llama")
    found = bench(model, engine="vllm", prompt=5, new_tokens=3, rounds=1, batch=2, threads=1, engine_python=python)
    loads, *calls = logged(tmp_path)
    assert loads["loads"] == str(model) and loads["max_model_len"] == 9 and found.threads == 1
    assert loads["enable_prefix_caching"] is False and loads["trust_remote_code"] is False
    assert calls == [{"asked": 5, "new": 4}] * 4
    assert (found.engine, found.dtype) == ("vllm", "bfloat16")
    assert found.model.prefill_seconds.median > 0 and found.model.decode_step_seconds.median > 0
    assert found.model.parameter_bytes == sum(
        file.stat().st_size for file in model.glob("*.safetensors")
    ) - header_bytes(model)


def header_bytes(model: Path) -> int:
    (file,) = model.glob("*.safetensors")
    with file.open("rb") as opened:
        return 8 + int.from_bytes(opened.read(8), "little")


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("error", "model: vllm cannot load it: no class for it and more"),
        ("code", "model: vllm has no code for this form; install llmsurgeon beside it, whose plugin has, or pass"),
        ("step", "model: vllm failed: a kernel of this is missing"),
        ("death", "vllm's process was ended by SIGKILL; is there memory for it. It said last: the last words"),
    ],
)
def test_what_an_engine_says_of_a_model_is_one_message(tmp_path, python, monkeypatch, fails, message):
    monkeypatch.setenv("STAND_IN_FAILS", fails)
    with pytest.raises(SurgeryError, match=message):
        bench(save_tiny(tmp_path / "model", "llama"), engine="vllm", engine_python=python)


def test_what_cannot_be_loaded_is_refused_before_anything_is_started(tmp_path, python):
    surgeon, tiny = tmp_path / "surgeon", save_tiny(tmp_path / "model", "llama")
    recipe = "version: 1\nformat: surgeon\nsteps: [{op: prune_attention, layers: [1]}]\n"
    run(loads(recipe), str(tiny), surgeon, Options())
    with pytest.raises(SurgeryError, match=r"its exporter knows models by their type, and surgeon_llama brings code"):
        bench(surgeon, engine="openvino", engine_python=python)
    with pytest.raises(SurgeryError, match=r"it generates text, and this is an encoder"):
        bench(save_encoder(tmp_path / "encoder", "bert"), engine="vllm", engine_python=python)
    file = export(save_uniform(tmp_path / "uniform", "llama"), tmp_path / "model.gguf").path
    with pytest.raises(SurgeryError, match=r"cannot load it: a GGUF file; llmsurgeon export --to native makes"):
        bench(file, engine="vllm", engine_python=python)
    with pytest.raises(SurgeryError, match=r"prompt and new tokens make 1,?000005 positions"):
        bench(tiny, engine="vllm", engine_python=python, prompt=1_000_000, new_tokens=5)
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"engine": "openvino", "engine_python": "nowhere/python"}, "--engine-python nowhere/python: no such program"),
        ({"engine": "vllm"}, "vllm is not installed here.* python -m venv vllm-env; vllm-env/bin/pip install vllm;"),
        ({"engine": "transformers", "engine_python": "x"}, "--engine-python is for --engine openvino and vllm"),
        ({"engine": "vllm", "type": "int8"}, "--type is for --engine llama.cpp and openvino; for vllm there is"),
        ({"engine": "openvino", "type": "Q8_0"}, "--type Q8_0: expected int8 or int4"),
        ({"engine": "openvino", "device": "cuda"}, "leave out --device and --graph"),
        ({"engine": "vllm", "graph": True}, "leave out --device and --graph"),
        ({"engine": "vllm", "dtype": "int3"}, "int3"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, how, message):
    with pytest.raises(SurgeryError, match=message):
        bench(save_tiny(tmp_path / "model", "llama"), **how)


def test_the_command_prints_the_table_of_another_environment(tmp_path, python):
    app = typer.Typer()
    evaluate.register(app)  # with one command alone, Typer wants no name
    command.register(app)
    model = save_tiny(tmp_path / "model", "llama")
    sizes = ["--prompt", "4", "--new-tokens", "2", "--rounds", "1"]
    result = CliRunner().invoke(app, ["bench", str(model), "--engine", "openvino", "--engine-python", python, *sizes])
    assert result.exit_code == 0, result.output
    assert "openvino, cpu, bf16, 3 threads" in " ".join(result.output.split()) and "decode, tokens/s" in result.output


def test_a_search_names_the_engines_that_it_measures_in():
    with pytest.raises(SurgeryError, match=r"expected one of transformers, llama\.cpp.*; it is for bench alone"):
        Engine.parse("vllm")
    with pytest.raises(SurgeryError, match=r"expected one of transformers, llama\.cpp, such as llama\.cpp:q8_0$"):
        Engine.parse("onnx")


def test_no_process_is_left(tmp_path, python):
    bench(save_tiny(tmp_path / "m", "llama"), engine="vllm", prompt=3, new_tokens=1, rounds=1, engine_python=python)
    names = [(Path("/proc") / each / "cmdline") for each in os.listdir("/proc") if each.isdigit()]
    lines = [file.read_bytes() for file in names if file.exists()]
    assert not any(b"vllm_worker.py" in line and str(tmp_path).encode() in line for line in lines)
