"""Fixtures of networks as detectron2 has them."""

from tests.detectron2_networks import detectron2_tensors, drawn_as_golden, golden

__all__ = ["detectron2_tensors", "drawn_as_golden", "golden"]
