"""ModelConfig: every choice that shapes the network and its losses, checked on construction."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]

LABEL_GROUPS = range(3, 7)
"""Numbers of groups in which label maps tell head, torso and legs apart."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LtpsConfig(_Section):
    """Learnable thin-plate splines before the attention (paper, section LTPS).

    Attributes:
        layers: ``"all"``, or the blocks (counted from 0) that have one; ``[]`` for none.
        control_points: K, a square number: 4, 9, 16, 25, 36, ...
        eta: weight of the warped map in ``x + eta * warped(x)``. The published code uses 0.1; its
            comments suggest 0.2 for CARGO and 0.5 for AG-ReID.
        hidden: channels of the angle predictor's convolution and of its hidden layer.
        angle: ``"tanh"``, within 90 degrees either way as published, or ``"direction"``, the full
            circle; see docs/ltps_switches.md.
        aspect_true: whether the map is turned rigidly in its patches, rather than in [-1, 1]^2 as
            published, which is a shear unless the map is square.
        points_per_image: whether every image moves the control points in its own way, rather than
            all in the learned one; see ``gsalign.model.ltps_points``.
    """

    layers: Literal["all"] | tuple[int, ...] = "all"
    control_points: int = 4
    eta: Annotated[float, Field(allow_inf_nan=False)] = 0.1
    hidden: tuple[Positive, Positive] = (256, 128)
    angle: Literal["tanh", "direction"] = "tanh"
    aspect_true: bool = False
    points_per_image: bool = False

    @field_validator("control_points")
    @classmethod
    def _is_a_square(cls, value: int) -> int:
        if value < 4 or math.isqrt(value) ** 2 != value:
            raise ValueError(f"must be a square number of at least 4 (4, 9, 16, ...), got {value}")
        return value


class DamConfig(_Section):
    """Dynamic alignment of masked prototypes (paper, section DAM); training only.

    Attributes:
        enabled: whether the mask generator and its loss exist.
        entropy_weight: weight of the entropy term inside the mask loss.
    """

    enabled: bool = True
    entropy_weight: Weight = 0.1


class HeadsConfig(_Section):
    """The classification heads.

    Attributes:
        published_double_pass: update the identity neck's running statistics twice in a training
            step, with ``feature`` and then with ``global_feature``, as the published code does.
            Its checkpoints carry that mix. Off, the neck sees ``feature`` only.
    """

    published_double_pass: bool = True


class OrientationConfig(_Section):
    """Aligning every image before the patch embedding; an extension, off by default.

    See ``gsalign.model.orientation`` and docs/alignment.md.

    Attributes:
        enabled: whether images are aligned, and the predictor of their roll trained.
        turns: whether alignment turns images upright.
        cuts_out: whether it makes grey what is not seen of the person, as far as the predictor
            knows; only what reads parts does.
        reads: what the roll is read from: ``"rays"`` of a polar map, learned from upright ground
            images; or the ``"parts"`` of the body, learned from label maps, which training then
            needs.
        rings: R, of the polar map that the predictor looks at.
        rays: T, of that map.
        width: channels of the predictor's circular convolutions.
        kernels: how many rays each of them reaches over; odd.
        finder_width: channels of the finest scale of what finds the parts; a multiple of 4.
        pretrained: path of a file of ours (a run's ``model_final.safetensors``) whose predictor is
            taken and kept as it is: nothing is learned about rolls, and no label maps are needed.
            Read by :func:`gsalign.model.create_model`, not by the constructor.
    """

    enabled: bool = False
    turns: bool = True
    cuts_out: bool = False
    reads: Literal["rays", "parts"] = "rays"
    rings: Positive = 16
    rays: Annotated[int, Field(ge=4)] = 32
    width: Positive = 64
    kernels: tuple[Positive, ...] = (5, 9, 17)
    finder_width: Annotated[int, Field(gt=0, multiple_of=4)] = 16
    pretrained: str | None = None

    @property
    def turns_images(self) -> bool:
        """Whether images are turned, so that there are rolls to speak of."""
        return self.enabled and self.turns

    @property
    def learns_from_labels(self) -> bool:
        """Whether training needs label maps for it."""
        return self.enabled and self.reads == "parts" and self.pretrained is None

    @model_validator(mode="after")
    def _can_do_what_it_is_asked(self) -> OrientationConfig:
        if self.cuts_out and self.reads != "parts":
            raise ValueError(
                f"cuts_out needs reads 'parts', got {self.reads!r}: rays do not tell which pixels "
                "are of the person"
            )
        if not (self.turns or self.cuts_out):
            raise ValueError(
                "turns and cuts_out are both off, so images would stay as they are: set one of "
                "them, or enabled to false"
            )
        return self

    @model_validator(mode="after")
    def _reaches_both_ways(self) -> OrientationConfig:
        wrong = [kernel for kernel in self.kernels if kernel % 2 == 0 or kernel > self.rays]
        if wrong or not self.kernels:
            raise ValueError(
                f"kernels {list(self.kernels)} must be odd numbers, at least one and none above "
                f"rays {self.rays}: a convolution reaches as far to either side of a ray"
            )
        return self


