"""Records to Rows: four formats, and the columns of known hub data sets. Coerces nothing; a bad record says why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import combinations
from os.path import commonprefix
from typing import Any

from cdpo.batch import Pair
from cdpo.data.rows import BadRow, Row, is_number, misspelt

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
Columns = dict[str, Any]


def get(record: Columns, key: str, kind: type | tuple[type, ...] = str) -> Any:
    """The value of a column, which must be of type `kind`. BadRow if it is missing, null or of another type."""
    if not isinstance(record, dict):
        raise BadRow("type", f"{key!r} must stand in an object, not in {type(record).__name__}")
    if key not in record:
        raise BadRow("key", f"no key {key!r}{misspelt(key, record)}")
    value = record[key]
    if not isinstance(value, kind):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise BadRow("type", f"{key!r} must be {names}, not {'null' if value is None else type(value).__name__}")
    return value


def columns(source: str, record: Columns) -> Row:
    """prompt, chosen, rejected: three strings."""
    prompt, chosen, rejected = (get(record, key) for key in ("prompt", "chosen", "rejected"))
    return Row(source, prompt, [chosen, rejected], [Pair(0, 1)])


def transcripts(source: str, record: Columns) -> Row:
    """chosen, rejected: dialogues of Human and Assistant. The prompt ends at the last Assistant turn they share."""
    chosen, rejected = get(record, "chosen"), get(record, "rejected")
    differ = len(commonprefix([chosen, rejected]))  # noqa: RUF071  characters are meant
    end = chosen.rfind(ASSISTANT, 0, differ) + len(ASSISTANT)
    if end < len(ASSISTANT):  # not found
        wanted = f"; or name the column of the prompt 'prompt'{misspelt('prompt', record)}"
        raise BadRow("transcript", f"chosen and rejected share no {ASSISTANT!r} to answer{wanted}")
    return Row(source, chosen[:end], [chosen[end:], rejected[end:]], [Pair(0, 1)])


def messages(source: str, record: Columns) -> Row:
    """chosen, rejected: messages, the whole conversation or its last reply; prompt: messages, text or absent."""
    asked = get(record, "prompt", (list, str)) if record.get("prompt") is not None else []
    prompt = _conversation("prompt", asked) if isinstance(asked, list) else [{"role": "user", "content": asked}]
    before, replies = [], []
    for key in ("chosen", "rejected"):
        *turns, reply = _conversation(key, get(record, key, list)) or [{"role": "", "content": ""}]
        if reply["role"] != "assistant":
            raise BadRow("type", f"{key!r} must end with a message of role 'assistant'")
        before.append(turns or prompt)
        replies.append(reply["content"])
    if before[0] != before[1] or (isinstance(asked, list) and asked and before[0] != prompt):
        raise BadRow("prompt", "chosen and rejected must answer one conversation, that of the prompt where it is given")
    if not before[0]:
        raise BadRow("key", f"no message before the reply; give 'prompt'{misspelt('prompt', record)}")
    return Row(source, before[0], replies, [Pair(0, 1)])


def _conversation(key: str, value: list[Any]) -> list[dict[str, str]]:
    for message in value:
        if not isinstance(message, dict):
            raise BadRow("type", f"{key!r} must hold messages (objects), not {type(message).__name__}")
        get(message, "role"), get(message, "content")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def scored(source: str, record: Columns) -> Row:
    """prompt, responses, rewards: K candidates. Each is preferred to all of lower reward, for want of softer labels."""
    prompt = get(record, "prompt", (str, list))
    responses, rewards = get(record, "responses", list), get(record, "rewards", list)
    if both := [key for key in ("chosen", "rejected") if record.get(key) is not None]:
        raise BadRow("key", f"{both[0]!r} beside rewards, of which the preferences are made; delete one of the two")
    if not all(isinstance(text, str) for text in responses):
        raise BadRow("type", "'responses' must hold strings")
    if not all(map(is_number, rewards)):
        raise BadRow("number", "'rewards' must hold finite numbers")
    if len(responses) != len(rewards) or len(responses) < 2:
        raise BadRow("length", f"{len(responses)} responses and {len(rewards)} rewards; give one each for 2 or more")
    best_first = sorted(range(len(rewards)), key=lambda k: -rewards[k])
    pairs = [Pair(i, j) for i, j in combinations(best_first, 2) if rewards[i] > rewards[j]]
    turns = _conversation("prompt", prompt) if isinstance(prompt, list) else prompt
    return Row(source, turns, responses, pairs, [float(reward) for reward in rewards])


FORMATS: dict[str, Callable[[str, Columns], Row]] = {
    "columns": columns,
    "transcripts": transcripts,
    "messages": messages,
    "scored": scored,
}


def detect(records: Iterable[Columns]) -> str:
    """The format that most of `records` have, so that one bad record does not decide."""
    return Counter(map(_looks_like, records)).most_common(1)[0][0]


def _looks_like(record: Columns) -> str:
    if "responses" in record or "rewards" in record:
        return "scored"
    if any(isinstance(record.get(key), list) for key in ("chosen", "rejected")):
        return "messages"
    return "columns" if "prompt" in record else "transcripts"


def check(row: Row, max_chars: int) -> Row:
    """The row itself. BadRow if a text is empty or too long, or if the two responses of a pair are identical."""
    size = sum(map(len, row.texts()))
    if size > max_chars:
        raise BadRow("long", f"{size:,} characters, more than dataset.max_chars={max_chars:,}; raise it or cut the row")
    if not any(row.texts()[: -len(row.responses)]):
        raise BadRow("empty", "the prompt is empty; write it or delete the row")
    for k, text in enumerate(row.responses):
        if not text:
            name = f"response {k + 1}" if row.rewards else ("chosen", "rejected")[k]
            raise BadRow("empty", f"{name} is empty; write it or delete the row")
    for i, j, *_ in row.pairs:
        if row.responses[i] == row.responses[j]:
            names = f"responses {i + 1} and {j + 1}" if row.rewards else "chosen and rejected"
            raise BadRow("identical", f"{names} are identical, so nothing is preferred; delete the row")
    return row


def shp(record: Columns) -> Columns:
    """stanfordnlp/SHP: labels is 1 where comment A was preferred. The post becomes a Human turn."""
    label = get(record, "labels", int)
    if label not in (0, 1):
        raise BadRow("number", f"'labels' must be 0 or 1, not {label}")
    a, b = (" " + get(record, key) for key in ("human_ref_A", "human_ref_B"))
    prompt = f"{HUMAN} {get(record, 'history')}{ASSISTANT}"
    return {"prompt": prompt, "chosen": a if label else b, "rejected": b if label else a}


def ultrafeedback(record: Columns) -> Columns:
    """openbmb/UltraFeedback: `completions` with response and overall_score (1 to 10)."""
    completions = get(record, "completions", list)
    return {
        "prompt": [{"role": "user", "content": get(record, "instruction")}],
        "responses": [get(completion, "response") for completion in completions],
        "rewards": [get(completion, "overall_score", (int, float)) for completion in completions],
    }


ADAPTERS: dict[str, Callable[[Columns], Columns]] = {"none": dict, "shp": shp, "ultrafeedback": ultrafeedback}
