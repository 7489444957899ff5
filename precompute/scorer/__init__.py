"""A causal language model + sequences -> the log-prob of every completion token: what both phases share."""

from typing import Literal

Layout = Literal["packed", "padded"]
"""packed: rows without padding, each prompt once; padded: plain batches, for models that packed refuses."""

AttentionKernel = Literal["default", "FA3", "FA4"]
"""Of the packed layout on a GPU; attention.KERNELS says what each needs."""
