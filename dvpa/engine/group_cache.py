"""Which expert groups are in memory: slots, least recently used first out, and reading ahead.

Knows keys and slots only; whoever makes one gives it the function that fills a slot. No torch.

Two threads: the step's, which waits for what it needs, and one that reads ahead what was
predicted. One lock guards the tables and is never held while a slot is filled.
"""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, replace

logger = logging.getLogger(__name__)
MAX_HINTS = 4  # predictions waiting to be read; the oldest is forgotten first

Key = tuple[int, int]  # decoder layer, group


class GroupUnavailable(RuntimeError):
    """A group that a token was routed to cannot be read. Whatever is resident goes on working."""

    def __init__(self, layer: int, group: int, reason: str) -> None:
        super().__init__(f"layer {layer}, expert group {group}: {reason}")
        self.layer, self.group, self.reason = layer, group, reason


@dataclass
class ResidencyStats:
    """Counters since the start, of the groups that come and go (never of the base pool).

    Attributes:
        resident_bytes: all weights in memory now, those that stay included.
        bytes_read: bytes read from files; read_seconds: time that took, both threads together.
        group_loads: groups read; prefetch_loads: those of them read ahead.
        hits: groups that a layer needed and found, or found being read ahead; misses: the others.
        prefetch_hits: hits on a group that was read ahead and not used before.
        evictions: groups dropped for others.
        failed_loads: attempts to read a group that failed.
        failed_groups: ((layer, group), reason) of each group whose last attempt failed.
    """

    resident_bytes: int = 0
    bytes_read: int = 0
    read_seconds: float = 0.0
    group_loads: int = 0
    prefetch_loads: int = 0
    hits: int = 0
    misses: int = 0
    prefetch_hits: int = 0
    evictions: int = 0
    failed_loads: int = 0
    failed_groups: tuple[tuple[Key, str], ...] = ()


@dataclass
class _Held:
    """A resident group: its slot, the step that last used it, whether it was only read ahead."""

    slot: int
    step: int
    is_prefetched: bool


@dataclass(frozen=True)
class _Hint:
    """Groups still to read ahead, and the step in which that was asked for."""

    keys: deque[Key]
    step: int


