"""GSAlign: the assembled network, its embeddings and its losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gsalign.model import losses
from gsalign.model.config import ModelConfig
from gsalign.model.dam import DAM, patch_mean
from gsalign.model.equivariance import EVERY, equivariance_costs, random_turns, turned
from gsalign.model.heads import ClassifierHead
from gsalign.model.orientation import Aligned, Uprighting
from gsalign.model.parts import PartBranch, PartEmbeddings, PartOutput
from gsalign.model.precision import promote, without_autocast
from gsalign.model.processes import process_count, rows_of_all
from gsalign.model.uprighting import create_uprighting
from gsalign.model.vit import Backbone


@dataclass(frozen=True)
class FeatureOutput:
    """What the backbone makes of a batch.

    Attributes:
        global_feature: ``[B, C]``, the class token after the final norm.
        view_feature: ``[B, C]``, the view token after the final norm.
        feature: ``[B, C]``, ``global_feature - view_feature``.
        patch_mean: ``[B, C]``, mean of the raw patch embeddings.
        angles: ``[L, B]``, LTPS angles in radians, one row per layer that has an LTPS.
        parts: masks, embeddings and visibilities of the body parts; None where there are none.
        direction: ``[B, 2]``, (cos, sin) of the roll that was undone before all else; None where
            images are not turned.
        offsets: ``[L, B, K, 2]``, what every image adds to the control points of an LTPS, in units
            of [-1, 1]; None where the images share them.
        person: ``[B, 1, H, W]``, the share of the person in every pixel of the images as they came,
            by which they were cut out before the turn; None where nothing is.
    """

    global_feature: Tensor
    view_feature: Tensor
    feature: Tensor
    patch_mean: Tensor
    angles: Tensor
    parts: PartOutput | None = None
    direction: Tensor | None = None
    offsets: Tensor | None = None
    person: Tensor | None = None


class GSAlign(nn.Module):
    """GSAlign (arXiv 2510.22268): ViT with view decoupling, LTPS and DAM.

    Images are RGB ``[B, 3, H, W]``, normalised to [-1, 1] by (x - 127.5) / 127.5; (H, W) is
    ``config.image_size``. :meth:`embed` and :meth:`losses` each mean one thing in training and in
    evaluation mode; the mode decides only whether stochastic depth acts in the losses and whether
    they move the running statistics.

    Args:
        config: the network; None for the published one.

    Attributes:
        global_losses: whether, under DistributedDataParallel, :meth:`losses` are those of the
            images of all processes together, heads and their statistics included: the numbers and
            gradients of one process with the whole batch. Each process must then bring as many
            images. False until somebody sets it: a process sees its own images only.
    """

    def __init__(self, config: ModelConfig | None = None) -> None:
        super().__init__()
        config = ModelConfig() if config is None else config
        self.config = config
        self.global_losses = False
        self.backbone = Backbone(config)
        self.dam = DAM(config.width, config.dam) if config.dam.enabled else None
        self.identity_head = ClassifierHead(config.width, config.num_identities)
        self.view_head = ClassifierHead(config.width, config.num_views)
        # Last, so that a network without them draws the same initial values as ever.
        self.parts: PartBranch | None = None
        if config.parts:
            self.parts = PartBranch(
                config.width,
                config.grid,
                config.parts,
                config.num_identities,
                config.part_cells,
                config.patch_size,
            )
        self.uprighting: Uprighting | None = None
        if config.orientation.enabled:
            self.uprighting = create_uprighting(config)
            self.uprighting.requires_grad_(config.orientation.pretrained is None)

    def _check(self, images: Tensor) -> None:
        height, width = self.config.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, height, width):
            raise ValueError(
                f"images must be [B, 3, {height}, {width}], got {list(images.shape)}: resize them "
                "or set image_size in the model's configuration"
            )
        if not images.is_floating_point():
            raise TypeError(
                f"images must be floating point in [-1, 1], got {images.dtype}: normalise with "
                "(x - 127.5) / 127.5"
            )

    def _align(self, images: Tensor) -> Aligned:
        """The images aligned, where the network does that, and otherwise as they are."""
        return Aligned(images) if self.uprighting is None else self.uprighting(images)

    def _features(
        self, images: Tensor, patches: Tensor, *, stochastic: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, PartOutput | None]:
        """Global and view features ``[B, C]``, angles ``[L, B]``, offsets, parts of images."""
        tokens, angles, offsets = self.backbone(
            patches, all_tokens=self.parts is not None, stochastic=stochastic
        )
        # Without parts only the two prefix tokens are read; the norm acts on each token alone.
        normalised = promote(self.backbone.norm(tokens))
        parts = None if self.parts is None else self.parts(normalised, images)
        return normalised[:, 0], normalised[:, 1], angles, offsets, parts

    def forward_features(self, images: Tensor) -> FeatureOutput:
        """Features of normalised images ``[B, 3, H, W]`` before the heads.

        Stochastic depth acts in training mode.

        Raises:
            ValueError: the images have another size than the network.
            TypeError: the images are not floating point.
        """
        self._check(images)
        aligned = self._align(images)
        patches = self.backbone.patches(aligned.images)
        global_feature, view_feature, angles, offsets, parts = self._features(
            aligned.images, patches, stochastic=True
        )
        return FeatureOutput(
            global_feature=global_feature,
            view_feature=view_feature,
            feature=global_feature - view_feature,
            patch_mean=patch_mean(patches),
            angles=angles,
            parts=parts,
            direction=aligned.direction,
            offsets=offsets,
            person=aligned.person,
        )

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings for search: the identity neck's output under its running statistics.

        No labels, no stochastic depth, no statistics moved, in either mode of the module.

        Args:
            images: ``[B, 3, H, W]``, normalised.

        Returns:
            ``[B, D]``, not normalised; compare by cosine. D is the width; with parts
            ``config.embedding_size``, see :meth:`PartEmbeddings.flat`.

        Raises:
            ValueError: the images have another size than the network.
            TypeError: the images are not floating point.
        """
        feature, parts = self._embedded(images)
        return feature if parts is None else self._with_parts(feature, parts).flat()

    def embed_parts(self, images: Tensor) -> PartEmbeddings:
        """Embeddings of the whole image and of its parts, and how visible each is.

        As :meth:`embed` otherwise. Compare by :func:`gsalign_kernels.part_distance`. Without parts
        the whole image is all there is.

        Args:
            images: ``[B, 3, H, W]``, normalised.

        Raises:
            ValueError: the images have another size than the network.
            TypeError: the images are not floating point.
        """
        return self._with_parts(*self._embedded(images))

    def _embedded(self, images: Tensor) -> tuple[Tensor, PartOutput | None]:
        """The identity neck's output ``[B, C]``, and the parts before their necks."""
        self._check(images)
        images = self._align(images).images
        patches = self.backbone.patches(images)
        global_feature, view_feature, _, _, parts = self._features(
            images, patches, stochastic=False
        )
        return self.identity_head.embed(global_feature - view_feature), parts

    def _with_parts(self, feature: Tensor, parts: PartOutput | None) -> PartEmbeddings:
        vectors, visibility = feature.unsqueeze(1), feature.new_ones(feature.shape[0], 1)
        if self.parts is not None and parts is not None:
            embedded = self.parts.embed(parts.pooled)
            vectors = torch.cat([vectors, embedded.to(feature.dtype)], dim=1)
            visibility = torch.cat([visibility, parts.visibility.to(feature.dtype)], dim=1)
        return PartEmbeddings(vectors, visibility)

    def losses(
        self,
        images: Tensor,
        identities: Tensor,
        views: Tensor,
        part_labels: Tensor | None = None,
        deformation_share: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The terms of the training loss, weights applied; their sum is what training minimises.

        The necks use the statistics of the batch. In training mode the running statistics follow,
        with ``heads.published_double_pass`` first ``feature`` and then ``global_feature``.

        Args:
            images: ``[B, 3, H, W]``, normalised; B at least 2.
            identities: ``[B]`` integers in [0, ``num_identities``).
            views: ``[B]`` integers in [0, ``num_views``) or bool: 0 ground, 1 aerial.
            part_labels: uint8 ``[B, H, W]``, which part every pixel shows: 0 the background, 1 .. P
                the parts, above unknown, P being ``config.label_groups``. None where nobody knows.
                Read where ``losses.part_labels`` is more than 0 and where the roll is learned from
                parts.
            deformation_share: scalar on the images' device, a factor on the weight of the
                deformation term, see ``losses.deformation_warmup``; None for 1. A tensor, so that
                neither a compiled network nor a CUDA graph takes its figure for a constant.

        Returns:
            Of this process's images, or of all with ``global_losses``; on every process.
            Scalars ``identity``, ``triplet``, ``view``, ``orthogonality``, ``mask`` and
            ``deformation``, float32 (float64 for a float64 network). Without DAM ``mask`` is 0,
            without LTPS ``deformation`` is 0. With parts also ``part_identity`` and
            ``part_collapse``, and where its weight is more than 0 ``part_labels``, which is 0
            without label maps. Where a predictor of the roll learns also ``orientation``; with LTPS
            and a weight of more than 0 ``equivariance``.

        Raises:
            ValueError: images or labels have the wrong size, or there are no label maps to learn
                the roll from.
            TypeError: the images are not floating point.
        """
        self._check(images)
        batch = images.shape[0]
        for name, labels in (("identities", identities), ("views", views)):
            if tuple(labels.shape) != (batch,):
                raise ValueError(
                    f"{name} must be [{batch}], one label per image, got {list(labels.shape)}"
                )
        if part_labels is not None and tuple(part_labels.shape) != (batch, *images.shape[2:]):
            raise ValueError(
                f"part_labels must be {[batch, *images.shape[2:]]}, one label per pixel, got "
                f"{list(part_labels.shape)}"
            )
        if batch < 2:
            raise ValueError(
                f"losses need a batch of at least 2 images, got {batch}: batch statistics of one "
                "image are empty; drop incomplete batches"
            )
        identities, views = identities.long(), views.long()
        aligned = self._align(images)
        upright, direction = aligned.images, aligned.direction
        # Before the images themselves, so that who watches the backbone is left with theirs.
        turns = self._angles_of_turned(upright)
        patches = self.backbone.patches(upright)
        global_feature, view_feature, angles, _, parts = self._features(
            upright, patches, stochastic=True
        )
        turn_costs = None
        if turns is not None:
            turn_costs = equivariance_costs(angles[:, ::EVERY], *turns)
        part_logits = None if parts is None else parts.logits
        described = None if self.dam is None else self.dam.describe(patches, part_logits)
        looked: Sequence[Tensor] | None = None
        if self.uprighting is not None and self.config.orientation.pretrained is None:
            looked = self.uprighting.look(images, part_labels)
        label_costs = None
        if parts is not None and part_labels is not None and self.config.losses.part_labels:
            if self.uprighting is not None and direction is not None:
                part_labels = self.uprighting.turn_labels(part_labels, direction)
            label_costs = losses.part_label_costs(
                parts.cell_logits, part_labels, self.config.mask_grid
            )
        if self.global_losses and process_count() > 1:
            identities, views = rows_of_all([identities, views])
            if turn_costs is not None:  # of fewer images, so by themselves
                (turn_costs,) = rows_of_all([turn_costs])
            global_feature, view_feature, angles, described, parts, label_costs, looked = (
                _of_all_processes(
                    global_feature, view_feature, angles, described, parts, label_costs, looked
                )
            )
        feature = global_feature - view_feature
        identity_logits = self.identity_head(feature)
        if self.config.heads.published_double_pass:
            self.identity_head.observe(global_feature)
        view_logits = self.view_head(view_feature)

        weights = self.config.losses
        with without_autocast(images):
            terms = {
                "identity": weights.identity * losses.classification(identity_logits, identities),
                "triplet": weights.triplet * losses.batch_hard_triplet(feature, identities),
                "view": weights.view * losses.classification(view_logits, views),
                "orthogonality": weights.orthogonality
                * losses.orthogonality(feature, view_feature),
                "mask": feature.new_zeros(())
                if self.dam is None or described is None
                else weights.mask * self.dam.loss(described, identities),
                "deformation": weights.deformation
                * losses.deformation(angles, weights.deformation_hinge),
            }
            if deformation_share is not None:
                terms["deformation"] = deformation_share * terms["deformation"]
            if self.parts is not None and parts is not None:
                terms |= {
                    "part_identity": weights.part_identity
                    * self.parts.identity_loss(parts, identities),
                    "part_collapse": weights.part_collapse * losses.part_collapse(parts.logits),
                }
                if weights.part_labels:
                    terms["part_labels"] = (
                        feature.new_zeros(())
                        if label_costs is None
                        else weights.part_labels * losses.part_labels(label_costs)
                    )
            if self.uprighting is not None and looked is not None:
                terms["orientation"] = weights.orientation * self.uprighting.loss(
                    looked, identities, views
                )
            if turn_costs is not None:
                terms["equivariance"] = weights.equivariance * turn_costs.mean()
            return terms

    def _angles_of_turned(self, images: Tensor) -> tuple[Tensor, Tensor] | None:
        """LTPS angles ``[L, S]`` of a share of the images, turned, and the turns ``[S]``.

        None where no loss asks for them.
        """
        if not (self.config.losses.equivariance and self.config.ltps_layers):
            return None
        share = images[::EVERY]
        turns = random_turns(share)
        _, angles, _ = self.backbone(self.backbone.patches(turned(share, turns)))
        return angles, turns

    def forward(
        self,
        images: Tensor,
        identities: Tensor | None = None,
        views: Tensor | None = None,
        part_labels: Tensor | None = None,
        deformation_share: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """:meth:`losses` when labels are given, else :meth:`embed`; for wrappers such as DDP.

        Raises:
            ValueError: one of the two labels is missing.
        """
        if identities is None and views is None:
            return self.embed(images)
        if identities is None or views is None:
            missing = "identities" if identities is None else "views"
            raise ValueError(f"{missing} must be given with the other labels, or neither")
        return self.losses(images, identities, views, part_labels, deformation_share)


def _of_all_processes(
    global_feature: Tensor,
    view_feature: Tensor,
    angles: Tensor,
    described: Tensor | None,
    parts: PartOutput | None,
    label_costs: Tensor | None,
    looked: Sequence[Tensor] | None,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor | None, PartOutput | None, Tensor | None, list[Tensor] | None
]:
    """What losses are made of, ``[B, ...]`` but for the angles ``[L, B]``, of all processes.

    Of the masks of cells, the largest there is, only their costs travel. Of what was looked at for
    the rolls all does: an aerial image may be compared with the ground images of its person,
    whichever processes have them.
    """
    given = [global_feature, view_feature, angles.T]
    given += [rows for rows in (described, label_costs) if rows is not None]
    if parts is not None:
        given += [parts.logits, parts.pooled, parts.visibility]
    if looked is not None:
        given += looked
    dtype = global_feature.dtype
    found = iter(rows_of_all([tensor.to(dtype) for tensor in given]))
    global_feature, view_feature, angles = next(found), next(found), next(found).T
    described = None if described is None else next(found)
    label_costs = None if label_costs is None else next(found)
    if parts is not None:
        parts = PartOutput(next(found), next(found), next(found), parts.cell_logits)
    seen = None if looked is None else [next(found) for _ in looked]
    return global_feature, view_feature, angles, described, parts, label_costs, seen


def without_values(config: ModelConfig) -> GSAlign:
    """A network on the CPU whose weights are still to be loaded, all of them.

    Spares drawing a hundred million random numbers only to overwrite them, and leaves PyTorch's
    generator alone.
    """
    with torch.device("meta"):
        model = GSAlign(config)
    return model.to_empty(device="cpu")
