#!/usr/bin/env python3
"""Plays the original's processes against real roles of ours (`distillation.wire = "cosmos-rl"`), with redis-py and msgpack.

  PEER_REDIS_URL=redis://... python3 tests/python/cosmos_rl_roles.py trainer|teacher --top-k K

trainer: rollout and trainer of the original: publishes completions of rows of the dataset, takes every result with GETDEL,
         checks that they are log-probs of the right shape, publishes the end marker.
teacher: the original's teacher: reads as a member of the group, deletes each entry, stores a result for every completion,
         until the end marker. It has no model: log-probs come from the token ids.
Exit 0 when all is as it should be, 1 with the difference when not.
"""

import argparse
import datetime
import math
import os
import sys
import time
import uuid

import msgpack
import redis

STREAM = "teacher_request_stream"
GROUP = "teacher_request_group"
SECONDS_MAX = 200
# Of the quickstart's models: every id below it is a token.
VOCABULARY = 24


def publish(client, message):
    now = datetime.datetime.now().isoformat()
    client.xadd(STREAM, {"teacher_request": msgpack.packb(message), "timestamp": now}, maxlen=10000)


def rows(tokens, top_k):
    """Each position: the sampled token, then the others of the candidates."""
    return [[t] + [(t + 1 + i) % VOCABULARY for i in range(max(top_k - 1, 0))] for t in tokens]


def trainer(client, top_k):
    wanted = {}
    for prompt in range(6):
        completions = [[(7 * prompt + 3 * n + t) % VOCABULARY for t in range(1 + n)] for n in range(4)]
        keys = [str(uuid.uuid4()) for _ in completions]
        publish(client, {
            "prompt_idx": prompt, "completion_token_ids": [rows(c, top_k) for c in completions],
            "prompt_token_ids": [], "teacher_result_uuid": keys, "replica_name": "rollout",
        })
        wanted.update(zip(keys, (len(c) for c in completions)))
    deadline = time.monotonic() + SECONDS_MAX
    for key, tokens in wanted.items():
        while (value := client.getdel(key)) is None:
            if time.monotonic() > deadline:
                sys.exit(f"error: no result under `{key}`")
            time.sleep(0.01)
        scores = msgpack.unpackb(value)["teacher_logprobs"]
        if len(scores) <= tokens or any(len(row) != max(top_k, 1) for row in scores):
            sys.exit(f"error: `{key}`: {len(scores)} rows for {tokens} tokens after a prompt: {scores}")
        if any(not math.isfinite(v) or v > 0 for row in scores for v in row):
            sys.exit(f"error: `{key}`: no log-probs: {scores}")
        if any(sum(math.exp(v) for v in row) > 1 + 1e-4 for row in scores[-tokens:]):
            sys.exit(f"error: `{key}`: more than all probability: {scores}")
    publish(client, {
        "is_end": True, "prompt_idx": -1, "completion_token_ids": [], "teacher_result_uuid": [],
        "replica_name": "controller",
    })


def prompt_positions(client, request):
    """The original knows the prompt from its dataset; here the request has it."""
    rows_of_prompt = request.get("prompt_token_ids")
    if not rows_of_prompt:
        sys.exit("error: the request has no positions of the prompt, set `distillation.include_prompt`")
    return rows_of_prompt


def teacher(client, top_k):
    try:
        client.xgroup_create(STREAM, GROUP, id="0-0", mkstream=True)
    except redis.ResponseError as error:
        if "already exists" not in str(error):
            raise
    deadline = time.monotonic() + SECONDS_MAX
    while time.monotonic() < deadline:
        for _, entries in client.xreadgroup(GROUP, "peer", {STREAM: ">"}, count=8, block=1000) or []:
            for entry, fields in entries:
                request = msgpack.unpackb(fields[b"teacher_request"])
                client.xdel(STREAM, entry)
                if request.get("is_end"):
                    return
                before = prompt_positions(client, request)
                for completion, key in zip(request["completion_token_ids"], request["teacher_result_uuid"], strict=True):
                    scores = [[-1.0 - (t % 7) / 8.0 for t in row[:max(top_k, 1)]] for row in before + completion]
                    client.set(key, msgpack.packb({
                        "teacher_logprobs": scores, "timestamp": datetime.datetime.now().isoformat(), "replica_name": "peer",
                    }))
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
