"""Which unlabelled frames to learn from: features, distances, choices."""
