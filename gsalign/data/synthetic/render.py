"""One batch of images from appearance to pixels, labels and truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gsalign.data.synthetic.background import render_background
from gsalign.data.synthetic.body import (
    PARTS,
    Mesh,
    build_body,
    topology,
    vertex_slots,
)
from gsalign.data.synthetic.cameras import Viewpoint, body_yaw, place_cameras
from gsalign.data.synthetic.config import SyntheticConfig
from gsalign.data.synthetic.draws import Draws
from gsalign.data.synthetic.geometry import dot, normalise, rotate_z
from gsalign.data.synthetic.identity import Appearance, People
from gsalign.data.synthetic.material import paint
from gsalign.data.synthetic.occluders import render_occluders
from gsalign.data.synthetic.plan import ImageSpec
from gsalign.data.synthetic.pose import Pose, walking_pose
from gsalign.data.synthetic.raster import rasterise
from gsalign.data.synthetic.sensor import expose
from gsalign.data.synthetic.shading import (
    LIGHTINGS,
    body_shadow,
    irradiance,
    make_blockers,
    make_light,
)
from gsalign.data.synthetic.truth import BODY_PARTS, TruthRow

_OCCLUDER = PARTS.index("occluder")


@dataclass(frozen=True)
class Rendering:
    """A rendered batch.

    Attributes:
        images: ``[B, H, W, 3]`` uint8, RGB, on the CPU.
        labels: ``[B, H, W]`` uint8 part labels (indices into ``body.PARTS``), on the CPU, or None.
        truth: one row per image.
    """

    images: Tensor
    labels: Tensor | None
    truth: list[TruthRow]


def _fine_size(size: tuple[int, int]) -> tuple[int, int]:
    """Size at which the body is drawn, before it is averaged down: small images need more."""
    factor = 2.0 if size[0] <= 160 else 1.5
    return round(size[0] * factor), round(size[1] * factor)


def _reduce(layer: Tensor, size: tuple[int, int]) -> Tensor:
    """Average ``[N, C, H', W']`` down to (height, width)."""
    if layer.shape[-2] == 2 * size[0] and layer.shape[-1] == 2 * size[1]:
        return F.avg_pool2d(layer, 2)
    return F.interpolate(layer, size=size, mode="bilinear", antialias=True, align_corners=False)


@torch.inference_mode()
def render(
    specs: Sequence[ImageSpec],
    appearances: Sequence[Appearance],
    config: SyntheticConfig,
    *,
    device: torch.device | str = "cpu",
) -> Rendering:
    """Render a batch of images.

    Every image depends on the seed, its id and its identity only: on one machine and device its
    pixels are the same in whatever batch it is rendered.

    Args:
        specs: the images.
        appearances: people by identity; identity 1 is the first.
        config: settings of the set.
        device: where to compute.
    """
    size = config.image_size
    fine = _fine_size(size)
    draws = Draws(config.seed, [s.image_id for s in specs], size, device)
    people = People([appearances[s.identity - 1] for s in specs], device)
    cameras = torch.tensor([s.camera for s in specs], device=device)
    night = torch.tensor([float(s.night) for s in specs], device=device)
    batch = len(specs)

    pose = walking_pose(people, draws)
    mesh = build_body(people, pose, draws)
    _, turn = body_yaw(draws)
    sin, cos = torch.sin(turn), torch.cos(turn)
    points = rotate_z(mesh.position, sin, cos)
    normals = rotate_z(mesh.normal, sin, cos)
    key = str(points.device)
    present = mesh.enabled[:, vertex_slots(key)]
    view = place_cameras(cameras, draws, points, present, size, config.aerial_roll)
    light = make_light(night, draws)
    blockers = make_blockers(people, pose, light, turn)

    faces, face_slot, face_part, two_sided = topology(key)
    screen = view.project(points, size, fine)
    hits = rasterise(
        screen, faces, mesh.enabled[:, face_slot], two_sided, face_part, len(PARTS), fine
    )

    # Attributes of the visible points.
    vertices = points.shape[1]
    table = torch.cat((points, normals, mesh.surface), dim=-1).reshape(batch * vertices, -1)
    corner = faces.index_select(0, hits.face) + (hits.image * vertices).unsqueeze(1)
    attributes = sum(
        table.index_select(0, corner[:, i]) * hits.weights[:, i : i + 1] for i in range(3)
    )
    assert isinstance(attributes, Tensor)
    place, normal, surface = attributes[:, 0:3], attributes[:, 3:6], attributes[:, 6:10]
    toward = normalise(view.position.index_select(0, hits.image) - place)
    slot = face_slot.index_select(0, hits.face)
    inside = two_sided.index_select(0, hits.face) & (dot(normal, toward) < 0)
    flip = torch.where(inside, -1.0, 1.0).unsqueeze(1)
    material = paint(people, draws, hits.image, slot, surface)
    normal = normalise(normalise(normal) * flip + material.bump)
    ambient = surface[:, 3] * torch.where(inside, 0.5, 1.0)
    # Points that face away from the light need no shadow, and an overcast sky casts hardly any.
    overcast = light.kind == LIGHTINGS.index("overcast")
    facing = dot(normal, light.direction.index_select(0, hits.image)) > 0
    direct = overcast.index_select(0, hits.image).float() * 0.8
    lit = torch.nonzero(facing & (direct == 0)).flatten()
    direct[lit] = body_shadow(blockers, place.index_select(0, lit), hits.image.index_select(0, lit))
    direct = direct * torch.where(inside, 0.2, 1.0)
    light_in = irradiance(light, normal, hits.image, direct, ambient)
    half = normalise(toward + light.direction.index_select(0, hits.image))
    shine = dot(normal, half).clamp(min=0.0)
    shine = shine * shine
    shine = shine * shine
    shine = shine * shine * shine  # 12th power
    colour = material.albedo * light_in
    colour = colour + light.key.index_select(0, hits.image) * (
        material.gloss * shine * direct
    ).unsqueeze(1)

    # Samples to pixels.
    layer = torch.zeros(batch * fine[0] * fine[1], 4, device=points.device)
    layer[hits.pixel] = torch.cat((colour, torch.ones_like(colour[:, :1])), dim=1)
    layer = _reduce(layer.view(batch, *fine, 4).permute(0, 3, 1, 2).contiguous(), size)
    body, alpha = layer[:, :3], layer[:, 3:]

    feet = rotate_z(torch.stack(pose.ankle, dim=1), sin, cos)
    radiance = render_background(draws, view, light, blockers, feet, size)
    radiance = radiance * (1.0 - alpha) + body
    occluder, opacity = render_occluders(
        draws, light, (cameras <= 5).float(), config.occlusion_share, size
    )
    radiance = radiance + (occluder - radiance) * opacity.unsqueeze(1)
    images = expose(radiance, cameras, light, draws)

    # Truth.
    part = face_part.index_select(0, hits.face)
    rows = torch.arange(fine[0], device=points.device) * size[0] // fine[0]
    columns = torch.arange(fine[1], device=points.device) * size[1] // fine[1]
    hidden = (opacity > 0.5).index_select(1, rows).index_select(2, columns)
    seen = ~hidden.flatten().index_select(0, hits.pixel)
    bins = hits.image * len(PARTS) + part
    count = torch.bincount(bins, minlength=batch * len(PARTS)).view(batch, -1)
    shown = torch.bincount(bins[seen], minlength=batch * len(PARTS)).view(batch, -1)
    framed = _framed_share(screen, faces, face_part, mesh, face_slot, fine)
    visible = shown / hits.silhouette.clamp(min=1) * framed
    exists = torch.stack(
        [(mesh.enabled[:, face_slot] & (face_part == p)).any(1) for p in range(len(PARTS))],
        dim=1,
    )
    visible = torch.where(exists, visible, torch.full_like(visible, -1.0))
    occluded = 1.0 - shown.sum(1) / count.sum(1).clamp(min=1)
    labels = None
    if config.write_parts:
        labels = _labels(hits.pixel, part, alpha, opacity, batch, fine).cpu()
    truth = _truth(specs, view, light.kind, pose, visible, occluded, sin, cos, size)
    return Rendering(images.permute(0, 2, 3, 1).contiguous().cpu(), labels, truth)


def _framed_share(
    screen: Tensor,
    faces: Tensor,
    part: Tensor,
    mesh: Mesh,
    face_slot: Tensor,
    fine: tuple[int, int],
) -> Tensor:
    """Share ``[B, P]`` of the projected area of each part that lies within the image."""
    a, b, c = (screen.index_select(1, faces[:, i]) for i in range(3))
    area = (b[..., 0] - a[..., 0]) * (c[..., 1] - a[..., 1]) - (b[..., 1] - a[..., 1]) * (
        c[..., 0] - a[..., 0]
    )
    area = (-area).clamp(min=0.0) * mesh.enabled[:, face_slot]
    x = (a[..., 0] + b[..., 0] + c[..., 0]) / 3.0
    y = (a[..., 1] + b[..., 1] + c[..., 1]) / 3.0
    within = (x >= 0) & (x < fine[1]) & (y >= 0) & (y < fine[0])
    total = torch.zeros(area.shape[0], len(PARTS), device=area.device)
    inside = torch.zeros_like(total)
    for p in range(1, len(PARTS) - 1):
        index = torch.nonzero(part == p).flatten()
        total[:, p] = area[:, index].sum(1)
        inside[:, p] = (area * within)[:, index].sum(1)
    return inside / total.clamp(min=1e-6)


def _labels(
    pixel: Tensor,
    part: Tensor,
    alpha: Tensor,
    opacity: Tensor,
    batch: int,
    fine: tuple[int, int],
) -> Tensor:
    """Most frequent part among the samples of a pixel; background where most of them miss."""
    votes = torch.zeros(len(PARTS), batch * fine[0] * fine[1], device=pixel.device)
    votes[part, pixel] = 1.0
    size = (opacity.shape[1], opacity.shape[2])
    votes = _reduce(votes.view(len(PARTS), batch, *fine), size)
    label = votes.argmax(0)
    label = torch.where(alpha[:, 0] >= 0.5, label, torch.zeros_like(label))
    label = torch.where(opacity > 0.5, torch.full_like(label, _OCCLUDER), label)
    return label.to(torch.uint8)


def _truth(
    specs: Sequence[ImageSpec],
    view: Viewpoint,
    kind: Tensor,
    pose: Pose,
    visible: Tensor,
    occluded: Tensor,
    sin: Tensor,
    cos: Tensor,
    size: tuple[int, int],
) -> list[TruthRow]:
    feet = (pose.ankle[0] + pose.ankle[1]) * 0.5
    axis = rotate_z(torch.stack((feet, pose.head), dim=1), sin, cos)
    ends = view.project(axis, size, size)
    rise = ends[:, 1] - ends[:, 0]
    angle = torch.rad2deg(torch.atan2(rise[:, 0], -rise[:, 1])).tolist()
    elevation = torch.rad2deg(view.elevation).tolist()
    heading = torch.rad2deg(view.heading).tolist()
    roll = torch.rad2deg(view.roll).tolist()
    phase, kinds = pose.phase.tolist(), kind.tolist()
    shares, hidden = visible.tolist(), occluded.tolist()
    return [
        TruthRow(
            path=spec.path,
            identity=spec.identity,
            camera=spec.camera,
            view=spec.view,
            time=spec.time,
            elevation=elevation[i],
            heading=heading[i] % 360.0,
            roll=(roll[i] + 180.0) % 360.0 - 180.0,
            body_angle=angle[i],
            phase=phase[i],
            lighting=LIGHTINGS[kinds[i]],
            occluded_share=hidden[i],
            visible={name: shares[i][PARTS.index(name)] for name in BODY_PARTS},
        )
        for i, spec in enumerate(specs)
    ]
