"""Starting from a network of ours that was trained on other people."""

from __future__ import annotations

import os

from gsalign.errors import CheckpointError
from gsalign.model.checkpoint import read_weights_config
from gsalign.model.network import GSAlign
from gsalign.model.pretrained_report import PretrainedReport
from gsalign.model.weights import name_some, read_state_dict

# Their classes are people; necks learn with them.
_OF_IDENTITIES = ("identity_head.", "parts.heads.")
# What a network may have or not; the rest it must have.
_OPTIONAL = ("dam.", "parts.", "uprighting.")


def transfer_weights(model: GSAlign, path: str | os.PathLike[str]) -> PretrainedReport:
    """Start from a file of :func:`save_weights`; all or nothing.

    Everything is taken but the identity heads, those of the parts too: their classes are the people
    of the data set. So part masks learnt where label maps are can be used where none are. DAM,
    parts and the predictor of the roll start fresh where the file has none, and are left out where
    the network has none.

    Args:
        model: the network; keeps its device, type and mode.
        path: the file.

    Returns:
        What became of every tensor.

    Raises:
        CheckpointError: the file is missing, damaged or not one of ours, lacks a tensor, or has one
            of another shape than the network's.
    """
    read_weights_config(path)
    state, ours = read_state_dict(path), model.state_dict()
    found = {
        name: tensor
        for name, tensor in state.items()
        if name in ours and not name.startswith(_OF_IDENTITIES)
    }
    has = {section: any(name.startswith(section) for name in found) for section in _OPTIONAL}
    missing = [
        name
        for name in ours
        if name not in found
        and not name.startswith(_OF_IDENTITIES)
        and not any(name.startswith(section) and not has[section] for section in _OPTIONAL)
    ]
    unknown = [name for name in state if name not in ours and not name.startswith(_OPTIONAL)]
    problems = [f"nothing for {name_some(missing)}"] if missing else []
    problems += [f"no place for {name_some(unknown)}"] if unknown else []
    problems += [
        f"{name} is {list(tensor.shape)}, the network has {list(ours[name].shape)}"
        for name, tensor in found.items()
        if tensor.shape != ours[name].shape
    ]
    if problems:
        raise CheckpointError(
            f"pretrained {os.fspath(path)} holds another network than the configuration "
            f"describes: {name_some(problems)}"
        )
    model.load_state_dict({**ours, **found})
    return PretrainedReport(
        source=os.fspath(path),
        loaded=tuple(sorted(found)),
        resized="",
        left_out=tuple(name for name in state if name not in found),
        untouched=tuple(name for name, _ in model.named_parameters() if name not in found),
    )
