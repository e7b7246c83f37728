"""Accelerator kernels, imported as ``hyperjax.kernels``."""

if __name__ != "hyperjax.kernels":
    raise ImportError("Install hyperjax, then `import hyperjax.kernels`.")
