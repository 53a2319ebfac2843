#!/usr/bin/env python3
"""The training step of cosmos-host beside that of PyTorch: forward, next-token loss, backward, AdamW.

The same random weights and tokens on all sides, f32, every side in a process of its own, in turn:

  ours      cosmos-host's CPU engine
  eager     transformers, gradient checkpointing on, fused AdamW
  compiled  the same through torch.compile (needs a C++ compiler)

A round starts each side once: some steps to warm up (compiling happens there), then the measured ones. The table shows
the median of all measured steps and the largest peak of resident memory; the ratios are to the faster peer, and to the
leaner one. Every side's losses, before and after the first update, must agree, or nothing is printed: a ratio between
different work says nothing.

No side clips gradients, so that ours may update each parameter within the backward, as a run does with
`train.optm_grad_norm_clip = 0`; `--update after` keeps all gradients first, as a run that clips does. PyTorch keeps them, as
its trainers do.

Where one call may not take long, sides can be measured in a call each and put together, as for the larger model:

  python3 benchmarks/train.py --model qwen2.5-0.5b --rounds 1 --warmup 1 --steps 2 --folder F --sides ours --json ours.json
  (the same with --sides eager --json eager.json, and with --sides compiled --json compiled.json)
  python3 benchmarks/train.py --join ours.json eager.json compiled.json

Needs torch, transformers and safetensors in the Python that runs it, and
  cargo build --release -p cosmos-host --example bench
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import bench_binary, processor

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("eager", "compiled")
LEARNING_RATE = 1e-4

MODELS = {
    "qwen3-5.8m": dict(
        kind="qwen3", hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        intermediate_size=768, vocab_size=4096, batch=16, length=256,
    ),
    "qwen2.5-0.5b": dict(
        kind="qwen2", hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        intermediate_size=4864, vocab_size=151936, batch=2, length=512,
    ),
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3-5.8m", help="shapes of the model")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a quick look")
    parser.add_argument("--batch", type=int, help="sequences a step")
    parser.add_argument("--length", type=int, help="tokens a sequence")
    parser.add_argument("--sides", default="ours,eager,compiled", help="which sides, in this order")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=2, help="steps before the measured ones, at least 1")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of a side in a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--bench", type=Path, help="the bench binary (default: the one under the target folder)")
    parser.add_argument("--folder", type=Path, help="keep the weights here and use them again (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="also write everything that was measured here")
    parser.add_argument("--update", choices=("in-backward", "after"), default="in-backward", help="when ours updates parameters")
    parser.add_argument("--join", type=Path, nargs="+", metavar="JSON", help="measure nothing: put what earlier calls wrote together")
    parser.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.sides = options.sides.split(",")
    if unknown := set(options.sides) - {"ours", *PEERS}:
        parser.error(f"unknown sides: {', '.join(sorted(unknown))}")
    if options.warmup < 1 or options.steps < 1 or options.rounds < 1:
        parser.error("at least one step to warm up, one measured step and one round")
    return options


def shape_of(options):
    shape = dict(MODELS[options.model])
    if options.layers:
        shape["num_hidden_layers"] = options.layers
    batch, length = shape.pop("batch"), shape.pop("length")
    return shape, options.batch or batch, options.length or length


def make_model(shape, folder):
    """Random weights, kept as bf16, which every side reads into f32."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    shape = dict(shape)
    kinds = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    config_class, model_class = kinds[shape.pop("kind")]
    config = config_class(
        max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0, **shape
    )
    config.architectures = [model_class.__name__]
    config.save_pretrained(folder)
    if (folder / "model.safetensors").exists():
        return
    with torch.device("meta"):
        model = model_class(config)
    torch.manual_seed(1)
    tensors = {}
    for name, parameter in model.named_parameters():
        values = torch.ones(parameter.shape) if name.endswith("norm.weight") else 0.02 * torch.randn(parameter.shape)
        tensors[name] = values.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def make_tokens(vocab, batch, length):
    import torch

    torch.manual_seed(2)
    return torch.randint(1, vocab, (batch, length)).tolist()


