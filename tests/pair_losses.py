"""Every loss on pairs, by its preset and in other variants, and log-probs of made-up pairs to give them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from cdpo.batch import Logps
from cdpo.losses import DPO, EXPO, FDPO, KTO, ODPO, SFT, WPO, DiscoPOP, Gaussian, SimPO
from cdpo.losses.loss import per_unit

CONF = Path(__file__).parents[1] / "conf"
PRESETS = sorted(file.stem for file in (CONF / "loss").glob("*.yaml"))


def composed(*overrides: str):
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(overrides=["+beta=0.1", *overrides]).loss


def preset(name: str):
    return instantiate(composed(f"+loss={name}"), _convert_="all")


# what no preset covers: other branches of the same classes
VARIANTS = {
    "dpo smoothed": DPO(label_smoothing=0.2),
    "discopop wide": DiscoPOP(tau=3.0),
    "odpo rewards": ODPO(offset="rewards", scale=0.5),
    "expo pair": EXPO(kl="pair"),
    "fdpo chi squared, cut off": FDPO(divergence="chi_squared", max_reward=1.0),
    "kto candidates": KTO(desirable=1.3, undesirable=0.7, kl="candidates"),
    "simpo alpha below 0": SimPO(alpha=-0.5),
    "sft sum": SFT(length_normalized=False),
    "wpo importance": WPO(FDPO(divergence="forward_kl"), weight="importance"),
    "gaussian linear schedule": Gaussian(noise_scale=50.0, noise_schedule="linear"),
    "gaussian constant linear": Gaussian(noise="constant", noise_scale=2.0, penalty="linear"),
}
LOSSES = {name: loss for name, loss in ((n, preset(n)) for n in PRESETS) if loss.unit == "pair"} | VARIANTS
LOSSES = {name: loss for name, loss in LOSSES.items() if not getattr(loss, "whole_steps", False)}  # test_transport
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def logps_of(policy, reference, length, **more) -> Logps:
    """Pairs (0, 1), (2, 3), ... of the given responses, one pair per Item."""
    policy = torch.as_tensor(policy)
    pairs = torch.arange(len(policy)).view(-1, 2)
    like = {"dtype": policy.dtype}
    count = len(pairs)
    reference = torch.as_tensor(reference, **like)
    defaults = {"preference": torch.ones(count, **like), "weight": torch.ones(count, **like), "base": reference}
    return Logps(
        policy=policy,
        reference=reference,
        length=torch.as_tensor(length, **like),
        item=torch.arange(len(policy)) // 2,
        pairs=pairs,
        sources=tuple(f"data.jsonl:{i + 1}" for i in range(count)),
        **(defaults | more),
    )


def random_logps(pairs: int = 8, seed: int = 0, dtype=torch.float64, **more) -> Logps:
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(1, 9, (2 * pairs,), generator=g)
    policy, reference = -2 * length * torch.rand(2, 2 * pairs, generator=g, dtype=torch.float64)
    rewards = torch.randn(2 * pairs, generator=g, dtype=torch.float64).to(dtype)
    return logps_of(policy.to(dtype), reference.to(dtype), length, rewards=rewards, progress=0.3, baseline=0.7, **more)


def gradient(loss, logps: Logps) -> torch.Tensor:
    policy = logps.policy.detach().requires_grad_()
    return torch.autograd.grad(per_unit(loss, replace(logps, policy=policy)).sum(), policy)[0]


def all_pairs(policy: torch.Tensor, reference: torch.Tensor) -> Logps:
    """One prompt, K one-token responses, which are all there are, and all K^2 ordered pairs."""
    pairs = torch.cartesian_prod(torch.arange(len(policy)), torch.arange(len(policy)))
    ones = torch.ones(len(pairs), dtype=policy.dtype)
    item = torch.zeros(len(policy), dtype=torch.long)
    return Logps(policy, reference, torch.ones_like(policy), item, pairs, ones, ones, base=reference)
