"""Settings of the data room: where the images are, how they are read, augmented and batched."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from gsalign.data.images import Cache, OnBroken
from gsalign.data.layout import Singletons
from gsalign.data.registry import DatasetName

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class AugmentationConfig(BaseModel):
    """Training augmentation, in the order in which it is applied after the bicubic resize.

    The defaults are those published for CARGO; ``ag_reid()`` and ``light()`` give two other sets.
    Zero switches a step off. Steps a configuration leaves off do not change the others' draws.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    crop_padding: int = Field(
        default=10,
        ge=0,
        description="pixels of black border before a random crop to the image size",
    )
    flip: Probability = Field(default=0.5, description="chance of a horizontal flip")
    rotation: float = Field(
        default=30.0, ge=0.0, le=180.0, description="largest rotation either way, in degrees"
    )
    scale: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="largest change of size either way, as a share of 1",
    )
    color_jitter: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="largest change of brightness, contrast and saturation, as a share of 1",
    )
    augmix: Probability = Field(default=0.0, description="chance of AugMix")
    augmix_severity: int = Field(
        default=1, ge=1, le=10, description="strength of the operations it mixes"
    )
    augmix_width: int = Field(default=3, ge=1, description="number of chains it mixes")
    augmix_depth: int = Field(
        default=1, ge=-1, description="length of its chains; -1 draws from 1 to 3"
    )
    augmix_alpha: float = Field(
        default=0.1, gt=0.0, description="parameter of its mixing distributions"
    )
    erasing: Probability = Field(default=0.5, description="chance of erasing a rectangle")
    erasing_area: tuple[float, float] = Field(
        default=(0.02, 0.33),
        description="smallest and largest area erased, as a share of the image",
    )
    erasing_ratio: tuple[float, float] = Field(
        default=(0.3, 3.3),
        description="smallest and largest height-to-width ratio of the rectangle",
    )
    erasing_fill: tuple[float, float, float] = Field(
        default=(123.675, 116.28, 103.53), description="colour of the rectangle, RGB from 0 to 255"
    )

    @field_validator("erasing_area", "erasing_ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0.0 < value[0] <= value[1]:
            raise ValueError(f"wanted 0 < smallest <= largest, got {value}")
        return value

    @classmethod
    def cargo(cls) -> AugmentationConfig:
        """Return the set published for CARGO: crop, flip, rotation of 30 degrees, erasing 0.5."""
        return cls()

    @classmethod
    def ag_reid(cls) -> AugmentationConfig:
        """Return the set published for AG-ReID and its v2: AugMix 0.3, erasing 0.3, no rotation."""
        return cls(rotation=0.0, augmix=0.3, erasing=0.3)

    @classmethod
    def light(cls) -> AugmentationConfig:
        """Return a light set for small networks trained for minutes on generated images."""
        return cls(crop_padding=0, rotation=10.0, scale=0.08, color_jitter=0.1, erasing=0.1)

    @classmethod
    def none(cls) -> AugmentationConfig:
        """Return a set that leaves the images alone."""
        return cls(crop_padding=0, flip=0.0, rotation=0.0, erasing=0.0)


class DataConfig(BaseModel):
    """Where the images are and how batches are made of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: DatasetName = Field(
        default="cargo",
        description="data set: `cargo`, `ag_reid`, `ag_reid_v2`, `market1501`, or one's own images "
        "in a `folder` or a `table`",
    )
    root: Path = Field(
        default=Path("data/cargo"), description="folder of the data set, or the table"
    )
    image_size: tuple[int, int] = Field(default=(256, 128), description="(height, width) in pixels")
    augmentation: AugmentationConfig = Field(default_factory=AugmentationConfig)
    identities_per_batch: int = Field(
        default=32, ge=1, description="P, over all processes together"
    )
    images_per_identity: int = Field(default=4, ge=1, description="K")
    eval_batch_size: int = Field(default=128, ge=1, description="images per batch in evaluation")
    num_workers: int = Field(
        default=2, ge=0, description="loader processes; 0 loads in the main one"
    )
    augment_on_device: bool = Field(
        default=False,
        description="augment and normalise where the network computes; loaders hand out bytes",
    )
    cache: Cache = Field(
        default="none",
        description="of decoded, resized images: `none`, `memory`, or `packed`, a file of them",
    )
    cache_folder: Path | None = Field(
        default=None, description="of packed files; null: `packed` in the data set's folder"
    )
    on_broken: OnBroken = Field(default="error", description="'skip' goes on without broken images")
    singletons: Singletons = Field(
        default="drop", description="'keep', 'drop' or 'error': identities with one training image"
    )
    max_bad_names: int = Field(
        default=10, ge=0, description="unreadable file names that are tolerated"
    )
    validation_fraction: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="share of training identities held out for validation",
    )

    @model_validator(mode="after")
    def _augmix_needs_the_cpu(self) -> DataConfig:
        if self.augment_on_device and self.augmentation.augmix:
            raise ValueError(
                "augment_on_device is true, but AugMix runs on the CPU only: set "
                "augmentation.augmix=0, or augment_on_device=false"
            )
        return self

    @property
    def folder(self) -> Path:
        """The data set's folder; ``root``, or where that lies if it is a table."""
        return self.root.parent if self.name == "table" else self.root

    @property
    def packed_folder(self) -> Path:
        """Where packed files are; ``cache_folder``, or ``packed`` in the data set's folder."""
        return self.folder / "packed" if self.cache_folder is None else self.cache_folder

    @field_validator("image_size")
    @classmethod
    def _positive(cls, value: tuple[int, int]) -> tuple[int, int]:
        if min(value) < 1:
            raise ValueError(f"height and width must be positive, got {value}")
        return value
