"""How far a run of a study is, and whether it is still the run that the study means."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

import torch

from gsalign import __version__
from gsalign.config import load_config, save_config
from gsalign.errors import ConfigError, DataError
from gsalign.files import atomic_write
from gsalign.provenance import commit_here, device_name
from gsalign.study.plan import StudyRun

_ORIGIN = "origin.json"
# Where a run lies says nothing about its results, and training counts the identities itself.
_IGNORED = ("name", "output", "model.num_identities")


class RunState(Enum):
    """How far a run is."""

    NEW = "not begun"
    BEGUN = "begun, nothing saved"
    HALFWAY = "half finished"
    FINISHED = "finished"


def state_of(run: StudyRun) -> RunState:
    """How far a run is, as its folder tells."""
    folder = run.folder
    # Training writes it last.
    if folder.final.is_file():
        return RunState.FINISHED
    if folder.state.is_file():
        return RunState.HALFWAY
    return RunState.BEGUN if folder.is_used() else RunState.NEW


def begin(run: StudyRun) -> None:
    """Write down what a run is made of, before it is made: configuration, data, code, machine."""
    save_config(run.config, run.folder.config)
    device = run.config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    origin = {
        "data": run.data,
        "gsalign": __version__,
        "torch": torch.__version__,
        "commit": commit_here(),
        "machine": device_name(torch.device(device)),
    }
    with atomic_write(run.folder.root / _ORIGIN) as temporary:
        temporary.write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def origin_of(run: StudyRun) -> dict[str, str]:
    """What :func:`begin` wrote beside the configuration; missing values are empty.

    Raises:
        DataError: the file is missing or damaged.
    """
    path = run.folder.root / _ORIGIN
    try:
        origin = json.loads(path.read_text(encoding="utf-8"))
        return {key: str(value or "") for key, value in origin.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} cannot be read ({error}): the run was not made by a study; remove its folder, "
            "or give the study another --out"
        ) from None


def refuse_changed(runs: Iterable[StudyRun]) -> None:
    """Make sure that runs that exist were made with the settings the study has now.

    Raises:
        ConfigError: some were not; the message names the first keys that differ.
    """
    faults = []
    for run in runs:
        if state_of(run) is RunState.NEW:
            continue
        if changed := list(_changes(run)):
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            faults.append(f"{run.folder.root}: {', '.join(changed[:3])}{more}")
    if faults:
        more = f"; and {len(faults) - 3} more runs" if len(faults) > 3 else ""
        raise ConfigError(
            f"runs of other settings than the study's are in the way: {'; '.join(faults[:3])}"
            f"{more}. Remove those folders, give the study another --out, or take the change back"
        )


def _changes(run: StudyRun) -> Iterator[str]:
    """What a run was made with, where the study has something else."""
    if origin_of(run).get("data", "") != (run.data or ""):
        yield f"data is another set than that in {run.config.data.root} (the fingerprints differ)"
    then = dict(_flat(load_config(run.folder.config).model_dump(mode="json")))
    now = dict(_flat(run.config.model_dump(mode="json")))
    for key in dict.fromkeys((*then, *now)):
        if key not in _IGNORED and then.get(key) != now.get(key):
            yield f"{key} was {then.get(key)}, is {now.get(key)}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
