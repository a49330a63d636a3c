"""Kernels for jgia: one folder per operation, importing JAX and never jgia.

Every operation has an XLA reference, which is its contract, its fallback and its default, and
Pallas kernels beside it that a caller asks for by name. Import an operation from its folder::

    from jgia_kernels.soft_threshold import soft_threshold

Nothing is re-exported here, because a function would hide the folder of the same name.
"""
