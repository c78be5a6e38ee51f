"""The network computed as the authors' published code computes it: what speed is compared with.

The same parameters and, to rounding, the same numbers as :class:`gsalign.model.GSAlign`. What is
done as there: attention as two products around a softmax, the last block for all tokens; two copies
of the tokens kept per block, which nothing reads; for every warp the patches laid out as images,
the spline solved again for every image, sampled, and laid out as tokens again; the subtraction of
the view token by putting the tokens together anew; the identity head run in full on a second
feature whose logits no loss uses; DAM's prototypes one label after the other, with the host waiting
each time. Written from a description of that code, in our own words.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import normalize

from gsalign.model import GSAlign, losses
from gsalign.model.ltps import LTPS, PREFIX, control_grid
from gsalign_kernels.reference import tps as reference_tps


class PublishedWay:
    """``embed`` and ``losses`` of a network without parts, the published way.

    Args:
        network: whose parameters are used; its mode decides as it does there.

    Raises:
        ValueError: the network has body parts or another warp than the published one.
    """

    def __init__(self, network: GSAlign) -> None:
        if network.parts is not None:
            raise ValueError("network: the published one has no body parts, this one has")
        ltps = network.config.ltps
        if ltps.aspect_true or ltps.points_per_image:
            raise ValueError(
                "network: the published one turns control points that images share in [-1, 1]^2; "
                "set ltps.aspect_true and ltps.points_per_image to false"
            )
        self.network = network
        self.warps = {name: _Warp(ltps) for name, ltps in network.backbone.ltps.items()}
        self.kept: list[Tensor] = []

    def embed(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W] -> [B, C]``, as :meth:`GSAlign.embed`."""
        patches = self.network.backbone.patches(images)
        global_feature, view_feature, _ = self._features(patches)
        return self.network.identity_head.embed(global_feature - view_feature)

    def losses(self, images: Tensor, identities: Tensor, views: Tensor) -> dict[str, Tensor]:
        """The weighted terms of the training loss, as :meth:`GSAlign.losses`."""
        network, weights = self.network, self.network.config.losses
        patches = network.backbone.patches(images)
        global_feature, view_feature, angles = self._features(patches)
        feature = global_feature - view_feature
        logits = network.identity_head(feature)
        network.identity_head(global_feature)
        view_logits = network.view_head(view_feature)
        with torch.autocast(images.device.type, enabled=False):
            apart = losses.orthogonality(feature, view_feature)
            return {
                "identity": weights.identity * losses.classification(logits, identities),
                "triplet": weights.triplet * losses.batch_hard_triplet(feature, identities),
                "view": weights.view * losses.classification(view_logits, views),
                "orthogonality": weights.orthogonality * apart,
                "mask": weights.mask * self._alignment(patches, identities),
                "deformation": weights.deformation * losses.deformation(angles),
            }

    def _features(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        backbone = self.network.backbone
        batch = patches.shape[0]
        tokens = torch.cat(
            [
                backbone.class_token.expand(batch, -1, -1),
                backbone.view_token.expand(batch, -1, -1),
                patches,
            ],
            dim=1,
        )
        tokens = tokens + backbone.position
        angles = []
        self.kept.clear()
        for index, block in enumerate(backbone.blocks):
            self.kept.append(tokens.detach().clone())
            if str(index) in self.warps:
                tokens, angle = self.warps[str(index)](tokens)
                angles.append(angle)
            self.kept.append(tokens.detach().clone())
            tokens = tokens + block.drop_path1(_attention(block.attn, block.norm1(tokens)))
            tokens = tokens + block.drop_path2(block.mlp(block.norm2(tokens)))
            difference = tokens[:, :1] - tokens[:, 1:2]
            tokens = torch.cat([difference, tokens[:, 1:]], dim=1)
        normalised = backbone.norm(tokens)
        wide = torch.promote_types(normalised.dtype, torch.float32)
        found = torch.stack(angles) if angles else patches.new_zeros(0, batch)
        return normalised[:, 0].to(wide), normalised[:, 1].to(wide), found

    def _alignment(self, patches: Tensor, identities: Tensor) -> Tensor:
        dam = self.network.dam
        wide = torch.promote_types(patches.dtype, torch.float32)
        features = patches.to(wide).mean(dim=1)
        if dam is None:
            return features.new_zeros(())
        unit = normalize(features, dim=1)
        masks = dam.mask(unit)
        centres = torch.zeros_like(features)
        for label in identities.unique():
            chosen = identities == label
            centres[chosen] = normalize(features[chosen].mean(dim=0), dim=0)
        prototypes = normalize(centres * masks, dim=1)
        entropy = -(masks * masks.clamp(min=1e-6).log()).mean()
        return functional.mse_loss(unit, prototypes) + dam.entropy_weight * entropy


class _Warp:
    """One LTPS, by images: ``[B, 2 + H*W, C] -> [B, 2 + H*W, C]`` and the angles ``[B]``."""

    def __init__(self, ltps: LTPS) -> None:
        self.ltps = ltps
        points = control_grid(ltps.control_points)
        inverse = torch.linalg.inv(reference_tps.system_matrix(points.unsqueeze(0), 0.0))
        rows, columns = ltps.size
        x = torch.linspace(-1.0, 1.0, columns, dtype=torch.float64).expand(rows, columns)
        y = torch.linspace(-1.0, 1.0, rows, dtype=torch.float64).unsqueeze(1).expand(rows, columns)
        where = torch.stack([x.flatten(), y.flatten()], dim=-1).unsqueeze(0)
        terms = reference_tps.radial_basis(
            reference_tps.squared_distances(where, points.unsqueeze(0))
        )
        terms = torch.cat([terms, reference_tps.affine_terms(where)], dim=-1)
        like = ltps.basis
        self.inverse, self.terms = inverse.to(like), terms.to(like)

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        ltps = self.ltps
        batch = tokens.shape[0]
        rows, columns = ltps.size
        patches = tokens[:, PREFIX:].transpose(1, 2).reshape(batch, -1, rows, columns)
        patches = patches.contiguous()
        response = ltps.predictor.conv(patches).relu()
        response = response.mean(dim=(2, 3), dtype=self.terms.dtype)
        angle = ltps.predictor.angle(ltps.predictor.features_of(response)).to(self.terms.dtype)
        cosine, sine = angle.cos(), angle.sin()
        rotation = torch.stack([cosine, -sine, sine, cosine], dim=-1).view(batch, 2, 2)
        points = ltps.source_points.to(self.terms.dtype).expand(batch, -1, -1)
        with torch.autocast(tokens.device.type, enabled=False):
            points = points @ rotation.transpose(1, 2)
            padded = torch.cat([points, points.new_zeros(batch, 3, 2)], dim=1)
            grid = self.terms @ (self.inverse @ padded)
        grid = grid.view(batch, rows, columns, 2)
        warped = functional.grid_sample(
            patches, grid.to(patches.dtype), padding_mode="border", align_corners=True
        )
        patches = (patches + ltps.eta * warped).flatten(2).transpose(1, 2)
        return torch.cat([tokens[:, :PREFIX], patches], dim=1), angle


def _attention(attention: torch.nn.Module, tokens: Tensor) -> Tensor:
    batch, count, width = tokens.shape
    heads = attention.num_heads
    mixed = attention.qkv(tokens).reshape(batch, count, 3, heads, width // heads)
    query, key, value = mixed.permute(2, 0, 3, 1, 4).unbind(0)
    weights = (query @ key.transpose(-2, -1)) * (width // heads) ** -0.5
    mixed = weights.softmax(dim=-1) @ value
    return attention.proj(mixed.transpose(1, 2).reshape(batch, count, width))
