"""Triton kernels of the masked part pooling: their design, and the three of them.

What has to move, for B 64, N 128, C 768, P 6 (masks and pooled parts are 6 % more), its time at the
4.15 TB/s that an H200 copies, and the products of a weight and a token:

              forward             backward            products
    float32   25.2 MB   6.1 us    50.3 MB   12.1 us   38 M forward, 75 M backward
    bfloat16  12.6 MB   3.0 us    25.2 MB    6.1 us   the same

The products are made value by value in float32: 1.1 and 2.3 us of that GPU's 67 TFLOP/s. Matrix
units have little to win: in float32 there are none, and in bfloat16 the weights would come in two
halves, of which one that is 0 makes a NaN of an infinite token. What counts is instructions, and
that nothing goes from thread to thread inside a loop. No layout is left for the compiler to choose:

- every tile of a loop is ``[ROWS, columns]`` with 16 bytes of a row a thread, and there are as many
  of them in a tuple as are wanted, one per part or per round of rows. Triton 3.6 laid out tiles of
  three and more axes so that most of them lay in local memory.
- what belongs to a row, its weights, are tensors of ``ROWS``, fewer than there are threads. The
  compiler loads and computes such again wherever they are needed, instead of moving them.

Forward, a program has a sample, a group of parts and a tile of channels. It makes the weights of
all positions once, a thread per position, and writes them, two parts in 64 bits, to memory that is
its own; after a barrier they come back from the caches, a load for two parts. So a softmax costs
nothing in the loop. Tokens are asked for before all this, and in the loop a tile's registers get
its successor as soon as it is used up: all rounds but one are under way. One more program per
sample and group makes visibilities, sums and peaks.

Backward, a program has a sample and a block of rows and goes along the channels once. The 16 bytes
that a thread has are taken apart into tiles ``[ROWS, LANES]``, each in other registers of the same
thread, and so the dot products of a row take one register per part and not one per value. Lanes
are added up once, at the end. More than 8 parts take a walk for each group of parts, and one more
for the tokens' gradients. ``finish_kernel`` adds what several programs or samples found.

A channel of the masks is a part, or the background before the parts.
"""

from __future__ import annotations

from gsalign_kernels.triton.pool_backward_kernels import backward_kernel, finish_kernel
from gsalign_kernels.triton.pool_forward_kernels import forward_kernel

__all__ = ["backward_kernel", "finish_kernel", "forward_kernel"]
