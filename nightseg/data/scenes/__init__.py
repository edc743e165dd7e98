"""Procedural street scenes with exact labels: the data of the demo and of the tests."""

from nightseg.data.scenes.street import Scene, scene

__all__ = ["Scene", "scene"]
