"""From YAML to objects. The only package, with train.py, that sees Hydra's configs."""
