"""vLLM on a CPU loads what this tool writes, and computes what transformers does. Started by scripts/engines."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

sys.path.insert(0, str(Path(__file__).parent))
from compared import BASE, answered, expected, held

pytest.importorskip("vllm")
pytestmark = pytest.mark.engines
PLUGIN = any(point.name == "llmsurgeon" for point in entry_points(group="vllm.general_plugins"))
NEW = 12


# The surgeon form and packed ternary linears are the plugin's; without it vLLM has no class for them.
OURS = ("surgeon", "bitnet")
LOADED = [name for name in expected() if not name.startswith("refused") and (PLUGIN or not name.startswith(OURS))]


@pytest.mark.skipif(not PLUGIN or not expected(), reason="the plugin refuses")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("refused-parallel", "layer 2 of this surgeon_llama checkpoint runs blocks in parallel"),
        ("refused-heads", "Qwen2Attention takes no heads of 32 where there are 2"),
        ("refused-mixed", "here model.layers.2.self_attn.k_proj is packed and model.layers.2.self_attn.q_proj is not"),
        ("refused-settings", "use_parallel_residual of this surgeon_stablelm checkpoint is True"),
    ],
)
def test_what_vllm_has_no_layers_for_is_refused_with_the_reason(name, message):
    from vllm import LLM

    with pytest.raises(Exception, match=message):
        LLM(str(BASE / name), enforce_eager=True, max_model_len=64, skip_tokenizer_init=True)


@pytest.mark.parametrize("name", LOADED)
def test_a_checkpoint_is_computed_as_by_transformers(name):
    from vllm import LLM, SamplingParams

    wanted = expected()[name]
    model = LLM(
        wanted["folder"],
        dtype=wanted["dtype"],
        enforce_eager=True,
        max_model_len=256,
        enable_prefix_caching=True,
        skip_tokenizer_init=wanted["texts"] is None,
        trust_remote_code=not PLUGIN,
    )
    how = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, prompt_logprobs=0, detokenize=False)
    prompts = wanted["texts"] or [{"prompt_token_ids": prompt} for prompt in wanted["prompts"]]
    # All in one call are batched; once more, alone and with what the first call has left in the prefix cache.
    batched = model.generate(prompts, how, use_tqdm=False)
    assert [list(each.prompt_token_ids) for each in batched] == wanted["prompts"]
    logs = [
        [place[token].logprob for place, token in zip(each.prompt_logprobs[1:], prompt[1:], strict=True)]
        for each, prompt in zip(batched, wanted["prompts"], strict=True)
    ]
    follow = [list(each.outputs[0].token_ids) for each in batched]
    held("vllm", name, "plugin" if PLUGIN else "checkpoint's", logs, follow)
    plain = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    again = [list(model.generate([prompt], plain, use_tqdm=False)[0].outputs[0].token_ids) for prompt in prompts[:4]]
    if wanted["dtype"] == "float32" and wanted["bfloat16"] is not None:
        assert again == follow[:4]


@pytest.mark.skipif(not expected(), reason="scripts/engines has written no checkpoints")
def test_what_bench_asks_is_timed():
    found = answered("vllm_worker.py", expected()["nas-llama"]["folder"], trust_remote_code=not PLUGIN)
    assert found[0]["device"] == "cpu" and found[0]["dtype"] == "float32" and found[0]["threads"] == 1


@pytest.mark.skipif(not PLUGIN or not expected(), reason="the plugin's models")
@pytest.mark.parametrize("how", [("2",), ("1", "compile")], ids=["two ranks", "compiled"])
def test_ranks_and_compiled_models_give_the_same_texts(how):
    """Tensor parallelism, attention left out, a layer with one key/value head for both ranks; and torch.compile."""
    command = [sys.executable, str(Path(__file__).with_name("generated.py")), "surgeon-qwen2", *how]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert made.returncode == 0, made.stderr[-3000:]
    # vLLM prints lines of its own around it.
    (told,) = [line.split(maxsplit=1)[1] for line in made.stdout.splitlines() if line.startswith("TOKENS ")]
    assert json.loads(told) == expected()["surgeon-qwen2"]["follow"]


@pytest.mark.skipif(not expected(), reason="scripts/engines has written no checkpoints")
def test_a_server_answers(tmp_path):
    """`vllm serve OUT`, with the flag without the plugin and without any with it: a completion, and a chat."""
    from transformers import AutoTokenizer

    name = "surgeon-qwen2" if PLUGIN else "nas-llama"
    wanted = expected()[name]
    (tmp_path / "chat.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    # What `vllm serve` starts; the command itself asks for a package named vllm, and this one is vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", wanted["folder"]]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "128",
    ]
    command += ["--chat-template", str(tmp_path / "chat.jinja"), *([] if PLUGIN else ["--trust-remote-code"])]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        ready(f"http://127.0.0.1:{port}/health", server, tmp_path / "log")
        how = {"model": wanted["folder"], "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
        prompt, follow = wanted["prompts"][0], wanted["follow"][0]
        told = posted(f"http://127.0.0.1:{port}/v1/completions", {**how, "prompt": prompt, "return_token_ids": True})
        assert told["choices"][0]["token_ids"] == follow
        chat = {**how, "messages": [{"role": "user", "content": "abc def"}], "return_token_ids": True}
        told = posted(f"http://127.0.0.1:{port}/v1/chat/completions", chat)
        assert told["usage"]["completion_tokens"] == NEW
        text = AutoTokenizer.from_pretrained(wanted["folder"]).decode(told["choices"][0]["token_ids"])
        assert told["choices"][0]["message"]["content"].split() == text.split()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


def ready(address, server, log):
    """Wait until a server answers."""
    for _ in range(300):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"no answer in five minutes: {log.read_text()[-3000:]}")


def posted(address, asked):
    """What a server answers."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, json.dumps(asked).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
