"""What several networks share: model folders, files of weights, EMA, normalisation."""
