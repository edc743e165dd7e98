"""Procedural street scenes with exact labels, by day, at twilight and at night: the data of the demo and of the tests.

street.py    the plan of a street: camera, ground, what stands where; the function `scene`
sheet.py     camera, and the sheet whose strokes carry colour and surface together; class numbers
things.py    people, bicyclists, trees, lamps, signs, signals, bollards
cars.py      cars, vans, buses
lots.py      houses, shops, fences, hedges, gardens, skyline
weather.py   light and exposure, drawn for each domain
light.py     how a street looks under that light: windows, wet road, bloom, sensor
"""

from nightseg.data.scenes.street import Scene, scene

__all__ = ["Scene", "scene"]
