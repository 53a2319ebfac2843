#!/usr/bin/env python3
"""Loads an exported folder with transformers and compares its log-probabilities with those of `cosmos-host score`.

  python3 tests/python/check_export.py EXPORTED_FOLDER [--binary target/release/cosmos-host] [--texts FILE]

Exit 0 when every token agrees within the tolerance, 1 when one differs. The folder is also checked for what
transformers needs to load it without our help: config.json, safetensors, generation_config.json, tokenizer.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["(3+5)*2=16", "1+2+3=6\n", "The quick brown fox jumps over the lazy dog.", "7*8-9=47, 2*2*2=8"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/cosmos-host")
    parser.add_argument("--texts", type=Path, help="one text a line, instead of the built-in ones")
    parser.add_argument("--tolerance", type=float, default=2e-4, help="absolute, on a log-probability in f32")
    options = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    model, info = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            sys.exit(f"error: transformers reports {kind}: {sorted(map(str, info[kind]))}")
    if (options.folder / "generation_config.json").exists():
        GenerationConfig.from_pretrained(options.folder)
    model.eval()

    texts = options.texts.read_text().splitlines() if options.texts else TEXTS
    with tempfile.TemporaryDirectory() as temporary:
        requests = Path(temporary) / "texts.jsonl"
        requests.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        done = subprocess.run(
            [str(options.binary), "score", "--model", str(options.folder), "--input", str(requests)],
            check=True, stdout=subprocess.PIPE, text=True,
        )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    if len(answers) != len(texts):
        sys.exit(f"error: {len(texts)} texts in, {len(answers)} answers out")

    worst, tokens = 0.0, 0
    for text, answer in zip(texts, answers):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids != answer["ids"]:
            sys.exit(f"error: `{text}`: transformers tokenizes to {ids}, cosmos-host to {answer['ids']}")
        if len(ids) < 2:
            continue
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        expected = log_probs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        given = answer["logprobs"]
        if len(given) != len(expected):
            sys.exit(f"error: `{text}`: {len(expected)} log-probabilities expected, {len(given)} given")
        for position, (mine, theirs) in enumerate(zip(given, expected)):
            worst = max(worst, abs(mine - theirs))
            if abs(mine - theirs) > options.tolerance:
                sys.exit(f"error: `{text}`, token {position + 1}: cosmos-host {mine}, transformers {theirs}")
        tokens += len(expected)
    if tokens == 0:
        sys.exit("error: no text has two tokens, so nothing was compared")
    print(f"{options.folder}: {tokens} log-probabilities agree, largest difference {worst:.2e}")


if __name__ == "__main__":
    main()
