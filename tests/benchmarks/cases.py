"""What is compared: a model with random weights, pairs of HH, and the order in which both sides see them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cdpo.batch import Item
from cdpo.data.packing import Plan
from cdpo.data.rows import Row
from cdpo.data.sources import Jsonl

HH = Path(__file__).parents[2] / "../shared/data/hh-harmless-base-test.jsonl.gz"


@dataclass(frozen=True)
class Case:
    """One comparison. Sizes are those of the model; lengths are in tokens."""

    name: str
    vocabulary: int = 32_000
    layers: int = 8
    width: int = 256
    batch: int = 8  # prompts per optimizer step
    candidates: int = 2  # responses per prompt; with K > 2 every pair of them is a preference
    response: str = "hh"  # hh: as they are; short: at most 12 tokens; long: six of them joined
    lora: bool = False
    longest_prompt: int = 384
    learning_rate: float = 1e-4  # large enough that the second step's loss is not log 2 any more

    @property
    def pairs(self) -> int:
        """Pairs per optimizer step."""
        return self.batch * self.candidates * (self.candidates - 1) // 2


CASES = {
    case.name: case
    for case in (
        Case("hh"),
        Case("lora", lora=True),
        Case("vocabulary-128k", vocabulary=128_000),
        Case("short", response="short"),
        Case("long", response="long"),
        Case("candidates-4", candidates=4),
        Case("tiny", vocabulary=300, layers=1, width=32, batch=2, longest_prompt=48),
    )
}

LARGE = {"vocabulary": 128_000, "layers": 16, "width": 2048}  # Llama-like, with 1.2 billion weights
FOR_GPUS = {
    case.name: case
    for case in (
        Case("1b-lora-64", **LARGE, batch=64, lora=True),
        Case("1b-64", **LARGE, batch=64, learning_rate=1e-5),
        Case("1b-lora-16", **LARGE, batch=16, lora=True),
        Case("1b-16", **LARGE, batch=16, learning_rate=1e-5),
        Case("1b-lora-k8", **LARGE, batch=4, candidates=8, lora=True),
        CASES["tiny"],
    )
}


@dataclass(frozen=True)
class Setup:
    """What a side is to train, and where. `own` is for cdpo's side alone: more KEY=VALUE of its command line."""

    case: Case
    work: Path  # folder of all cases: those of one shape share a model
    steps: int
    device: str = "cpu"
    threads: int = 1
    own: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where the case lies."""
        return self.work / self.case.name


def prepare(setup: Setup, data: Path) -> list[Item]:
    """Write model, tokenizer and rows for the steps of both sides. Returns the Items in the order of training."""
    case, folder, steps = setup.case, setup.folder, setup.steps
    folder.mkdir(parents=True, exist_ok=True)
    rows = _rows(data)
    model = folder.parent / f"model-{case.vocabulary}-{case.layers}-{case.width}"
    if not model.is_dir():
        _write_model(case, rows, model, setup.device)
    (folder / "model").symlink_to(model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    items = list(_items(case, rows, tokenizer, steps * case.batch))
    order = [i for step in range(steps) for part in _plan(case, len(items), steps)[step] for i in part]
    _write(folder / "cdpo.jsonl", [_row(item, tokenizer) for item in items])
    _write(folder / "trl.jsonl", [pair for i in order for pair in _pairs(items[i], tokenizer)])
    return [items[i] for i in order]


@lru_cache(maxsize=1)
def _rows(data: Path) -> list[Row]:
    source = Jsonl(path=str(data), eval_size=0, on_identical="drop", on_empty="drop", max_drop_fraction=1)
    return source.load(0).train


def _write_model(case: Case, rows: list[Row], folder: Path, device: str) -> None:
    tokenizer = _tokenizer(rows, case.vocabulary)
    tokenizer.save_pretrained(folder)
    with torch.device(device):
        _model(case, tokenizer).save_pretrained(folder)
    if device == "cuda":
        torch.cuda.empty_cache()  # it is the sides' from here on


def _plan(case: Case, items: int, steps: int) -> Plan:
    return Plan([1] * items, case.batch, steps, seed=0, micro_batch=1)


def _tokenizer(rows: list[Row], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, learnt from HH itself; it has no more than 32,000 tokens, whatever the model has room for."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, 32_000), special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((text for row in rows for text in row.texts()), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def _model(case: Case, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        intermediate_size=8 * case.width // 3 // 8 * 8,
        num_hidden_layers=case.layers,
        num_attention_heads=max(1, case.width // 64),
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def _items(case: Case, rows: list[Row], tokenizer: PreTrainedTokenizerFast, count: int) -> Iterator[Item]:
    """The first rows of the file whose prompts are not too long, without EOS; K > 2 borrows from the rows after."""
    end, made = tokenizer.eos_token_id, 0
    for i in range(len(rows)):
        prompt = tokenizer.encode(rows[i].prompt)
        texts = [text for k in range(24) for text in rows[(i + k) % len(rows)].responses]
        encoded = [tokenizer.encode(text) for text in texts]
        joined = 6 if case.response == "long" else 1
        responses = [list(chain(*encoded[k :: case.candidates][:joined])) for k in range(case.candidates)]
        if case.response == "short":
            responses = [response[:12] for response in responses]
        if len(prompt) <= case.longest_prompt and len(set(map(tuple, responses))) == case.candidates:
            yield Item(prompt, [[*response, end] for response in responses], [], source=f"cdpo.jsonl:{made + 1}")
            made += 1
        if made == count:
            return
    raise ValueError(f"the file has {made} usable rows, and {count} are needed; make fewer steps")


def _row(item: Item, tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    prompt, *texts = (tokenizer.decode(ids) for ids in (item.prompt, *(response[:-1] for response in item.responses)))
    return {"prompt": prompt, "responses": texts, "rewards": [float(-k) for k in range(len(texts))]}


def _pairs(item: Item, tokenizer: PreTrainedTokenizerFast) -> Iterator[dict[str, object]]:
    row = _row(item, tokenizer)
    texts = row["responses"]
    for k, chosen in enumerate(texts):
        for rejected in texts[k + 1 :]:
            yield {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
