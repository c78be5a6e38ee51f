"""Settings of training: optimizer, learning-rate schedule, length, precision and what is saved."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]

NO_SELECTION = "last"
VALIDATION = "validation"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OptimizerConfig(_Section):
    """How weights follow gradients. The defaults are the published SGD recipe.

    The four weight decays tell apart what a parameter is; ``None`` means ``weight_decay``.
    """

    name: Literal["sgd", "adamw"] = Field(default="sgd", description="`sgd` or `adamw`")
    lr: Positive = Field(default=0.008, description="peak learning rate")
    momentum: Beta = Field(default=0.9, description="of SGD")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="of AdamW")
    weight_decay: NonNegative = Field(default=1e-4, description="of ordinary weights")
    weight_decay_norm: NonNegative | None = Field(
        default=5e-4, description="of the weights of every norm; null: `weight_decay`"
    )
    weight_decay_bias: NonNegative | None = Field(
        default=5e-4, description="of every bias, norms included; null: `weight_decay`"
    )
    weight_decay_tokens: NonNegative | None = Field(
        default=None,
        description="of class and view token, position embedding and spline points; "
        "null: `weight_decay`",
    )
    ltps_lr_factor: NonNegative = Field(
        default=1.0, description="factor on the learning rate of every LTPS, see ltps_switches.md"
    )
    ltps_warmup: NonNegative = Field(
        default=0.0,
        description="iterations over which that factor rises in a line from 0; below 1 a share of "
        "the whole run",
    )


class ScheduleConfig(_Section):
    """How the learning rate moves: a linear warm-up, then a cosine (or nothing)."""

    name: Literal["cosine", "constant"] = Field(
        default="cosine", description="after the warm-up: `cosine` or `constant`"
    )
    warmup: NonNegative = Field(
        default=2000, description="iterations; below 1 a share of the whole run"
    )
    warmup_start: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.01, description="factor on the learning rate at the first iteration"
    )
    minimum: NonNegative = Field(default=1.6e-6, description="learning rate the cosine ends at")
    step: Literal["epoch", "iteration"] = Field(
        default="epoch", description="how often the cosine moves"
    )


class TrainingConfig(_Section):
    """How long to train, in what precision, and what to look at and keep meanwhile."""

    epochs: Annotated[int, Field(gt=0)] | None = Field(
        default=150, description="length of the run in epochs; null: `iterations` counts"
    )
    iterations: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="length of the run in iterations; null: `epochs` counts"
    )
    precision: Literal["no", "fp16", "bf16"] = Field(
        default="fp16", description="mixed precision: `no`, `fp16` or `bf16`"
    )
    clip_norm: NonNegative = Field(
        default=5.0, description="bound on the norm of all gradients together; 0: none"
    )
    log_every: Annotated[int, Field(gt=0)] = Field(
        default=50, description="iterations between lines of the log"
    )
    evaluate_every: Annotated[int, Field(ge=0)] = Field(
        default=10,
        description="epochs (or iterations, if these give the length) between evaluations; "
        "0: at the end only",
    )
    checkpoint_every: Annotated[int, Field(ge=0)] = Field(
        default=1,
        description="epochs (or iterations, if these give the length) between checkpoints; "
        "0: at the end only",
    )
    select_on: str = Field(
        default=NO_SELECTION,
        description="what chooses `model_best`: `last` (no choice), `validation` (held-out "
        "training identities, see `data.validation_fraction`) or a protocol of the test set, as "
        "`all`, which is how the published code chooses",
    )
    select_by: Literal["metric", "mAP", "rank1", "mINP"] = Field(
        default="metric", description="number that chooses; `metric` is (mAP + Rank-1) / 2"
    )
    compile: bool = Field(default=False, description="compile the network with torch.compile")
    cuda_graphs: bool = Field(
        default=False,
        description="run a training step as one CUDA graph: one GPU, precision `bf16` or `no`",
    )
    recompute: Literal["nothing", "cheap", "layers"] = Field(
        default="cheap",
        description="what the backward pass computes again instead of keeping it: `nothing`, "
        "`cheap` (norms and GELU: a third less memory) or `layers` (least memory, a third more "
        "arithmetic)",
    )
    deterministic: bool = Field(
        default=False,
        description="the same bits on every run of the same machine; slower on a GPU",
    )
    global_losses: bool = Field(
        default=True,
        description="several processes: losses compare the images of all of them, as one process "
        "with the whole batch would; false: each its own",
    )
    find_unused_parameters: bool = Field(
        default=False, description="of DistributedDataParallel; the network needs it nowhere"
    )

    @field_validator("precision", mode="before")
    @classmethod
    def _plain_no(cls, value: object) -> object:
        # YAML reads an unquoted `no` as false.
        return "no" if value is False else value

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if (self.epochs is None) == (self.iterations is None):
            raise ValueError(
                f"exactly one of epochs ({self.epochs}) and iterations ({self.iterations}) must "
                "be a number; set the other to null"
            )
        return self
