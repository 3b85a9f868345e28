"""Attention, cross-entropy and log-probability kernels, each beside its NumPy reference."""
