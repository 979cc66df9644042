"""Which files of a dataset's repository are a split, as the library `datasets` would find them without running code.

In this order: `files` of the source; the `configs` in the front matter of the README; the branch that the hub itself
writes (refs/convert/parquet: a folder a configuration, in it a folder a split); the usual names, by the patterns of
`datasets.data_files`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from finetune_trainer.config import HuggingFaceDataset
from finetune_trainer.runtime.errors import InvalidConfig, InvalidDataset, NotFound
from finetune_trainer.runtime.wording import what_is_there
from finetune_trainer.sources.choose import DATA_SUFFIXES, is_data

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from finetune_trainer.config import ModelScopeDataset

CARD = "README.md"
PARQUET_BRANCH = "refs/convert/parquet"
DEFAULT_CONFIG, DEFAULT_SPLIT = "default", "train"

Splits = dict[str, list[str]]
"""Names of the files of each split."""


def split_names(
    source: HuggingFaceDataset | ModelScopeDataset, names: Collection[str], card: bytes, where: str, field: str
) -> list[str]:
    """The files that the source means. InvalidConfig (config, split), NotFound (files), InvalidDataset."""
    field += ".huggingFace" if isinstance(source, HuggingFaceDataset) else ".modelScope"
    if source.files is not None:
        return _given(source.files, names, where, field)
    _refuse_a_script_alone(source.repo, names, where, field)
    splits = _splits_of_config(source, names, card, where, field)
    wanted = source.split or DEFAULT_SPLIT
    if wanted not in splits:
        msg = f"{where} has no split '{wanted}' (has {', '.join(sorted(splits)) or 'none'}). "
        raise InvalidConfig(msg + f"Set {field}.split to one of them, or {field}.files.")
    if not (found := sorted(name for name in splits[wanted] if is_data(name))):
        msg = f"{where}: split '{wanted}' has no {', '.join(DATA_SUFFIXES)} file ({what_is_there(splits[wanted])}). "
        raise InvalidDataset(msg + f"Set {field}.revision: {PARQUET_BRANCH}, or {field}.files.")
    return found


def _given(patterns: Sequence[str], names: Collection[str], where: str, field: str) -> list[str]:
    found: set[str] = set()
    for pattern in patterns:
        if not (matched := set(_matching(pattern, names))):
            msg = f"{where} has no file '{pattern}' ({what_is_there(names)}). Correct {field}.files."
            raise NotFound(msg)
        found |= matched
    return sorted(found)


def _refuse_a_script_alone(repo: str, names: Collection[str], where: str, field: str) -> None:
    script = f"{repo.rpartition('/')[2]}.py"
    if script in names and not any(is_data(name) for name in _visible(names)):
        msg = f"{where} has only a loading script ({script}), which is not run. "
        raise InvalidDataset(msg + f"Set {field}.revision: {PARQUET_BRANCH}, the hub's own copy as parquet.")


def _splits_of_config(
    source: HuggingFaceDataset | ModelScopeDataset, names: Collection[str], card: bytes, where: str, field: str
) -> Splits:
    if source.revision == PARQUET_BRANCH:
        configs = _configs_of_parquet_branch(names)
    else:
        configs = _configs_of_card(card, names, where)
    if not configs:
        return (
            _usual_splits(names) if source.config is None else _usual_splits_below(source.config, names, where, field)
        )
    config = source.config or _default_config(configs)
    if config is None:
        msg = f"{where} has several configurations ({', '.join(sorted(configs))}). Set {field}.config to one of them."
        raise InvalidConfig(msg)
    if config not in configs:
        msg = f"{where} has no configuration '{config}' (has {', '.join(sorted(configs))}). Correct {field}.config."
        raise InvalidConfig(msg)
    return configs[config]


def _default_config(configs: Collection[str]) -> str | None:
    """The only configuration, or the one of that name."""
    if len(configs) == 1:
        return next(iter(configs))
    return DEFAULT_CONFIG if DEFAULT_CONFIG in configs else None


def _configs_of_parquet_branch(names: Collection[str]) -> dict[str, Splits]:
    configs: dict[str, Splits] = {}
    for name in names:
        config, _, rest = name.partition("/")
        split, _, file = rest.partition("/")
        if file and is_data(name):
            configs.setdefault(config, {}).setdefault(split, []).append(name)
    return configs


def _configs_of_card(card: bytes, names: Collection[str], where: str) -> dict[str, Splits]:
    """The configurations that the README's front matter describes; one marked as default goes by that name too."""
    configs: dict[str, Splits] = {}
    for entry in _entries_of_card(card, where):
        name, folder = str(entry.get("config_name", DEFAULT_CONFIG)), str(entry.get("data_dir") or "").strip("/")
        inside = [each for each in names if each.startswith(f"{folder}/")] if folder else names
        configs[name] = _splits_of_entry(entry, folder, inside, where)
        if entry.get("default") is True:
            configs.setdefault(DEFAULT_CONFIG, configs[name])
    return configs


