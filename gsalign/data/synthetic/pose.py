"""The walk cycle: joint positions of a batch of people.

Body frame: x to the person's right, y forward, z up, metres, the feet on z = 0. ``[B, 3]`` points;
index 0 of a pair is the left side (x < 0), index 1 the right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gsalign.data.synthetic.draws import Draws
from gsalign.data.synthetic.geometry import cross, normalise, rotate_z, vector
from gsalign.data.synthetic.identity import People


@dataclass(frozen=True)
class Pose:
    """Joints and axes in the body frame; every tensor is ``[B, 3]`` unless said otherwise."""

    height: Tensor  # [B] metres
    pelvis: Tensor
    pelvis_front: Tensor  # unit, where the pelvis faces
    chest_front: Tensor  # unit, where the shoulders face
    spine: Tensor  # unit, from the pelvis up
    neck: Tensor  # base of the neck
    head: Tensor  # centre of the head
    head_front: Tensor
    head_up: Tensor
    hip: tuple[Tensor, Tensor]
    knee: tuple[Tensor, Tensor]
    ankle: tuple[Tensor, Tensor]
    foot_front: tuple[Tensor, Tensor]  # unit, heel to toe
    shoulder: tuple[Tensor, Tensor]
    elbow: tuple[Tensor, Tensor]
    wrist: tuple[Tensor, Tensor]
    phase: Tensor  # [B] in [0, 1)


def _bump(phase: Tensor, centre: float, width: float) -> Tensor:
    """A smooth periodic bump of height 1."""
    distance = phase - centre
    distance = (distance - torch.round(distance)) / width
    return torch.exp(-distance * distance)


def _turn(vector_: Tensor, angle: Tensor) -> Tensor:
    return rotate_z(vector_, torch.sin(angle), torch.cos(angle))


def walking_pose(people: People, draws: Draws) -> Pose:
    """Pose a batch of walkers.

    The curves follow the textbook gait cycle: hip flexion close to a cosine of ±25°, a knee that
    yields a little in stance and bends 60° in swing, heel strike with the toes up, arms opposite
    to the legs. About one person in seven stands or strolls instead.
    """
    height = people.height
    phase = draws["phase"]
    two_pi = 2.0 * math.pi
    strolling = draws.below("amplitude", 0.14)
    stride = people.stride * (1.0 - 0.72 * strolling) * (0.85 + 0.3 * draws["amplitude"])
    zero = torch.zeros_like(height)

    pelvis_yaw = -0.12 * stride * torch.cos(two_pi * phase)
    up = vector(zero, zero, zero + 1.0)
    forward = vector(zero, zero + 1.0, zero)
    pelvis_front = _turn(forward, pelvis_yaw)
    chest_front = _turn(forward, -0.9 * pelvis_yaw)
    lean = draws.between("lean", 0.0, 0.1)
    spine = normalise(vector(zero, torch.sin(lean), torch.cos(lean)))

    hip_half = height * (0.047 + 0.008 * people.figure)
    thigh, shin = height * 0.245, height * 0.246
    pelvis = up * (height * 0.53).unsqueeze(-1)
    pelvis_side = cross(pelvis_front, up)  # to the right

    hips, knees, ankles, feet = [], [], [], []
    for sign, shift in ((-1.0, 0.5), (1.0, 0.0)):
        leg_phase = phase + shift
        leg_phase = leg_phase - torch.floor(leg_phase)
        swing = 0.10 * stride + 0.40 * stride * torch.cos(two_pi * leg_phase)
        flexion = 0.10 + stride * (
            0.20 * _bump(leg_phase, 0.13, 0.10) + 0.95 * _bump(leg_phase, 0.72, 0.13)
        )
        pitch = stride * (
            0.32 * _bump(leg_phase, 0.0, 0.07)
            - 0.75 * _bump(leg_phase, 0.62, 0.09)
            - 0.25 * _bump(leg_phase, 0.76, 0.09)
        )
        hip = pelvis + pelvis_side * (sign * hip_half).unsqueeze(-1)
        inward = -0.03 * sign * torch.ones_like(height)
        down = normalise(vector(inward, torch.sin(swing), -torch.cos(swing)))
        knee = hip + down * thigh.unsqueeze(-1)
        lower = swing - flexion
        down = normalise(vector(inward * 0.5, torch.sin(lower), -torch.cos(lower)))
        ankle = knee + down * shin.unsqueeze(-1)
        toe_out = 0.1 * sign
        foot = normalise(vector(zero + toe_out, torch.cos(pitch), torch.sin(pitch)))
        hips.append(hip)
        knees.append(knee)
        ankles.append(ankle)
        feet.append(foot)

    # The lower sole stands on the ground: heel, ball and ankle height decide.
    lowest = torch.full_like(height, 1e3)
    for ankle, foot in zip(ankles, feet, strict=True):
        sole = ankle[:, 2] - height * 0.040
        heel = sole - foot[:, 2] * height * 0.045
        ball = sole + foot[:, 2] * height * 0.09
        lowest = torch.minimum(lowest, torch.minimum(heel, ball))
    lift = vector(zero, zero, -lowest)
    pelvis = pelvis + lift
    hips = [p + lift for p in hips]
    knees = [p + lift for p in knees]
    ankles = [p + lift for p in ankles]

    neck = pelvis + spine * (height * 0.305).unsqueeze(-1)
    chest_side = normalise(cross(chest_front, spine))
    shoulder_half = height * (0.1055 - 0.013 * people.figure) * (1.0 + 0.06 * people.build)
    shoulder_centre = pelvis + spine * (height * 0.266).unsqueeze(-1)

    shoulders, elbows, wrists = [], [], []
    for index, (sign, shift) in enumerate(((-1.0, 0.5), (1.0, 0.0))):
        cosine = torch.cos(two_pi * (phase + shift))
        swing = 0.02 - 0.33 * stride * cosine
        flexion = 0.22 + 0.13 * stride * (1.0 - cosine)
        abduction = 0.13 + 0.10 * people.build.clamp(min=0.0)
        mode = draws["arm_mode" if index == 0 else "arm_mode2"]
        at_ear = (mode < 0.05).float()
        reading = ((mode >= 0.05) & (mode < 0.10)).float()
        in_pocket = ((mode >= 0.10) & (mode < 0.17)).float()
        carrying = people.is_("bag", "handbag") * (people.side == sign).float()
        free = 1.0 - carrying
        at_ear, reading, in_pocket = at_ear * free, reading * free, in_pocket * free
        busy = at_ear + reading + in_pocket + carrying
        swing = (
            swing * (1.0 - busy)
            + at_ear * 0.55
            + reading * 0.12
            - in_pocket * 0.35
            + carrying * (0.02 - 0.1 * cosine)
        )
        flexion = (
            flexion * (1.0 - busy)
            + at_ear * 2.35
            + reading * 2.05
            + in_pocket * 0.75
            + carrying * 0.08
        )
        abduction = abduction + 0.25 * at_ear + 0.12 * in_pocket + 0.1 * carrying
        shoulder = shoulder_centre + chest_side * (sign * shoulder_half).unsqueeze(-1)
        outward = chest_side * (sign * torch.sin(abduction)).unsqueeze(-1)
        upper = (
            outward
            + chest_front * (torch.sin(swing) * torch.cos(abduction)).unsqueeze(-1)
            - up * (torch.cos(swing) * torch.cos(abduction)).unsqueeze(-1)
        )
        elbow = shoulder + normalise(upper) * (height * 0.172).unsqueeze(-1)
        bent = swing + flexion
        inward = chest_side * (
            sign * (0.02 - 0.3 * at_ear - 0.62 * reading - 0.1 * in_pocket)
        ).unsqueeze(-1)
        fore = (
            inward
            + chest_front * torch.sin(bent).unsqueeze(-1)
            - up * torch.cos(bent).unsqueeze(-1)
        )
        wrist = elbow + normalise(fore) * (height * 0.147).unsqueeze(-1)
        shoulders.append(shoulder)
        elbows.append(elbow)
        wrists.append(wrist)

    head_yaw = draws.between("head_yaw", -0.5, 0.5) - 0.4 * pelvis_yaw
    head_front = _turn(forward, head_yaw)
    pitch = draws.between("head_pitch", -0.30, 0.12)
    head_side = cross(head_front, up)
    head_front = normalise(
        head_front * torch.cos(pitch).unsqueeze(-1) + up * torch.sin(pitch).unsqueeze(-1)
    )
    head_up = cross(head_side, head_front)
    head = neck + spine * (height * 0.040).unsqueeze(-1) + head_up * (height * 0.066).unsqueeze(-1)
    head = head + forward * (height * 0.010).unsqueeze(-1)
    return Pose(
        height=height,
        pelvis=pelvis,
        pelvis_front=pelvis_front,
        chest_front=chest_front,
        spine=spine,
        neck=neck,
        head=head,
        head_front=head_front,
        head_up=head_up,
        hip=(hips[0], hips[1]),
        knee=(knees[0], knees[1]),
        ankle=(ankles[0], ankles[1]),
        foot_front=(feet[0], feet[1]),
        shoulder=(shoulders[0], shoulders[1]),
        elbow=(elbows[0], elbows[1]),
        wrist=(wrists[0], wrists[1]),
        phase=phase,
    )
