"""Dense weights (attention, shared experts, dense layers, head) through the kernels.

Every large `nn.Linear` keeps the checkpoint's own 16 bits, half of float32's bytes, or fewer, and
a token's time is mostly reading them. `serve` gives such a module another ``forward``: few tokens
go to the row dots, many to blocks of rows widened to float32. Sums are float32 either way.
Embeddings are looked up and widened. Below 16 bit the checkpoint's own rows are read from their
file where full precision is asked for. What it does not know: which modules these are (`skeleton`
loads them at 16 bit), and experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only

from moelab.engine.chunks import FEW_TOKENS
from moelab.engine.kernels import BLOCK_BYTES, in_blocks, linear
from moelab.models.shards import Checkpoint
from moelab.store.codecs import GROUP, Layout, decode, encode, nbytes

Rows = Callable[[int, int], torch.Tensor]
Code = Callable[[dict[str, torch.Tensor], Layout, int], np.ndarray]

# T tokens, K inputs, N outputs.


class Weight:
    """A matrix ``[N, K]`` at the checkpoint's 16 bits or, with its rows in a file, at fewer.

    Parameters
    ----------
    half
        The weight, bfloat16 or float16.
    bits
        What is kept in memory: 16, 8, 4, 3 or 2.
    file
        ``file(first, last)``: rows as the checkpoint has them. Without it ``bits`` has to be 16,
        or the weight random.
    exact
        Whether full precision is asked for now.
    code
        What makes the codes of some rows.
    """

    def __init__(
        self,
        half: torch.Tensor,
        bits: int,
        file: Rows | None,
        exact: Callable[[], bool],
        code: Code = encode,
    ) -> None:
        self.shape, self.bits = half.shape, bits
        self.dtype = str(half.dtype).removeprefix("torch.")
        self.step = max(1, BLOCK_BYTES // 4 // half.shape[1])
        self._exact, self._file = exact, file
        if bits == 16:
            self._half = half
            self.nbytes, self._address = half.nbytes, half.data_ptr()
        else:
            self._half = None
            self._codes = np.zeros(nbytes(self._layout(len(half)), bits), np.uint8)
            for first in range(0, len(half), self.step):  # the whole in float32 would be the peak
                block = half[first : first + self.step]
                layout = self._layout(len(block))
                blob = code({"w": block}, layout, bits)
                for ours, its in self._parts(first, first + len(block)):
                    self._codes[ours] = blob[its]
            self.nbytes, self._address = len(self._codes), self._codes.ctypes.data

    @property
    def half(self) -> torch.Tensor:
        """The 16 bits in memory, to write to.

        Raises
        ------
        RuntimeError
            They are not in memory.
        """
        if self._half is None:
            raise RuntimeError(f"a weight kept at {self.bits} bit cannot be written to")
        return self._half

    def _layout(self, rows: int) -> Layout:
        return Layout((("w", (rows, self.shape[1])),), self.dtype)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """Some rows, float32 ``[n, K]``."""
        first, last, _ = rows.indices(self.shape[0])
        if self._half is not None:
            return self._half[first:last].float()
        if self._exact() and self._file is not None:
            return self._file(first, last).float()
        return self._decoded(first, last)

    def _parts(self, first: int, last: int) -> tuple[tuple[slice, slice], ...]:
        """Where the codes and the pairs of some rows lie, here and in a blob of these rows."""
        (n, k), count = self.shape, last - first
        row, pair = k * self.bits // 8, k // GROUP * 4
        at, middle = n * row, count * row
        codes = slice(first * row, last * row), slice(0, middle)
        pairs = slice(at + first * pair, at + last * pair), slice(middle, middle + count * pair)
        return codes, pairs

    def _decoded(self, first: int, last: int) -> torch.Tensor:
        layout = self._layout(last - first)
        blob = np.zeros(nbytes(layout, self.bits), np.uint8)
        for ours, its in self._parts(first, last):
            blob[its] = self._codes[ours]
        return decode(blob, layout, self.bits)["w"]

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ W.T``, float32 ``[T, N]`` for x float32 ``[T, K]``."""
        if not self._exact() if self._half is None else len(x) <= FEW_TOKENS:
            found = linear(self._address, self.bits, self.dtype, x.numpy(), self.shape[0])
            return torch.from_numpy(found)
        return in_blocks(x, self)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows by number, float32 ``[..., K]``."""
        if self._half is not None:
            return F.embedding(ids, self._half).float()
        found = [self[at : at + 1] for at in ids.flatten().tolist()]
        return torch.cat(found).view(*ids.shape, -1)


class Widened(torch.Tensor):
    """A `Weight` that says it is float32, and is as soon as anybody but us computes with it.

    Families read ``weight.dtype`` to cast by, and some multiply by a module's weight themselves.
    """

    held: Weight

    @staticmethod
    def __new__(cls: type[Widened], held: Weight) -> Widened:  # noqa: PYI034
        """Shape of ``held``, dtype float32."""
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=torch.float32)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any operation on it: on the widened values; one that writes, on the 16 bits."""
        if func is torch.ops.aten.detach.default:
            return cls(args[0].held)
        if func._schema.is_mutable and isinstance(args[0], cls):
            func(args[0].held.half, *args[1:], **(kwargs or {}))
            return args[0]
        whole = tree_map_only(cls, lambda t: t.held[:], (args, kwargs or {}))
        return func(*whole[0], **whole[1])


