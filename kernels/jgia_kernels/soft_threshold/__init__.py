"""Soft-thresholding, the proximal map of the l1 norm."""

from jgia_kernels.soft_threshold.api import soft_threshold

__all__ = ["soft_threshold"]
