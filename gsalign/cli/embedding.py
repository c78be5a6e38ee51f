"""What the commands that embed images share: their options, and the embedder these make."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from gsalign.cli.options import add_config_options, read_config

if TYPE_CHECKING:
    from gsalign.config import Config
    from gsalign.model import GSAlign
    from gsalign.search import Embedder


def add_checkpoint_option(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add ``--checkpoint`` and the options of a configuration."""
    parser.add_argument(
        "--checkpoint",
        required=required,
        metavar="FILE",
        help="weights that training wrote; a .pth is read as one of the published code, with "
        "image size, heads and eta from the configuration",
    )
    add_config_options(parser)


def add_embedding_options(parser: argparse.ArgumentParser) -> None:
    """Add batch size, workers, precision and flip test."""
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument(
        "--workers", type=int, default=2, metavar="N",
        help="processes that decode images; 0: none of their own (default: 2)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=("no", "fp16", "bf16"), default="no",
        help="of the computation (default: no, which is float32)",
    )  # fmt: skip
    parser.add_argument(
        "--flip-test", choices=("off", "mean"), default="off",
        help="also embed the mirror image and take the mean",
    )  # fmt: skip


def config_beside(arguments: argparse.Namespace) -> Config:
    """The configuration of the options, by default the one beside the checkpoint."""
    return read_config(arguments, fallback=Path(arguments.checkpoint).parent / "config.yaml")


def load_checkpoint(arguments: argparse.Namespace, config: Config) -> GSAlign:
    """The network of ``--checkpoint``."""
    from gsalign.engine.loading import load_network

    return load_network(Path(arguments.checkpoint), config.model, compare=False)


def make_embedder(arguments: argparse.Namespace, config: Config) -> Embedder:
    """The embedder of the options of :func:`add_embedding_options`."""
    from gsalign.engine.distributed import build_accelerator
    from gsalign.search import Embedder

    place = build_accelerator(device=config.device, precision=arguments.precision)
    return Embedder(
        load_checkpoint(arguments, config),
        device=place.device,
        precision=arguments.precision,
        flip_test=arguments.flip_test,
        batch_size=arguments.batch_size,
        checkpoint=os.path.abspath(arguments.checkpoint),
    )
