#!/usr/bin/env python3
"""Teacher scoring and full-vocabulary objectives: cosmos-host and transformers/TRL in turns, on one random model.

  score   log-probabilities of every token but the first: ours, against a transformers forward, `log_softmax` and
          `gather`; and what our top k costs beside them
  train   forward, loss and backward over the same tokens, without the optimizer: the plain negative log-likelihood, and
          the generalised Jensen-Shannon divergence to one teacher and to the mixture of two. Counted in the divergence:
          each teacher's head product over its kept hidden states, its softmax, the divergence. Not counted: the
          teacher's own forward up to its head, which is scoring. The peer is TRL's GKD loss on the same logits.
  memory  peak resident memory over sequences of rising length and number, a fresh process for each

Both sides are processes of their own that live as long as the comparison; their rounds alternate and the table has the
medians. They must agree on every log-probability and on the losses, or nothing is printed: a ratio between different
work says nothing.

Needs torch, transformers, trl and safetensors in the Python that runs it, and
  cargo build --release -p cosmos-engine --example score
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

from machine import processor

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20

SHAPES = {
    # family, hidden, layers, heads, kv heads, head dim, intermediate, vocabulary
    "medium": ("qwen3", 256, 6, 4, 2, 64, 768, 4096),
    "wide": ("qwen3", 256, 6, 4, 2, 64, 768, 151_936),
    "qwen2.5-0.5b": ("qwen2", 896, 24, 14, 2, 64, 4864, 151_936),
}
LOGPROB_GAP_MAX = 1e-4
LOSS_GAP_MAX = 1e-4


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["score", "train", "memory"])
    parser.add_argument("--shape", choices=SHAPES, default="medium")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--mini-batch", type=int, default=8, help="sequences of a forward pass")
    parser.add_argument("--top-k", type=int, nargs="*", default=[8, 64])
    parser.add_argument("--beta", type=float, default=0.5, help="of the divergence")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cpu-time", action="store_true", help="compare processor time on one thread instead of the clock: for a machine that does other work too")
    parser.add_argument("--alone", action="store_true", help="leave transformers and TRL out of `train`")
    parser.add_argument("--worker", type=Path, help="our half (default: the example `score` under the target folder)")
    parser.add_argument("--json", type=Path, help="also write everything that was measured here")
    options = parser.parse_args()
    if options.cpu_time:
        # Waiting threads of PyTorch spin, which would count against it.
        options.threads = 1
    options.clock = "cpu_seconds" if options.cpu_time else "seconds"
    return options


# ---- the reference ----------------------------------------------------------------------------------------------------


def make_model(shape, folder, seed):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    family, hidden, layers, heads, kv_heads, head_dim, intermediate, vocab = shape
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=intermediate, max_position_embeddings=32_768,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )
    if family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(head_dim=head_dim, **sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
    # Halves the file; both sides widen the same numbers.
    model.to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)
    return sum(p.numel() for p in model.parameters())


class Seconds:
    """By the clock, and of processor time."""

    def __init__(self):
        self.start = time.perf_counter(), time.process_time()

    def so_far(self):
        return {"seconds": time.perf_counter() - self.start[0], "cpu_seconds": time.process_time() - self.start[1]}


class Reference:
    """The work in transformers and TRL, by the orders of our half."""

    def __init__(self, folder, threads):
        import torch

        torch.set_num_threads(threads)
        self.model = self.load(folder)
        self.teachers = []

    @staticmethod
    def load(folder):
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()

        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def score(self, order):
        import torch

        sequences = torch.tensor(order["sequences"])
        self.model.eval()
        seconds, logprobs = Seconds(), []
        with torch.inference_mode():
            for batch in sequences.split(order["mini_batch"]):
                logits = self.model(batch).logits[:, :-1]
                found = logits.log_softmax(-1).gather(-1, batch[:, 1:, None])[..., 0]
                if order["top_k"]:
                    logits.topk(order["top_k"], dim=-1)
                logprobs += found.tolist()
        return dict(seconds.so_far(), logprobs=logprobs)

    def teach(self, order):
        import torch

        model = self.load(order["folder"]).eval()
        with torch.inference_mode():
            hidden = model.model(torch.tensor(order["sequences"])).last_hidden_state[:, :-1]
        # A tensor that autograd may meet.
        self.teachers.append((model.lm_head, hidden.clone()))
        return {}

    def train(self, order):
        import torch

        sequences = torch.tensor(order["sequences"])
        rows = sequences.shape[0] * (sequences.shape[1] - 1)
        self.model.train().zero_grad()
        seconds, total, first = Seconds(), 0.0, 0
        for batch in sequences.split(order["mini_batch"]):
            own = slice(first, first + len(batch))
            first += len(batch)
            logits = self.model(batch).logits[:, :-1]
            if order["loss"] == "nll":
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
                ) / rows
            else:
                loss = self.divergence(logits, own, batch, order["beta"], rows)
            loss.backward()
            total += loss.item()
        spent = seconds.so_far()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()]).item()
        return dict(spent, loss=total, gradient_norm=norm)

    def divergence(self, logits, own, batch, beta, rows):
        import torch
        from trl.experimental.gkd.gkd_trainer import GKDTrainer

        with torch.no_grad():
            found = [head(hidden[own]) for head, hidden in self.teachers]
            if len(found) > 1:
                mixed = torch.stack([z.softmax(-1) for z in found]).mean(0).log()
            else:
                mixed = found[0]
        return GKDTrainer.generalized_jsd_loss(logits, mixed, batch[:, 1:], beta=beta, num_items_in_batch=rows)


def memory(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return None


def serve(folder, threads):
    reference = Reference(folder, threads)
    print(json.dumps({"resident_bytes": memory("VmRSS:")}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass
        answer = getattr(reference, order["do"])(order)
        print(json.dumps(dict(answer, peak_bytes=memory("VmHWM:"))), flush=True)


# ---- both -------------------------------------------------------------------------------------------------------------


class Worker:
    """A process that answers orders with one line each."""

    def __init__(self, command, threads):
        environment = dict(os.environ, TRL_EXPERIMENTAL_SILENCE="1")
        for variable in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            environment[variable] = str(threads)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.resident = self.answer()["resident_bytes"]

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"error: {self.process.args[0]} ended with {self.process.wait()}; its message is above")
        return json.loads(line)

    def ask(self, **order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self):
        self.process.stdin.close()
        self.process.wait()


class Bench:
    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.worker = options.worker or Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release/examples/score"
        if not self.worker.exists():
            sys.exit(f"error: {self.worker} is not there\nhint: cargo build --release -p cosmos-engine --example score")
        self.shape = SHAPES[options.shape]
        self.parameters = int(self.run_python("make", "student", "1"))

    def run_python(self, *words):
        command = [sys.executable, __file__, "--part", *words]
        return subprocess.run(
            command, check=True, capture_output=True, text=True,
            env=dict(os.environ, HF_HUB_DISABLE_PROGRESS_BARS="1", COSMOS_SCORE_FOLDER=str(self.folder), COSMOS_SCORE_SHAPE=self.options.shape),
        ).stdout.strip().splitlines()[-1]

    def ours(self):
        return Worker([str(self.worker), str(self.folder / "student")], self.options.threads)

    def theirs(self):
        command = [sys.executable, __file__, "--part", "serve", str(self.folder / "student"), str(self.options.threads)]
        return Worker(command, self.options.threads)

    def tokens(self, sequences, length):
        import random

        random.seed(3)
        return [[random.randrange(1, self.shape[-1]) for _ in range(length)] for _ in range(sequences)]

    def score(self):
        options = self.options
        sequences = self.tokens(options.sequences, options.length)
        sides = {"ours": self.ours(), "theirs": self.theirs()}
        order = dict(do="score", sequences=sequences, mini_batch=options.mini_batch)
        times, peaks = {}, {}
        for number in range(options.rounds + 1):
            found = {}
            for k in [0, *options.top_k]:
                for side, worker in sides.items():
                    answer = found[side] = worker.ask(**order, top_k=k)
                    peaks[side] = max(peaks.get(side, 0), answer["peak_bytes"] or 0)
                    if number:
                        times.setdefault((side, k), []).append(answer[options.clock])
                check_logprobs(found["ours"]["logprobs"], found["theirs"]["logprobs"])
        tokens = options.sequences * options.length
        medians = {key: statistics.median(values) for key, values in times.items()}
        print(f"{'top k':<8}{'ours tok/s':>12}{'transformers':>14}{'ratio':>8}{'ours, extra':>13}{'theirs, extra':>15}")
        rows = []
        for k in [0, *options.top_k]:
            ours, theirs = medians["ours", k], medians["theirs", k]
            extra = [medians[side, k] / medians[side, 0] - 1 for side in ("ours", "theirs")]
            print(f"{k:<8}{tokens / ours:>12.1f}{tokens / theirs:>14.1f}{theirs / ours:>8.2f}{extra[0]:>12.1%} {extra[1]:>14.1%}")
            rows.append(dict(top_k=k, ours_seconds=times["ours", k], theirs_seconds=times["theirs", k], ratio=theirs / ours))
        for side, worker in sides.items():
            print(f"{side}: {peaks[side] / MIB:,.0f} MiB at most, {worker.resident / MIB:,.0f} MiB with the model loaded")
            worker.end()
        return dict(rows=rows, peak_bytes=peaks)

    def train(self):
        options = self.options
        sequences = self.tokens(options.sequences, options.length)
        for name, seed in (("teacher-1", "2"), ("teacher-2", "3")):
            self.run_python("make", name, seed)
        names = ["ours"] if options.alone else ["ours", "theirs"]
        losses = ["nll", "jsd, one teacher", "jsd, two teachers"]
        times, peaks, seen = {}, {}, {}
        # Teachers stay once they are there, so each number of them has processes of its own.
        for teachers in (1, 2):
            sides = {side: getattr(self, side)() for side in names}
            for worker in sides.values():
                for number in range(teachers):
                    worker.ask(do="teach", folder=str(self.folder / f"teacher-{number + 1}"), sequences=sequences)
            mine = losses[:2] if teachers == 1 else losses[2:]
            for number in range(options.rounds + 1):
                for loss in mine:
                    for side, worker in sides.items():
                        answer = worker.ask(
                            do="train", sequences=sequences, loss=loss[:3], beta=options.beta, mini_batch=options.mini_batch
                        )
                        seen[side, loss] = (answer["loss"], answer["gradient_norm"])
                        peaks[side, loss] = max(peaks.get((side, loss), 0), answer["peak_bytes"] or 0)
                        if number:
                            times.setdefault((side, loss), []).append(answer[options.clock])
            for worker in sides.values():
                worker.end()
        for loss in losses if len(names) == 2 else []:
            for what, mine, reference in zip(("loss", "gradient norm"), seen["ours", loss], seen["theirs", loss]):
                if not abs(mine - reference) <= LOSS_GAP_MAX * abs(reference):
                    sys.exit(f"error: the {what} of {loss} differs: cosmos-host {mine}, reference {reference}")
        tokens = options.sequences * options.length
        medians = {key: statistics.median(values) for key, values in times.items()}
        print(f"{'loss':<20}{'ours tok/s':>12}{'by our nll':>12}{'peak MiB':>10}" + (f"{'torch, TRL':>12}{'by its nll':>12}{'peak MiB':>10}{'ratio':>8}" if len(names) == 2 else ""))
        rows = []
        for loss in losses:
            line = f"{loss:<20}"
            for side in names:
                seconds = medians[side, loss]
                line += f"{tokens / seconds:>12.1f}{seconds / medians[side, 'nll']:>12.3f}{peaks[side, loss] / MIB:>10,.0f}"
            if len(names) == 2:
                line += f"{medians['theirs', loss] / medians['ours', loss]:>8.2f}"
            print(line)
            rows.append(dict(loss=loss, **{f"{side}_seconds": times[side, loss] for side in names}, **{f"{side}_peak_bytes": peaks[side, loss] for side in names}))
        return dict(rows=rows)

    def memory(self):
        """What scoring takes beside the loaded model, over rising lengths and batches."""
        print(f"{'sequences':<11}{'length':>8}{'tokens x vocabulary':>21}{'ours, beside the model':>24}{'transformers':>14}")
        rows = []
        for sequences, length in [(1, 128), (1, 512), (4, 512), (8, 512), (1, 2048), (2, 2048)]:
            ids = self.tokens(sequences, length)
            found = {}
            for side in ("ours", "theirs"):
                worker = getattr(self, side)()
                # A single short sequence first: what a process needs once is no part of the question.
                worker.ask(do="score", sequences=[ids[0][:32]], mini_batch=1, top_k=0)
                answer = worker.ask(do="score", sequences=ids, mini_batch=sequences, top_k=8)
                found[side] = max(0, answer["peak_bytes"] - worker.resident)
                worker.end()
            logits = 4 * sequences * length * self.shape[-1]
            print(f"{sequences:<11}{length:>8}{logits / MIB:>17,.0f} MiB{found['ours'] / MIB:>20,.0f} MiB{found['theirs'] / MIB:>10,.0f} MiB")
            rows.append(dict(sequences=sequences, length=length, logits_bytes=logits, **found))
        return dict(rows=rows)


def check_logprobs(ours, theirs):
    gap = max(abs(a - b) for mine, reference in zip(ours, theirs) for a, b in zip(mine, reference))
    if len(ours) != len(theirs) or not gap <= LOGPROB_GAP_MAX:
        sys.exit(f"error: log-probabilities differ by up to {gap}; the two sides do different work")


def main():
    options = arguments()
    from importlib.metadata import version

    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(options, Path(temporary))
        report = {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "machine": {"cpu": processor(), "threads": options.threads, "clock": "processor" if options.cpu_time else "wall"},
            "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers", "trl")}},
            "work": {
                "shape": options.shape, "parameters": bench.parameters, "vocabulary": bench.shape[-1], "sequences": options.sequences,
                "length": options.length, "mini_batch": options.mini_batch, "rounds": options.rounds, "beta": options.beta,
            },
        }
        versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
        print(f"{report['machine']['cpu']}, {options.threads} threads, {report['machine']['clock']} time; {versions}")
        print(f"{options.shape}: {bench.parameters / 1e6:.2f} M parameters, vocabulary {bench.shape[-1]:,}; "
              f"{options.sequences} x {options.length} tokens, {options.mini_batch} sequences at a time, f32")
        for what in options.what:
            print(f"\n{what}", flush=True)
            report[what] = getattr(bench, what)()
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
        print(f"written: {options.json}")


def part(words):
    """What this script runs in processes of its own."""
    if words[0] == "serve":
        serve(words[1], int(words[2]))
    else:
        folder, shape = Path(os.environ["COSMOS_SCORE_FOLDER"]), SHAPES[os.environ["COSMOS_SCORE_SHAPE"]]
        print(make_model(shape, folder / words[1], int(words[2])))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        part(sys.argv[2:])
    else:
        main()
