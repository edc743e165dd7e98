"""Ray Tune over the rounds: which loss, which selection, how many frames."""

from nightseg.pipeline.search.run import Found, search
from nightseg.pipeline.search.settings import Dimension, Search

__all__ = ["Dimension", "Found", "Search", "search"]
