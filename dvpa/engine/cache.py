"""The cache: what attention keeps of each position, in pages.

Of multi-head latent attention, a position's row in a layer is its normalised latent (C =
kv_lora_rank values) followed by the rotated rope key (P = qk_rope_head_dim): 576 values for
DeepSeek-V3, whatever the number of heads. Of grouped-query attention, every key-value head has a
row of its own: value, then rotated key. Rows of pages that nobody holds may contain anything, NaN
included.

Letters: L layers, G key-value heads, W = C + P, or twice a head's width.
"""

import torch

from dvpa.config import DvpaConfig
from dvpa.engine.config import EngineConfig
from dvpa.engine.pages import PageAllocator


class LatentCache:
    """Storage for `num_pages` pages of `page_size` positions.

    `layers[i]` is [pages, size, W]; of grouped-query attention [G, pages, size, W].
    """

    def __init__(
        self,
        config: DvpaConfig,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = [config.num_hidden_layers, num_pages, page_size, config.kv_width]
        if config.kv_lora_rank is None:
            groups = config.num_key_value_heads
            shape[1:] = [groups, num_pages, page_size, config.kv_width // groups]
        self.page_size = page_size
        self.storage = torch.empty(shape, dtype=dtype, device=device)
        self.layers = list(self.storage.unbind(0))

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages."""
        return self.storage.numel() * self.storage.element_size()


def bytes_per_position(config: DvpaConfig, dtype: torch.dtype) -> int:
    """Bytes that one position takes in the cache, over all layers."""
    return config.num_hidden_layers * config.kv_width * dtype.itemsize


def make_cache(
    model_config: DvpaConfig, config: EngineConfig, dtype: torch.dtype, device: torch.device
) -> tuple[PageAllocator, LatentCache]:
    """The pages that `cache_bytes` has room for, or fewer where fewer are ever needed.

    Raises:
        ValueError: there is no room for one page.
    """
    page_bytes = bytes_per_position(model_config, dtype) * config.page_size
    longest = -(-model_config.max_position_embeddings // config.page_size)
    num_pages = min(config.cache_bytes // page_bytes, config.max_num_seqs * longest)
    if num_pages < 1:
        raise ValueError(
            f"cache_bytes: {config.cache_bytes} must be at least one page, {page_bytes}"
        )
    cache = LatentCache(model_config, num_pages, config.page_size, dtype, device)
    return PageAllocator(num_pages, config.page_size), cache
