"""Batch scripts for a Slurm cluster, and submit.py, which chains them."""
