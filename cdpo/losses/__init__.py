"""From log-probs to a number per pair or Item. conf/loss/ names these classes; one of your own extends PairLoss."""

from cdpo.losses.candidates import RLHF, OnPolicyRegression
from cdpo.losses.combined import WPO, Sum
from cdpo.losses.divergence import FDPO
from cdpo.losses.gaussian import Gaussian
from cdpo.losses.loss import Loss, PairLoss
from cdpo.losses.pairwise import (
    BCO,
    DPO,
    EXO,
    EXPO,
    IPO,
    NCA,
    ODPO,
    ORPO,
    SFT,
    SPPO,
    APODown,
    APOZero,
    DiscoPOP,
    Hinge,
    Robust,
    SimPO,
)  # fmt: skip

__all__ = [
    "BCO", "DPO", "EXO", "EXPO", "FDPO", "IPO", "NCA", "ODPO", "ORPO", "RLHF", "SFT", "SPPO", "WPO", "APODown",
    "APOZero", "DiscoPOP", "Gaussian", "Hinge", "Loss", "OnPolicyRegression", "PairLoss", "Robust", "SimPO", "Sum",
]  # fmt: skip
