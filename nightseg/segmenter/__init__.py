"""Semantic FPN: settings, network, loss, data, training, prediction."""
