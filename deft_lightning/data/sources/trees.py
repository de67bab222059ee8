"""Trees of messages, as OpenAssistant keeps them: each becomes the conversation of its best-ranked replies.

Flat files have a row for every message, with ``message_id`` and ``parent_id``; others a whole tree in each row, as
``{"prompt": {"text": ..., "replies": [...]}}``. The rows of flat files are held until all of them are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from deft_lightning.data.sources.layouts import Expected
from deft_lightning.data.sources.remarks import Remark
from deft_lightning.data.sources.rows import LONGEST, Located, RowError, absent
from deft_lightning.errors import UserError

MOST = 16 * LONGEST  # letters of the messages of a flat file that are held together
REJECTED = ("aborted_low_grade", "halted_by_moderator")  # states of a tree
ORPHANS = "without the message that they answer"
ROLES = {"prompter": "user", "assistant": "assistant", "system": "system"}


@dataclass
class _Node:
    where: str
    message: Mapping[str, Any]
    replies: list[_Node] = field(default_factory=list)


def assembled(rows: Located, expected: Expected) -> Located:
    """Yield conversations for the messages of trees; any other rows as they are.

    The first row tells what all are. At every turn the reply of the best rank is taken, of those without a rank the
    first: nothing is learnt twice. What is deleted or was rejected by review is left out with all that follows it, and
    so is a last question without an answer. How many messages were left out, and why, is remarked.

    Args:
        rows: As a reader gives them.
        expected: What the rows are expected to be; explicit formats and mapped columns are left alone.

    Raises:
        UserError: A flat file is too large to be held.
    """
    for where, record in rows:
        if isinstance(record, Remark | RowError):
            yield where, record
            continue
        free = expected.format in ("auto", "messages") and not expected.column_map.keys() & {"text", "messages"}
        if free and _is_turn(record):
            yield from _flat((where, record), rows)
        elif free and _is_tree(record):
            yield from _nested((where, record), rows)
        else:
            yield where, record
            yield from rows


def _is_turn(record: Any) -> bool:
    """Return whether a row is a message of a tree; the first of one may have no parent."""
    if not isinstance(record, Mapping) or not all(isinstance(record.get(name), str) for name in ("text", "role")):
        return False
    linked = "parent_id" in record or "message_tree_id" in record or record["role"] == "prompter"
    return "message_id" in record and record["role"] in ROLES and linked


def _is_tree(record: Any) -> bool:
    prompt = record.get("prompt") if isinstance(record, Mapping) else None
    return isinstance(prompt, Mapping) and isinstance(prompt.get("replies"), list) and "text" in prompt


def _nested(first: tuple[str, Any], rows: Located) -> Located:
    counts: Counter[str] = Counter()
    for where, record in chain([first], rows):
        if not _is_tree(record):
            yield where, record
            continue
        try:
            root = _grown(where, {**record["prompt"], "tree_state": record.get("tree_state")})
        except RecursionError:
            yield where, RowError(where, "is nested too deeply", kind="nesting")
            continue
        yield from _conversation(root, record.get("message_tree_id"), counts)
    yield from _told(first[0], counts)


def _grown(where: str, message: Mapping[str, Any]) -> _Node:
    replies = message.get("replies") or []
    return _Node(where, message, [_grown(where, reply) for reply in replies if isinstance(reply, Mapping)])


def _flat(first: tuple[str, Any], rows: Located) -> Located:
    nodes: dict[str, _Node] = {}
    letters = 0
    for where, record in chain([first], rows):
        if not isinstance(record, Mapping):
            yield where, record
            continue
        id = record.get("message_id")
        if absent(id) or absent(record.get("text")) or absent(record.get("role")):
            lacking = next(name for name in ("message_id", "text", "role") if absent(record.get(name)))
            yield where, RowError(where, "is missing in a message of a tree", lacking, "missing")
        elif str(id) in nodes:
            problem = f"{str(id)[:80]!r} is the message of {nodes[str(id)].where} too"
            yield where, RowError(where, problem, "message_id", "tree")
        else:
            nodes[str(id)] = _Node(where, record)
            letters += len(str(record["text"]))
        if letters > MOST:
            raise UserError(f"{where}: the trees so far have more than {MOST:,} characters; split the file by trees")
    counts: Counter[str] = Counter()
    roots = []
    for node in nodes.values():
        parent = node.message.get("parent_id")
        if absent(parent) or parent == "":
            roots.append(node)
        elif str(parent) in nodes:
            nodes[str(parent)].replies.append(node)
    reached = 0
    for root in roots:
        reached += _size(root)
        yield from _conversation(root, None, counts)
    if len(nodes) > reached:
        counts[ORPHANS] += len(nodes) - reached
    yield from _told(first[0], counts)


def _conversation(root: _Node, id: Any, counts: Counter[str]) -> Iterator[tuple[str, Any]]:
    """Yield the conversation of the best replies of a tree, and count what is left out."""
    total = _size(root)
    counts["messages"] += total
    counts["trees"] += 1
    path: list[_Node] = []
    choices = [root]
    gone = 0
    while choices:
        kept = [node for node in choices if not _is_bad(node.message)]
        gone += sum(_size(node) for node in choices if _is_bad(node.message))
        if not kept:
            break
        path.append(min(kept, key=_rank))
        choices = path[-1].replies
    while path and path[-1].message.get("role") != "assistant":
        path.pop()
        counts["without an answer"] += 1
    if gone:
        counts["deleted or rejected, with their replies"] += gone
    if not path:
        return
    turns = []
    for node in path:
        role = node.message.get("role")
        turns.append({"role": ROLES.get(str(role), role), "content": node.message.get("text")})
    last = path[-1]
    own = last.message.get("message_id") if absent(id) else id
    counts["conversations"] += 1
    counts["learnt"] += len(path)
    yield last.where, {**({} if absent(own) else {"id": str(own)}), "messages": turns}


def _is_bad(message: Mapping[str, Any]) -> bool:
    rejected = message.get("review_result") is False or message.get("tree_state") in REJECTED
    return message.get("deleted") is True or rejected


def _rank(node: _Node) -> float:
    rank = node.message.get("rank")
    return float("inf") if absent(rank) or not isinstance(rank, int | float) else float(rank)


def _size(root: _Node) -> int:
    count, waiting = 0, [root]
    while waiting:
        node = waiting.pop()
        count += 1
        waiting += node.replies
    return count


def _told(where: str, counts: Counter[str]) -> Iterator[tuple[str, Any]]:
    file = where.rpartition(", row ")[0]
    sums = {name: counts.pop(name, 0) for name in ("messages", "trees", "conversations", "learnt")}
    out = sums["messages"] + counts[ORPHANS] - sums["learnt"]
    if others := out - counts.total():
        counts["of another rank, or replies to such"] = others
    reasons = ", ".join(f"{count} {why}" for why, count in counts.items() if count)
    text = f"{file}: {sums['trees']} trees of messages give {sums['conversations']} conversations, of the best replies"
    if not sums["conversations"]:
        raise UserError(f"{text}: nothing is left to learn ({reasons})")
    yield where, Remark("trees", f"{text}; {out} messages are left out ({reasons})" if out else text)
