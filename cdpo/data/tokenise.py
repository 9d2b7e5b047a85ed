"""Rows to Items. One rule: prompt and response are tokenised apart, so that a prompt's tokens suit all its responses.

Refuses to pad, to forge an EOS on a response that was cut, and to lose a row without counting it. Runs share Items: the
same text, tokenizer and limits are tokenised once.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdpo.batch import Item
from cdpo.data.rows import BadRow, Dataset, Ledger, Row
from cdpo.data.shared_items import Ids, decoded, encoded, key_of, slim
from cdpo.errors import ConfigError, DataError
from cdpo.system.cache import Entry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
WINDOW = 64  # characters on each side of the boundary that can change its tokens
CHUNK = 512  # rows between two calls of `pause`
FEW = 100  # rows that are tokenised sooner than a file is found
NOT_PARALLEL = "off"  # as cdpo spells it, so that a user's "false" can be told from it
FORKED: list[bool] = []  # not empty in a forked process, which has lost the threads of its parent
os.register_at_fork(after_in_child=lambda: FORKED.append(True))
TURNS = {"user": "Human", "assistant": "Assistant", "system": "System"}


def tokenise(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    limits: Dataset,
    pause: Callable[[], None] = lambda: None,
    shared: Path | None = None,
) -> tuple[list[Item], Ledger]:
    """Items in the order of `rows`, and the ledger of what was cut or dropped. `pause` may raise to end it early.

    Out of the folder `shared` where an earlier run has left them there; not for fewer than 100 rows, nor for a
    tokenizer that is not of the tokenizers library, which has no complete text form to know it by.

    Raises ConfigError if the tokenizer lacks an EOS or a chat template that the rows need; DataError if more rows are
    dropped, or have another joint tokenisation, than `limits` allow.
    """
    if shared is None or len(rows) < FEW or getattr(tokenizer, "backend_tokenizer", None) is None:
        return _tokenised(rows, tokenizer, limits, pause)
    entry = Entry(shared, key_of(rows, tokenizer, limits))
    with entry.claimed(lambda done: pause()) as found:
        if found is None:
            items, ledger = _tokenised(rows, tokenizer, limits, pause)
            entry.keep(encoded(items, ledger))
            return items, ledger
    items, ledger = decoded(found)
    judge(ledger, limits)  # what a person is told of the rows does not depend on who tokenised them
    return items, ledger


def _tokenised(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, limits: Dataset, pause: Callable[[], None]
) -> tuple[list[Item], Ledger]:
    work = _Tokeniser(tokenizer, limits)
    if any(row.complete for row in rows) and work.eos is None:
        raise ConfigError(f"the tokenizer {work.name!r} has no EOS, which ends every response; set its eos_token")
    items: list[Item] = []
    for chunk in _chunks(rows):
        pause()
        items += work.items(chunk)
    work.ledger.lengths = lengths(items)
    judge(work.ledger, limits)
    return items, work.ledger


def _chunks(rows: list[Row]) -> Iterator[list[Row]]:
    from rich.console import Console
    from rich.progress import track

    chunks = [rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)]
    quiet = len(chunks) < 2 or not sys.stderr.isatty()
    return iter(track(chunks, "tokenising", disable=quiet, console=Console(stderr=True), transient=True))


def judge(ledger: Ledger, limits: Dataset) -> None:
    """Warn of what befell the rows. Raises DataError where that is more than `limits` allow."""
    for kind in ("special_tokens", "boundary_mismatches"):
        tally = ledger.notes[kind]
        if tally.count:
            log.warning("%d rows with %s, first %s", tally.count, kind.replace("_", " "), ", ".join(tally.rows[:5]))
    mismatches = ledger.notes["boundary_mismatches"]
    if mismatches.count > limits.max_mismatch_fraction * ledger.rows:
        raise DataError(
            f"{mismatches.count} of {ledger.rows} rows have other tokens when prompt and response are tokenised "
            f"together, above dataset.max_mismatch_fraction={limits.max_mismatch_fraction:g} "
            f"({', '.join(mismatches.rows[:5])}); let prompts end, or responses begin, with a space or line break"
        )
    ledger.check_drops("tokenisation", limits.max_drop_fraction)


class _Tokeniser:
    """The tokenizer with its special tokens, the limits, and the ledger they fill."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limits: Dataset) -> None:
        self.tokenizer, self.limits, self.ledger = tokenizer, limits, Ledger()
        self.name = tokenizer.name_or_path or type(tokenizer).__name__
        self.eos, self.bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.adds_bos = self.bos is not None and list(tokenizer("").input_ids)[:1] == [self.bos]
        self.slim = slim()
        special = sorted(filter(None, tokenizer.all_special_tokens), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, special)) or r"(?!)")  # (?!) matches nothing

    def items(self, rows: list[Row]) -> list[Item]:
        """The Items of one chunk, tokenised in few calls."""
        texts = [self.render(row) for row in rows]
        prompts = self.ids([prompt for prompt, _ in texts])
        responses = iter(self.ids([text for _, answers in texts for text in answers]))
        mismatches = iter(self.mismatches([(prompt, text) for prompt, answers in texts for text in answers]))
        items = []
        for row, prompt in zip(rows, prompts):
            answers = [next(responses) for _ in row.responses]
            if sum(next(mismatches) for _ in answers):
                self.ledger.note("boundary_mismatches", row.source)
            try:
                items.append(self.item(row, prompt, answers))
                self.ledger.keep()
            except BadRow as problem:
                self.ledger.drop(problem.kind, row.source)
        return items

    def mismatches(self, texts: list[tuple[str, str]]) -> list[bool]:
        """Whether a prompt and its response have other tokens together than apart, looking near where they meet."""
        tails, heads = [prompt[-WINDOW:] for prompt, _ in texts], [response[:WINDOW] for _, response in texts]
        joint = self.ids([tail + head for tail, head in zip(tails, heads)])
        return [j != t + h for j, t, h in zip(joint, self.ids(tails), self.ids(heads))]

    def ids(self, texts: list[str]) -> list[Ids]:
        """Token ids of each text; a text that comes again, as a prompt's end does, is tokenised once."""
        unique = list(dict.fromkeys(texts))
        with on_all_cores():
            found = self.tokenizer(
                unique, add_special_tokens=False, return_attention_mask=False, verbose=False
            ).input_ids
        of = dict(zip(unique, map(self.slim, found)))
        return [of[text] for text in texts]

    def item(self, row: Row, prompt: Ids, answers: list[Ids]) -> Item:
        """BadRow if the prompt or a response is left without a token, or a pair without a difference."""
        if any(map(self.special.search, row.responses)):
            self.ledger.note("special_tokens", row.source)
            if self.limits.on_special_tokens == "error":
                raise DataError(f"{row.source}: a response spells a special token of {self.name!r}; mend the row")
            if self.limits.on_special_tokens == "drop":
                raise BadRow("special_tokens", "a response spells a special token")
        cuts = self.cuts()
        prompt = self.cut_prompt(row, prompt)
        if not prompt or not all(answers):
            raise BadRow("empty", "no token is left of the prompt or of a response")
        answers = [self.cut_response(row, answer) for answer in answers]
        rewards = row.rewards or range(len(answers))  # a pair that ties may be cut to the same: it teaches nothing
        if any(answers[i] == answers[j] and rewards[i] != rewards[j] for i, j, *_ in row.pairs):
            raise BadRow("identical", "the responses of a pair have the same tokens")
        if self.cuts() > cuts:
            self.ledger.note("cut_rows", row.source)
        base = row.base or ("uniform" if row.rewards is not None else None)
        return Item(prompt, answers, row.pairs, row.rewards, row.source, base=base)

    def cuts(self) -> int:
        return self.ledger.notes["cut_prompts"].count + self.ledger.notes["cut_responses"].count

    def cut_prompt(self, row: Row, prompt: Ids) -> Ids:
        """The last tokens that fit, behind one BOS where the tokenizer wants one."""
        has_bos = self.bos is not None and prompt[:1] == [self.bos]
        templated = not isinstance(row.prompt, str) and self.limits.chat_template == "own"  # it writes its own BOS
        bos = [self.bos] if has_bos or (self.adds_bos and not templated) else []
        body = prompt[1:] if has_bos else prompt
        room = max(self.limits.max_prompt_tokens - len(bos), 0)
        if len(body) > room:
            self.ledger.note("cut_prompts", row.source)
            body = body[len(body) - room :]
        return bos + body

    def cut_response(self, row: Row, answer: Ids) -> Ids:
        """The first tokens that fit. The EOS counts as a token, and only a response that keeps its end has one."""
        limit = self.limits.max_response_tokens
        if row.complete and answer[-1] != self.eos:
            answer = [*answer, self.eos]
        if len(answer) > limit:
            self.ledger.note("cut_responses", row.source)
            if row.complete:
                self.ledger.note("lost_eos", row.source)
        return answer[:limit]

    def render(self, row: Row) -> tuple[str, list[str]]:
        """Prompt and responses as the text to tokenise; conversations through the chat template."""
        if isinstance(row.prompt, str):
            return row.prompt, row.responses
        if self.limits.chat_template == "plain":
            turns = "".join(f"\n\n{TURNS.get(m['role'], m['role'])}: {m['content']}" for m in row.prompt)
            return f"{turns}\n\nAssistant:", [" " + text for text in row.responses]
        prompt = self.chat(row.prompt, add_generation_prompt=True)
        return prompt, [self.reply(row, prompt, text) for text in row.responses]

    def reply(self, row: Row, prompt: str, text: str) -> str:
        """What the template writes after the prompt for this response, up to the EOS."""
        assert isinstance(row.prompt, list)
        whole = self.chat([*row.prompt, {"role": "assistant", "content": text}])
        if not whole.startswith(prompt):
            raise ConfigError(
                f"{row.source}: the chat template of {self.name!r} writes a prompt with its answer otherwise than "
                "alone; use dataset.chat_template=plain, or another template"
            )
        rest = whole[len(prompt) :]
        eos = self.tokenizer.eos_token
        return rest.rstrip() if eos and rest.rstrip().endswith(eos) else rest

    def chat(self, messages: list[dict[str, str]], **options: Any) -> str:
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer {self.name!r} has no chat template, which conversations need; "
                "use dataset.chat_template=plain, or a chat model"
            )
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        assert isinstance(text, str), f"chat template gave {type(text).__name__}"
        return text


@contextmanager
def on_all_cores() -> Iterator[None]:
    """Within the block the tokenizers library uses all cores, unless the user chose, or the process was forked."""
    if os.environ.get("TOKENIZERS_PARALLELISM", NOT_PARALLEL) == NOT_PARALLEL and not FORKED:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        try:
            yield
        finally:
            os.environ["TOKENIZERS_PARALLELISM"] = NOT_PARALLEL
    else:
        yield


def lengths(items: list[Item]) -> dict[str, float]:
    """Mean and maximum number of tokens, of the prompts over Items and of chosen and rejected over pairs."""
    tokens = {
        "prompt": [len(item.prompt) for item in items],
        "chosen": [len(item.responses[pair.winner]) for item in items for pair in item.pairs],
        "rejected": [len(item.responses[pair.loser]) for item in items for pair in item.pairs],
    }
    found: dict[str, float] = {}
    for name, counts in tokens.items():
        if counts:
            found |= {f"{name}_mean": sum(counts) / len(counts), f"{name}_max": max(counts)}
    return found
