"""The backbone: timm's ViT blocks with a view token, view decoupling and LTPS before attention."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gsalign.model.config import ModelConfig
from gsalign.model.lean import linear_after_gelu, linear_after_norm, may_forget
from gsalign.model.linear import attention, attention_weights, linear, linear_gelu
from gsalign.model.ltps import LTPS, PREFIX

Recompute = Literal["nothing", "cheap", "layers"]


def attend(module: Any, packed: Tensor) -> Tensor:
    """Self-attention of all tokens.

    Args:
        module: timm's attention module (``proj``, ``num_heads``).
        packed: ``[B, N, 3 * C]``, queries, keys and values as its ``qkv`` gives them.

    Returns:
        ``[B, N, C]``.
    """
    query, key, value = _heads(packed, 3, module.num_heads)
    return _projected(module, attention(query, key, value))


def attend_from(module: Any, tokens: Tensor, count: int) -> Tensor:
    """Self-attention whose queries are the first ``count`` tokens only.

    Args:
        module: timm's attention module (``qkv``, ``proj``, ``num_heads``).
        tokens: ``[B, N, C]``; all of them are keys and values.
        count: number of queries.

    Returns:
        ``[B, count, C]``, what the full attention gives at these positions.
    """
    width = tokens.shape[2]
    weight, bias = module.qkv.weight, module.qkv.bias
    (query,) = _heads(linear(tokens[:, :count], weight[:width], bias[:width]), 1, module.num_heads)
    key, value = _heads(linear(tokens, weight[width:], bias[width:]), 2, module.num_heads)
    return _projected(module, attention(query, key, value))


def attended_from(module: Any, tokens: Tensor) -> Tensor:
    """Where the self-attention of all tokens looks, which :func:`attend` never holds.

    Args:
        module: timm's attention module (``qkv``, ``num_heads``).
        tokens: ``[B, N, C]``, normalised as the block normalises them.

    Returns:
        ``[B, heads, N, N]``: the weight of token j in what token i gets; rows sum to 1.
    """
    width = tokens.shape[2]
    packed = linear(tokens, module.qkv.weight[: 2 * width], module.qkv.bias[: 2 * width])
    return attention_weights(*_heads(packed, 2, module.num_heads))


def _heads(packed: Tensor, count: int, heads: int) -> tuple[Tensor, ...]:
    """``[B, N, count * C]`` as ``count`` times ``[B, heads, N, C / heads]``."""
    return packed.unflatten(2, (count, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _projected(module: Any, attended: Tensor) -> Tensor:
    return linear(attended.transpose(1, 2).flatten(2), module.proj.weight, module.proj.bias)


def feed_forward(module: Any, norm: nn.LayerNorm, tokens: Tensor, *, again: bool) -> Tensor:
    """Timm's MLP (``fc1``, GELU, ``fc2``) of the normalised tokens: ``[B, N, C] -> [B, N, C]``."""
    if may_forget(again):
        hidden = linear_after_norm(module.fc1, norm, tokens, again=again)
        return linear_after_gelu(module.fc2, hidden, again=again)
    hidden = linear_gelu(norm(tokens), module.fc1.weight, module.fc1.bias)
    return linear(hidden, module.fc2.weight, module.fc2.bias)


def run_block(
    block: Any,
    tokens: Tensor,
    *,
    queries: int | None = None,
    stochastic: bool = True,
    again: bool = False,
) -> Tensor:
    """One pre-norm transformer block of timm, with ways to leave work and memory out.

    Args:
        block: timm's block (``norm1``, ``attn``, ``drop_path1``, ``norm2``, ``mlp``,
            ``drop_path2``).
        tokens: ``[B, N, C]``.
        queries: when given, only this many leading tokens are computed.
        stochastic: whether stochastic depth may act (it also needs training mode).
        again: whether the backward pass makes norms and GELU again, see :mod:`gsalign.model.lean`.

    Returns:
        ``[B, N, C]``, or ``[B, queries, C]``.
    """
    if queries is None:
        packed = linear_after_norm(block.attn.qkv, block.norm1, tokens, again=again)
        attended = attend(block.attn, packed)
    else:
        attended = attend_from(block.attn, block.norm1(tokens), queries)
        tokens = tokens[:, :queries]
    tokens = tokens + (block.drop_path1(attended) if stochastic else attended)
    expanded = feed_forward(block.mlp, block.norm2, tokens, again=again)
    return tokens + (block.drop_path2(expanded) if stochastic else expanded)