class DenseLinear:
    """What stands in for the ``forward`` of one `nn.Linear`."""

    def __init__(self, weight: Weight, bias: torch.Tensor | None = None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ W.T + b`` for x ``[..., K]``, in the dtype of x."""
        y = self._weight.times(x.reshape(-1, x.shape[-1]).float().contiguous())
        if self._bias is not None:
            y += self._bias
        return y.view(*x.shape[:-1], -1).to(x.dtype)


def memory_bytes(model: nn.Module) -> int:
    """Memory of all weights that are no expert's."""
    weights = [w for w in model.parameters() if w.device.type != "meta"]
    return sum(w.held.nbytes if isinstance(w, Widened) else w.nbytes for w in weights)


def serve(
    model: nn.Module,
    bits: int = 16,
    checkpoint: Checkpoint | None = None,
    exact: Callable[[], bool] = lambda: False,
) -> dict[str, Weight]:
    """Let the kernels compute every module whose weight was left at 16 bit.

    Parameters
    ----------
    bits
        For those whose rows lie in a file as they are, K being whole groups of 64; others stay at
        16 bit.
    checkpoint
        What the model's weights came from.
    exact
        Whether full precision is asked for now.

    Returns
    -------
    dict of str to Weight
        By the name of each module; tied ones share theirs. Deleting a module's ``forward`` gives
        it its own back.
    """
    owners: dict[nn.Parameter, list[tuple[str, Any]]] = {}  # a tied weight has several
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, nn.Embedding):
            weight: Any = module.weight
            if weight.dtype in (torch.bfloat16, torch.float16):
                owners.setdefault(weight, []).append((name, module))
    served: dict[str, Weight] = {}
    random = checkpoint is not None and checkpoint.random
    code = _once() if random else encode
    while owners:  # taken out one by one, so that what is replaced can go
        weight, modules = owners.popitem()
        half = weight.detach()
        name = f"{modules[0][0]}.weight"  # transformers saves a tied weight under its first name
        file = _rows_of(checkpoint, name, half) if checkpoint and bits < 16 and not random else None
        kept = bits if file or (random and half.shape[1] % GROUP == 0) else 16
        held = Weight(half, kept, file, exact, code)
        widened = nn.Parameter(Widened(held), requires_grad=False)
        for name, module in modules:
            is_embedding = isinstance(module, nn.Embedding)
            module.weight = widened
            module.forward = held.lookup if is_embedding else DenseLinear(held, module.bias)
            served[name] = held
    return served


def _once() -> Code:
    """Makes codes of a layout once: of random weights the next ones are as good."""
    known: dict[tuple[Layout, int], np.ndarray] = {}

    def code(tensors: dict[str, torch.Tensor], layout: Layout, bits: int) -> np.ndarray:
        if (layout, bits) not in known:
            known[layout, bits] = encode(tensors, layout, bits)
        return known[layout, bits]

    return code


def _rows_of(checkpoint: Checkpoint, key: str, half: torch.Tensor) -> Rows | None:
    """Reads rows of a weight from its file, where it lies there as it is."""
    info = checkpoint.info.get(key)
    if info is None or half.shape[1] % GROUP or info.shape != tuple(half.shape):
        return None
    file: Rows = lambda first, last: checkpoint.rows(key, first, last)  # noqa: E731
    step = max(1, BLOCK_BYTES // 2 // half.shape[1])
    for first in range(0, len(half), step):
        if not torch.equal(file(first, first + step), half[first : first + step]):
            return None
    return file
