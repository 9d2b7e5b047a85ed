"""Many runs, on this machine or on SLURM."""
