"""LTPS: a learnable thin-plate-spline warp of the patch map, rotated by a predicted angle."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

import gsalign_kernels
from gsalign.model.config import LtpsConfig
from gsalign.model.ltps_direction import angle_of
from gsalign.model.ltps_pixels import unit_splines, warp_tokens_by_points
from gsalign.model.ltps_points import PointOffsets
from gsalign.model.precision import promote, without_autocast

PREFIX = 2
"""Tokens before the patches: class, view."""


def control_grid(count: int) -> Tensor:
    """The regular g x g grid of control points over the map, column-major.

    Args:
        count: K = g * g.

    Returns:
        ``[K, 2]`` float64 on the CPU; row ``i * g + j`` is ``(x, y) = (lin[i], lin[j])`` with
        ``lin = linspace(-1, 1, g)``.
    """
    side = math.isqrt(count)
    # Spelled out: torch.linspace in float64 would leave the middle of an odd grid at 1e-17.
    steps = [2.0 * i / (side - 1) - 1.0 for i in range(side)]
    points = [(x, y) for x in steps for y in steps]
    return torch.tensor(points, dtype=torch.float64, device="cpu")


def rotated(points: Tensor, angle: Tensor, aspect: float = 1.0) -> Tensor:
    """Points (x, y) turned about 0 by every angle: ``[N, 2], [B] -> [B, N, 2]``.

    Or ``[B, N, 2]``, of every angle its own. Rigidly where a step of 1 along x is ``aspect`` times
    as long as one along y.
    """
    cosine, sine = angle.cos(), angle.sin()
    rotation = torch.stack([cosine, -sine / aspect, sine * aspect, cosine], dim=-1)
    return points @ rotation.unflatten(-1, (2, 2)).transpose(1, 2)


class AnglePredictor(nn.Module):
    """One rotation angle per image from its patch map (paper, section LTPS).

    ``pi/2 * tanh(FC(ReLU(FC(mean over the map of ReLU(Conv3x3)))))``, or with ``"direction"`` the
    angle of the vector that the last FC gives, over the full circle.

    Initialised as the published code does: the convolution by PyTorch's default, the linear layers
    from a normal distribution of deviation 0.02 with zero bias. With such small weights the angle
    starts near 0; a direction starts near (1, 0).

    Args:
        width: channels of a token.
        hidden: channels of the convolution and of the hidden layer.
        form: ``"tanh"`` as published, or ``"direction"``.
    """

    def __init__(
        self,
        width: int,
        hidden: tuple[int, int],
        form: Literal["tanh", "direction"] = "tanh",
    ) -> None:
        super().__init__()
        self.form = form
        self.conv = nn.Conv2d(width, hidden[0], kernel_size=3, padding=1)
        self.hidden = nn.Linear(hidden[0], hidden[1])
        self.out = nn.Linear(hidden[1], 1 if form == "tanh" else 2)
        for linear in (self.hidden, self.out):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if form == "direction":
            nn.init.ones_(self.out.bias[:1])

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """The angle of every image.

        Args:
            tokens: ``[B, 2 + H*W, C]``: class, view, patches in row-major order.
            size: ``(H, W)``.

        Returns:
            ``[B]``, radians in (-pi/2, pi/2), of a direction in [-pi, pi]; float32 or float64.
        """
        return self.angle(self.features(tokens, size))

    def features(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """What the angle is predicted from; arguments as those of a call, ``[B, hidden[1]]``."""
        bias = self.conv.bias
        assert bias is not None
        return self.features_of(
            gsalign_kernels.conv_relu_mean(tokens, self.conv.weight, bias, size=size, prefix=PREFIX)
        )

    def features_of(self, response: Tensor) -> Tensor:
        """The same by the mean responses of the convolution, ``[B, hidden[0]]``."""
        with without_autocast(response):
            # A few hundred numbers per image: float32 costs nothing, bf16 would cost the angle
            # two digits.
            return self.hidden(response.to(self.hidden.weight.dtype)).relu()

    def angle(self, features: Tensor) -> Tensor:
        """The angle by the features: ``[B, hidden[1]] -> [B]``."""
        with without_autocast(features):
            out = promote(self.out(features))
            if self.form == "direction":
                return angle_of(out)
            return out.squeeze(1).tanh() * (math.pi / 2)


def _follow_loaded_weights(module: nn.Module, incompatible_keys: object) -> None:
    """After loading with ``assign=True`` the weights may live elsewhere than the basis does."""
    assert isinstance(module, LTPS)
    module._make_constants()


class LTPS(nn.Module):
    """Learnable thin-plate spline on the patch tokens.

    The target points stay on the regular grid, so the spline's basis ``M`` is constant; the source
    points are learned, start on the grid and are shared by the batch; only the rotation angle
    differs between images. Patch tokens become ``x + eta * bilinear(x, grid)``; with points on
    the grid and angle 0 that is ``(1 + eta) * x``.

    With ``aspect_true`` the rotation is rigid in the map's patches; as published it is one of the
    square [-1, 1]^2. With ``points_per_image`` every image adds offsets of its own to the source
    points, before the rotation. Either takes :func:`warp_tokens_by_points`.

    Args:
        width: channels of a token.
        size: rows and columns of the patch map.
        config: control points, eta and hidden sizes.
    """

    basis: Tensor
    control: Tensor
    splines: Tensor

    def __init__(self, width: int, size: tuple[int, int], config: LtpsConfig) -> None:
        super().__init__()
        self.size = size
        self.eta = config.eta
        self.control_points = config.control_points
        self.by_points = config.aspect_true or config.points_per_image
        # ±1 are the centres of the outermost patches.
        self.aspect = (size[1] - 1) / (size[0] - 1) if config.aspect_true else 1.0
        points = control_grid(config.control_points)
        # Made empty first, so that a default device or type in force applies to it.
        self.source_points = nn.Parameter(torch.empty(points.shape).copy_(points))
        self.predictor = AnglePredictor(width, config.hidden, config.angle)
        self.offsets: PointOffsets | None = None
        if config.points_per_image:
            self.offsets = PointOffsets(config.hidden[1], config.control_points)
        for name, constant in self._constants().items():
            self.register_buffer(name, constant, persistent=False)
        self.register_load_state_dict_post_hook(_follow_loaded_weights)

    def _constants(self) -> dict[str, Tensor]:
        """``M [H*W, K]`` and what points that differ between images need.

        For where and in what the module computes.
        """
        # Whatever kernels are asked for: they are for the tokens' device, and this is on the CPU.
        points = control_grid(self.control_points)
        exact = {"basis": gsalign_kernels.tps_basis(points, self.size, implementation="auto")}
        if self.by_points:
            exact |= {"control": points, "splines": unit_splines(points)}
        learned = self.source_points
        dtype = torch.float64 if learned.dtype == torch.float64 else torch.float32
        return {name: each.to(device=learned.device, dtype=dtype) for name, each in exact.items()}

    def _make_constants(self) -> None:
        for name, constant in self._constants().items():
            setattr(self, name, constant)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LTPS:
        # Made anew rather than converted: .double() then has a basis exact in float64, .bfloat16()
        # keeps its grid in float32, and .to_empty() after building on meta has real numbers.
        super()._apply(fn, recurse)
        self._make_constants()
        return self

    def angle(self, tokens: Tensor) -> Tensor:
        """The rotation angle of every image: ``[B, 2 + H*W, C] -> [B]``, radians."""
        return self.predictor(tokens, self.size)

    def points(self, offsets: Tensor | None = None) -> Tensor:
        """Where the control points read before the rotation, in the type of the basis.

        Args:
            offsets: ``[B, K, 2]`` of the images; None for the points that they share.

        Returns:
            ``[B, K, 2]``, or ``[K, 2]``.
        """
        shared = self.source_points.to(self.basis.dtype)
        return shared if offsets is None else shared + offsets.to(shared.dtype)

    def sampling_grid(self, angle: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Where each patch of the output reads the input, for pictures and tests.

        Args:
            angle: ``[B]``, radians.
            offsets: ``[B, K, 2]``, or None, as a call gives them.

        Returns:
            ``[B, H, W, 2]`` positions (x, y) in [-1, 1], ``align_corners=True``.
        """
        plain = self.basis @ self.points(offsets)
        return rotated(plain, angle.to(self.basis.dtype), self.aspect).unflatten(1, self.size)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Warp the patch tokens.

        Args:
            tokens: ``[B, 2 + H*W, C]``: class, view, patches in row-major order.

        Returns:
            Tokens of the same shape, class and view unchanged; the angles ``[B]`` in radians; and
            what every image adds to the control points, ``[B, K, 2]``, None where they share them.
        """
        features = self.predictor.features(tokens, self.size)
        angle = self.predictor.angle(features)
        offsets = None if self.offsets is None else self.offsets(features)
        return self.warp(tokens, angle, offsets), angle, offsets

    def warp(self, tokens: Tensor, angle: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Warp the patch tokens at given angles.

        Args:
            tokens: ``[B, 2 + H*W, C]``, any C.
            angle: ``[B]``, radians.
            offsets: ``[B, K, 2]`` of a layer with ``points_per_image``; None for none.

        Returns:
            Tokens of the same shape, class and view unchanged.
        """
        points, angle = self.points(offsets), angle.to(self.basis.dtype)
        if self.by_points:
            with without_autocast(tokens):
                values = rotated(points, angle, self.aspect)
            return warp_tokens_by_points(
                tokens,
                self.control,
                self.splines,
                values,
                size=self.size,
                eta=self.eta,
                prefix=PREFIX,
            )
        return gsalign_kernels.warp_tokens(
            tokens,
            points,
            angle,
            self.basis,
            size=self.size,
            eta=self.eta,
            prefix=PREFIX,
        )

    def extra_repr(self) -> str:
        """The sizes, for printing the module."""
        return f"size={self.size}, control_points={self.control_points}, eta={self.eta}"
