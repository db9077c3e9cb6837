"""Fixed windows over a prepared folder's documents, in an endless seeded order.

Window i of an epoch holds tokens i L .. (i + 1) L - 1 of all documents one after the other, so
every token is an input exactly once per epoch; only the last window may be shorter. Documents do
not see each other: positions start at 0 with every document (and with the window, where it begins
inside one), which is what Transformers' `create_causal_mask` reads as packed sequences, and no
token is asked to predict the first of another document.

The order of windows is a `Permutation` keyed by (seed, epoch): it knows nothing of processes, costs
no memory, and sample number i is found without the ones before it. Reads are as random as the
order; a window is one contiguous read.

Letters: L tokens of a window.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dvpa_train.permutation import Permutation
from dvpa_train.token_shards import map_shard, read_manifest, verify_shard

IntArray = npt.NDArray[np.int64]
IGNORED = -100
OPEN_SHARDS = 128  # kept mapped at once: two file descriptors each


@dataclass(frozen=True, eq=False)
class PackedRow:
    """A window: `input_ids`, `labels` (next token, -100 where a document ends) and `position_ids`
    (within the document), int64 [L] each.
    """

    input_ids: IntArray
    labels: IntArray
    position_ids: IntArray

    def __len__(self) -> int:
        return len(self.input_ids)


class PackedDataset:
    """A prepared folder as rows of `sequence_length` tokens.

    Args:
        verify: also compare every shard with its hash (reads everything).

    Raises:
        FileNotFoundError: not a prepared folder, or a shard is missing.
        ValueError: a shard is damaged, or `sequence_length` is below 1.
    """

    def __init__(
        self, folder: str | Path, sequence_length: int, seed: int = 0, verify: bool = False
    ) -> None:
        if sequence_length < 1:
            raise ValueError(f"sequence_length: {sequence_length} must be 1 or more")
        self.folder, self.sequence_length, self.seed = Path(folder), sequence_length, seed
        self.manifest = read_manifest(self.folder)
        if verify:
            for shard in self.manifest.shards:
                verify_shard(self.folder, self.manifest, shard)
        ends = np.cumsum([shard.num_tokens for shard in self.manifest.shards])
        self._starts = np.concatenate(([0], ends))
        self._shard = lru_cache(OPEN_SHARDS)(self._map)
        self._order = lru_cache(4)(lambda epoch: Permutation(len(self), (self.seed, epoch)))

    def __len__(self) -> int:
        """Windows of an epoch."""
        return -(-self.manifest.num_tokens // self.sequence_length)

    def order(self, start: int, stop: int) -> IntArray:
        """Windows of samples start .. stop - 1 of the endless order: int64 [stop - start]."""
        return self.windows_of(np.arange(start, stop))

    def windows_of(self, samples: npt.ArrayLike) -> IntArray:
        """Window numbers of samples [N] of the endless order: int64 [N]."""
        epochs, within = np.divmod(np.asarray(samples, dtype=np.int64), len(self))
        windows = np.empty_like(within)
        for epoch in np.unique(epochs):
            windows[epochs == epoch] = self._order(int(epoch))(within[epochs == epoch])
        return windows

    def sample(self, number: int) -> PackedRow:
        """Sample `number` of the endless order."""
        return self.window(int(self.windows_of([number])[0]))

    def window(self, number: int) -> PackedRow:
        """Window `number`, in reading order.

        Raises:
            IndexError: there is no such window.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"window {number} must be in 0 .. {len(self) - 1}")
        start = number * self.sequence_length
        stop = min(start + self.sequence_length, self.manifest.num_tokens)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        pieces = []
        while start < stop:
            end = min(stop, int(self._starts[first + 1]))
            pieces.append(self._piece(first, start, end))
            start, first = end, first + 1
        ids, labels, positions = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        return PackedRow(ids, labels, positions)

    def _piece(self, index: int, start: int, stop: int) -> tuple[IntArray, IntArray, IntArray]:
        """(ids, labels, positions) of tokens start .. stop - 1 of all, which lie in one shard."""
        tokens, offsets = self._shard(index)
        start, stop = start - int(self._starts[index]), stop - int(self._starts[index])
        read = np.asarray(tokens[start : stop + 1], dtype=np.int64)  # one more, for the last label
        ids = read[: stop - start]
        # A document that ends with this piece ends at `stop`, which is then an offset too.
        low, high = np.searchsorted(offsets, (start, stop), side="right")
        borders = np.asarray(offsets[low:high], dtype=np.int64) - start  # in 1 .. len(ids)
        labels = np.full_like(ids, IGNORED)
        labels[: len(read) - 1] = read[1:]
        labels[borders - 1] = IGNORED
        begins = np.concatenate(([0], borders[borders < len(ids)]))
        lengths = np.diff(np.append(begins, len(ids)))
        positions = np.arange(len(ids)) - np.repeat(begins, lengths)
        return ids, labels, positions

    def _map(self, index: int) -> tuple[npt.NDArray[Any], IntArray]:
        return map_shard(self.folder, self.manifest, self.manifest.shards[index])
