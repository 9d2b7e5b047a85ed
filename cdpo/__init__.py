"""cdpo: preference optimisation under learning constraints."""

__version__ = "0.1.0"
