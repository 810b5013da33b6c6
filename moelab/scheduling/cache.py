"""What is known of every expert, in arrays kept once: the copy in memory, and its uses.

A copy takes its place when its load is *issued*, so loads in flight are inside the budget. One
expert has one copy at a time: a copy at more bits serves any request, so a second one would only
take room. The cache knows bytes, not memory: the engine's memory mirrors it.

n experts of the model; a key is ``offset[layer] + expert``.
"""

from __future__ import annotations

import numpy as np

from moelab.scheduling.stream import Key, Shape


class Cache:
    """Resident copies within a budget, and how each of all n experts was used.

    Parameters
    ----------
    shape
        Gives the bytes of a copy.
    budget_bytes
        Never exceeded: `add` raises before it would be.

    Attributes
    ----------
    bits, last_use, last_token, uses, high_uses, in_flight
        Arrays ``[n]``, see `moelab.scheduling.stream.View`.
    held
        Flags ``[n]`` of who must not be evicted now: `NEEDED`, `PROTECTED`, `PINNED`.
    used_bytes, layer_bytes, tier_bytes
        Bytes of the resident copies: of all, of each layer, of each tier.
    """

    NEEDED, PROTECTED, PINNED = 1, 2, 4
    """Flags of `held`, and how long each stands.

    Needed: serves the layer at work, until its step is over. Protected: resident and predicted for
    a coming layer, until that layer comes or is predicted anew, the copy leaves or another sequence
    begins. Pinned:
    kept for good, as long as the strategy that pins it is in force, be it resident or not.
    """

    def __init__(self, shape: Shape, budget_bytes: int) -> None:
        n = shape.n
        self.shape = shape
        self.budget_bytes, self.used_bytes = budget_bytes, 0
        self.layer_bytes, self.tier_bytes = [0] * shape.layers, dict.fromkeys(shape.nbytes, 0)
        self.clock = self.token = 0
        self.bits, self.held = np.zeros(n, np.uint8), np.zeros(n, np.uint8)
        self.last_use, self.in_flight = np.zeros(n, np.int64), np.zeros(n, np.bool_)
        self.last_token, self.uses, self.high_uses = np.zeros((3, n), np.int64)
        # The same memory for single experts: reading and writing one number of a numpy array
        # costs three times as much as through a memoryview.
        self.bits_of, self.held_of = self.bits.data, self.held.data
        self._last_use, self._last_token = self.last_use.data, self.last_token.data
        self._uses, self._high_uses = self.uses.data, self.high_uses.data
        self._layer_of = shape.layer_of.tolist()

    def __contains__(self, key: Key) -> bool:
        return self.bits_of[key] > 0

    def __len__(self) -> int:
        return int(np.count_nonzero(self.bits))

    def items(self) -> list[tuple[Key, int]]:
        """(key, bits) of every resident copy, least recently used first."""
        keys = np.flatnonzero(self.bits)
        keys = keys[np.argsort(self.last_use[keys])]
        return list(zip(keys.tolist(), self.bits[keys].tolist(), strict=True))

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
        nbytes = self.shape.size(key, bits)
        if self.bits_of[key]:
            raise AssertionError(f"expert {self.shape.place(key)} is resident already")
        if nbytes > self.free_bytes:
            raise AssertionError(
                f"expert {self.shape.place(key)} at {bits} bit needs {nbytes} bytes, "
                f"{self.free_bytes} are free"
            )
        self.bits_of[key] = bits
        self.used_bytes += nbytes
        self.layer_bytes[self._layer_of[key]] += nbytes
        self.tier_bytes[bits] += nbytes
        self.clock += 1
        self._last_use[key] = self.clock

    def use(self, key: Key, *, high: bool) -> None:
        """``key`` serves a request: it becomes the last. ``high``: for the bits asked for."""
        self.clock += 1
        self._last_use[key] = self.clock
        self._last_token[key] = self.token + 1
        self._uses[key] += 1
        if high:
            self._high_uses[key] += 1

    def remove(self, key: Key) -> int:
        """Give the room back; returns the bits the copy had."""
        bits = self.bits_of[key]
        nbytes = self.shape.size(key, bits)
        self.bits_of[key] = 0
        self.held_of[key] &= ~self.PROTECTED  # needed and pinned are not the copy's
        self.in_flight[key] = False
        self.used_bytes -= nbytes
        self.layer_bytes[self._layer_of[key]] -= nbytes
        self.tier_bytes[bits] -= nbytes
        return bits

    def new_sequence(self) -> None:
        """Forget the uses of the last sequence; the copies and their order of use stay.

        The clock begins anew, so that a replay of this sequence alone reads the same numbers.
        """
        residents = [key for key, _ in self.items()]
        self.last_use[:] = 0
        self.last_use[residents] = np.arange(1, len(residents) + 1)
        self.clock, self.token = len(residents), 0
        for array in (self.last_token, self.uses, self.high_uses, self.in_flight):
            array[:] = 0
        self.held &= self.PINNED
