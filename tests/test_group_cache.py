"""Which groups stay: against a model of least recently used, and what reading ahead may do."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvpa.engine.group_cache import MAX_HINTS, GroupCache, GroupUnavailable, Key


class Disk:
    """Fills slots as told: it remembers what it read, fails on some keys and can be held up."""

    def __init__(self) -> None:
        self.reads: list[Key] = []
        self.slots: dict[int, Key] = {}
        self.bad: set[Key] = set()
        self.gate = threading.Event()
        self.gate.set()

    def fill(self, key: Key, slot: int) -> int:
        assert self.gate.wait(20)
        if key in self.bad:
            raise ValueError(f"file {key[1]}: bad sector")
        self.reads.append(key)
        self.slots[slot] = key
        return 100


@pytest.fixture
def disk() -> Iterator[Disk]:
    disk = Disk()
    yield disk
    disk.gate.set()


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline, "nothing happened for 20 seconds"
        time.sleep(0.001)


key_sets = st.sets(st.tuples(st.just(1), st.integers(0, 7)), min_size=1, max_size=3)


@given(st.lists(key_sets, max_size=30), st.integers(3, 6))
def test_the_least_recently_used_goes_first(calls: list[set[Key]], num_slots: int) -> None:
    disk, expected, reads = Disk(), list[Key](), list[Key]()
    cache = GroupCache(range(5, 5 + num_slots), disk.fill)
    for keys in calls:
        cache.bring_in(keys)
        for key in sorted(keys, key=lambda key: (key not in expected, key)):
            if key in expected:
                expected.remove(key)
            else:
                reads.append(key)
                if len(expected) == num_slots:
                    expected.pop(next(i for i, old in enumerate(expected) if old not in keys))
            expected.append(key)
        assert cache.resident() == expected
        assert keys <= {disk.slots[slot] for slot in range(5, 5 + num_slots) if slot in disk.slots}
    stats = cache.stats
    assert disk.reads == reads and stats.misses == stats.group_loads == len(reads)
    assert stats.hits == sum(map(len, calls)) - len(reads)
    assert stats.evictions == len(reads) - len(expected)
    assert stats.bytes_read == 100 * len(reads)


def test_the_newest_hint_goes_first(disk: Disk) -> None:
    cache = GroupCache(range(20), disk.fill)
    disk.gate.clear()
    cache.prefetch([(1, 0), (1, 1)])
    wait_until(lambda: cache.num_used == 1)  # held up in its first read
    cache.prefetch([(2, 0)])
    cache.prefetch([(3, 0), (3, 1)])
    assert cache.stats.group_loads == 0  # nobody had to wait for the disk
    disk.gate.set()
    wait_until(lambda: cache.stats.group_loads == 5)
    assert disk.reads == [(1, 0), (3, 0), (3, 1), (2, 0), (1, 1)]
    cache.close()


def test_hints_are_bounded_and_a_wider_one_replaces_a_narrower_one(disk: Disk) -> None:
    cache = GroupCache(range(50), disk.fill)
    disk.gate.clear()
    cache.prefetch([(0, 0)])
    wait_until(lambda: cache.num_used == 1)
    for layer in range(1, MAX_HINTS + 4):
        cache.prefetch([(layer, 0)])
    cache.prefetch([(MAX_HINTS + 3, 1), (MAX_HINTS + 3, 0)])  # includes the last one
    disk.gate.set()
    wait_until(lambda: cache.stats.group_loads == MAX_HINTS + 2)
    cache.close()
    last = MAX_HINTS + 3
    kept = [(last, 1), (last, 0), *((layer, 0) for layer in range(last - 1, last - MAX_HINTS, -1))]
    assert disk.reads == [(0, 0), *kept]


def test_reading_ahead_never_takes_what_the_step_uses(disk: Disk) -> None:
    cache = GroupCache(range(3), disk.fill)
    cache.bring_in({(1, 0), (1, 1)})
    cache.next_step()
    cache.bring_in({(1, 0)})
    cache.prefetch([(2, 0), (2, 1), (2, 2)])  # one free slot, one that only the last step used
    wait_until(lambda: cache.stats.prefetch_loads == 2)
    cache.prefetch([(3, 0)])  # no room: everything is in use or just predicted
    wait_until(lambda: not cache._hints and cache.num_used == len(cache.resident()))
    cache.close()
    assert cache.resident() == [(1, 0), (2, 0), (2, 1)]


def test_a_step_waits_for_what_is_being_read_ahead_instead_of_reading_it_again(disk: Disk) -> None:
    cache = GroupCache(range(1), disk.fill)
    disk.gate.clear()
    cache.prefetch([(1, 0)])
    wait_until(lambda: cache.num_used == 1)
    step = threading.Thread(target=lambda: [cache.bring_in({(1, g)}) for g in (0, 1)])
    step.start()
    time.sleep(0.02)
    disk.gate.set()
    step.join(20)
    assert disk.reads == [(1, 0), (1, 1)]
    stats = cache.stats
    assert (stats.hits, stats.prefetch_hits, stats.misses, stats.evictions) == (1, 1, 1, 1)
    cache.close()


def test_a_failure_is_reported_counted_and_tried_again(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    cache = GroupCache(range(2), disk.fill)
    disk.bad = {(1, 7)}
    for _ in range(2):
        with pytest.raises(GroupUnavailable, match=r"layer 1, expert group 7: file 7: bad sector"):
            cache.bring_in({(1, 0), (1, 7)})
    assert len(caplog.records) == 1
    assert cache.stats.failed_groups == (((1, 7), "file 7: bad sector"),)
    assert cache.stats.failed_loads == 2 and cache.num_used == 1
    cache.prefetch([(1, 7), (1, 2)])
    wait_until(lambda: cache.stats.group_loads == 2)
    assert cache.stats.failed_loads == 2
    disk.bad = set()
    cache.bring_in({(1, 7), (1, 0)})
    assert cache.stats.failed_groups == ()
    cache.close()
    with pytest.raises(GroupUnavailable, match="the weights are closed"):
        cache.bring_in({(1, 5)})


def test_closing_waits_for_a_read_in_flight(disk: Disk) -> None:
    cache = GroupCache(range(4), disk.fill)
    disk.gate.clear()
    cache.prefetch([(1, group) for group in range(4)])
    wait_until(lambda: cache.num_used == 1)
    closing = threading.Thread(target=cache.close)
    closing.start()
    time.sleep(0.02)
    assert closing.is_alive()
    disk.gate.set()
    closing.join(20)
    assert not closing.is_alive() and disk.reads == [(1, 0)]
