"""``gsalign train``: train a network as a configuration says."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gsalign.cli.options import add_config_options, add_speed_options, read_config
from gsalign.errors import ConfigError


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "train",
        help="train a network",
        description="Trains and evaluates; writes configuration, log, metrics, TensorBoard events "
        "and weights to logs/<data set>/<name>. Ctrl-C stops it between two iterations, and "
        "--resume goes on exactly there.",
    )
    add_config_options(parser)
    parser.add_argument("--output", metavar="DIR", help="folder of the run")
    there = parser.add_mutually_exclusive_group()
    there.add_argument("--resume", action="store_true", help="go on where the run was stopped")
    there.add_argument("--overwrite", action="store_true", help="replace a run in the folder")
    add_speed_options(parser)
    parser.add_argument(
        "--num-gpus",
        type=int,
        metavar="N",
        help="GPUs of this machine to share the work; 0: train on the CPU",
    )
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate the run's best weights, do not train"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, on one process or on several."""
    if arguments.num_gpus is not None and arguments.num_gpus < 0:
        raise ConfigError(f"--num-gpus is {arguments.num_gpus}; wanted 0 (the CPU) or a number")
    if arguments.num_gpus == 0:
        arguments.device = "cpu"
    fallback = Path(arguments.output) / "config.yaml" if arguments.output else None
    config = read_config(arguments, fallback=fallback)

    from gsalign.engine.kernels import chosen_kernels

    with chosen_kernels(config.kernels):
        if arguments.eval_only:
            from gsalign.cli.evaluation import evaluate_checkpoint
            from gsalign.engine.folder import RunFolder

            return evaluate_checkpoint(config, RunFolder(config.run_folder).best)
        if arguments.num_gpus is not None and arguments.num_gpus > 1:
            from gsalign.engine.launch import is_launched, launch, require_gpus

            require_gpus(arguments.num_gpus)
            if not is_launched():
                return launch(sys.argv[1:], processes=arguments.num_gpus)
        return _train(arguments, config)


def _train(arguments: argparse.Namespace, config: Any) -> int:
    from gsalign.cli.console import log_to, make_console
    from gsalign.data import dataset_statistics, load_dataset, statistics_table
    from gsalign.engine.build import build_trainer
    from gsalign.engine.display import Display, TerminalDisplay
    from gsalign.engine.folder import RunFolder

    console = make_console()
    log_to(console)
    if not (arguments.resume or arguments.overwrite):
        RunFolder(config.run_folder).require_unused()
    dataset = load_dataset(config.data)
    console.print(statistics_table(dataset_statistics(dataset), title=str(dataset.root)))
    display = TerminalDisplay(console) if console.is_terminal else Display()
    trainer = build_trainer(
        config,
        dataset,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        display=display,
    )
    trainer.train()
    return 0
