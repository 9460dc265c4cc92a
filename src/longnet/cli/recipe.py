"""Options from a TOML file, and options that are dictionaries."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, get_args, get_origin

import tyro

# Options that may also be unset are values on the command line, not flags.
_THREE_VALUED = ("bf16",)


def expand(arguments: list[str]) -> list[str]:
    r"""Replace `--config FILE.toml` by the options of the file. Options that are also given by hand are left to the hand.

    A file of `longnet train` holds the names of its options, with - or _; `[model]` holds the overrides of the preset.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "small.toml"
        ...     _ = path.write_text('preset = "tiny"\nsteps = 5\n[model]\nnum_hidden_layers = 2')
        ...     expand(["train", "--config", str(path), "--steps", "9"])
        ['train', '--preset', 'tiny', '--model', 'num_hidden_layers=2', '--steps', '9']
    """
    split = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    if "--config" not in split:
        return arguments
    place = split.index("--config")
    before, after = split[:place], split[place + 2 :]
    if len(split) == place + 1:
        raise ValueError("--config: expected a TOML file after it; got nothing")
    try:
        values = tomllib.loads(Path(split[place + 1]).read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{split[place + 1]}: expected TOML; got {error}") from error
    given = {
        a.split("=", 1)[0].replace("_", "-").replace("--no-", "--")
        for a in before + after
        if a.startswith("--")
    }
    options: list[str] = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if flag not in given:
            options += _option(flag, value)
    return [*before, *options, *after]


def _option(flag: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        return [flag, *_pairs(value)]
    if isinstance(value, bool) and flag[2:] not in _THREE_VALUED:
        return [flag if value else "--no-" + flag[2:]]
    return [flag, *map(str, value)] if isinstance(value, list) else [flag, str(value)]


def _pairs(value: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(item)}" for key, item in value.items()]


registry = tyro.constructors.ConstructorRegistry()


@registry.primitive_rule
def _dictionary(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """dict[str, Any] is written KEY=VALUE KEY=VALUE; a value is JSON, or a word as it stands."""
    if get_origin(info.type) is not dict or get_args(info.type) != (str, Any):
        return None

    def parse(words: list[str]) -> dict[str, Any]:
        result = {}
        for word in words:
            key, sign, value = word.partition("=")
            if not sign:
                raise ValueError(f"expected KEY=VALUE; got {word!r}")
            try:
                result[key] = json.loads(value)
            except ValueError:
                result[key] = value
        return result

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*", metavar="KEY=VALUE", instance_from_str=parse,
        is_instance=lambda x: isinstance(x, dict), str_from_instance=_pairs,
    )  # fmt: skip
