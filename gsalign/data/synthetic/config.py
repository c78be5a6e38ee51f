"""Settings of the generated data set, and the fingerprint that names one rendering of it."""

from __future__ import annotations

import hashlib
import json

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Raise whenever the same settings would give other pixels, so that stale folders are not reused.
RENDERER_VERSION = 6


class SyntheticConfig(BaseModel):
    """What to render. The defaults are the set the demo trains on.

    Identities are numbered 1..``train_identities`` for training, then ``test_identities`` more for
    query and gallery, then ``distractor_identities`` that appear in the gallery only.

    Attributes:
        seed: everything random follows from it; two sets with the same settings are equal bit by
            bit on one machine, whatever the number of workers.
        train_identities: people in ``train/``.
        test_identities: people in ``query/`` and ``gallery/``, none of whom is in ``train/``.
        images_per_identity_aerial: images of each person from cameras 1-5.
        images_per_identity_ground: images of each person from cameras 6-13.
        queries_per_identity: query images per test identity over both views, hence even: half are
            aerial, half are ground, each from another camera as far as the cameras suffice.
        distractor_identities: people who appear in the gallery only.
        image_size: (height, width) in pixels, width about half the height.
        night_share: share of the images taken at night, 0 to 1.
        occlusion_share: share of the images with something in front of the person, 0 to 1.
        aerial_roll: largest in-plane roll of cameras 1-5 either way, in degrees. 180 is any way
            round; with 0 the same people are seen from the same places, upright.
        write_parts: write part label maps to ``parts/`` as PNG.
        jpeg_quality: 1 to 95.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(default=0, ge=0, lt=2**31)
    train_identities: int = Field(default=100, ge=1, le=100_000)
    test_identities: int = Field(default=50, ge=1, le=100_000)
    images_per_identity_aerial: int = Field(default=16, ge=1, le=1000)
    images_per_identity_ground: int = Field(default=16, ge=1, le=1000)
    queries_per_identity: int = Field(default=4, ge=2, le=200)
    distractor_identities: int = Field(default=0, ge=0, le=100_000)
    image_size: tuple[int, int] = (128, 64)
    night_share: float = Field(default=0.3, ge=0.0, le=1.0)
    occlusion_share: float = Field(default=0.12, ge=0.0, le=1.0)
    aerial_roll: float = Field(default=180.0, ge=0.0, le=180.0)
    write_parts: bool = False
    jpeg_quality: int = Field(default=92, ge=1, le=95)

    @model_validator(mode="after")
    def _consistent(self) -> SyntheticConfig:
        height, width = self.image_size
        if not (32 <= height <= 1024 and 16 <= width <= 1024):
            raise ValueError(
                f"image_size is (height, width) = {self.image_size}; height must lie in 32..1024 "
                "and width in 16..1024"
            )
        if not 0.3 <= width / height <= 1.0:
            raise ValueError(
                f"image_size is (height, width) = {self.image_size}; the width must be 0.3 to 1 "
                "times the height, (128, 64) for instance"
            )
        if self.queries_per_identity % 2:
            raise ValueError(
                f"queries_per_identity is {self.queries_per_identity}; it counts both views and "
                "must be even"
            )
        fewest = min(self.images_per_identity_aerial, self.images_per_identity_ground)
        if self.queries_per_identity // 2 >= fewest:
            raise ValueError(
                f"queries_per_identity is {self.queries_per_identity}, so each view gives "
                f"{self.queries_per_identity // 2} queries, and at least one more image of each "
                f"view must remain for the gallery; there are {fewest}"
            )
        return self

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of these settings and of the renderer's version."""
        settings = {"renderer_version": RENDERER_VERSION, **self.model_dump(mode="json")}
        # Younger than sets that are on disk: its default renders what they hold.
        if self.aerial_roll == SyntheticConfig.model_fields["aerial_roll"].default:
            del settings["aerial_roll"]
        text = json.dumps(settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
