#!/usr/bin/env python3
"""Plays the other side of `distillation.wire = "cosmos-rl"` for the tests of `host/broker`, with redis-py and msgpack.

  PEER_REDIS_URL=redis://... python3 tests/python/cosmos_rl_peer.py trainer|teacher --top-k K

trainer: publishes requests as a rollout does, takes every result with GETDEL, checks it, publishes the end marker.
teacher: reads the stream as a member of the group, deletes each entry, stores results, until the end marker.
A token's log-prob is -id / 1024 on both sides. Exit 0 when all is as it should be, 1 with the difference when not.
"""

import datetime
import sys
import uuid

import cosmos_rl_wire as wire

SECONDS_MAX = 50


def logprob(token):
    return -token / 1024.0


def scored(row, top_k):
    """The ids of a position that are scored: the token, or the candidates without a token that is none of them."""
    if top_k == 0:
        return row[:1]
    return row[1:] if len(row) == top_k + 1 else row


def candidates(token, position, top_k):
    if top_k == 0:
        return [token]
    others = [1000 + 10 * position + i for i in range(top_k)]
    return [token] + (others if position % 2 else others[: top_k - 1])


def trainer(client, top_k):
    expected = {}
    client.xadd(wire.STREAM, {"something": "else"})
    for prompt in range(8):
        prompt_ids = [100 + prompt, 5, 6]
        prompt_rows = [candidates(t, i, top_k) for i, t in enumerate(prompt_ids[1:])] if top_k else []
        completions, keys = [], []
        for n in range(3):
            rows = [candidates(200 + 10 * n + t, t, top_k) for t in range(1 + (prompt + n) % 5)]
            key = str(uuid.uuid4())
            completions.append(rows)
            keys.append(key)
            all_rows = (prompt_rows if top_k else [[t] for t in prompt_ids[1:]]) + rows
            expected[key] = (all_rows, rows, prompt_rows)
        wire.publish(client, {
            "prompt_idx": prompt, "completion_token_ids": completions, "prompt_token_ids": prompt_rows,
            "teacher_result_uuid": keys, "replica_name": "peer",
        })
    wire.publish(client, {
        "prompt_idx": 99999, "completion_token_ids": [[[1]]], "teacher_result_uuid": [str(uuid.uuid4())],
        "replica_name": "peer",
    })
    for key, result in wire.results(client, expected, SECONDS_MAX):
        all_rows, rows, prompt_rows = expected[key]
        wanted = [[logprob(t) for t in scored(row, top_k)] for row in all_rows]
        if result["teacher_logprobs"] != wanted:
            sys.exit(f"error: `{key}`: {result['teacher_logprobs']}, expected {wanted}")
        if result["completion_token_ids"] != rows or result["prompt_token_ids"] != prompt_rows:
            sys.exit(f"error: `{key}`: the token ids are not those that were sent")
        if not isinstance(result["timestamp"], str) or result["replica_name"] != "ours" or "teacher_result_uuid" in result:
            sys.exit(f"error: `{key}`: {sorted(result)}")
        datetime.datetime.fromisoformat(result["timestamp"])
    wire.publish_end(client)


def teacher(client, top_k):
    for request in wire.requests(client, 2, SECONDS_MAX):
        # It knows the prompt from its dataset; the message has at most the candidates there.
        prompt_ids = [100 + request["prompt_idx"], 5, 6]
        prompt_rows = request.get("prompt_token_ids")
        if top_k == 0 and prompt_rows not in ([], [[t] for t in prompt_ids[1:]]):
            sys.exit(f"error: prompt rows {prompt_rows}")
        rows_before = prompt_rows or [[t] * max(top_k, 1) for t in prompt_ids[1:]]
        for rows, key in zip(request["completion_token_ids"], request["teacher_result_uuid"], strict=True):
            if any(len(row) not in ((1,) if top_k == 0 else (top_k, top_k + 1)) for row in rows):
                sys.exit(f"error: candidates {rows}")
            scores = [[logprob(t) for t in scored(row, top_k)] for row in rows_before + rows]
            # Only with `trainer_token_ids_from_teacher`.
            ids = {"completion_token_ids": rows, "prompt_token_ids": prompt_rows}
            wire.store(client, key, scores, **(ids if request["prompt_idx"] % 3 == 0 else {}))


if __name__ == "__main__":
    wire.main(__doc__, trainer, teacher)
