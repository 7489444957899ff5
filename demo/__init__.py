"""A preference set and a model small enough to run both phases on two CPU cores, without a network."""
