"""``gsalign eval``: the table of results of a checkpoint, with what it has to beat."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsalign.cli.options import add_config_options, read_config

if TYPE_CHECKING:
    from gsalign.config import Config


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "eval",
        help="evaluate a checkpoint",
        description="Prints Rank-1, Rank-5, Rank-10, mAP, mINP and metric by protocol, with the "
        "number of valid queries. A<->G exists in two forms that give different numbers; both are "
        "printed, by name. For a network with parts on a generated set with label maps "
        "(write_parts) also how its part masks agree with the true parts; on any generated set how "
        "its angles agree with the true roll of the cameras.",
    )
    add_config_options(parser)
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="weights (default: model_best of the configuration's run); a .pth is read as one of "
        "the published code",
    )
    parser.add_argument(
        "--baselines", action="store_true", help="add chance and a colour histogram"
    )
    parser.add_argument("--protocols", nargs="+", metavar="NAME", help="only these")
    parser.add_argument(
        "--flip-test",
        choices=("off", "mean", "published"),
        default="off",
        help="also embed the mirror image; `published` repeats a fault of the published code",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate."""
    from gsalign.engine.folder import RunFolder
    from gsalign.engine.kernels import chosen_kernels

    # The option takes all that follows it, overrides too.
    names = [text for text in arguments.protocols or () if "=" not in text]
    taken = [text for text in arguments.protocols or () if "=" in text]
    arguments.overrides = [*arguments.overrides, *taken]
    given = arguments.checkpoint
    fallback = Path(given).parent / "config.yaml" if given else None
    config = read_config(arguments, fallback=fallback)
    checkpoint = Path(given) if given else RunFolder(config.run_folder).best
    with chosen_kernels(config.kernels):
        return evaluate_checkpoint(
            config,
            checkpoint,
            compare=arguments.config_file is not None
            or (fallback is not None and fallback.is_file()),
            baselines=arguments.baselines,
            protocols=tuple(names),
            flip_test=arguments.flip_test,
            json_file=arguments.json,
        )


def evaluate_checkpoint(
    config: Config,
    checkpoint: Path,
    *,
    compare: bool = True,
    baselines: bool = False,
    protocols: tuple[str, ...] = (),
    flip_test: Any = "off",
    json_file: str | None = None,
) -> int:
    """Evaluate weights on the configuration's data set and print the table.

    Args:
        config: data, device and precision; the network is the checkpoint's.
        checkpoint: the weights.
        compare: make sure that the configuration describes the same network.
        baselines: add rows of chance and of a colour histogram.
        protocols: names; all if empty.
        flip_test: see ``gsalign.evaluation.features.embed_batch``.
        json_file: where to write the results too.
    """
    from gsalign.cli.console import log_to, make_console, progress
    from gsalign.data import check_images, load_dataset
    from gsalign.engine.distributed import build_accelerator
    from gsalign.engine.loading import load_network
    from gsalign.engine.testing import evaluate_network, measure_parts, measure_rolls
    from gsalign.evaluation import PROTOCOLS, get_protocol
    from gsalign.evaluation.baselines import chance_level, histogram_features
    from gsalign.evaluation.features import evaluate_features
    from gsalign.evaluation.report import results_dict, results_table
    from gsalign.files import atomic_write

    names = tuple(get_protocol(name).name for name in protocols) or tuple(PROTOCOLS)
    console = make_console()
    log_to(console)
    network = load_network(checkpoint, config.model, compare=compare)
    data = config.data.model_copy(update={"image_size": network.config.image_size})
    dataset = load_dataset(data)
    accelerator = build_accelerator(device=config.device, precision=config.training.precision)
    network.to(accelerator.device)
    with progress(console, "embedding", "images") as report:
        results: dict[str, Any] = dict(
            evaluate_network(
                network,
                dataset.query,
                dataset.gallery,
                data,
                accelerator,
                protocols=names,
                flip_test=flip_test,
                report=report,
            )
        )
        agreement = measure_parts(
            network, (dataset.query, dataset.gallery), dataset.root, data, accelerator
        )
        rolls = measure_rolls(
            network, (dataset.query, dataset.gallery), dataset.root, data, accelerator
        )
    title = f"{checkpoint} on {dataset.root}"
    console.print(results_table(results, dataset=dataset.name, title=title))
    tables = {"network": results_dict(results)}
    if agreement is not None:
        console.print(agreement.as_table())
    if rolls is not None:
        console.print(rolls.as_table())
    if baselines:
        # The same images as the network's.
        query, gallery = (
            check_images(split).split if data.on_broken == "skip" else split
            for split in (dataset.query, dataset.gallery)
        )
        histograms = (histogram_features(query), histogram_features(gallery))
        other: dict[str, dict[str, Any]] = {
            "colour histogram": dict(evaluate_features(*histograms, protocols=names)),
            "chance": {name: chance_level(query, gallery, name) for name in names},
        }
        for baseline, rows in other.items():
            console.print(results_table(rows, dataset=dataset.name, title=baseline))
            tables[baseline] = results_dict(rows)
    if json_file is not None and accelerator.is_main_process:
        document: dict[str, Any] = {
            "checkpoint": str(checkpoint),
            "data": str(dataset.root),
            "results": tables,
        }
        if agreement is not None:
            document["parts"] = agreement.as_dict()
        if rolls is not None:
            document["rolls"] = rolls.as_dict()
        with atomic_write(json_file) as temporary:
            temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0
