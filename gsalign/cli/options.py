"""Options that several commands have, and the configuration they make."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gsalign.config import Config

KERNELS = ("auto", "reference", "cpp", "cuda", "triton")


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--config-file``, ``--data-root``, ``--kernels``, ``--device`` and the overrides."""
    parser.add_argument("--config-file", metavar="YAML", help="settings; see configs/")
    parser.add_argument("--data-root", metavar="DIR", help="the same as data.root=DIR")
    parser.add_argument(
        "--kernels",
        choices=KERNELS,
        help="implementation of the fused operators (default: the configuration's)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="the same as device=...")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that replace those of the file, as optimizer.lr=0.01",
    )


def add_speed_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--compile`` and ``--precision``."""
    parser.add_argument("--compile", action="store_true", help="the same as training.compile=true")
    parser.add_argument(
        "--precision",
        choices=("no", "fp16", "bf16"),
        help="the same as training.precision=...",
    )


def split_overrides(arguments: argparse.Namespace, taken: Sequence[str]) -> list[str]:
    """Give the overrides among the values that another argument took to the overrides.

    Args:
        arguments: parsed options of :func:`add_config_options`.
        taken: values, such as paths; what exists as a file is no override, whatever its name.

    Returns:
        The values that are none.
    """
    overrides = [text for text in taken if "=" in text and not Path(text).exists()]
    arguments.overrides = [*arguments.overrides, *overrides]
    return [text for text in taken if text not in overrides]


def read_config(arguments: argparse.Namespace, *, fallback: Path | None = None) -> Config:
    """The configuration that the options make.

    Args:
        arguments: parsed options of :func:`add_config_options`, perhaps with ``output`` and those
            of :func:`add_speed_options`.
        fallback: the file to read when ``--config-file`` is not given, if it exists.

    Raises:
        ConfigError: see ``gsalign.config.load_config``.
    """
    from gsalign.config import load_config

    path = arguments.config_file
    if path is None and fallback is not None and fallback.is_file():
        path = fallback
    overrides = list(arguments.overrides)
    for key, value in (
        ("data.root", arguments.data_root),
        ("kernels", arguments.kernels),
        ("device", arguments.device),
        ("output", getattr(arguments, "output", None)),
        ("training.precision", getattr(arguments, "precision", None)),
    ):
        if value is not None:
            # Quoted, so that YAML takes any path for a text.
            overrides.append(f"{key}='{str(value).replace(chr(39), chr(39) * 2)}'")
    if getattr(arguments, "compile", False):
        overrides.append("training.compile=true")
    return load_config(path, overrides)
