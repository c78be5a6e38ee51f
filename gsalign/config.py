"""Config: all settings of a run, read from YAML and ``key=value`` overrides, saved resolved."""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gsalign.data.config import DataConfig
from gsalign.engine.config import (
    VALIDATION,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
)
from gsalign.errors import ConfigError
from gsalign.evaluation.protocols import KNOWN_PROTOCOLS
from gsalign.files import atomic_write
from gsalign.model.config import ModelConfig

COMMAND_LINE = "the command line"
Section = TypeVar("Section", bound=BaseModel)
Kernels = Literal["auto", "reference", "cpp", "cuda", "triton"]


class Config(BaseModel):
    """All settings of a run: one section per room, and what concerns the run as a whole."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    name: str = Field(default="gsalign", description="name of the run, and of its folder")
    output: Path | None = Field(
        default=None, description="folder of the run; null: `logs/<data set>/<name>`"
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="everything random follows from it")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="`auto` takes a GPU if there is one"
    )
    kernels: Kernels = Field(
        default="auto", description="implementation of the fused operators, see `gsalign info`"
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.model.image_size != self.data.image_size:
            raise ValueError(
                f"model.image_size {list(self.model.image_size)} and data.image_size "
                f"{list(self.data.image_size)} must be equal: give one of them, and the other "
                "follows"
            )
        choices = ("last", VALIDATION, *KNOWN_PROTOCOLS)
        if self.training.select_on not in choices:
            raise ValueError(
                f"training.select_on is {self.training.select_on!r}; wanted one of "
                f"{', '.join(choices)}"
            )
        if self.training.select_on == VALIDATION and not self.data.validation_fraction:
            raise ValueError(
                "training.select_on is validation, which needs held-out identities: set "
                "data.validation_fraction, to 0.04 for instance"
            )
        return self

    @property
    def run_folder(self) -> Path:
        """Where the run writes; ``output``, or ``logs/<data set>/<name>``."""
        if self.output is not None:
            return self.output
        return Path("logs") / self.data.name / self.name


def load_config(
    path: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    given_in: str = COMMAND_LINE,
) -> Config:
    """Read a configuration file and apply overrides.

    Args:
        path: a YAML file; ``None`` starts from the defaults. What it does not name keeps its
            default.
        overrides: ``key=value`` with dotted keys, the value in YAML, as ``optimizer.lr=0.01`` or
            ``model.ltps.layers=[0,1]``; later ones win. A mapping of dotted keys has values that
            are read already.
        given_in: where the overrides stand, for messages.

    Returns:
        The resolved, validated configuration.

    Raises:
        ConfigError: the file is missing or no YAML mapping, an override has another form, a key
            is unknown or a value is of the wrong type. Each message names the key, what came and
            where it was given.
    """
    values: dict[str, Any] = {}
    where: dict[str, str] = {}
    if path is not None:
        values = read_yaml(Path(path))
        where.update((key, str(path)) for key in _keys_of(values))
    if isinstance(overrides, Mapping):
        # A later key may go into the value of an earlier one, which is the caller's.
        settings = list(copy.deepcopy(dict(overrides)).items())
    else:
        settings = [_parse_override(text) for text in overrides]
    for key, value in settings:
        _set(values, key, value)
        where[key] = given_in
        for place, character in enumerate(key):
            if character == ".":
                where.setdefault(key[:place], given_in)
        where.update((inner, given_in) for inner in _keys_of({key: value}))
    _refuse_unknown(values, Config, where)
    _share_image_size(values)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, where)) from None


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Write the resolved configuration as YAML, every key with its value, atomically."""
    text = yaml.safe_dump(
        config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=100
    )
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a configuration, as ``optimizer.lr``, in order."""
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is None:
            yield prefix + name
        else:
            yield from known_keys(inner, f"{prefix}{name}.")


def validate_section(section: type[Section], overrides: Sequence[str]) -> Section:
    """A section by itself, from its defaults and ``key=value`` overrides with its own keys.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    values: dict[str, Any] = {}
    for text in overrides:
        key, value = _parse_override(text)
        _set(values, key, value)
    where = dict.fromkeys(_keys_of(values), COMMAND_LINE)
    _refuse_unknown(values, section, where)
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, where, section)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; of an empty one an empty mapping.

    Raises:
        ConfigError: there is no such file, it cannot be read, or it holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"configuration file {path} does not exist; the project's own are in configs/"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds a {type(content).__name__}, wanted a mapping such as 'optimizer: ...'"
        )
    return content


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key):
        raise ConfigError(
            f"cannot read override {text!r}: wanted key=value, as optimizer.lr=0.01, without "
            "blanks around the equals sign"
        )
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"override {text!r}: the value is not YAML: {' '.join(str(error).split())}"
        ) from None


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        if not isinstance(inner, dict):
            inner = values[section] = {}
        values = inner
    values[last] = value


