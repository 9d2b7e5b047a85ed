"""From YAML to objects.

Hydra composes a DictConfig, which only this package, train.py and launch/ see. In plain values, resolved, it is what a
`Task` carries and config.json keeps: `composed`. Built and checked it is a `Config`, called `spec`.
"""
