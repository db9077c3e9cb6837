"""Pages of the latent cache: who holds which, and which prefixes they contain. No tensors.

A page is free, held by requests (counted), or kept: nobody holds it, but its content is known by a
key and may be taken again. Kept pages are given up in the order they were last held, oldest first.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence


class PageAllocator:
    """Hands out `num_pages` pages of `page_size` positions each.

    `on_allocate` is called with each page handed out, whose content then counts as lost.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        for name, value in (("num_pages", num_pages), ("page_size", page_size)):
            if value < 1:
                raise ValueError(f"{name}: {value} must be 1 or more")
        self.num_pages = num_pages
        self.page_size = page_size
        self.on_allocate: Callable[[int], None] = lambda page: None
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out."""
        return len(self._free) + len(self._kept)

    @property
    def num_held(self) -> int:
        """Pages held by requests."""
        return self.num_pages - self.num_available

    def pages_for(self, num_positions: int) -> int:
        """Pages that many positions need."""
        return -(-num_positions // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages with unspecified content; there must be as many available."""
        assert count <= self.num_available, "the scheduler asks only for what is there"
        pages = []
        for _ in range(count):
            if not self._free:
                self.forget(next(iter(self._kept)))
            page = self._free.pop()
            self.on_allocate(page)
            self._holders[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Iterable[int]) -> None:
        """Give up one hold on each page. Later pages go first when room is needed."""
        for page in reversed(list(pages)):
            assert self._holders[page] > 0, "released more often than held"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def register(self, page: int, key: bytes) -> None:
        """Say what a held page contains from now on; the first page of a key stays its page."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def forget(self, page: int) -> None:
        """The page's content is not to be taken again."""
        key = self._key_of.pop(page, None)
        if key is None:
            return
        del self._page_of[key]
        if page in self._kept:
            del self._kept[page]
            self._free.append(page)

    def match(
        self, keys: Sequence[bytes], usable: Callable[[int], bool] = lambda page: True
    ) -> list[int]:
        """Pages of the longest known prefix, without holding them."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None or not usable(page):
                break
            pages.append(page)
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """Hold known pages, together with whoever holds them already."""
        for page in pages:
            if self._holders[page] == 0:
                del self._kept[page]
            self._holders[page] += 1
