"""llama.cpp's own quantizer, called in the library that the package xllamacpp brings: float32 rows in, blocks out.

`ggml_quantize_chunk` of ggml.h. The `gguf` package, in numpy, makes the plain types and not these.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmsurgeon.errors import SurgeryError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

MISSING = "is made by llama.cpp's own quantizer, of the package xllamacpp: pip install 'llmsurgeon[llamacpp]'"


def require(type: str) -> None:
    """Raise SurgeryError where the library is not installed, or too old to be asked; `type` is what is wanted."""
    try:
        _library()
    except (OSError, AttributeError) as error:
        raise SurgeryError(f"GGUF type {type} {MISSING}") from error


def llama_quantize(rows: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Rows [n, I] of float32 as blocks of a type, uint8 [n, bytes of a row]."""
    from gguf import GGML_QUANT_SIZES

    block, block_bytes = GGML_QUANT_SIZES[kind]
    count, width = rows.shape
    made = np.empty((count, width // block * block_bytes), np.uint8)
    source = np.ascontiguousarray(rows, np.float32)
    written = _library().ggml_quantize_chunk(int(kind), source.ctypes.data, made.ctypes.data, 0, count, width, None)
    assert written == made.nbytes, (kind, written, made.nbytes)
    return made


@cache
def _library() -> ctypes.CDLL:
    found = find_spec("xllamacpp")
    folder = Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None
    files = sorted(folder.glob("xllamacpp*.so")) + sorted(folder.glob("xllamacpp*.pyd")) if folder else []
    if not files:
        raise OSError("xllamacpp is not installed")
    library = ctypes.CDLL(str(files[0]))
    quantize = library.ggml_quantize_chunk
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    quantize.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    quantize.restype = ctypes.c_size_t
    return library
