"""From log-probs to a number per pair or Item. conf/loss/ names these classes; one of your own extends PairLoss."""

from cdpo.losses.anchored import KTO, CalDPO, DPOPositive
from cdpo.losses.candidates import RLHF, OnPolicyRegression
from cdpo.losses.combined import WPO, Sum
from cdpo.losses.divergence import FDPO
from cdpo.losses.explicit import EXPO, EXPORegression
from cdpo.losses.gaussian import Gaussian
from cdpo.losses.loss import Loss, PairLoss
from cdpo.losses.pairwise import BCO, DPO, EXO, IPO, NCA, SFT, SPPO, APODown, APOZero, DiscoPOP, Hinge, Robust
from cdpo.losses.reference_free import ORPO, SimPO
from cdpo.losses.rewards import ODPO, REBEL
from cdpo.losses.transport import AOT

__all__ = [
    "AOT", "BCO", "DPO", "EXO", "EXPO", "FDPO", "IPO", "KTO", "NCA", "ODPO", "ORPO", "REBEL", "RLHF", "SFT", "SPPO",
    "WPO", "APODown", "APOZero", "CalDPO", "DPOPositive", "DiscoPOP", "EXPORegression", "Gaussian", "Hinge", "Loss",
    "OnPolicyRegression", "PairLoss", "Robust", "SimPO", "Sum",
]  # fmt: skip
