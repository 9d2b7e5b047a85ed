"""What holds a policy back. conf/constraint/ names these classes; one of your own extends Constraint or Projection."""

from cdpo.constraints.bias_only import BiasOnly
from cdpo.constraints.constraint import Constraint
from cdpo.constraints.dropout import Dropout
from cdpo.constraints.early_stop import EarlyStop
from cdpo.constraints.freeze import Freeze
from cdpo.constraints.kl_budget import KLBudget
from cdpo.constraints.l2_ball import L2Ball
from cdpo.constraints.l2_to_start import L2ToStart
from cdpo.constraints.linf_ball import LinfBall
from cdpo.constraints.lora import LoRA
from cdpo.constraints.projection import Projection
from cdpo.constraints.sparse_topk import SparseTopK
from cdpo.constraints.weight_decay import WeightDecay

__all__ = [
    "BiasOnly", "Constraint", "Dropout", "EarlyStop", "Freeze", "KLBudget", "L2Ball", "L2ToStart", "LinfBall", "LoRA",
    "Projection", "SparseTopK", "WeightDecay",
]  # fmt: skip
