"""LinVideo in JAX: Wan2.1 with mostly linear attention."""

__version__ = "0.1.0"
