"""Which images exist: split, identity, camera, time of day and number of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gsalign.data.synthetic.config import SyntheticConfig

AERIAL_CAMERAS = (1, 2, 3, 4, 5)
GROUND_CAMERAS = (6, 7, 8, 9, 10, 11, 12, 13)

_PLAN_STREAM = 1


@dataclass(frozen=True)
class ImageSpec:
    """One image to render.

    Attributes:
        image_id: number of the image, unique within the set; its random stream follows from it.
        split: ``train``, ``query`` or ``gallery``.
        identity: raw identity as in the file name, from 1.
        camera: 1..13, aerial up to 5.
        night: taken at night.
    """

    image_id: int
    split: str
    identity: int
    camera: int
    night: bool

    @property
    def view(self) -> int:
        """0 = ground, 1 = aerial."""
        return int(self.camera <= AERIAL_CAMERAS[-1])

    @property
    def time(self) -> str:
        """``day`` or ``night``."""
        return "night" if self.night else "day"

    @property
    def path(self) -> str:
        """Path below the root of the set, with forward slashes."""
        name = f"Cam{self.camera}_{self.time}_{self.identity}_{self.image_id}.jpg"
        return f"{self.split}/Cam{self.camera}/{name}"


def plan_images(config: SyntheticConfig) -> list[ImageSpec]:
    """List every image of the set, in the order of their ids."""
    specs: list[ImageSpec] = []
    total = config.train_identities + config.test_identities + config.distractor_identities
    test_start = config.train_identities + 1
    distractor_start = test_start + config.test_identities
    per_view = config.queries_per_identity // 2
    for identity in range(1, total + 1):
        rng = np.random.default_rng([config.seed, _PLAN_STREAM, identity])
        for cameras, count in (
            (AERIAL_CAMERAS, config.images_per_identity_aerial),
            (GROUND_CAMERAS, config.images_per_identity_ground),
        ):
            # Going round the cameras in a shuffled order: the first images, which become the
            # queries, are from different cameras, and every camera is used about equally often.
            order = rng.permutation(cameras)
            night = rng.random(count) < config.night_share
            for number in range(count):
                if identity < test_start:
                    split = "train"
                elif identity < distractor_start and number < per_view:
                    split = "query"
                else:
                    split = "gallery"
                specs.append(
                    ImageSpec(
                        image_id=len(specs) + 1,
                        split=split,
                        identity=identity,
                        camera=int(order[number % len(cameras)]),
                        night=bool(night[number]),
                    )
                )
    return specs
