"""A pretended accelerator: tensors that say they are on it, compute on the CPU, and refuse to meet the CPU's, as CUDA's do.

What a stage does on it is what it would do on a GPU, up to kernels: a tensor left behind on the CPU, a draw from a CPU
generator on the device, a device tensor turned into an array all fail.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from infra.stages import DEVICE_VARIABLE

AWAY = torch.device("lazy", 0)  # a device type whose backward passes torch runs without a driver
COPIES = ("_to_copy", "copy_")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")


class Away(torch.Tensor):
    """A tensor on the device; `here` holds its numbers."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> "Away":
        return torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            layout=here.layout, device=AWAY, requires_grad=here.requires_grad,
        )  # fmt: skip

    def __init__(self, here: torch.Tensor) -> None:
        self.here = here

    def new_tensor(self, data: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype).to(device or AWAY)

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.here.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """An operation on the CPU whose answer is where CUDA's would be."""
    name = func._schema.name.split("::")[1]
    tensors = [x for x in tree_flatten((args, dict(kwargs)))[0] if isinstance(x, torch.Tensor)]
    away = [x for x in tensors if isinstance(x, Away)]
    if away and name not in COPIES:
        refuse_mixed(name, [x for x in tensors if not isinstance(x, Away)])
    asked = kwargs.get("device")
    target = AWAY if away else torch.device("cpu")
    target = torch.device(asked) if asked is not None else target
    if kwargs.get("generator") is not None and target == AWAY:
        raise RuntimeError(f"{name}: expected a generator of {AWAY}, got the CPU's")
    plain = tree_map(lambda x: x.here if isinstance(x, Away) else x, (args, dict(kwargs)))
    more = plain[1] | ({"device": torch.device("cpu")} if asked is not None else {})
    answer = func(*plain[0], **more)
    if name == "copy_":
        return args[0]
    if target != AWAY:
        return answer
    wrapped = tree_map(lambda x: Away(x) if isinstance(x, torch.Tensor) else x, answer)
    return return_and_correct_aliasing(func, args, dict(kwargs), wrapped) if away else wrapped


def refuse_mixed(name: str, here: list[torch.Tensor]) -> None:
    """Numbers may stay on the CPU, and indices."""
    allowed = (torch.int64, torch.bool) if name in INDEXING else ()
    if left := [tuple(x.shape) for x in here if x.dim() > 0 and x.dtype not in allowed]:
        raise RuntimeError(f"{name}: tensors on {AWAY} and on the CPU, of shapes {left}")


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class Factories(TorchFunctionMode):
    """`torch.tensor` with a device, which does not come by as an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == AWAY:
            kwargs.pop("device")
            return func(*args, **kwargs).to(AWAY)
        return func(*args, **kwargs)


@pytest.fixture(params=["pretended", pytest.param("cuda", marks=pytest.mark.gpu)])
def away(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """A block in which stages compute on the device; outside they compute on the CPU."""
    cuda = request.param == "cuda"
    if cuda and not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    monkeypatch.setenv(DEVICE_VARIABLE, "cpu")

    @contextmanager
    def block() -> Iterator[None]:
        monkeypatch.setenv(DEVICE_VARIABLE, "cuda" if cuda else str(AWAY))
        with nullcontext() if cuda else Operations(), nullcontext() if cuda else Factories():
            yield
        monkeypatch.setenv(DEVICE_VARIABLE, "cpu")

    return block
