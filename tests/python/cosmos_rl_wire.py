"""The original's side of `distillation.wire = "cosmos-rl"`, as its processes do it, with redis-py and msgpack."""

import argparse
import datetime
import os
import sys
import time

import msgpack
import redis

STREAM = "teacher_request_stream"
GROUP = "teacher_request_group"


def now():
    return datetime.datetime.now().isoformat()


def publish(client, message):
    client.xadd(STREAM, {"teacher_request": msgpack.packb(message), "timestamp": now()}, maxlen=10000)


def publish_end(client):
    publish(client, {
        "is_end": True, "prompt_idx": -1, "completion_token_ids": [], "teacher_result_uuid": [],
        "replica_name": "controller",
    })


def results(client, keys, seconds_max):
    """Takes the result of every key, as a trainer does: with GETDEL, again and again until it is there."""
    deadline = time.monotonic() + seconds_max
    for key in keys:
        while (value := client.getdel(key)) is None:
            if time.monotonic() > deadline:
                sys.exit(f"error: no result under `{key}`")
            time.sleep(0.01)
        yield key, msgpack.unpackb(value)


def requests(client, count, seconds_max):
    """Reads as a teacher does, a member of the group that deletes each entry, until the end marker."""
    try:
        client.xgroup_create(STREAM, GROUP, id="0-0", mkstream=True)
    except redis.ResponseError as error:
        if "already exists" not in str(error):
            raise
    deadline = time.monotonic() + seconds_max
    while time.monotonic() < deadline:
        for _, entries in client.xreadgroup(GROUP, "peer", {STREAM: ">"}, count=count, block=1000) or []:
            for entry, fields in entries:
                request = msgpack.unpackb(fields[b"teacher_request"])
                datetime.datetime.fromisoformat(fields[b"timestamp"].decode())
                client.xdel(STREAM, entry)
                if request.get("is_end"):
                    return
                yield request
    sys.exit("error: no end marker came")


def store(client, key, scores, **more):
    result = {"teacher_logprobs": scores, "timestamp": now(), "replica_name": "peer", **more}
    client.set(key, msgpack.packb(result))


def main(description, trainer, teacher):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=["trainer", "teacher"])
    parser.add_argument("--top-k", type=int, default=0)
    options = parser.parse_args()
    client = redis.Redis.from_url(os.environ["PEER_REDIS_URL"])
    {"trainer": trainer, "teacher": teacher}[options.role](client, options.top_k)
