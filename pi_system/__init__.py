"""Private inference of SENet-linearized neural networks between two parties."""

__version__ = "0.1.0"
