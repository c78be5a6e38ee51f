"""The whole network: embedding and training step, as published, with reference operators, ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import check
from benchmarks.case import DTYPE_NAMES, REFERENCE, Choice, normal
from benchmarks.kept import kept_mib
from benchmarks.measure import Subject, peak_mib, time_subjects
from benchmarks.published_network import PublishedWay
from benchmarks.rows import Row
from benchmarks.timing import Settings
from gsalign.engine.config import OptimizerConfig
from gsalign.engine.cuda_graphs import WARMUP, GraphedStep, rates_on_device
from gsalign.engine.optimizer import build_optimizer
from gsalign.model import GSAlign, LtpsConfig, ModelConfig
from gsalign.model.vit import Recompute
from gsalign_kernels import use_kernels

FAMILY = "model"
OPERATORS = ("gsalign",)

EMBED = "embed"
STEP = "training step"
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Way:
    """One way to compute the network.

    Attributes:
        name: what its rows are called.
        kernels: who serves the operators.
        note: what a reader must know.
        published: computed as the authors' code does.
        recompute: ``training.recompute``.
        compiled: by ``torch.compile``.
        graphs: a step is one CUDA graph; on a GPU only.
        passes: those it is measured in.
    """

    name: str
    kernels: str
    note: str
    published: bool = False
    recompute: Recompute = "cheap"
    compiled: bool = False
    graphs: bool = False
    passes: tuple[str, ...] = (EMBED, STEP)


WAYS = (
    Way("published way", REFERENCE, "computed as the authors' code does", published=True),
    Way(REFERENCE, REFERENCE, "our network, --kernels reference"),
    Way("auto", "auto", "our network, --kernels auto"),
    Way("auto, kept", "auto", "training.recompute=nothing", recompute="nothing", passes=(STEP,)),
    Way("auto, layers", "auto", "training.recompute=layers", recompute="layers", passes=(STEP,)),
    Way("auto, compiled", "auto", "--kernels auto --compile", compiled=True),
    Way("auto, graphs", "auto", "training.cuda_graphs=true", graphs=True, passes=(STEP,)),
)

Inputs = tuple[Tensor, Tensor, Tensor]
"""Images, identities, views."""

# The arithmetic of a step at a rate that leaves the weights where the judge saw them.
RATE = 1e-30
CLIP = 5.0

# Stochastic depth is off, so that both see the same network and float64 can judge them.
DEMO = ModelConfig(
    image_size=(128, 64),
    width=128,
    depth=4,
    num_heads=4,
    drop_path=0.0,
    num_identities=100,
    ltps=LtpsConfig(hidden=(64, 32)),
)
PUBLISHED = ModelConfig(drop_path=0.0)


def measure(choice: Choice, settings: Settings) -> Iterator[Row]:
    """Rows of the demo's network at batch 64, and with ``full`` of the published one.

    That is measured in float32 and under bfloat16 autocast: at batch 8 on a CPU; at 32, 128, 256
    and 1024 on a GPU, where the first batch alone is checked against float64.

    Raises:
        WrongResultError: the embeddings or the loss differ from the reference in float64.
    """
    demo = 8 if choice.quick else 64
    yield from measure_network("demo", DEMO, demo, torch.float32, choice, settings)
    if choice.full:
        batches = (32, 128, 256, 1024) if choice.device.type == "cuda" else (8,)
        for dtype in (torch.float32, torch.bfloat16):
            for batch in batches:
                yield from measure_network(
                    "ViT-B/16",
                    PUBLISHED,
                    batch,
                    dtype,
                    choice,
                    settings,
                    checked=batch == batches[0],
                )


def measure_network(
    name: str,
    config: ModelConfig,
    batch: int,
    dtype: torch.dtype,
    choice: Choice,
    settings: Settings,
    *,
    checked: bool = True,
) -> Iterator[Row]:
    """Rows of one network: two passes, all ways to compute; half types by autocast.

    A way that needs more memory than there is gets a row that says so.
    """
    device = choice.device
    network = _network(config, device)
    images = normal(batch, 3, *config.image_size, seed=53, device=device, dtype=torch.float32)
    labels = torch.arange(batch, device=device)
    identities, views = labels // 4 % config.num_identities, labels % 2
    inputs = (images, identities, views)
    shape = f"{name} B{batch} {config.image_size[0]}x{config.image_size[1]}"

    for pass_name in (EMBED, STEP):
        wanted = None
        if checked:
            with use_kernels(REFERENCE):
                exact = copy.deepcopy(network).double()
                wanted = _call(exact, exact, pass_name, (images.double(), identities, views))()
                del exact
        subjects = []
        for way in WAYS:
            if pass_name not in way.passes or (way.compiled and not choice.compile):
                continue
            if way.graphs and device.type != "cuda":
                continue
            row = Row(OPERATORS[0], way.name, pass_name, DTYPE_NAMES[dtype], shape, note=way.note)
            try:
                row, call = _prepared(way, network, inputs, dtype, row, wanted)
            except torch.OutOfMemoryError:
                yield replace(row, note=f"not measured: out of memory; {way.note}")
                continue
            subjects.append(Subject(row, [call]))
        # A step is timed as it is launched; as a graph it is a way of its own.
        yield from time_subjects(
            subjects, device, settings, images=batch, graphs=pass_name == EMBED
        )


def _network(config: ModelConfig, device: torch.device) -> GSAlign:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(51)
        network = GSAlign(config)
    with torch.no_grad():
        for parameter_name, parameter in network.named_parameters():
            # A fresh network warps by nothing; turn the maps a little, as a trained one does.
            if "ltps" in parameter_name and parameter.dim() > 1:
                noise = normal(
                    *parameter.shape, seed=52, device=parameter.device, dtype=parameter.dtype
                )
                parameter.add_(0.01 * noise)
    return network.to(device)


def _prepared(
    way: Way,
    network: GSAlign,
    inputs: Inputs,
    dtype: torch.dtype,
    row: Row,
    wanted: Tensor | None,
) -> tuple[Row, Callable[[], Tensor]]:
    """A pass computed in one way, checked, and its row with memory and error."""
    own = copy.deepcopy(network)
    own.backbone.recompute = way.recompute
    computed = PublishedWay(own) if way.published else own
    device = inputs[0].device
    call = _under(way, _call(own, computed, row.pass_name, inputs, way), device, dtype)
    result = call()
    if wanted is not None:
        label = f"{row.shape} {row.pass_name}: {way.name}"
        error = check.worst_error(label, [result], [wanted], TOLERANCES[dtype])
        row = replace(row, error=error)
    if row.pass_name == STEP and not (way.compiled or way.graphs):
        forward = _under(way, lambda: total_loss(computed, inputs), device, dtype)
        known = [*own.parameters(), *own.buffers(), *inputs]
        kept = kept_mib(forward, known, lambda: computed.kept if way.published else ())
        row = replace(row, note=f"{way.note}; {kept:.4g} MiB kept for the backward pass")
    return replace(row, peak_mib=peak_mib(call, device)), call


def _under(
    way: Way, call: Callable[[], Tensor], device: torch.device, dtype: torch.dtype
) -> Callable[[], Tensor]:
    def run() -> Tensor:
        half = dtype != torch.float32
        # A graph must not hold casts of weights that autocast remembered from outside it.
        autocast = torch.autocast(device.type, dtype, enabled=half, cache_enabled=False)
        with use_kernels(way.kernels), autocast:
            return call()

    return run


def total_loss(computed: GSAlign | PublishedWay, inputs: Inputs) -> Tensor:
    """Sum of the training losses."""
    return torch.stack(list(computed.losses(*inputs).values())).sum()


def _call(
    network: GSAlign,
    computed: GSAlign | PublishedWay,
    pass_name: str,
    inputs: Inputs,
    way: Way | None = None,
) -> Callable[[], Tensor]:
    """A pass of what computes with the parameters of a network."""
    compiled = way is not None and way.compiled
    if pass_name == EMBED:
        network.eval()
        embedded = torch.compile(computed.embed, dynamic=False) if compiled else computed.embed

        def embed() -> Tensor:
            with torch.no_grad():
                return embedded(inputs[0])

        return embed
    network.train()
    optimizer = build_optimizer(network, OptimizerConfig(lr=RATE))
    loss = torch.compile(total_loss, dynamic=False) if compiled else total_loss

    def forget() -> None:
        optimizer.zero_grad(set_to_none=True)

    def step(*batch: Tensor) -> dict[str, Tensor]:
        total = loss(computed, batch)
        total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        return {"total": total.detach()}

    if way is not None and way.graphs:
        rates_on_device(optimizer, inputs[0].device)
        graphed = GraphedStep(step, forget)
        for _ in range(WARMUP):
            graphed(*inputs)
        return lambda: graphed(*inputs)["total"]

    def launched() -> Tensor:
        total = step(*inputs)["total"]
        forget()
        return total

    return launched
