"""Responses drawn from a policy, and what they say of its KL to the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cdpo.batch import Item
from cdpo.data.packing import Scored
from cdpo.model.attention import ordinary_attention
from cdpo.model.change import Change
from cdpo.model.layers import uncompiled
from cdpo.model.logps import Scorer


def generations(scorer: Scorer, scored: Scored, count: int, tokens: int, seed: int) -> Iterator[Item]:
    """Sampled continuations of the first `count` prompts, at temperature 1, that leave the run's random state alone.

    Each is an Item with one response, of at most `tokens` tokens: it ends with the first EOS, or is cut.
    """
    devices = [scored.device] if scored.device.type == "cuda" else []
    policy: Any = scorer.eval().model
    state = torch.random.fork_rng(devices=devices)
    with state, ordinary_attention(policy), uncompiled(policy), torch.no_grad():
        torch.manual_seed(seed)
        for item in scored.items[:count]:
            prompt = torch.tensor([item.prompt], device=scored.device)
            out = scorer.ask(lambda policy, prompt=prompt: _continued(policy, prompt, tokens))  # type: ignore[misc]
            yield Item(item.prompt, [out[0, len(item.prompt) :].tolist()], [], source=item.source)


def _continued(policy: Any, prompt: Tensor, tokens: int) -> Tensor:
    """One prompt and what follows it. [1, T] -> [1, T + at most `tokens`]"""
    return policy.generate(  # type: ignore[no-any-return]
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        pad_token_id=0,  # never used: each prompt is continued by itself
        do_sample=True,  # from the policy itself, whatever the checkpoint's generation config says
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
    )


def sampled_kl(scorer: Scorer, change: Change, samples: Scored, budget: int) -> Tensor:
    """log pi(y) - log pi_ref(y) of every sampled response, nats: their mean estimates KL(pi || pi_ref), up to the cut.

    The reference is the policy with its change put aside, so no second model is needed. [samples]
    """
    scorer.eval()
    with torch.no_grad():
        batches = [batch for _, batch in samples.batches(budget)]
        now = torch.cat([scorer(batch)[0] for batch in batches])
        with change.at_start():
            start = torch.cat([scorer(batch)[0] for batch in batches])
    order = [i for indices, _ in samples.batches(budget) for i in indices]
    return (now - start)[torch.tensor(order).argsort()]


@dataclass(frozen=True)
class Draws:
    """Responses that the policy drew after `step` steps, one to each of D prompts."""

    step: int
    scored: Scored

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: no later policy can draw them again."""
        return {"step": self.step, "items": [(one.prompt, one.responses[0], one.source) for one in self.scored.items]}

    @staticmethod
    def restored(state: Mapping[str, Any], like: Scored) -> Draws:
        """What `state_dict` returned, in the layout and on the device of other Items."""
        items = [Item(prompt, [response], [], source=source) for prompt, response, source in state["items"]]
        return Draws(state["step"], Scored(items, like.padded, like.device))
