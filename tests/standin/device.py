"""A device that stands in for a graphics card on machines without one: numbers are the CPU's, the rules are a card's.

    use_stand_in()                       # once, in a process of its own: torch can have one such device
    with StandIn() as card: ...          # tensors on device "standin" may not meet those on the CPU

A tensor of it is a wrapper with the numbers inside. As on a card, numpy cannot read it, and an operation on tensors of
both devices is an error, but for copies, for indices and for tensors of one number without a shape.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "standin"
# Take tensors of several devices on a card, too. Indices may lie on the CPU, what they index may not.
BETWEEN = {"aten.copy_.default", "aten._to_copy.default", "aten._copy_from.default"}
INDEXED = {"aten.index.Tensor", "aten.index_put.default", "aten.index_put_.default", "aten._index_put_impl_.default"}

PRODUCTS = {"aten.mm.default", "aten.addmm.default", "aten.bmm.default", "aten.baddbmm.default", "aten.addmm_.default"}


class OnCard(torch.Tensor):
    """A tensor on the stand-in, whose numbers are `inner`."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnCard:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=f"{NAME}:0",
            requires_grad=False,
        )
        made.inner = inner
        return made

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        # Says that a module must swap such a parameter as a whole when it is cast.
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, torch.Tensor], context: None, *sizes: Any) -> OnCard:
        return OnCard(parts["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return carried_out(func, args, kwargs or {})


class StandIn(TorchDispatchMode):
    """While it is entered, what is asked for on "standin" is made there.

    done: operations by device. left: products of matrices that were computed on the CPU, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.done: Counter[str] = Counter()
        self.left: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode what is made of other operations arrives whole
            made = func.decompose(*args, **kwargs)
        if made is NotImplemented:
            made = carried_out(func, args, kwargs)
        card = any(isinstance(each, OnCard) for each in tree_flatten(made)[0])
        self.done["card" if card else "cpu"] += 1
        if not card and str(func) in PRODUCTS:
            self.left[str(func)] += 1
        return made


def carried_out(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation, where its tensors are.

    Raises:
        RuntimeError: they are on both devices.
    """
    given = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
    there = [each for each in given if isinstance(each, OnCard)]
    elsewhere = [each for each in given if not isinstance(each, OnCard) and (each.dim() or each.is_meta)]
    name = str(func)
    values = args[2:3] if name in INDEXED else ()
    indexed = (
        name in INDEXED and isinstance(args[0], OnCard) and not any(each is one for each in values for one in elsewhere)
    )
    if there and elsewhere and name not in BETWEEN and not indexed:
        found = [f"{NAME if isinstance(each, OnCard) else each.device} {list(each.shape)}" for each in given]
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {', '.join(found)}")
    asked = kwargs.get("device")
    card = torch.device(asked).type == NAME if asked is not None else bool(there)
    if card and asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if name == "aten.copy_.default":
        card = isinstance(args[0], OnCard)
    plain: dict[int, torch.Tensor] = {id(each.inner): each for each in there}
    made = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    # What worked in place gives back the very tensor that it was given.
    own = {id(each): each for each in given}
    return tree_map(lambda each: plain.get(id(each)) if id(each) in plain else _placed(each, card, own), made)


def _placed(value: Any, card: bool, own: dict[int, torch.Tensor]) -> Any:
    if not isinstance(value, torch.Tensor) or not card or id(value) in own or isinstance(value, OnCard):
        return value
    return OnCard(value)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnCard) else value


class _Generator(torch.Generator):
    """Random numbers of the stand-in are the CPU's."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls)


def use_stand_in() -> None:
    """Make "standin" a device of this process; to be called before anything imports safetensors."""
    import safetensors.torch
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)
    torch.Generator = _Generator  # type: ignore[misc]
    tensor = torch.tensor

    def made_there(data: Any, *, device: Any = None, **settings: Any) -> torch.Tensor:
        # torch.tensor makes its numbers where no mode sees it.
        made = tensor(data, **settings)
        return made if device is None else made.to(device)

    torch.tensor = made_there
    save = safetensors.torch.save_file

    def save_file(tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> None:
        save({name: _inner(tensor.detach()) for name, tensor in tensors.items()}, *args, **kwargs)

    safetensors.torch.save_file = save_file
