#!/usr/bin/env python3
"""Plays the original's processes against real roles of ours (`distillation.wire = "cosmos-rl"`), with redis-py and msgpack.

  PEER_REDIS_URL=redis://... python3 tests/python/cosmos_rl_roles.py trainer|teacher --top-k K

trainer: rollout and trainer of the original: publishes completions of rows of the dataset, takes every result with GETDEL,
         checks that they are log-probs of the right shape, publishes the end marker.
teacher: the original's teacher: reads as a member of the group, deletes each entry, stores a result for every completion,
         until the end marker. It has no model: log-probs come from the token ids.
Exit 0 when all is as it should be, 1 with the difference when not.
"""

import math
import sys
import uuid

import cosmos_rl_wire as wire

SECONDS_MAX = 200
# Of the quickstart's models: every id below it is a token.
VOCABULARY = 24


def rows(tokens, top_k):
    """Each position: the sampled token, then the others of the candidates."""
    return [[t] + [(t + 1 + i) % VOCABULARY for i in range(max(top_k - 1, 0))] for t in tokens]


def trainer(client, top_k):
    lengths = {}
    for prompt in range(6):
        completions = [[(7 * prompt + 3 * n + t) % VOCABULARY for t in range(1 + n)] for n in range(4)]
        keys = [str(uuid.uuid4()) for _ in completions]
        wire.publish(client, {
            "prompt_idx": prompt, "completion_token_ids": [rows(c, top_k) for c in completions],
            "prompt_token_ids": [], "teacher_result_uuid": keys, "replica_name": "rollout",
        })
        lengths.update(zip(keys, (len(c) for c in completions)))
    for key, result in wire.results(client, lengths, SECONDS_MAX):
        tokens, scores = lengths[key], result["teacher_logprobs"]
        if len(scores) <= tokens or any(len(row) != max(top_k, 1) for row in scores):
            sys.exit(f"error: `{key}`: {len(scores)} rows for {tokens} tokens after a prompt: {scores}")
        if any(not math.isfinite(v) or v > 0 for row in scores for v in row):
            sys.exit(f"error: `{key}`: no log-probs: {scores}")
        if any(sum(math.exp(v) for v in row) > 1 + 1e-4 for row in scores[-tokens:]):
            sys.exit(f"error: `{key}`: more than all probability: {scores}")
    wire.publish_end(client)


def teacher(client, top_k):
    for request in wire.requests(client, 8, SECONDS_MAX):
        # The original knows the prompt from its dataset; here the request has it.
        before = request.get("prompt_token_ids")
        if not before:
            sys.exit("error: the request has no positions of the prompt, set `distillation.include_prompt`")
        for completion, key in zip(request["completion_token_ids"], request["teacher_result_uuid"], strict=True):
            wire.store(client, key, [[-1.0 - (t % 7) / 8.0 for t in row[:max(top_k, 1)]] for row in before + completion])


if __name__ == "__main__":
    wire.main(__doc__, trainer, teacher)
