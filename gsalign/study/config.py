"""The study file: data sets, variants, seeds, and what is reported."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from gsalign.config import read_yaml
from gsalign.data.synthetic import SyntheticConfig
from gsalign.errors import ConfigError
from gsalign.evaluation.protocols import get_protocol

# What a study decides itself, run by run.
DECIDED = ("name", "output", "seed", "data.root")

Metric = Literal["Rank-1", "Rank-5", "Rank-10", "mAP", "mINP", "metric"]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


def _file_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", text):
        raise ValueError("wanted a name of letters, digits, '_', '-' and '.'")
    return text


def _left_to_the_study(overrides: dict[str, Any]) -> dict[str, Any]:
    for key in overrides:
        if key in DECIDED:
            raise ValueError(f"{key} is decided by the study; leave it out")
    return overrides


FileName = Annotated[str, AfterValidator(_file_name)]
Overrides = Annotated[dict[str, Any], AfterValidator(_left_to_the_study)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StudyData(_Section):
    """A data set.

    Attributes:
        root: its folder, or its table; relative to where the command is given, as ``data.root``.
        generate: render it with these settings when it is missing, and make sure that it has them
            when it is there; None: it is somebody else's.
    """

    root: Path
    generate: SyntheticConfig | None = None


class Variant(_Section):
    """A configuration to compare.

    Attributes:
        about: what it is, for the report.
        overrides: dotted keys and their values, on top of the study's.
        data: name of its data set; None: the study's first.
    """

    about: str = ""
    overrides: Overrides = Field(default_factory=dict)
    data: str | None = None


class StudyConfig(_Section):
    """A study.

    Attributes:
        name: of the study, and of its folder.
        about: what it is to tell, for the report.
        config: the configuration file that all variants begin with; relative to the study file.
        overrides: dotted keys and their values, for all variants.
        data: data sets by name.
        variants: by name, in the order in which they are run and reported.
        baseline: the variant that the others are compared with; None: the first.
        seeds: of the runs; the same seed gives every variant the same batches.
        metrics: what is reported; pictures show mAP, or the first if it is not among them.
        protocols: that are reported; empty: all the data set has.
    """

    name: FileName
    about: str = ""
    config: Path
    overrides: Overrides = Field(default_factory=dict)
    data: dict[FileName, StudyData] = Field(min_length=1)
    variants: dict[FileName, Variant] = Field(min_length=1)
    baseline: str | None = None
    seeds: tuple[Seed, ...] = Field(default=(0, 1, 2), min_length=1)
    metrics: tuple[Metric, ...] = Field(default=("Rank-1", "mAP", "mINP"), min_length=1)
    protocols: tuple[str, ...] = ()

    @field_validator("seeds", "metrics", "protocols")
    @classmethod
    def _no_repetition(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(value)) < len(value):
            raise ValueError("wanted each only once")
        return value

    @model_validator(mode="after")
    def _names_exist(self) -> StudyConfig:
        for name, variant in self.variants.items():
            if variant.data is not None and variant.data not in self.data:
                there = ", ".join(self.data)
                raise ValueError(f"variants.{name}.data is {variant.data!r}; there are {there}")
        if self.baseline is not None and self.baseline not in self.variants:
            there = ", ".join(self.variants)
            raise ValueError(f"baseline is {self.baseline!r}; the variants are {there}")
        return self

    @property
    def baseline_name(self) -> str:
        """The variant that the others are compared with."""
        return self.baseline or next(iter(self.variants))

    @property
    def main_metric(self) -> str:
        """The figure that pictures and progress tell."""
        return "mAP" if "mAP" in self.metrics else self.metrics[0]

    def data_name(self, variant: str) -> str:
        """Name of the data set of a variant."""
        return self.variants[variant].data or next(iter(self.data))


def read_study(path: str | os.PathLike[str]) -> StudyConfig:
    """Read a study file.

    Args:
        path: YAML with the fields of :class:`StudyConfig`.

    Returns:
        The study, ``config`` made relative to the working folder.

    Raises:
        ConfigError: the file is missing or no YAML mapping, a key is unknown or missing, or a value
            is wrong; the message names the key, what came and what was wanted.
    """
    path = Path(path)
    try:
        study = StudyConfig.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError(f"study file {path}: {_explain(error)}") from None
    for name in study.protocols:
        get_protocol(name)
    return study.model_copy(update={"config": path.parent / study.config})


def _explain(error: ValidationError) -> str:
    """All faults on one line, each with its dotted key."""
    faults = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"] if part != "[key]")
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            faults.append(f"unknown key {key!r}")
        elif fault["type"] == "missing":
            faults.append(f"{key!r} is missing")
        elif not key:
            faults.append(message)
        else:
            message = f"{message[0].lower()}{message[1:]}"
            faults.append(f"{key}: {message}, got {fault['input']!r}")
    return "; ".join(faults)
