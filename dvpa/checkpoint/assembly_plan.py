"""What an assembly will do to every tensor, decided from the headers alone; no PyTorch.

Every tensor of every parent is accounted for: the parents hold the same names with the same dtypes
and shapes, and every name falls under a rule. FP8 weights are taken together with their scales.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvpa.checkpoint.headers import INDEX_FILE, ShardHeaders, TensorInfo
from dvpa.checkpoint.interpolate import FORMATS
from dvpa.checkpoint.recipe import Recipe, Rule
from dvpa.checkpoint.tensor_class import Place, place_of

SCALE_SUFFIX = "_scale_inv"
BLOCK = 128
FP8 = "F8_E4M3"
CHUNK_BYTES = 1 << 20  # what is read and combined at a time
WORD = 8
_IGNORED_FIELDS = ("_name_or_path", "transformers_version", "auto_map")


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor, or an FP8 weight and its scale, to be taken or combined under a rule."""

    name: str
    scale: str | None
    place: Place
    rule: int
    info: TensorInfo
    num_bytes: int  # of the result, the scale's included


@dataclass(frozen=True)
class Plan:
    """Every step, in the order of the base's files; `units` are those decided together, by index.

    `config_differences` maps fields of config.json to each parent's value where they differ.
    """

    recipe: Recipe
    parents: tuple[ShardHeaders, ...]
    steps: tuple[Step, ...]
    units: tuple[tuple[int, ...], ...]
    config: Mapping[str, Any]
    config_differences: Mapping[str, Mapping[str, Any]]
    warnings: tuple[str, ...]

    @property
    def base(self) -> ShardHeaders:
        """The parent whose names and layout the result has."""
        return self.parents[self.recipe.base_index]

    @property
    def num_bytes(self) -> int:
        """Bytes of tensor data in the result."""
        return sum(step.num_bytes for step in self.steps)

    def rule(self, step: Step) -> Rule:
        """The rule of a step."""
        return self.recipe.rules[step.rule]

    def identity(self) -> str:
        """A hash of everything the result depends on; files by size and time of change."""
        states = [
            [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
            for parent in self.parents
            for path in [*parent.files, parent.folder / "config.json"]
        ]
        text = json.dumps([self.recipe.to_dict(), states], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def plan_assembly(recipe: Recipe) -> Plan:
    """Read the parents' headers, check them against each other, find each tensor's rule.

    Raises:
        FileNotFoundError: a parent's folder, config or shard is missing.
        ValueError: parents that do not fit together, a damaged shard, a tensor that cannot be
            combined as its rule wants; the message names the tensor.
    """
    names = list(recipe.parents)
    configs = {name: _read_config(folder) for name, folder in recipe.parents.items()}
    base_config = configs[recipe.base]
    differences = _compare_configs(configs)
    parents = tuple(_read_parent(folder) for folder in recipe.parents.values())
    base = parents[recipe.base_index]
    for parent in parents:
        _check_same(base, parent)
    steps = tuple(_steps(recipe, base, base_config))
    for step in steps:
        _check_step(step, recipe.rules[step.rule], base.folder)
    used = {step.rule for step in steps}
    warnings = [
        f"rules[{i}] ({rule.describe()}) matches no tensor"
        for i, rule in enumerate(recipe.rules)
        if i not in used
    ]
    warnings += [
        f"config.json: {key} differs ("
        + ", ".join(f"{name}: {json.dumps(values[name])}" for name in names)
        + f"); {recipe.base}'s is kept"
        for key, values in differences.items()
    ]
    units = _units(steps, recipe, parents)
    return Plan(recipe, parents, steps, units, base_config, differences, tuple(warnings))


def _read_parent(folder: Path) -> ShardHeaders:
    headers = ShardHeaders(folder)
    for name in headers.unindexed:
        file = headers.locate(name)[0].name
        raise ValueError(f"{folder / INDEX_FILE}: {name}: in {file}, but not in the index")
    if not headers.tensors:
        raise ValueError(f"{folder}: holds no tensors")
    return headers


def _check_same(base: ShardHeaders, parent: ShardHeaders) -> None:
    for name, info in base.tensors.items():
        other = parent.tensors.get(name)
        if other is None:
            raise ValueError(f"{parent.folder}: {name}: missing, {base.folder} has it")
        if other != info:
            raise ValueError(
                f"{parent.folder}: {name}: {other.dtype} {list(other.shape)}, "
                f"{base.folder} has {info.dtype} {list(info.shape)}"
            )
    for name in parent.tensors:
        if name not in base.tensors:
            raise ValueError(f"{parent.folder}: {name}: unaccounted for, not in {base.folder}")


def _steps(recipe: Recipe, base: ShardHeaders, config: Mapping[str, Any]) -> list[Step]:
    num_layers = _num_layers(config, base.folder)
    steps, scales = [], set()
    for name, info in base.tensors.items():
        if name.endswith(SCALE_SUFFIX):
            continue
        scale = name + SCALE_SUFFIX
        scale_info = base.tensors.get(scale)
        num_bytes = info.num_bytes
        if scale_info is not None:
            scales.add(scale)
            num_bytes += scale_info.num_bytes
            _check_scale(base.folder, name, info, scale_info)
        place = place_of(name, num_layers)
        rule = recipe.rule_of(name, place)
        steps.append(Step(name, scale if scale_info else None, place, rule, info, num_bytes))
    for name in base.tensors:
        if name.endswith(SCALE_SUFFIX) and name not in scales:
            raise ValueError(f"{base.folder}: {name}: a scale without its weight")
    blocks = (config.get("quantization_config") or {}).get("weight_block_size")
    if scales and blocks not in (None, [BLOCK, BLOCK]):
        raise ValueError(
            f"{base.folder / 'config.json'}: quantization_config.weight_block_size: {blocks} must "
            f"be [{BLOCK}, {BLOCK}]"
        )
    return steps


def _check_scale(folder: Path, name: str, info: TensorInfo, scale: TensorInfo) -> None:
    wanted = tuple(-(-size // BLOCK) for size in info.shape)
    if info.dtype != FP8 or len(info.shape) != 2 or scale != TensorInfo("F32", wanted):
        raise ValueError(
            f"{folder}: {name}{SCALE_SUFFIX}: {scale.dtype} {list(scale.shape)} does not belong to "
            f"{info.dtype} {list(info.shape)} in blocks of {BLOCK} x {BLOCK}"
        )


def _check_step(step: Step, rule: Rule, folder: Path) -> None:
    """Some tensors can be copied but neither combined nor compared."""
    is_mixed = sum(share > 0 for share in rule.shares) > 1
    if is_mixed and not can_combine(step):
        why = "has no scales" if step.info.dtype == FP8 else f"is {step.info.dtype}"
        raise ValueError(
            f"{folder}: {step.name}: {why}, which cannot be interpolated; give it a rule that "
            "takes it from one parent"
        )


def can_combine(step: Step) -> bool:
    """Whether values can be computed with: floats, and FP8 with scales."""
    return step.info.dtype in FORMATS or step.scale is not None


def _units(
    steps: tuple[Step, ...], recipe: Recipe, parents: tuple[ShardHeaders, ...]
) -> tuple[tuple[int, ...], ...]:
    """Steps one by one, but an expert's together where a threshold is about the expert, and small
    tensors together that will be combined alike and lie one after the other everywhere.
    """
    units: dict[Any, list[int]] = {}
    previous: Any = None
    for i, step in enumerate(steps):
        rule = recipe.rules[step.rule]
        key: Any = i
        if rule.expert_delta > 0 and step.place.expert is not None:
            key = (step.place.layer, step.place.expert, step.rule)
        elif previous in units:
            unit = [steps[k] for k in units[previous]]
            if _goes_on(unit, step, rule, parents):
                key = previous
        units.setdefault(key, []).append(i)
        previous = key
    return tuple(tuple(unit) for unit in units.values())


def _goes_on(unit: list[Step], step: Step, rule: Rule, parents: tuple[ShardHeaders, ...]) -> bool:
    """Whether a step can be combined in one chunk with those before it."""
    first, last = unit[0], unit[-1]
    is_alike = (step.rule, step.info.dtype, step.scale) == (first.rule, first.info.dtype, None)
    is_mixed = sum(share > 0 for share in rule.shares) > 1
    has_limit = rule.delta > 0 or rule.expert_delta > 0
    if not is_alike or first.scale is not None or not is_mixed or has_limit:
        return False
    sizes = [each.info.num_bytes for each in unit]
    if sum(sizes) + step.info.num_bytes > CHUNK_BYTES or any(size % WORD for size in sizes):
        return False
    for parent in parents:
        (file, offset), (before, start) = parent.locate(step.name), parent.locate(last.name)
        if file != before or offset != start + last.info.num_bytes:
            return False
    return True


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must hold a mapping")
    return data


def _num_layers(config: Mapping[str, Any], folder: Path) -> int:
    inner = config.get("text_config", config)
    layers = inner.get("num_hidden_layers") if isinstance(inner, dict) else None
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
        raise ValueError(
            f"{folder / 'config.json'}: num_hidden_layers: {layers!r} must be positive"
        )
    return layers


def _compare_configs(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    keys = dict.fromkeys(key for config in configs.values() for key in config)
    differences = {}
    for key in keys:
        values = {name: config.get(key) for name, config in configs.items()}
        given = list(values.values())
        if key not in _IGNORED_FIELDS and any(value != given[0] for value in given):
            differences[key] = values
    if "model_type" in differences:
        raise ValueError(
            "config.json: model_type: parents differ: "
            + ", ".join(f"{name}: {value}" for name, value in differences["model_type"].items())
        )
    return differences
