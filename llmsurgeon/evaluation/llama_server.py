"""llama.cpp's server in this process: next-token probabilities, greedy text, tokenisation and timings of a GGUF file.

Through `xllamacpp`, which is optional: pip install "llmsurgeon[llamacpp]". Imports no torch: a process of its own
(`apart`) is up in a second.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from llmsurgeon.errors import SurgeryError


@dataclass(frozen=True)
class Timing:
    """Seconds that a prompt took, and that the decode steps after it took together."""

    prefill: float
    decode: float


class LlamaCpp:
    """One GGUF file, loaded in llama.cpp inside this process. Use as a context manager, or `close()` it.

    `context` is how many tokens prompt and answer may have, `exact_cache` keeps keys and values in float32 rather
    than float16.

    Raises:
        SurgeryError: xllamacpp is missing, or llama.cpp cannot load the file.
    """

    def __init__(
        self, path: Path | str, *, context: int = 2048, threads: int | None = None, exact_cache: bool = False
    ) -> None:
        xllamacpp = require_xllamacpp()
        self.path = Path(path)
        if not self.path.is_file():
            raise SurgeryError(f"{path}: no such GGUF file")
        params = xllamacpp.CommonParams()
        params.model.path = str(self.path)
        # One slot, no cache of prompts: a second request must cost what the first did.
        params.n_parallel, params.cache_ram_mib, params.cache_prompt, params.warmup = 1, 0, False, False
        params.n_ctx, params.fit_params, params.n_gpu_layers = context, False, 0
        params.verbosity, params.ui = 1, False  # errors only
        self.threads = threads or len(os.sched_getaffinity(0))
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self.threads
        if exact_cache:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        with _stderr_kept() as log:
            try:
                self._server: Any = xllamacpp.Server(params)
            except Exception as error:  # RuntimeError today; the binding declares nothing
                raise SurgeryError(f"{path}: llama.cpp cannot load it: {_last_error(log()) or error}") from error
        # Closed before its loop runs, the server would wait for ever. An answered request means that it does.
        self._post("completion", self._request([self._letter], 1))

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model."""
        self._server = None

    def next_logprobs(self, ids: Sequence[int], top: int = 200) -> dict[int, float]:
        """Log-probabilities (nats) of the `top` likeliest tokens after `ids`, in order."""
        # They are reported once the answer is whole characters. Which token is drawn does not change them.
        forced = self._post("completion", self._request(ids, 1, n_probs=top, logit_bias=[[self._letter, 1000.0]]))
        return {entry["id"]: entry["logprob"] for entry in forced["completion_probabilities"][0]["top_logprobs"]}

    def generate(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """`new_tokens` likeliest tokens after `ids`, one after the other; those that end a text are passed over."""
        made: list[int] = self._post("completion", self._request(ids, new_tokens, return_tokens=True))["tokens"]
        return made

    def time(self, ids: Sequence[int], new_tokens: int, *, again: bool = False) -> Timing:
        """Seconds of a prefill of `ids` and of `new_tokens` decode steps.

        llama.cpp's clock of decoding starts when the first new token, which the prefill gave, is there. `again`: what
        the call before has read of `ids` need not be read anew, and the prefill's seconds mean nothing.
        """
        timings = self._post("completion", self._request(ids, new_tokens + 1, cache_prompt=again))["timings"]
        if (not again and timings["prompt_n"] != len(ids)) or timings["predicted_n"] != new_tokens + 1:
            raise SurgeryError(f"{self.path}: llama.cpp ran {timings}, asked for {len(ids)} and {new_tokens} tokens")
        return Timing(timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000)

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`, without what is put around a text; `special` reads control tokens in it."""
        request = {"content": text, "add_special": False, "parse_special": special}
        found: list[int] = self._post("tokenize", request)["tokens"]
        return found

    @cached_property
    def _letter(self) -> int:
        """A token that is whole characters."""
        return self.tokenize("a")[-1]

    def _request(self, ids: Sequence[int], new_tokens: int, **more: Any) -> dict[str, Any]:
        fixed = {"temperature": 0.0, "cache_prompt": False, "ignore_eos": True}
        return {"prompt": list(ids), "n_predict": new_tokens, **(fixed | more)}

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Ask llama.cpp's server, which listens on this machine only."""
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self._server.listening_address}/{path}", data, headers)
        try:
            with _DIRECT.open(request) as answer:
                found: dict[str, Any] = json.loads(answer.read())
                return found
        except urllib.error.HTTPError as error:
            said = json.loads(error.read()).get("error", {}).get("message", str(error))
            raise SurgeryError(f"{self.path}: llama.cpp: {said}") from error


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy


def require_xllamacpp() -> Any:
    """The package xllamacpp.

    Raises:
        SurgeryError: it is not installed.
    """
    try:
        import xllamacpp
    except ImportError as error:
        raise SurgeryError(
            'llama.cpp is not installed here: pip install "llmsurgeon[llamacpp]" (the package xllamacpp)'
        ) from error
    return xllamacpp


@contextmanager
def _stderr_kept() -> Iterator[Callable[[], str]]:
    """Keep what llama.cpp, which writes to the descriptor itself, says on stderr; yields a function that reads it."""
    sys.stderr.flush()
    saved = os.dup(2)
    with TemporaryFile() as file:

        def read() -> str:
            time.sleep(0.1)  # a thread of its own writes the log
            return os.pread(file.fileno(), 1 << 20, 0).decode(errors="replace")

        os.dup2(file.fileno(), 2)
        try:
            yield read
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _last_error(log: str) -> str:
    """What llama.cpp's log says went wrong, without times and levels."""
    said = [re.sub(r"^[\d.]+ [A-Z] +", "", line).strip() for line in log.splitlines()]
    telling = [line for line in said if "error" in line.lower()]
    return (telling or said or [""])[0]
