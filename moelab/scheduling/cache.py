"""What is resident, at which tier, within the budget.

A copy takes its place when its load is *issued*, so loads in flight are inside the budget. One
expert has one copy at a time: a copy at more bits serves any request, so a second one would only
take room. The cache knows bytes, not memory: the engine's arena mirrors it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moelab.scheduling.strategy import Key, Shape


class Cache(Mapping[Key, int]):
    """A mapping (layer, expert) -> bits of the resident copy, least recently used first.

    Parameters
    ----------
    shape
        Gives the bytes of a copy.
    budget_bytes
        Never exceeded: `add` raises before it would be.
    """

    def __init__(self, shape: Shape, budget_bytes: int) -> None:
        self._shape = shape
        self._bits: dict[Key, int] = {}
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.layer_bytes = [0] * shape.layers
        self.tier_bytes = dict.fromkeys(shape.nbytes, 0)

    def __getitem__(self, key: Key) -> int:
        return self._bits[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def bits(self, key: Key) -> int:
        """Bits of the resident copy of ``key``, 0 where it is not resident."""
        return self._bits.get(key, 0)

    @property
    def free_bytes(self) -> int:
        """Room left; negative between a smaller budget and the evictions that answer it."""
        return self.budget_bytes - self.used_bytes

    def add(self, key: Key, bits: int) -> None:
        """Take the room of a copy.

        Raises
        ------
        AssertionError
            The copy does not fit or the expert is resident already: a fault in the caller.
        """
        nbytes = self._shape.nbytes[bits]
        if key in self._bits:
            raise AssertionError(f"expert {key} is resident already")
        if nbytes > self.free_bytes:
            raise AssertionError(
                f"expert {key} at {bits} bit needs {nbytes} bytes, {self.free_bytes} are free"
            )
        self._bits[key] = bits
        self.used_bytes += nbytes
        self.layer_bytes[key[0]] += nbytes
        self.tier_bytes[bits] += nbytes

    def touch(self, key: Key) -> None:
        """``key`` serves a token now: it becomes the last."""
        self._bits[key] = self._bits.pop(key)

    def remove(self, key: Key) -> int:
        """Give the room back; returns the bits the copy had."""
        bits = self._bits.pop(key)
        nbytes = self._shape.nbytes[bits]
        self.used_bytes -= nbytes
        self.layer_bytes[key[0]] -= nbytes
        self.tier_bytes[bits] -= nbytes
        return bits