def _keys_of(values: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _keys_of(value, f"{prefix}{key}.")


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def _refuse_unknown(
    values: Mapping[Any, Any],
    section: type[BaseModel],
    where: Mapping[str, str],
    prefix: str = "",
    root: type[BaseModel] | None = None,
) -> None:
    root = root or section
    for key, value in values.items():
        full = f"{prefix}{key}"
        field = section.model_fields.get(str(key))
        if field is None:
            hint = _near(full, prefix, section, root)
            raise ConfigError(f"unknown key {full!r} in {_place(full, where)}{hint}")
        inner = _section_of(field.annotation)
        if inner is not None and isinstance(value, Mapping):
            _refuse_unknown(value, inner, where, f"{full}.", root)


def _near(full: str, prefix: str, section: type[BaseModel], root: type[BaseModel]) -> str:
    """The known keys most like ``full``: of the same section, of the same last part, or alike."""
    known = list(known_keys(root))
    last = full.rpartition(".")[2]
    near = [prefix + name for name in difflib.get_close_matches(last, section.model_fields, 3)]
    if not prefix:
        # Perhaps its section was forgotten; then it may be misspelt as well.
        for alike in difflib.get_close_matches(last, [k.rpartition(".")[2] for k in known], 3):
            near += [key for key in known if key.rpartition(".")[2] == alike]
    else:
        near += [key for key in known if key.rpartition(".")[2] == last]
    if near:
        return f"; did you mean {' or '.join(list(dict.fromkeys(near))[:3])}?"
    return f"; {prefix.rstrip('.') or 'known'} has {', '.join(section.model_fields)}"


def _place(key: str, where: Mapping[str, str]) -> str:
    """Where a key was given, or the section it is in; a key that has its default is in neither."""
    while key:
        if key in where:
            return where[key]
        key = key.rpartition(".")[0]
    return "the defaults"


def _share_image_size(values: dict[str, Any]) -> None:
    """Give ``image_size`` to the one of model and data that was not given it."""
    model, data = (
        values.setdefault(name, {}) if values.get(name, {}) is not None else None
        for name in ("model", "data")
    )
    if not isinstance(model, dict) or not isinstance(data, dict):
        return
    if "image_size" in model:
        data.setdefault("image_size", model["image_size"])
    elif "image_size" in data:
        model["image_size"] = data["image_size"]


def _explain(
    error: ValidationError, where: Mapping[str, str], section: type[BaseModel] = Config
) -> str:
    """All faults on one line: key, what came, what was wanted, where it was given."""
    faults: dict[str, list[str]] = {}
    known = [f"{key}." for key in known_keys(section)]
    for fault in error.errors():
        # Choices of a union and places in a list are no keys of ours.
        parts: list[str] = []
        for part in fault["loc"]:
            if isinstance(part, int) or not part.isidentifier():
                break
            parts.append(part)
        while parts and not any(key.startswith(".".join(parts) + ".") for key in known):
            parts.pop()
        key = ".".join(parts)
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] != "value_error":
            message = f"{message[0].lower()}{message[1:]}"
            if not isinstance(fault["input"], Mapping):
                message += f", got {fault['input']!r}"
        told = faults.setdefault(key, [])
        if message not in told:
            told.append(message)
    lines = []
    for key, messages in faults.items():
        text = " or ".join(messages)
        lines.append(f"{key}: {text} (in {_place(key, where)})" if key else text)
    return "; ".join(lines)
