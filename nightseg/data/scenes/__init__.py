"""Procedural street scenes with exact labels, by day, at twilight and at night: the data of the demo and of the tests.

street.py   the plan of a street: camera, ground, what stands where; the function `scene`
sheet.py    camera, and the sheet whose strokes carry colour and surface together; class numbers
things.py   people, trees, lamps, signs, cars, houses, fences, skyline
light.py    weather of each domain, and how a street appears under it: windows, wet road, bloom, sensor
"""

from nightseg.data.scenes.street import Scene, scene

__all__ = ["Scene", "scene"]
