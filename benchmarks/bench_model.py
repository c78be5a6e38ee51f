"""The whole network: embedding and training step, as published, with reference operators, ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import check
from benchmarks.case import DTYPE_NAMES, REFERENCE, Choice, normal
from benchmarks.measure import Subject, peak_mib, time_subjects
from benchmarks.published_network import PublishedWay
from benchmarks.rows import Row
from benchmarks.timing import Settings
from gsalign.model import GSAlign, LtpsConfig, ModelConfig
from gsalign_kernels import use_kernels

FAMILY = "model"
OPERATORS = ("gsalign",)

PUBLISHED_WAY = "published way"
NOTES = {
    PUBLISHED_WAY: "computed as the authors' code does",
    REFERENCE: "our network, --kernels reference",
    "auto": "our network, --kernels auto",
}
EMBED = "embed"
STEP = "training step"
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 5e-2}

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

    That is measured in float32 at batch 8 on a CPU; in float32 and under bfloat16 autocast at batch
    64 on a GPU.

    Raises:
        WrongResultError: the embeddings or the loss differ from the reference in float64.
    """
    demo = 8 if choice.quick else 64
    yield from measure_network("demo", DEMO, demo, torch.float32, choice, settings)
    if choice.full:
        gpu = choice.device.type == "cuda"
        for dtype in (torch.float32, torch.bfloat16) if gpu else (torch.float32,):
            batch = 64 if gpu else 8
            yield from measure_network("ViT-B/16", PUBLISHED, batch, dtype, choice, settings)


def measure_network(
    name: str,
    config: ModelConfig,
    batch: int,
    dtype: torch.dtype,
    choice: Choice,
    settings: Settings,
) -> Iterator[Row]:
    """Rows of one network: two passes, three ways to compute; half types by autocast."""
    device = choice.device
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
    network.to(device)
    images = normal(batch, 3, *config.image_size, seed=53, device=device, dtype=torch.float32)
    labels = torch.arange(batch, device=device)
    identities, views = labels // 4 % config.num_identities, labels % 2
    shape = f"{name} B{batch} {config.image_size[0]}x{config.image_size[1]}"

    for pass_name in (EMBED, STEP):
        with use_kernels(REFERENCE):
            exact = copy.deepcopy(network).double()
            wanted = _call(exact, pass_name, images.double(), identities, views)().detach()
            del exact
        subjects = []
        for way, note in NOTES.items():
            own = copy.deepcopy(network)
            computed = PublishedWay(own) if way == PUBLISHED_WAY else own
            call = _call(own, pass_name, images, identities, views, computed)
            call = _under(REFERENCE if way == PUBLISHED_WAY else way, call, device, dtype)
            error = check.worst_error(
                f"{shape} {pass_name}: {way}", [call()], [wanted], TOLERANCES[dtype]
            )
            row = Row(
                OPERATORS[0],
                way,
                pass_name,
                DTYPE_NAMES[dtype],
                shape,
                peak_mib=peak_mib(call, device),
                error=error,
                note=note,
            )
            subjects.append(Subject(row, [call]))
        # The optimizer of a step counts its steps on the host, which no graph can hold.
        yield from time_subjects(
            subjects, device, settings, images=batch, graphs=pass_name == EMBED
        )


def _under(
    choice: str, call: Callable[[], Tensor], device: torch.device, dtype: torch.dtype
) -> Callable[[], Tensor]:
    def run() -> Tensor:
        half = dtype != torch.float32
        # A graph must not hold casts of weights that autocast remembered from outside it.
        autocast = torch.autocast(device.type, dtype, enabled=half, cache_enabled=False)
        with use_kernels(choice), autocast:
            return call()

    return run


def _call(
    network: GSAlign,
    pass_name: str,
    images: Tensor,
    identities: Tensor,
    views: Tensor,
    computed: GSAlign | PublishedWay | None = None,
) -> Callable[[], Tensor]:
    """A pass of a network, or of what computes with its parameters."""
    computed = network if computed is None else computed
    if pass_name == EMBED:
        network.eval()

        def embed() -> Tensor:
            with torch.no_grad():
                return computed.embed(images)

        return embed
    network.train()
    # A rate of 0 does the arithmetic of a step and leaves the weights where the judge saw them.
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, weight_decay=0.0)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        losses = computed.losses(images, identities, views)
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        optimizer.step()
        return total.detach()

    return step