def _splits_of_entry(entry: dict[str, Any], folder: str, inside: Collection[str], where: str) -> Splits:
    from datasets.data_files import sanitize_patterns  # noqa: PLC0415 - slow

    if "data_files" not in entry:
        return _usual_splits(inside)
    try:
        splits = sanitize_patterns(entry["data_files"])
    except (ValueError, TypeError, KeyError) as error:
        msg = f"{where}: a configuration in its {CARD} cannot be read ({error}). Set files instead."
        raise InvalidDataset(msg) from error
    return {
        split: sorted({file for pattern in each for file in _matching(f"{folder}/{pattern}".lstrip("/"), inside)})
        for split, each in splits.items()
    }


def _entries_of_card(card: bytes, where: str) -> Iterator[dict[str, Any]]:
    import yaml  # noqa: PLC0415 - comes with huggingface_hub

    front = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---", card.decode(errors="replace").lstrip("\ufeff"), re.DOTALL)
    if front is None:
        return
    try:
        metadata = yaml.safe_load(front[1])
    except yaml.YAMLError as error:
        msg = f"{where}: the front matter of its {CARD} is not YAML ({str(error).splitlines()[0]}). Set files instead."
        raise InvalidDataset(msg) from error
    entries = metadata.get("configs") if isinstance(metadata, dict) else None
    yield from (entry for entry in entries or [] if isinstance(entry, dict))


def _usual_splits_below(config: str, names: Collection[str], where: str, field: str) -> Splits:
    """Without metadata, a configuration can only be a folder."""
    inside = [name for name in names if name.startswith(f"{config}/")]
    if not inside:
        msg = f"{where} describes no configurations and has no folder '{config}' ({what_is_there(names)}). "
        raise InvalidConfig(msg + f"Drop {field}.config, or set {field}.files.")
    return _usual_splits(inside)


def _usual_splits(names: Collection[str]) -> Splits:
    """The splits that the names themselves tell, in the order in which `datasets` believes them."""
    from datasets.data_files import ALL_DEFAULT_PATTERNS  # noqa: PLC0415 - slow

    data = [name for name in names if is_data(name)]
    if sharded := _sharded_splits(data):
        return sharded
    for patterns in ALL_DEFAULT_PATTERNS:
        found_splits = {
            str(split): sorted({name for pattern in each for name in _matching(pattern, data)})
            for split, each in patterns.items()
        }
        if any(found_splits.values()):
            return {split: files for split, files in found_splits.items() if files}
    return {}


def _sharded_splits(data: Collection[str]) -> Splits:
    """data/<split>-00000-of-00002...: the names that the hub gives when a dataset is pushed."""
    splits: Splits = {}
    for name in sorted(data):
        if found := re.fullmatch(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*", name):
            splits.setdefault(found[1], []).append(name)
    return splits


def _matching(pattern: str, names: Collection[str]) -> list[str]:
    """The names that a glob pattern means: `**` any folders, `*` within one; hidden files only if it names them."""
    from fsspec.utils import glob_translate  # noqa: PLC0415 - comes with datasets

    matches = re.compile(glob_translate(pattern)).fullmatch
    hidden = any(part.startswith((".", "__")) for part in pattern.split("/"))
    return sorted(name for name in (names if hidden else _visible(names)) if matches(name))


def _visible(names: Collection[str]) -> list[str]:
    from datasets.data_files import FILES_TO_IGNORE  # noqa: PLC0415 - slow

    return [
        name
        for name in names
        if not any(part.startswith((".", "__")) for part in name.split("/"))
        and name.rpartition("/")[2] not in FILES_TO_IGNORE
    ]
