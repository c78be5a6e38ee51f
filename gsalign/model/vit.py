"""The backbone: timm's ViT blocks with a view token, view decoupling and LTPS before attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gsalign.model.config import ModelConfig
from gsalign.model.linear import attention, linear, linear_gelu
from gsalign.model.ltps import LTPS, PREFIX


def attend(module: Any, tokens: Tensor, count: int | None = None) -> Tensor:
    """Self-attention, of all tokens or with the first ``count`` alone as queries.

    Args:
        module: timm's attention module (``qkv``, ``proj``, ``num_heads``).
        tokens: ``[B, N, C]``; all of them are keys and values.
        count: number of queries; None for all.

    Returns:
        ``[B, N, C]``, or of it the first ``count`` tokens.
    """
    width = tokens.shape[2]
    weight, bias = module.qkv.weight, module.qkv.bias
    heads = (module.num_heads, width // module.num_heads)
    if count is None:
        mixed = linear(tokens, weight, bias).unflatten(2, (3, *heads))
        query, key, value = mixed.permute(2, 0, 3, 1, 4).unbind(0)
    else:
        query = linear(tokens[:, :count], weight[:width], bias[:width])
        query = query.unflatten(2, heads).transpose(1, 2)
        key_value = linear(tokens, weight[width:], bias[width:])
        key, value = key_value.unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4).unbind(0)
    attended = attention(query, key, value).transpose(1, 2).flatten(2)
    return linear(attended, module.proj.weight, module.proj.bias)


def feed_forward(module: Any, tokens: Tensor) -> Tensor:
    """The MLP of timm (``fc1``, GELU, ``fc2``): ``[B, N, C] -> [B, N, C]``."""
    hidden = linear_gelu(tokens, module.fc1.weight, module.fc1.bias)
    return linear(hidden, module.fc2.weight, module.fc2.bias)


def run_block(
    block: Any, tokens: Tensor, *, queries: int | None = None, stochastic: bool = True
) -> Tensor:
    """One pre-norm transformer block of timm, with two ways to leave work out.

    Args:
        block: timm's block (``norm1``, ``attn``, ``drop_path1``, ``norm2``, ``mlp``,
            ``drop_path2``).
        tokens: ``[B, N, C]``.
        queries: when given, only this many leading tokens are computed.
        stochastic: whether stochastic depth may act (it also needs training mode).

    Returns:
        ``[B, N, C]``, or ``[B, queries, C]``.
    """
    normalised = block.norm1(tokens)
    attended = attend(block.attn, normalised, queries)
    if queries is not None:
        tokens = tokens[:, :queries]
    tokens = tokens + (block.drop_path1(attended) if stochastic else attended)
    expanded = feed_forward(block.mlp, block.norm2(tokens))
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
        recompute: whether the backward pass computes every layer anew instead of keeping what is
            between its first and last tokens: the same numbers, a third more arithmetic, and of
            each layer only its tokens in memory. False until somebody sets it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.recompute = False
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
    ) -> tuple[Tensor, Tensor]:
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
            ``[B, 2 + N, C]``; and the LTPS angles ``[L, B]`` in radians, float32 or float64.
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
        last = len(self.blocks) - 1
        recompute = self.recompute and torch.is_grad_enabled()
        for index in range(len(self.blocks)):
            queries = PREFIX if index == last and not all_tokens else None
            arguments = (index, tokens, queries, stochastic)
            if recompute:
                tokens, angle = checkpoint(self._layer, *arguments, use_reentrant=False)
            else:
                tokens, angle = self._layer(*arguments)
            if angle is not None:
                angles.append(angle)
        if not angles:
            return tokens, patches.new_zeros(0, batch)
        return tokens, torch.stack(angles)

    def _layer(
        self, index: int, tokens: Tensor, queries: int | None, stochastic: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One warp, where the layer has one, one block and the subtraction; and the angles."""
        angle = None
        if str(index) in self.ltps:
            tokens, angle = self.ltps[str(index)](tokens)
        tokens = run_block(self.blocks[index], tokens, queries=queries, stochastic=stochastic)
        # In place: the block's output is a fresh sum that nothing else holds, and a copy of all
        # tokens to change one would cost as much as the warp.
        tokens[:, 0] -= tokens[:, 1]
        return tokens, angle