class LossConfig(_Section):
    """Weights of the losses. ``mask`` is the paper's beta, ``deformation`` its alpha.

    The published CARGO configuration leaves the deformation term out (weight 0); the paper and the
    published AG-ReID configurations have it. ``part_identity``, ``part_collapse`` and
    ``part_labels`` count only where the network has parts, ``part_labels`` only where the data set
    has label maps, ``orientation`` only where ``model.orientation`` is enabled, ``equivariance``
    only where the network has LTPS. ``deformation_hinge`` is no weight but an angle in radians:
    the deformation term counts what exceeds it. ``deformation_warmup`` is the length over which
    that term's weight rises in a line from 0: iterations or, below 1, a share of the run; the
    trainer, which knows the iteration, hands :meth:`GSAlign.losses` the share that has risen. See
    docs/ltps_switches.md.
    """

    identity: Weight = 1.0
    triplet: Weight = 1.0
    view: Weight = 0.001
    orthogonality: Weight = 0.001
    mask: Weight = 10.0
    deformation: Weight = 0.5
    deformation_hinge: Weight = 0.0
    deformation_warmup: Weight = 0.0
    equivariance: Weight = 0.0
    part_identity: Weight = 1.0
    part_collapse: Weight = 1.0
    part_labels: Weight = 0.0
    orientation: Weight = 1.0

    @model_validator(mode="after")
    def _has_a_weight_to_rise(self) -> LossConfig:
        if self.deformation_warmup and not self.deformation:
            raise ValueError(
                f"deformation_warmup is {self.deformation_warmup:g}, but deformation, the weight "
                "that is to rise over it, is 0: give deformation a weight, as the default 0.5, or "
                "set deformation_warmup to 0"
            )
        return self


class ModelConfig(_Section):
    """The network. Defaults are the published GSAlign: ViT-B/16 on 256 x 128, LTPS in 12 blocks.

    The VDT baseline is the same network with ``ltps.layers=[]`` and ``dam.enabled=False``.

    Attributes:
        image_size: (height, width) in pixels, multiples of ``patch_size``.
        patch_size: side of a patch, and the stride between patches, in pixels.
        width: channels of a token; also the length of an embedding.
        depth: number of transformer blocks.
        num_heads: attention heads; divides ``width``.
        mlp_ratio: hidden width of a block's MLP over ``width``.
        drop_path: rate of stochastic depth in the last block, rising linearly from 0.
        num_identities: classes of the identity head.
        num_views: classes of the view head (0 ground, 1 aerial).
        parts: P, how many body parts get a spatial mask, an embedding and a visibility of their
            own; an extension beyond the published code. 0 is the published network.
        part_cells: how many cells a side of a patch has in the part masks, which are that much
            finer than the patch map; divides ``patch_size``. 1 is a mask value per patch.
        pretrained: None, the name of a timm ViT, the path of a file with its weights, or of a file
            of ours (a run's ``model_final.safetensors``), of which all is taken but the identity
            heads; read by :func:`gsalign.model.create_model`, not by the constructor.
    """

    image_size: tuple[Positive, Positive] = (256, 128)
    patch_size: Positive = 16
    width: Positive = 768
    depth: Positive = 12
    num_heads: Positive = 12
    mlp_ratio: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 4.0
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    num_identities: Positive = 2500
    num_views: Positive = 2
    parts: Annotated[int, Field(ge=0)] = 0
    part_cells: Positive = 1
    orientation: OrientationConfig = OrientationConfig()
    ltps: LtpsConfig = LtpsConfig()
    dam: DamConfig = DamConfig()
    heads: HeadsConfig = HeadsConfig()
    losses: LossConfig = LossConfig()
    pretrained: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ModelConfig:
        height, width = self.image_size
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"image_size {height}x{width} is not a multiple of patch_size {self.patch_size}"
            )
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.patch_size % self.part_cells:
            raise ValueError(
                f"patch_size {self.patch_size} is not a multiple of part_cells {self.part_cells}"
            )
        self._check_orientation()
        if self.ltps.layers != "all":
            layers = self.ltps.layers
            outside = [layer for layer in layers if not 0 <= layer < self.depth]
            if outside:
                raise ValueError(
                    f"ltps.layers names {outside}, but depth {self.depth} has blocks 0 to "
                    f"{self.depth - 1}"
                )
            if len(set(layers)) != len(layers):
                raise ValueError(f"ltps.layers names a block twice: {list(layers)}")
        if self.ltps_layers and min(self.grid) < 2:
            # align_corners=True has no scale for a map of one row or column.
            raise ValueError(
                f"LTPS needs a map of at least 2x2 patches, image_size {height}x{width} with "
                f"patch_size {self.patch_size} gives {self.grid[0]}x{self.grid[1]}"
            )
        return self

    def _check_orientation(self) -> None:
        if not self.orientation.learns_from_labels:
            return
        if self.label_groups not in LABEL_GROUPS:
            raise ValueError(
                "orientation.reads parts must tell head, torso and legs apart, which label maps "
                f"for parts {self.parts} do not: take {min(LABEL_GROUPS)} to {max(LABEL_GROUPS)} "
                "parts, or set losses.part_labels to 0"
            )

    @property
    def label_groups(self) -> int:
        """Into how many groups the parts of label maps are put; 0 where no loss reads them."""
        if self.parts and self.losses.part_labels:
            return self.parts
        return min(LABEL_GROUPS) if self.orientation.learns_from_labels else 0

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patch map."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def mask_grid(self) -> tuple[int, int]:
        """Rows and columns of the part masks."""
        return self.grid[0] * self.part_cells, self.grid[1] * self.part_cells

    @property
    def embedding_size(self) -> int:
        """Length of what the network's ``embed`` gives, the image's embedding, then the parts'."""
        return self.width * (1 + self.parts)

    @property
    def ltps_layers(self) -> tuple[int, ...]:
        """The blocks that have an LTPS, in ascending order."""
        if self.ltps.layers == "all":
            return tuple(range(self.depth))
        return tuple(sorted(self.ltps.layers))
