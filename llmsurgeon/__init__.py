"""Surgery on pretrained Hugging Face checkpoints: measure, cut, heal, prove, ship.

A verb is a function of this package, and a file of the same name that tells its story. Neither torch nor anything else
that is large is imported before a verb is asked for.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

# As type checkers know it; importing `typing` for it would take as long as everything else here.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from llmsurgeon.analyze import analyze
    from llmsurgeon.bench import bench
    from llmsurgeon.evaluate import evaluate
    from llmsurgeon.export import export
    from llmsurgeon.heal import heal
    from llmsurgeon.inspect import inspect
    from llmsurgeon.run import run
    from llmsurgeon.search import search
    from llmsurgeon.verify import verify

__version__ = "0.1.0"
__all__ = ["analyze", "bench", "evaluate", "export", "heal", "inspect", "run", "search", "verify"]


class _Verbs(ModuleType):
    """This package: `llmsurgeon.run` is the function, also once somebody has imported the file of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        # An import of llmsurgeon.run ends with setting `run` here to the module.
        is_file = isinstance(value, ModuleType) and value.__name__ == f"{__name__}.{name}"
        super().__setattr__(name, getattr(value, name) if is_file and name in __all__ else value)

    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import_module(f"{__name__}.{name}")
        return self.__dict__[name]

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Verbs
