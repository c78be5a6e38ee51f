"""``gsalign eval``: the table of results of a checkpoint, with what it has to beat."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsalign.cli.options import (
    add_config_options,
    add_speed_options,
    read_config,
    split_overrides,
)

if TYPE_CHECKING:
    from rich.console import Console

    from gsalign.config import Config
    from gsalign.data import ReIDDataset
    from gsalign.evaluation import Comparison, EvaluationResult, Features, Search


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "eval",
        help="evaluate a checkpoint",
        description="Prints Rank-1, Rank-5, Rank-10, mAP, mINP and metric by protocol, with the "
        "number of valid queries. A<->G exists in two forms that give different numbers; both are "
        "printed, by name. For a network with parts on a generated set with label maps "
        "(write_parts) also how its part masks agree with the true parts; on any generated set how "
        "its angles agree with the true roll of the cameras. For a network that cuts the person "
        "out, on a set with label maps, how much of the person it keeps and of the background it "
        "leaves.",
    )
    add_config_options(parser)
    add_speed_options(parser)
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="weights (default: model_best of the configuration's run); a .pth is read as one of "
        "the published code",
    )
    parser.add_argument(
        "--baselines", action="store_true", help="add chance and a colour histogram"
    )
    parser.add_argument(
        "--protocols", nargs="+", metavar="NAME", help="only these (default: the data set's)"
    )
    parser.add_argument(
        "--flip-test",
        choices=("off", "mean", "published"),
        default="off",
        help="also embed the mirror image; `published` repeats a fault of the published code",
    )
    search = parser.add_argument_group("search")
    search.add_argument(
        "--metric",
        choices=("cosine", "euclidean"),
        default="cosine",
        help="of the embeddings (default: cosine)",
    )
    search.add_argument(
        "--query-expansion", action="store_true", help="average every embedding with its nearest"
    )
    search.add_argument(
        "--expansion-settings",
        metavar="K,ALPHA",
        default="5,3",
        help="embeddings averaged, power of the similarity (default: 5,3)",
    )
    search.add_argument("--rerank", action="store_true", help="k-reciprocal re-ranking")
    search.add_argument(
        "--rerank-settings",
        metavar="K1,K2,WEIGHT",
        default="20,6,0.3",
        help="neighbours, neighbours averaged, share of the plain distance (default: 20,6,0.3)",
    )
    more = parser.add_argument_group("more results")
    more.add_argument(
        "--roc", action="store_true", help="add the true positive rates at false positive rates"
    )
    more.add_argument(
        "--threshold",
        type=float,
        metavar="RATE",
        help="calibrate a threshold on the held-out training identities for this false accept "
        "rate, 0.001 for instance, and tell its error rates on the test; always of plain distances",
    )
    more.add_argument(
        "--dump", metavar="FILE", help="write what every query found: .csv, .jsonl or .parquet"
    )
    more.add_argument(
        "--dump-top", type=int, default=10, metavar="N", help="gallery images told (default: 10)"
    )
    more.add_argument("--json", metavar="FILE", help="write the results there too")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Wanted:
    """What an evaluation is to compute and to write.

    Attributes:
        search: how distances are made.
        protocols: names; those of the data set if empty.
        flip_test: see ``gsalign.evaluation.embed_batch``.
        baselines: add rows of chance and of a colour histogram.
        roc: add true positive rates.
        threshold: false accept rate to calibrate a threshold for; None: none.
        dump: where to write what every query found.
        dump_top: gallery images told of each.
        json_file: where to write the results too.
    """

    search: Search
    protocols: tuple[str, ...] = ()
    flip_test: Any = "off"
    baselines: bool = False
    roc: bool = False
    threshold: float | None = None
    dump: Path | None = None
    dump_top: int = 10
    json_file: Path | None = None


def run(arguments: argparse.Namespace) -> int:
    """Evaluate."""
    from gsalign.engine.folder import RunFolder
    from gsalign.engine.kernels import chosen_kernels

    # The option takes all that follows it, overrides too.
    names = split_overrides(arguments, arguments.protocols or ())
    given = arguments.checkpoint
    fallback = Path(given).parent / "config.yaml" if given else None
    config = read_config(arguments, fallback=fallback)
    wanted = _read_wanted(arguments, names)
    checkpoint = Path(given) if given else RunFolder(config.run_folder).best
    with chosen_kernels(config.kernels):
        return evaluate_checkpoint(
            config,
            checkpoint,
            wanted,
            compare=arguments.config_file is not None
            or (fallback is not None and fallback.is_file()),
        )


def _read_wanted(arguments: argparse.Namespace, names: list[str]) -> Wanted:
    from gsalign.errors import ConfigError
    from gsalign.evaluation import Expansion, Reranking, Search, get_protocol
    from gsalign.evaluation.dump import check_format

    k, alpha = _numbers(arguments.expansion_settings, "--expansion-settings", (int, float))
    k1, k2, weight = _numbers(arguments.rerank_settings, "--rerank-settings", (int, int, float))
    try:
        search = Search(
            metric=arguments.metric,
            expansion=Expansion(k, alpha) if arguments.query_expansion else None,
            reranking=Reranking(k1, k2, weight) if arguments.rerank else None,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    rate = arguments.threshold
    if rate is not None and not 0.0 < rate < 1.0:
        raise ConfigError(f"--threshold is {rate:g}; wanted a false accept rate between 0 and 1")
    if arguments.dump_top < 1:
        raise ConfigError(f"--dump-top is {arguments.dump_top}; wanted at least 1")
    dump = _output(arguments.dump, "--dump")
    if dump is not None:
        check_format(dump)
    return Wanted(
        protocols=tuple(get_protocol(name).name for name in names),
        search=search,
        flip_test=arguments.flip_test,
        baselines=arguments.baselines,
        roc=arguments.roc,
        threshold=rate,
        dump=dump,
        dump_top=arguments.dump_top,
        json_file=_output(arguments.json, "--json"),
    )


def _output(given: str | None, option: str) -> Path | None:
    """Where to write; that it is a folder is told now, and not after the evaluation."""
    from gsalign.errors import ConfigError

    path = None if given is None else Path(given)
    if path is not None and path.is_dir():
        raise ConfigError(f"{option} is {given}, which is a folder; wanted a file")
    return path


def _numbers(text: str, option: str, types: tuple[type, ...]) -> list[Any]:
    from gsalign.errors import ConfigError

    parts = text.split(",")
    try:
        if len(parts) == len(types):
            return [kind(part) for kind, part in zip(types, parts, strict=True)]
    except ValueError:
        pass
    words = ", ".join("a whole number" if kind is int else "a number" for kind in types)
    raise ConfigError(f"{option} is {text!r}; wanted {words}, separated by commas")


def evaluate_checkpoint(
    config: Config, checkpoint: Path, wanted: Wanted | None = None, *, compare: bool = True
) -> int:
    """Evaluate weights on the configuration's data set and print the table.

    Args:
        config: data, device, precision and whether to compile; the network is the checkpoint's.
        checkpoint: the weights.
        wanted: what to compute and to write; the table alone if None.
        compare: make sure that the configuration describes the same network.
    """
    from gsalign.cli.console import log_to, make_console, progress
    from gsalign.data import load_dataset
    from gsalign.engine.agreement import measure_cut_out, measure_parts, measure_rolls
    from gsalign.engine.compilation import compile_embedding
    from gsalign.engine.distributed import build_accelerator
    from gsalign.engine.loading import load_network
    from gsalign.engine.testing import embed_splits
    from gsalign.evaluation import Search
    from gsalign.evaluation import compare as compare_features
    from gsalign.evaluation.report import results_dict, results_table
    from gsalign.files import atomic_write

    wanted = Wanted(search=Search()) if wanted is None else wanted
    console = make_console()
    log_to(console)
    network = load_network(checkpoint, config.model, compare=compare)
    data = config.data.model_copy(update={"image_size": network.config.image_size})
    dataset = load_dataset(data)
    names = wanted.protocols or dataset.protocols
    splits = [(dataset.query, dataset.gallery)]
    if wanted.threshold is not None:
        splits.append(_validation(config, dataset, console))
    accelerator = build_accelerator(device=config.device, precision=config.training.precision)
    network.to(accelerator.device)
    if config.training.compile:
        compile_embedding(network)
    features: list[tuple[Features, Features]] = []
    for query, gallery in splits:
        with progress(console, "embedding", "images") as report:
            made = embed_splits(
                network,
                query,
                gallery,
                data,
                accelerator,
                flip_test=wanted.flip_test,
                report=report,
            )
        features.append(made)
    agreements = {
        name: measure(network, splits[0], dataset.root, data, accelerator)
        for name, measure in (
            ("parts", measure_parts),
            ("person", measure_cut_out),
            ("rolls", measure_rolls),
        )
    }
    comparisons = [compare_features(*features[0], name, wanted.search) for name in names]
    results = {comparison.protocol.name: comparison.evaluate() for comparison in comparisons}
    title = f"{checkpoint} on {dataset.root}"
    console.print(results_table(results, dataset=dataset.name, title=title))
    _tell_invalid(results, console)
    document: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "data": str(dataset.root),
        "results": {"network": results_dict(results)},
    }
    for name, agreement in agreements.items():
        if agreement is not None:
            console.print(agreement.as_table())
            document[name] = agreement.as_dict()
    if wanted.roc:
        document["roc"] = _print_roc(comparisons, dataset.name, console)
    if wanted.threshold is not None:
        plain = Search(metric=wanted.search.metric)
        validation = compare_features(*features[1], "all", plain)
        tests = [compare_features(*features[0], name, plain) for name in names]
        document["threshold"] = _print_threshold(validation, tests, wanted.threshold, console)
    if wanted.baselines:
        document["results"] |= _print_baselines(config, dataset, names, console)
    if accelerator.is_main_process:
        if wanted.dump is not None:
            _write_dump(wanted.dump, comparisons, results, dataset, wanted.dump_top)
            console.print(f"what every query found: {wanted.dump}")
        if wanted.json_file is not None:
            with atomic_write(wanted.json_file) as temporary:
                temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


def _tell_invalid(results: dict[str, EvaluationResult], console: Console) -> None:
    """Say why a row of the table has no figures."""
    from gsalign.evaluation import protocol_title

    for name, result in results.items():
        if not result.num_valid_queries:
            console.print(
                f"warning: {protocol_title(name)} has no figures: none of its "
                f"{result.num_queries} queries has another image of its person among the "
                f"{result.num_gallery} of its gallery"
            )


def _validation(config: Config, dataset: ReIDDataset, console: Console) -> tuple[Any, Any]:
    """The held-out training identities of a run: its validation query and gallery."""
    from gsalign.data import hold_out_identities
    from gsalign.engine.config import VALIDATION
    from gsalign.errors import ConfigError

    fraction = config.data.validation_fraction
    if not fraction:
        raise ConfigError(
            "--threshold needs held-out training identities to calibrate on: train with "
            "data.validation_fraction=0.04 training.select_on=validation"
        )
    if config.training.select_on != VALIDATION:
        console.print(
            "warning: the run was trained on the identities that the threshold is calibrated on "
            "(training.select_on is not validation); on other people it accepts less and errs more"
        )
    _, query, gallery = hold_out_identities(dataset, fraction, seed=config.seed)
    return query, gallery


def _print_roc(
    comparisons: list[Comparison], dataset: str, console: Console
) -> dict[str, dict[str, float | int | None]]:
    from gsalign.evaluation.report import roc_table
    from gsalign.evaluation.verification import verify

    rates = {comparison.protocol.name: verify(comparison).as_dict() for comparison in comparisons}
    console.print(roc_table(rates, dataset=dataset))
    return rates


def _print_threshold(
    validation: Comparison, tests: list[Comparison], target: float, console: Console
) -> dict[str, object]:
    from gsalign.evaluation.report import threshold_table
    from gsalign.evaluation.verification import calibrate_threshold

    threshold = calibrate_threshold(validation, tests, target)
    console.print(threshold_table(threshold))
    return threshold.as_dict()


def _print_baselines(
    config: Config, dataset: ReIDDataset, names: tuple[str, ...], console: Console
) -> dict[str, Any]:
    from gsalign.data import check_images
    from gsalign.evaluation import evaluate_features
    from gsalign.evaluation.baselines import chance_level, histogram_features
    from gsalign.evaluation.report import results_dict, results_table

    # The same images as the network's.
    query, gallery = (
        check_images(split).split if config.data.on_broken == "skip" else split
        for split in (dataset.query, dataset.gallery)
    )
    histograms = (histogram_features(query), histogram_features(gallery))
    baselines: dict[str, dict[str, Any]] = {
        "colour histogram": dict(evaluate_features(*histograms, protocols=names)),
        "chance": {name: chance_level(query, gallery, name) for name in names},
    }
    for baseline, rows in baselines.items():
        console.print(results_table(rows, dataset=dataset.name, title=baseline))
    return {baseline: results_dict(rows) for baseline, rows in baselines.items()}


def _write_dump(
    path: Path,
    comparisons: list[Comparison],
    results: dict[str, EvaluationResult],
    dataset: ReIDDataset,
    top: int,
) -> None:
    from gsalign.evaluation.dump import query_rows, write_rows

    rows = [
        row
        for comparison in comparisons
        for row in query_rows(comparison, results[comparison.protocol.name], dataset, top=top)
    ]
    write_rows(path, rows)
