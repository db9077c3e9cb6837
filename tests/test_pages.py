"""The page allocator against a plain model of it: who holds which page, and which go first."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dvpa.engine.pages import PageAllocator

NUM_PAGES = 7


class Allocator(RuleBasedStateMachine):
    """Random requests take, share, name and give up pages."""

    def __init__(self) -> None:
        super().__init__()
        self.handed_out: list[int] = []
        self.pages = PageAllocator(NUM_PAGES, page_size=4)
        self.pages.on_allocate = self.handed_out.append
        self.requests: list[list[int]] = []  # the pages each one holds
        self.kept: list[int] = []  # known and not held, the first to go first
        self.key_of: dict[int, bytes] = {}

    @property
    def held(self) -> Counter[int]:
        return Counter(page for pages in self.requests for page in pages)

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        held = self.held
        count = data.draw(st.integers(0, NUM_PAGES - len(held)))
        num_free = NUM_PAGES - len(held) - len(self.kept)
        lost = self.kept[: max(count - num_free, 0)]
        self.handed_out.clear()
        pages = self.pages.allocate(count)
        assert len(set(pages)) == count and not set(pages) & set(held)
        assert self.handed_out == pages
        assert set(lost) == set(pages) & set(self.kept), "only the longest unused are given up"
        del self.kept[: len(lost)]
        for page in lost:
            del self.key_of[page]
        self.requests.append(pages)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pages = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
        self.pages.release(pages)
        held = self.held
        for page in reversed(pages):  # the end of a prefix is worth less than its beginning
            if page not in held and page in self.key_of:
                self.kept.append(page)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), key=st.sampled_from([b"a", b"b", b"c", b"d", b"e"]))
    def register(self, data: st.DataObject, key: bytes) -> None:
        page = data.draw(st.sampled_from(sorted(self.held)))
        self.pages.register(page, key)
        if page not in self.key_of and key not in self.key_of.values():
            self.key_of[page] = key

    @precondition(lambda self: self.key_of)
    @rule(data=st.data())
    def take_known(self, data: st.DataObject) -> None:
        wanted = data.draw(st.permutations([b"a", b"b", b"c", b"d", b"e"]))
        unusable = data.draw(st.sampled_from([None, *self.key_of]))
        pages = self.pages.match(wanted, lambda page: page != unusable)
        page_of = {key: page for page, key in self.key_of.items() if page != unusable}
        expected = []
        for key in wanted:
            if key not in page_of:
                break
            expected.append(page_of[key])
        assert pages == expected
        self.pages.hold(pages)
        self.kept = [page for page in self.kept if page not in pages]
        self.requests.append(pages)

    @precondition(lambda self: self.key_of)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.key_of)))
        self.pages.forget(page)
        self.pages.forget(page)  # of no consequence
        del self.key_of[page]
        self.kept = [kept for kept in self.kept if kept != page]

    @invariant()
    def counts(self) -> None:
        assert self.pages.num_held == len(self.held)
        assert self.pages.num_available == NUM_PAGES - len(self.held)

    def teardown(self) -> None:
        for pages in self.requests:
            self.pages.release(pages)
        assert self.pages.num_held == 0
        assert sorted(self.pages.allocate(NUM_PAGES)) == list(range(NUM_PAGES))


TestAllocator = Allocator.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=40)


def test_pages_for_positions() -> None:
    pages = PageAllocator(3, page_size=4)
    assert [pages.pages_for(n) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("field", ["num_pages", "page_size"])
def test_sizes_must_be_positive(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}: 0 must be 1 or more"):
        PageAllocator(**{"num_pages": 1, "page_size": 1, field: 0})


def test_a_page_is_not_released_more_often_than_held() -> None:
    pages = PageAllocator(2, 4)
    [page] = pages.allocate(1)
    pages.release([page])
    with pytest.raises(AssertionError):
        pages.release([page])
