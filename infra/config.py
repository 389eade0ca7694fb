"""Configuration: frozen pydantic models read from safe YAML, and the digest of the part that changes results."""

import difflib
import hashlib
import json
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from infra.errors import ConfigError

C = TypeVar("C", bound=BaseModel)


def _as_form(schema: dict[str, Any]) -> None:
    """Number and name the fields: Prefect's form sorts by `position` (Postgres keeps no order of keys), shows `title`."""
    words = re.findall(r"[A-Z][a-z0-9]*", schema.get("title", "").removesuffix("Config"))
    if words:
        schema["title"] = " ".join(words).capitalize()
    for position, (name, field) in enumerate(schema.get("properties", {}).items()):
        title = name.replace("_", " ").capitalize()
        field |= {"position": position, "title": f"{title} (leave as it is)" if "const" in field else title}


class Config(BaseModel):
    """Base of every configuration class: immutable, no unknown keys, no NaN or infinity; a form in Prefect's UI."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, json_schema_extra=_as_form
    )


def versioned(config: BaseModel) -> dict[str, Any]:
    """The JSON-able part of `config` that changes results, at any depth: every field not marked `versioned=False`.

    A field marked `versioned="if set"` counts only where it differs from its default, so that a field added later leaves
    the keys of what was made before it alone.
    """
    result: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        extra = field.json_schema_extra
        mark = extra.get("versioned") if isinstance(extra, dict) else None
        if mark is False or (
            mark == "if set" and getattr(config, name) == field.get_default(call_default_factory=True)
        ):
            continue
        result[name] = _plain(getattr(config, name))
    return result


def _plain(value: Any) -> Any:
    match value:
        case BaseModel():
            return versioned(value)
        case Enum():
            return _plain(value.value)
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case set() | frozenset():
            return sorted((_plain(item) for item in value), key=canonical_json)
        case PurePath():
            return value.as_posix()
        case _:
            return value


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, floats by repr, NaN refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML mapping from `path` and apply overrides such as `pretrain.0.steps=5` (the value is YAML too).

    `extends: other.yaml` names a file beside it to start from: mappings are merged key by key, all else is replaced.
    """
    data = _extended(Path(path), ())
    for override in overrides:
        _apply(data, override)
    return data


def _extended(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in children:
        raise ConfigError(f"{path} extends itself ({' -> '.join(p.name for p in children)}); take one `extends` out")
    data = _mapping(path)
    base = data.pop("extends", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends is {base!r}; give the name of a YAML file beside it")
    return _merged(_extended(path.parent / base, (*children, path.resolve())), data)


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(base[key], own[key]) for key in base.keys() & own.keys()
            if isinstance(base[key], dict) and isinstance(own[key], dict)}  # fmt: skip
    return {**base, **own, **both}


def _mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"configuration file {path} does not exist{_near_files(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error}; give a UTF-8 YAML file") from error
    data = _yaml(text, str(path))
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}, not a mapping; write `key: value` lines")
    return data


def _yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error


def _near_files(path: Path) -> str:
    folder = path.parent
    names = sorted(item.name for item in folder.glob("*.y*ml")) if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1)
    if near:
        return f"; did you mean {folder / near[0]}?"
    return f"; {folder} has {', '.join(names)}" if names else "; give the path of a YAML file"


def _apply(data: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r} is not of the form key.key=value")
    put(data, dotted.strip(), _yaml(text, f"override {override!r}"), f"override {override!r}")


def put(data: dict[str, Any], dotted: str, value: Any, source: str) -> None:
    """Set the value at a dotted path such as `pretrain.0.steps`; mappings that are missing or null on the way are made.

    Raises `ConfigError`, which names `source`, for an empty step, a step into a value, or an index that a list does not have.
    """
    *parents, last = steps = dotted.split(".")
    if not all(steps):
        raise ConfigError(f"{source} is not of the form key.key=value")
    here: Any = data
    for position, step in enumerate(parents):
        if isinstance(here, dict) and here.get(step) is None:
            here[step] = {}
        here = here[_key(here, step, steps[:position], source)]
    here[_key(here, last, parents, source)] = value


def _key(here: Any, step: str, above: Sequence[str], source: str) -> str | int:
    where = ".".join(above) or "the top level"
    if isinstance(here, list):
        return _index(here, step, where, source)
    if not isinstance(here, dict):
        raise ConfigError(f"{source}: {where} is the value {here!r}, it has no {step!r} inside")
    return step


def _index(here: list[Any], step: str, where: str, source: str) -> int:
    if not step.isdigit() or int(step) >= len(here):
        limit = f"an index from 0 to {len(here) - 1}" if here else "no entry (the list is empty)"
        raise ConfigError(f"{source}: {where} is a list, {step!r} must be {limit}")
    return int(step)


def parse(model: type[C], data: Mapping[str, Any], source: str) -> C:
    """Build `model` from `data`; every mistake is named by its dotted path, unknown keys with a suggestion."""
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        problems = [_problem(model, item) for item in error.errors(include_url=False)]
    lines = "\n".join(f"  {problem}" for problem in problems)
    count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
    raise ConfigError(f"{source}: {count}\n{lines}")


def _problem(model: type[BaseModel], item: Any) -> str:
    location: tuple[str | int, ...] = item["loc"]
    dotted = ".".join(str(part) for part in location) or "the whole configuration"
    if item["type"] == "extra_forbidden":
        known = sorted(_fields_at(model, location[:-1]))
        near = difflib.get_close_matches(str(location[-1]), known, 1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known) or 'none'}"
        return f"{dotted}: unknown key; {hint}"
    message = item["msg"][0].lower() + item["msg"][1:]
    if item["type"] == "missing":
        return f"{dotted}: is required and not given"
    given = repr(item["input"])
    shown = given if len(given) <= 80 else given[:77] + "..."
    return f"{dotted} = {shown}: {message}"


def _fields_at(model: type[BaseModel], location: Sequence[str | int]) -> set[str]:
    """Field names of the model(s) reached by a pydantic error location (list indices and union tags are passed over)."""
    here: set[type[BaseModel]] = {model}
    for part in location:
        entered = [
            cls.model_fields[part].annotation for cls in here if isinstance(part, str) and part in cls.model_fields
        ]
        if entered:
            here = {found for annotation in entered for found in _models_in(annotation)}
        else:
            here = {cls for cls in here if part == cls.__name__} or here
    return {name for cls in here for name in cls.model_fields}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