class GroupCache:
    """Groups in `slots`, filled by `fill(key, slot) -> bytes read` (ValueError: unreadable)."""

    def __init__(self, slots: Iterable[int], fill: Callable[[Key, int], int]) -> None:
        self._fill = fill
        self._changed = threading.Condition()  # the one lock: everything below
        self._free = list(slots)
        self.num_slots = len(self._free)
        self._resident: OrderedDict[Key, _Held] = OrderedDict()  # least recently used first
        self._loading: set[Key] = set()
        self._failed: dict[Key, str] = {}
        self._hints: deque[_Hint] = deque(maxlen=MAX_HINTS)
        self._step = 0
        self._is_closed = False
        self._stats = ResidencyStats()
        self._reader: threading.Thread | None = None

    @property
    def stats(self) -> ResidencyStats:
        """A copy of the counters; `resident_bytes` is left to the owner."""
        with self._changed:
            return replace(self._stats, failed_groups=tuple(sorted(self._failed.items())))

    @property
    def num_used(self) -> int:
        """Slots that hold a group or are being filled."""
        with self._changed:
            return len(self._resident) + len(self._loading)

    def resident(self) -> list[Key]:
        """The groups in memory, least recently used first."""
        with self._changed:
            return list(self._resident)

    def next_step(self) -> None:
        """A new step begins: what earlier ones used may make room for what is read ahead."""
        with self._changed:
            self._step += 1

    def bring_in(self, keys: set[Key]) -> None:
        """Make at most `num_slots` groups resident together; they stay until the next call.

        Raises:
            GroupUnavailable: one of them cannot be read; an earlier failure is tried again.
        """
        assert len(keys) <= self.num_slots
        with self._changed:  # what is there first, before the other thread takes it away
            ordered = sorted(keys, key=lambda key: (key not in self._resident, key))
        for key in ordered:
            slot = self._find_or_take(key, keys)
            if slot is not None and (reason := self._load(key, slot)) is not None:
                raise GroupUnavailable(*key, reason)

    def _find_or_take(self, key: Key, keep: set[Key]) -> int | None:
        """None if the group is resident now, else a slot that the caller must fill."""
        with self._changed:
            while True:
                if (held := self._resident.get(key)) is not None:
                    self._touch(key)
                    self._stats.hits += 1
                    self._stats.prefetch_hits += held.is_prefetched
                    held.is_prefetched = False
                    return None
                if self._is_closed:
                    raise GroupUnavailable(*key, "the weights are closed")
                if key not in self._loading and (slot := self._take_slot(keep=keep)) is not None:
                    self._stats.misses += 1
                    self._loading.add(key)
                    return slot
                # The other thread is filling this group's slot or the last one that could go.
                self._changed.wait()

    def prefetch(self, keys: Iterable[Key]) -> None:
        """Read these groups in the background, in this order, before what was asked for earlier.

        Takes free slots, then those that no step has used since the present one began. Groups that
        failed before are left alone. Never waits for a file.
        """
        wanted = deque(keys)
        with self._changed:
            if not wanted or self._is_closed:
                return
            for key in wanted:
                if key in self._resident:  # about to be used: keep it
                    self._touch(key)
            included = set(wanted)
            older = (hint for hint in self._hints if not included.issuperset(hint.keys))
            self._hints = deque([*older, _Hint(wanted, self._step)], maxlen=MAX_HINTS)
            if self._reader is None:
                self._reader = threading.Thread(
                    target=self._read_ahead, name="dvpa-prefetch", daemon=True
                )
                self._reader.start()
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing is read after this; what is resident stays usable."""
        with self._changed:
            self._is_closed = True
            self._hints.clear()
            self._changed.notify_all()
            while self._loading:
                self._changed.wait()
        if self._reader is not None:
            self._reader.join()

    def _touch(self, key: Key) -> None:
        self._resident.move_to_end(key)
        self._resident[key].step = self._step

    def _take_slot(self, keep: Container[Key] = (), before: int | None = None) -> int | None:
        """A free slot, else that of the least recently used group; `before`: used before a step."""
        if self._free:
            return self._free.pop()
        for key, held in self._resident.items():
            if key not in keep and (before is None or held.step < before):
                del self._resident[key]
                self._stats.evictions += 1
                return held.slot
        return None

    def _load(self, key: Key, slot: int, is_prefetched: bool = False) -> str | None:
        """Fill a slot taken for a group, without the lock; the reason where that fails."""
        started = time.perf_counter()
        num_bytes, reason = 0, "interrupted"
        try:
            num_bytes, reason = self._fill(key, slot), ""
        except ValueError as error:
            reason = str(error)
            if self._failed.get(key) != reason:  # said once, however often it is tried again
                logger.warning("%s", GroupUnavailable(*key, reason))
        finally:  # whatever happened: nobody must wait for this group forever
            with self._changed:
                self._loading.discard(key)
                self._stats.read_seconds += time.perf_counter() - started
                self._stats.bytes_read += num_bytes
                if reason:
                    self._free.append(slot)
                    self._failed[key] = reason
                    self._stats.failed_loads += 1
                else:
                    self._failed.pop(key, None)
                    self._resident[key] = _Held(slot, self._step, is_prefetched)
                    self._stats.group_loads += 1
                    self._stats.prefetch_loads += is_prefetched
                self._changed.notify_all()
        return reason or None

    def _read_ahead(self) -> None:
        """The reading thread: one group at a time, always for the newest hint."""
        while True:
            with self._changed:
                while (job := self._next_job()) is None:
                    if self._is_closed:
                        return
                    self._changed.wait()
                self._loading.add(job[0])
            self._load(*job, is_prefetched=True)

    def _next_job(self) -> tuple[Key, int] | None:
        """A group to read and a slot for it; drops hints that are done or find no room."""
        while self._hints:
            hint = self._hints[-1]
            while hint.keys:
                key = hint.keys.popleft()
                if key in self._resident or key in self._loading or key in self._failed:
                    continue
                slot = self._take_slot(before=hint.step)
                if slot is None:
                    break
                return key, slot
            self._hints.pop()
        return None
