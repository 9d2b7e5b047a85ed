"""One run, from its config to summary.json."""
