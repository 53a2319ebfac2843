#!/usr/bin/env python3
"""The same work in cosmos-host and in transformers/TRL, side by side on this machine.

Three phases of on-policy distillation on one random Qwen3 student and teacher, the same weights, prompts and numbers
of tokens on both sides:

  rollout  sample `--new-tokens` tokens for each of `--sequences` prompts at temperature 1
  score    the teacher's log-probability of every completion token, and its top 8, in batches of `--micro-batch`
  train    one optimizer step of full-vocabulary reverse KL to the teacher (teacher forward included), in
           micro-batches, with clipping to norm 1 and AdamW

Rounds alternate between the two programs; in each, either side repeats a phase until `--seconds-min` have passed. The
table shows the median of the rounds. The first training loss of both
must agree, or nothing is printed: a ratio between different work says nothing.

Needs torch, transformers, trl and safetensors in the Python that runs it, and
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

SIZES = {
    # hidden, layers, heads, kv heads, head dim, intermediate, vocabulary
    "tiny": dict(student=(96, 2, 4, 2, 24, 256), teacher=(192, 4, 4, 2, 48, 512), vocab=64),
    "medium": dict(student=(256, 6, 4, 2, 64, 768), teacher=(256, 6, 4, 2, 64, 768), vocab=4096),
    "small": dict(student=(256, 6, 8, 4, 32, 768), teacher=(384, 8, 8, 4, 48, 1152), vocab=8192),
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds-min", type=float, default=1.0, help="repeat each phase of a round for so long; the round's time is the mean")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", help="of cosmos-host; PyTorch runs on the CPU, or on CUDA for burn:cuda")
    parser.add_argument("--cpu-time", action="store_true", help="compare processor time on one thread instead of the clock: for a machine that does other work too")
    parser.add_argument("--bench", type=Path, help="the bench binary (default: the newest under the target folder)")
    parser.add_argument("--json", type=Path, help="also write everything that was measured here")
    return parser.parse_args()


def make_model(shape, vocab, folder, seed):
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, layers, heads, kv_heads, head_dim, intermediate = shape
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, intermediate_size=intermediate,
        max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder, safe_serialization=True)
    return model


class Reference:
    """The work in transformers and TRL."""

    def __init__(self, student, teacher, options):
        import torch

        self.device = "cuda" if options.device == "burn:cuda" else "cpu"
        self.student, self.teacher, self.options = student.to(self.device), teacher.to(self.device).eval(), options
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)

    def timed(self, work):
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
        clock = time.process_time if self.options.cpu_time else time.perf_counter
        start, started, times = clock(), time.perf_counter(), 1
        result = work()
        while time.perf_counter() - started < self.options.seconds_min:
            work()
            times += 1
        if self.device == "cuda":
            torch.cuda.synchronize()
        return (clock() - start) / times, result

    def rollout(self, prompts):
        import torch

        def work():
            with torch.no_grad():
                return self.student.eval().generate(
                    prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                    max_new_tokens=self.options.new_tokens, min_new_tokens=self.options.new_tokens, pad_token_id=0,
                )

        return self.timed(work)[0]

    def score(self, sequences):
        import torch

        start = self.options.prompt_tokens - 1

        def work():
            total = 0.0
            with torch.no_grad():
                for batch in sequences.split(self.options.micro_batch):
                    logits = self.teacher(batch).logits[:, start:-1]
                    log_probs = logits.log_softmax(-1)
                    total += log_probs.gather(-1, batch[:, start + 1 :, None]).sum().item()
                    log_probs.topk(8, dim=-1)
            return total

        return self.timed(work)

    def train(self, sequences):
        import torch
        from trl.experimental.gkd.gkd_trainer import GKDTrainer

        start = self.options.prompt_tokens - 1
        tokens = sequences.shape[0] * self.options.new_tokens

        def work():
            total = 0.0
            self.student.train()
            self.optimizer.zero_grad()
            for batch in sequences.split(self.options.micro_batch):
                with torch.no_grad():
                    teacher_logits = self.teacher(batch).logits[:, start:-1]
                student_logits = self.student(batch).logits[:, start:-1]
                loss = GKDTrainer.generalized_jsd_loss(
                    student_logits, teacher_logits, batch[:, start + 1 :], beta=1.0, num_items_in_batch=tokens
                )
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            self.optimizer.step()
            return total

        return self.timed(work)


def ours(binary, folder, options):
    out = folder / "ours.json"
    command = [
        str(binary), "--suite", "compare", "--device", options.device, "--student", str(folder / "student"),
        "--teacher", str(folder / "teacher"), "--sequences", str(folder / "sequences.json"),
        "--prompt-tokens", str(options.prompt_tokens), "--micro-batch", str(options.micro_batch),
        "--seconds-min", str(options.seconds_min), "--json", str(out),
    ]
    environment = dict(os.environ, RAYON_NUM_THREADS=str(options.threads))
    subprocess.run(command, check=True, env=environment)
    return json.loads(out.read_text())


def main():
    options = arguments()
    if options.cpu_time:
        # Waiting threads of PyTorch spin, which would count against it.
        options.threads = 1
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(options.threads)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    binary = bench_binary(options.bench)
    import torch
    import transformers
    import trl

    torch.set_num_threads(options.threads)
    size = SIZES[options.size]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        student = make_model(size["student"], size["vocab"], folder / "student", 1)
        teacher = make_model(size["teacher"], size["vocab"], folder / "teacher", 2)
        parameters = [sum(p.numel() for p in m.parameters()) for m in (student, teacher)]
        torch.manual_seed(3)
        length = options.prompt_tokens + options.new_tokens
        sequences = torch.randint(1, size["vocab"], (options.sequences, length))
        (folder / "sequences.json").write_text(json.dumps(sequences.tolist()))
        theirs = Reference(student, teacher, options)
        sequences = sequences.to(theirs.device)
        prompts = sequences[:, : options.prompt_tokens]
        times = {phase: {"ours": [], "theirs": []} for phase in ("rollout", "score", "train")}
        for round_number in range(options.rounds + 1):
            mine = ours(binary, folder, options)
            theirs_rollout = theirs.rollout(prompts)
            theirs_score, score_sum = theirs.score(sequences)
            theirs_train, loss = theirs.train(sequences)
            if round_number == 0:
                # The first round warms up both sides, and is the only one in which PyTorch's student is still untrained.
                check("teacher log-probabilities", mine["score"]["logprob_sum"], score_sum)
                check("training loss", mine["train"]["loss"], loss)
                continue
            for phase, seconds in (("rollout", theirs_rollout), ("score", theirs_score), ("train", theirs_train)):
                times[phase]["theirs"].append(seconds)
                times[phase]["ours"].append(mine[phase]["cpu_seconds" if options.cpu_time else "seconds"])

    completion_tokens = options.sequences * options.new_tokens
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": {"cpu": processor(), "threads": options.threads, "device": options.device, "clock": "processor time" if options.cpu_time else "wall"},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
        "work": {
            "size": options.size, "student_parameters": parameters[0], "teacher_parameters": parameters[1], "vocab": size["vocab"],
            "sequences": options.sequences, "prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens,
            "micro_batch": options.micro_batch, "seconds_min": options.seconds_min, "rounds": options.rounds,
        },
        "phases": {},
    }
    print(f"{report['machine']['cpu']}, {options.threads} threads, {options.device}; "
          f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}")
    print(f"student {parameters[0] / 1e6:.2f} M, teacher {parameters[1] / 1e6:.2f} M, vocabulary {size['vocab']}, "
          f"{options.sequences} x ({options.prompt_tokens} + {options.new_tokens}) tokens")
    print(f"{'phase':<10}{'cosmos-host':>16}{'reference':>16}{'ratio':>9}   (completion tokens a second; above 1: cosmos-host is faster)")
    for phase, sides in times.items():
        mine, reference = (statistics.median(sides[side]) for side in ("ours", "theirs"))
        report["phases"][phase] = {
            "ours_seconds": sides["ours"], "theirs_seconds": sides["theirs"],
            "ours_tokens_per_second": completion_tokens / mine, "theirs_tokens_per_second": completion_tokens / reference,
            "ratio": reference / mine,
        }
        print(f"{phase:<10}{completion_tokens / mine:>16.0f}{completion_tokens / reference:>16.0f}{reference / mine:>9.2f}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
        print(f"written: {options.json}")


def check(what, mine, reference):
    if abs(mine - reference) > 1e-3 * abs(reference):
        sys.exit(f"error: the {what} differ: cosmos-host {mine}, reference {reference}; the two sides do different work")


if __name__ == "__main__":
    main()
