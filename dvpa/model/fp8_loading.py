"""FP8 checkpoints for `from_pretrained`: weights that become numbers again as they are read.

Transformers has a quantiser for this format. It is not used: on a GPU it would put layers of its
own in the place of ours, elsewhere it reads matrices wrongly whose sides are no multiple of a
block (V3's `kv_a_proj_with_mqa` has 576 rows). Here Transformers sees an ordinary checkpoint whose
tensors are lazy, as safetensors' own slices are.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers.integrations import is_deepspeed_zero3_enabled

from dvpa.fp8 import SCALE_SUFFIX, dequantise, fp8_problem

logger = logging.getLogger(__name__)


class Fp8Slice:
    """Codes and scales in their files, which to Transformers look like a lazy fp32 tensor.

    `read` gets the name at every use.
    """

    def __init__(self, name: str, codes: Any, scale_inv: Any, read: list[str]) -> None:
        self._name, self._codes, self._scale_inv, self._read = name, codes, scale_inv, read

    def __getitem__(self, index: Any) -> Tensor:
        """The weight, or a part of it; exact, so that what it is cast to is rounded once."""
        weight = dequantise(self._codes[...], self._scale_inv[...])
        self._read.append(self._name)
        return weight[index]

    def get_shape(self) -> list[int]:
        """As of safetensors' slices."""
        shape: list[int] = self._codes.get_shape()
        return shape

    def get_dtype(self) -> str:
        """As of safetensors' slices."""
        return "F32"


@contextmanager
def fp8_weights(
    model: Any,
    state_dict: dict[str, Any] | None,
    files: Sequence[str] | None,
    load_config: Any,
) -> Iterator[dict[str, Any] | None]:
    """The tensors of a checkpoint for Transformers to load into `model`, FP8 ones as `Fp8Slice`.

    `state_dict` itself where nothing in the files is FP8: Transformers then reads them. At the end
    it is said how many weights were dequantised. The model's config no longer says that its
    weights are FP8.

    Args:
        model: on `meta`, with a `DvpaConfig`.
        state_dict: tensors that somebody has read before; then `files` do not matter.
        files: safetensors, all of the checkpoint.
        load_config: what Transformers was asked for.

    Raises:
        ValueError: FP8 that cannot be read (naming the tensor), or that nobody would dequantise.
        SafetensorError: a shard is corrupt.
    """
    has_blocks, model.config.has_fp8_weights = model.config.has_fp8_weights, False
    if state_dict is not None or not files:
        for name, tensor in (state_dict or {}).items():
            if isinstance(tensor, Tensor) and "float8" in str(tensor.dtype):
                raise ValueError(f"state_dict: {name}: {tensor.dtype}; load its folder instead")
        yield state_dict
        return
    read: list[str] = []  # by several threads
    folder = Path(files[0]).parent
    with ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for path in files if files[0].endswith(".safetensors") else ():
            file = stack.enter_context(safe_open(path, framework="pt"))
            tensors.update({name: file.get_slice(name) for name in file.keys()})  # noqa: SIM118
        try:
            num_weights = _put_together(tensors, has_blocks, read)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        if not num_weights:
            yield None
            return
        if load_config.hf_quantizer is not None:
            raise ValueError(
                "quantization_config: a checkpoint in FP8 is dequantised when it is loaded; leave "
                "it out, or quantise a bf16 copy (dvpa convert --dtype bfloat16)"
            )
        if "disk" in (load_config.device_map or {}).values():
            raise ValueError(
                "device_map: 'disk' reads weights later and would take FP8 codes for them; use "
                "dvpa.Engine(max_resident_bytes=..), or a bf16 copy (dvpa convert --dtype bfloat16)"
            )
        if is_deepspeed_zero3_enabled():  # its loader takes nothing lazy
            tensors = {name: part[...] for name, part in tensors.items()}
        yield tensors
        logger.warning(
            "%s: %d weights dequantised from FP8 to %s",
            folder,
            len(set(read)),
            str(model.dtype).removeprefix("torch."),
        )


def _put_together(tensors: dict[str, Any], has_blocks: bool, read: list[str]) -> int:
    """Put an `Fp8Slice` in the place of codes and of their scales; how many there are."""
    kinds = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in tensors.items()}
    coded = [name for name, (dtype, _) in kinds.items() if dtype.startswith("F8")]
    for name in coded:
        problem = fp8_problem(name, kinds[name], kinds.get(name + SCALE_SUFFIX), has_blocks)
        if problem is not None:
            raise ValueError(problem)
    for name in coded:
        tensors[name] = Fp8Slice(name, tensors[name], tensors.pop(name + SCALE_SUFFIX), read)
    return len(coded)
