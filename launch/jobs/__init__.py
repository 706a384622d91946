"""Where runs run: submission to Slurm or to this machine, the worker, and the state of every run."""
