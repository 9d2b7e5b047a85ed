"""Compressive sensing on policies: which penalty of the Gaussian losses finds a direction despite flipped labels."""

from cdpo.policy_recovery.study import PolicyRecovery

__all__ = ["PolicyRecovery"]
