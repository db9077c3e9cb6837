"""What an assembly will do to every tensor, decided from the headers alone; no PyTorch.

Every tensor of every parent is accounted for: the parents hold the same names with the same dtypes
and shapes, and every name falls under a rule. FP8 weights are taken together with their scales.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dvpa.checkpoint.folders import identity_of
from dvpa.checkpoint.headers import TensorInfo
from dvpa.checkpoint.recipe import Recipe, Rule
from dvpa.checkpoint.scratch_database import ScratchDatabase
from dvpa.checkpoint.step_table import SCALE_SUFFIX, Step, StepTable
from dvpa.checkpoint.stored_headers import StoredHeaders
from dvpa.checkpoint.tensor_class import place_of

BLOCK = 128
FP8 = "F8_E4M3"
CHUNK_BYTES = 1 << 20  # what is read and combined at a time
WORD = 8
_IGNORED_FIELDS = ("_name_or_path", "transformers_version", "auto_map")


@dataclass(frozen=True)
class Plan:
    """Every step, in the order of the base's files. One run at a time.

    `config_differences` maps fields of config.json to each parent's value where they differ.
    """

    recipe: Recipe
    parents: tuple[StoredHeaders, ...]
    steps: StepTable
    config: Mapping[str, Any]
    config_differences: Mapping[str, Mapping[str, Any]]
    warnings: tuple[str, ...]

    @property
    def base(self) -> StoredHeaders:
        """The parent whose names and layout the result has."""
        return self.parents[self.recipe.base_index]

    def rule(self, step: Step) -> Rule:
        """The rule of a step."""
        return self.recipe.rules[step.rule]

    def identity(self) -> str:
        """A hash of everything the result depends on; files by size and time of change."""
        files = [
            path
            for parent in self.parents
            for path in [*parent.files, parent.folder / "config.json"]
        ]
        return identity_of(files, self.recipe.to_dict())


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
    database = ScratchDatabase()
    parents = tuple(StoredHeaders(folder, database) for folder in recipe.parents.values())
    base = parents[recipe.base_index]
    for parent in parents:
        base.check_same(parent)
    steps, used = _plan_steps(recipe, parents, base_config, database)
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
    return Plan(recipe, parents, steps, base_config, differences, tuple(warnings))


def _plan_steps(
    recipe: Recipe,
    parents: tuple[StoredHeaders, ...],
    config: Mapping[str, Any],
    database: ScratchDatabase,
) -> tuple[StepTable, set[int]]:
    """The steps, and the rules that take any.

    A unit is one step, but an expert's steps where a threshold is about the expert, and small
    tensors that will be combined alike and lie one after the other everywhere.
    """
    base = parents[recipe.base_index]
    num_layers = _num_layers(config, base.folder)
    steps, used = StepTable(database), set()
    open_unit: _Unit | None = None  # the one that the next step may join
    for step in _steps(recipe, base, num_layers):
        rule = recipe.rules[step.rule]
        used.add(step.rule)
        _check_step(step, rule, base.folder)
        unit: int | None = None
        if rule.expert_delta > 0 and step.expert is not None:
            unit, open_unit = steps.unit_of(step), None
        elif open_unit is not None and _goes_on(open_unit, step, rule, parents):
            unit = open_unit.first.number
            open_unit = _Unit(open_unit.first, step, open_unit.size + step.info.num_bytes)
        else:
            open_unit = _Unit(step, step, step.info.num_bytes)
        steps.add(step, step.number if unit is None else unit)
    blocks = (config.get("quantization_config") or {}).get("weight_block_size")
    if steps.num_scales and blocks not in (None, [BLOCK, BLOCK]):
        raise ValueError(
            f"{base.folder / 'config.json'}: quantization_config.weight_block_size: {blocks} must "
            f"be [{BLOCK}, {BLOCK}]"
        )
    return steps, used


def _steps(recipe: Recipe, base: StoredHeaders, num_layers: int) -> Iterator[Step]:
    for number, (name, info, scale_info) in enumerate(base.items_with(SCALE_SUFFIX)):
        num_bytes = info.num_bytes
        if scale_info is not None:
            num_bytes += scale_info.num_bytes
            _check_scale(base.folder, name, info, scale_info)
        place = place_of(name, num_layers)
        scale = None if scale_info is None else name + SCALE_SUFFIX
        expert = None if place.expert is None else f"{place.layer}/{place.expert}"
        rule = recipe.rule_of(name, place)
        yield Step(number, name, scale, place.tensor_class, expert, rule, info, num_bytes)
    if (lone := base.lone(SCALE_SUFFIX)) is not None:
        raise ValueError(f"{base.folder}: {lone}: a scale without its weight")


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
    if is_mixed and not step.can_combine:
        why = "has no scales" if step.info.dtype == FP8 else f"is {step.info.dtype}"
        raise ValueError(
            f"{folder}: {step.name}: {why}, which cannot be interpolated; give it a rule that "
            "takes it from one parent"
        )


class _Unit(NamedTuple):
    """Steps that are combined in one chunk: the ends, and the bytes of all of them."""

    first: Step
    last: Step
    size: int


def _goes_on(unit: _Unit, step: Step, rule: Rule, parents: tuple[StoredHeaders, ...]) -> bool:
    """Whether a step can be combined in one chunk with those before it."""
    first, last, size = unit
    is_alike = (step.rule, step.info.dtype, step.scale) == (first.rule, first.info.dtype, None)
    is_mixed = sum(share > 0 for share in rule.shares) > 1
    has_limit = rule.delta > 0 or rule.expert_delta > 0
    if not is_alike or first.scale is not None or not is_mixed or has_limit:
        return False
    if size + step.info.num_bytes > CHUNK_BYTES or size % WORD:
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
