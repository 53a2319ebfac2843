#!/usr/bin/env python3
"""Plays the other side of `distillation.wire = "cosmos-rl"` for the tests of `host/broker`, with redis-py and msgpack.

  PEER_REDIS_URL=redis://... python3 tests/python/cosmos_rl_peer.py trainer|teacher --top-k K

trainer: publishes requests as a rollout does, takes every result with GETDEL, checks it, publishes the end marker.
teacher: reads the stream as a member of the group, deletes each entry, stores results, until the end marker.
A token's log-prob is -id / 1024 on both sides. Exit 0 when all is as it should be, 1 with the difference when not.
"""

import argparse
import datetime
import os
import sys
import time
import uuid

import msgpack
import redis

STREAM = "teacher_request_stream"
GROUP = "teacher_request_group"
SECONDS_MAX = 50


def logprob(token):
    return -token / 1024.0


def now():
    return datetime.datetime.now().isoformat()


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


def publish(client, message):
    client.xadd(STREAM, {"teacher_request": msgpack.packb(message), "timestamp": now()}, maxlen=10000)


def trainer(client, top_k):
    expected = {}
    client.xadd(STREAM, {"something": "else"})
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
        publish(client, {
            "prompt_idx": prompt, "completion_token_ids": completions, "prompt_token_ids": prompt_rows,
            "teacher_result_uuid": keys, "replica_name": "peer",
        })
    publish(client, {
        "prompt_idx": 99999, "completion_token_ids": [[[1]]], "teacher_result_uuid": [str(uuid.uuid4())],
        "replica_name": "peer",
    })
    deadline = time.monotonic() + SECONDS_MAX
    for key, (all_rows, rows, prompt_rows) in expected.items():
        while (value := client.getdel(key)) is None:
            if time.monotonic() > deadline:
                sys.exit(f"error: no result under `{key}`")
            time.sleep(0.01)
        result = msgpack.unpackb(value)
        wanted = [[logprob(t) for t in scored(row, top_k)] for row in all_rows]
        if result["teacher_logprobs"] != wanted:
            sys.exit(f"error: `{key}`: {result['teacher_logprobs']}, expected {wanted}")
        if result["completion_token_ids"] != rows or result["prompt_token_ids"] != prompt_rows:
            sys.exit(f"error: `{key}`: the token ids are not those that were sent")
        if not isinstance(result["timestamp"], str) or result["replica_name"] != "ours" or "teacher_result_uuid" in result:
            sys.exit(f"error: `{key}`: {sorted(result)}")
        datetime.datetime.fromisoformat(result["timestamp"])
    publish(client, {
        "is_end": True, "prompt_idx": -1, "completion_token_ids": [], "teacher_result_uuid": [],
        "replica_name": "controller",
    })


def teacher(client, top_k):
    try:
        client.xgroup_create(STREAM, GROUP, id="0-0", mkstream=True)
    except redis.ResponseError as error:
        if "already exists" not in str(error):
            raise
    deadline = time.monotonic() + SECONDS_MAX
    while time.monotonic() < deadline:
        for _, entries in client.xreadgroup(GROUP, "peer", {STREAM: ">"}, count=2, block=1000) or []:
            for entry, fields in entries:
                request = msgpack.unpackb(fields[b"teacher_request"])
                datetime.datetime.fromisoformat(fields[b"timestamp"].decode())
                client.xdel(STREAM, entry)
                if request.get("is_end"):
                    return
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
                    result = {"teacher_logprobs": scores, "timestamp": now(), "replica_name": "peer"}
                    if request["prompt_idx"] % 3 == 0:
                        # Only with `trainer_token_ids_from_teacher`.
                        result["completion_token_ids"] = rows
                        result["prompt_token_ids"] = prompt_rows
                    client.set(key, msgpack.packb(result))
    sys.exit("error: no end marker came")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=["trainer", "teacher"])
    parser.add_argument("--top-k", type=int, default=0)
    options = parser.parse_args()
    client = redis.Redis.from_url(os.environ["PEER_REDIS_URL"])
    {"trainer": trainer, "teacher": teacher}[options.role](client, options.top_k)


if __name__ == "__main__":
    main()
