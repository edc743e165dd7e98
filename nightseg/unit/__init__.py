"""UNIT, the translator that is trained: settings, network, losses, data, training."""