def peak_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def worker(options):
    """One peer: prints the seconds and losses of its steps, and its peak of resident memory."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01, fused=True
    )
    run = torch.compile(model) if options.worker == "compiled" else model
    ids = torch.tensor(json.loads((options.folder / "tokens.json").read_text()))
    seconds, losses = [], []
    for _ in range(options.warmup + options.steps):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": seconds, "losses": losses, "peak_bytes": peak_bytes()}))


def run_side(side, binary, folder, options):
    environment = dict(os.environ)
    for variable in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[variable] = str(options.threads)
    if side == "compiled":
        # Its kernels and PyTorch's own have a pool of threads each, and what waits in one spins against the other.
        environment["OMP_WAIT_POLICY"] = "passive"
    if side == "ours":
        command = [
            binary, "--suite", "train", "--student", folder, "--sequences", folder / "tokens.json",
            "--steps", options.warmup + options.steps, "--learning-rate", LEARNING_RATE, "--update", options.update,
        ]
    else:
        command = [
            sys.executable, __file__, "--worker", side, "--folder", folder, "--threads", options.threads,
            "--warmup", options.warmup, "--steps", options.steps,
        ]
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, env=environment)
    if done.returncode != 0:
        sys.exit(f"error: the side `{side}` failed with {done.returncode}\nhint: its own message stands above")
    return json.loads(done.stdout)


def check(found):
    """All sides did the same work, if their first losses, and those after one update, agree."""
    names = list(found)
    for side in names[1:]:
        for step in range(2):
            mine, reference = (found[name]["losses"][step] for name in (names[0], side))
            if abs(mine - reference) > 1e-4 * abs(reference):
                sys.exit(
                    f"error: the losses of step {step + 1} differ: {names[0]} {mine}, {side} {reference}; "
                    "the sides do different work"
                )


def measure(options, folder):
    shape, batch, length = shape_of(options)
    binary = bench_binary(options.bench) if "ours" in options.sides else None
    folder.mkdir(parents=True, exist_ok=True)
    make_model(shape, folder)
    (folder / "tokens.json").write_text(json.dumps(make_tokens(shape["vocab_size"], batch, length)))
    runs = {side: [] for side in options.sides}
    for _ in range(options.rounds):
        for side in options.sides:
            runs[side].append(run_side(side, binary, folder, options))
        check({side: found[-1] for side, found in runs.items()})
    return shape, batch, length, runs


def measured(options):
    """What this call measures, as it is written with `--json`."""
    if options.folder:
        shape, batch, length, runs = measure(options, options.folder)
    else:
        with tempfile.TemporaryDirectory() as folder:
            shape, batch, length, runs = measure(options, Path(folder))
    import torch
    import transformers

    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": {"cpu": processor(), "threads": options.threads},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "work": {"model": options.model, **shape, "batch": batch, "length": length, "rounds": options.rounds, "steps": options.steps},
        "sides": {},
    }
    for side, found in runs.items():
        seconds = [s for run in found for s in run["seconds"][options.warmup :]]
        report["sides"][side] = {
            "seconds": seconds, "tokens_per_second": batch * length / statistics.median(seconds),
            "peak_bytes": max(run["peak_bytes"] for run in found), "losses": found[0]["losses"],
        }
    return report


def joined(paths):
    """Reports of the same work on the same machine as one."""
    reports = [json.loads(path.read_text()) for path in paths]
    report = reports[0]
    for path, other in zip(paths[1:], reports[1:]):
        for what in ("machine", "versions", "work"):
            if other[what] != report[what]:
                sys.exit(f"error: {path} has another `{what}` than {paths[0]}: {other[what]} and {report[what]}")
        if twice := set(report["sides"]) & set(other["sides"]):
            sys.exit(f"error: {path} has sides that an earlier file has too: {', '.join(sorted(twice))}")
        report["sides"].update(other["sides"])
    check(report["sides"])
    return report


def show(report):
    work, versions = report["work"], report["versions"]
    print(f"{report['machine']['cpu']}, {report['machine']['threads']} threads; "
          f"torch {versions['torch']}, transformers {versions['transformers']}")
    print(f"{work['model']}, {work['num_hidden_layers']} layers, {work['batch']} x {work['length']} tokens a step, f32")
    print(f"{'side':<12}{'tokens/s':>10}{'s/step':>10}{'peak MiB':>10}{'loss 1':>10}{'loss 2':>10}")
    for side, found in report["sides"].items():
        print(f"{side:<12}{found['tokens_per_second']:>10.1f}{statistics.median(found['seconds']):>10.3f}"
              f"{found['peak_bytes'] / 2**20:>10.0f}{found['losses'][0]:>10.4f}{found['losses'][1]:>10.4f}")
    peers = [found for side, found in report["sides"].items() if side != "ours"]
    if "ours" in report["sides"] and peers:
        mine = report["sides"]["ours"]
        report["speed_ratio"] = mine["tokens_per_second"] / max(peer["tokens_per_second"] for peer in peers)
        report["memory_ratio"] = mine["peak_bytes"] / min(peer["peak_bytes"] for peer in peers)
        print(f"{report['speed_ratio']:.2f} times the tokens a second of the faster peer, "
              f"{100 * report['memory_ratio']:.1f} % of the memory of the leaner one")


def main():
    options = arguments()
    if options.worker:
        return worker(options)
    report = joined(options.join) if options.join else measured(options)
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
        print(f"written: {options.json}")


if __name__ == "__main__":
    main()