class Backbone(nn.Module):
    """View-decoupled vision transformer (VDT) with LTPS.

    Token order: class, view, then the patches row by row. After every block, the last included,
    the view token is subtracted from the class token.

    Initialised as the published code does: linear layers, class token and position embedding from
    a truncated normal of deviation 0.02, the view token at 0, the patch projection from a normal
    of variance 2 / fan-out.

    Args:
        config: sizes of the network.

    Attributes:
        recompute: what the backward pass computes anew instead of keeping it; the same numbers.
            ``"cheap"``: the outputs of norms and GELU, for a few percent more time.
            ``"layers"``: everything between a layer's first and last tokens, for a third more
            arithmetic. ``"nothing"`` until somebody sets it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.recompute: Recompute = "nothing"
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.patch_embed = PatchEmbed(config.image_size, config.patch_size, 3, config.width)
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                config.num_heads,
                mlp_ratio=config.mlp_ratio,
                qkv_bias=True,
                drop_path=config.drop_path * index / max(config.depth - 1, 1),
                norm_layer=norm,
            )
            for index in range(config.depth)
        )
        self.norm = norm(config.width)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

        rows, columns = config.grid
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.view_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.position = nn.Parameter(torch.zeros(1, PREFIX + rows * columns, config.width))
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.position, std=0.02)
        nn.init.kaiming_normal_(self.patch_embed.proj.weight, mode="fan_out", nonlinearity="relu")

        # By block number, so that a layer keeps its name whichever others have an LTPS.
        self.ltps = nn.ModuleDict(
            {
                str(layer): LTPS(config.width, config.grid, config.ltps)
                for layer in config.ltps_layers
            }
        )

    def patches(self, images: Tensor) -> Tensor:
        """Raw patch embeddings, before the position embedding: ``[B, 3, H, W] -> [B, N, C]``."""
        return self.patch_embed(images)

    def forward(
        self, patches: Tensor, *, all_tokens: bool = False, stochastic: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run the blocks.

        Nothing after the network reads the patches of the last block, so by default its queries
        and its MLP are computed for the class and view tokens alone: the same numbers for a sixth
        of that block's work.

        Args:
            patches: ``[B, N, C]`` raw patch embeddings.
            all_tokens: compute the patches of the last block too.
            stochastic: whether stochastic depth may act (it also needs training mode).

        Returns:
            Tokens after the last subtraction and before the final norm, ``[B, 2, C]`` or
            ``[B, 2 + N, C]``; the LTPS angles ``[L, B]`` in radians, float32 or float64; and what
            the images add to the control points, ``[L, B, K, 2]``, None where they share them.
        """
        batch = patches.shape[0]
        position = self.position
        tokens = torch.cat(
            [
                (self.class_token + position[:, :1]).expand(batch, -1, -1),
                (self.view_token + position[:, 1:PREFIX]).expand(batch, -1, -1),
                patches + position[:, PREFIX:],
            ],
            dim=1,
        )
        angles: list[Tensor] = []
        offsets: list[Tensor] = []
        last = len(self.blocks) - 1
        recompute = self.recompute == "layers" and torch.is_grad_enabled()
        for index in range(len(self.blocks)):
            queries = PREFIX if index == last and not all_tokens else None
            arguments = (index, tokens, queries, stochastic)
            if recompute:
                tokens, angle, moved = checkpoint(self._layer, *arguments, use_reentrant=False)
            else:
                tokens, angle, moved = self._layer(*arguments)
            if angle is not None:
                angles.append(angle)
            if moved is not None:
                offsets.append(moved)
        if not angles:
            return tokens, patches.new_zeros(0, batch), None
        return tokens, torch.stack(angles), torch.stack(offsets) if offsets else None

    def _layer(
        self, index: int, tokens: Tensor, queries: int | None, stochastic: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One warp, where the layer has one, one block and the subtraction.

        The tokens, and angles and offsets of the warp.
        """
        angle = offsets = None
        if str(index) in self.ltps:
            tokens, angle, offsets = self.ltps[str(index)](tokens)
        tokens = run_block(
            self.blocks[index],
            tokens,
            queries=queries,
            stochastic=stochastic,
            again=self.recompute == "cheap",
        )
        # In place: the block's output is a fresh sum that nothing else holds, and a copy of all
        # tokens to change one would cost as much as the warp.
        tokens[:, 0] -= tokens[:, 1]
        return tokens, angle, offsets
