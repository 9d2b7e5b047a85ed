"""cdpo and TRL side by side: launch/benchmark.sh. Nothing here is imported by the package."""
