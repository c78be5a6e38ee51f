"""Operators in Triton, as ``torch.ops.gsalign_triton``; triton itself is imported at first use."""
