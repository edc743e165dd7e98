"""The recipe as a graph of stages, run, searched and summed up."""
