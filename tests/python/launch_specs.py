#!/usr/bin/env python3
"""Checks what `launch lepton` and `launch kubernetes` write against the types and schemas of those who read it.

    pip install leptonai kubernetes-validate pyyaml
    python3 tests/python/launch_specs.py [--binary target/release/cosmos-host]

Lepton: the package's own pydantic types, with unknown fields refused, and the checks that its client makes before it
sends a job. Kubernetes: the published schema of each object, strictly. A package that is not installed is named and its
part skipped; exit 77 when nothing could be checked.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/quickstart/countdown.toml"
REFERENCE = ROOT / "configs/lepton/reference-job.json"
PLUGIN = "/opt/cosmos-host/plugins/dist/countdown.wasm"
GPUS = ["--set", "host.device=burn:cuda", "--set", "policy.parallelism.tp_size=8", "--n-rollout-replicas", "3"]

LEPTON = {
    "reference": ["--lepton-reference-job", str(REFERENCE), "--one-process"],
    "small": ["--lepton-container-image", "image:1", "--lepton-resource-shape", "cpu.small", "--one-process"],
    "everything": [
        "--lepton-job-name", "distil-a", "--lepton-container-image", "image:1", "--lepton-resource-shape",
        "gpu.8xh100-80gb", "--lepton-container-port", "8082", "--lepton-container-port", "12800:tcp",
        "--lepton-node-group", "ng-1", "--lepton-node-id", "node-1", "--lepton-max-failure-retry", "1",
        "--lepton-max-job-failure-retry", "2", "--lepton-env", "A=b=c", "--lepton-secret", "HF_TOKEN",
        "--lepton-secret", "COSMOS_CONTROL_TOKEN=run-token", "--lepton-mount", "/runs:/mnt/runs:node-nfs:my-nfs",
        "--lepton-image-pull-secrets", "registry", "--lepton-privileged", "--lepton-log-collection", "true",
        "--lepton-queue-priority", "5", "--lepton-can-be-preempted", "--lepton-can-preempt", "false",
        "--lepton-visibility", "private", "--lepton-shared-memory-size", "65536", "--lepton-with-reservation", "r-1",
        *GPUS,
    ],
}
KUBERNETES = {
    "one": ["--one-process"],
    # A policy of 16 GPUs over two nodes.
    "large": ["--name", "distil", "--set", "host.device=burn:cuda", "--set", "policy.parallelism.tp_size=8", "--set",
              "policy.parallelism.dp_shard_size=2"],
    "many": [
        "--name", "distil", "--namespace", "training", "--volume-claim", "runs", "--env", "HF_HUB_OFFLINE=1",
        "--retries", "5", *GPUS,
    ],
}


def told(binary, *arguments):
    done = subprocess.run([binary, "launch", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"error: {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def unknown(model, value, place):
    """Fields of `value` that the pydantic model would silently drop."""
    from pydantic import BaseModel

    if isinstance(model, list):
        for item, inner in zip(value, model):
            yield from unknown(inner, item, place)
    elif isinstance(model, BaseModel):
        known = {field.alias or name: name for name, field in type(model).model_fields.items()}
        for key, inner in value.items():
            if key not in known:
                yield f"{place}.{key}"
            else:
                yield from unknown(getattr(model, known[key]), inner, f"{place}.{key}")


def check_lepton(binary):
    try:
        from leptonai.api.v2.job_validation import validate_job_create
        from leptonai.api.v2.types.job import LeptonJob
    except ImportError as error:
        print(f"skipped: lepton ({error}; pip install leptonai)")
        return False
    for name, arguments in LEPTON.items():
        common = ["--config", str(CONFIG), "--plugin", PLUGIN, "--run", "/mnt/runs/a", "--dry-run"]
        value = json.loads(told(binary, "lepton", *common, *arguments))
        job = LeptonJob(**value)
        validate_job_create(job)
        lost = list(unknown(job, value, "job"))
        if lost:
            sys.exit(f"error: lepton {name}: unknown to leptonai: {', '.join(lost)}")
        assert job.spec.completions == job.spec.parallelism >= 1
        assert job.spec.container.command[0] == "/bin/sh"
        print(f"ok: lepton {name}, {job.spec.completions} workers")
    assert job.spec.envs[1].value is None and job.spec.envs[1].value_from.secret_name_ref == "HF_TOKEN"
    assert job.spec.queue_config.priority_class == "mid-5000"
    assert job.spec.reservation_config.reservation_id == "r-1"
    broken = {"metadata": {"id": "Distil_"}, "spec": {}}
    try:
        validate_job_create(LeptonJob(**broken))
    except ValueError:
        return True
    sys.exit("error: leptonai accepts a bad name: this check checks nothing")


def check_kubernetes(binary):
    try:
        import kubernetes_validate
        import yaml
    except ImportError as error:
        print(f"skipped: kubernetes ({error}; pip install kubernetes-validate pyyaml)")
        return False
    version = kubernetes_validate.latest_version()
    for name, arguments in KUBERNETES.items():
        common = ["--config", str(CONFIG), "--plugin", PLUGIN, "--image", "registry/cosmos-host:1"]
        documents = list(yaml.safe_load_all(told(binary, "kubernetes", *common, *arguments)))
        kinds = [document["kind"] for document in documents]
        assert kinds == ["Service", "ConfigMap", "Job"], kinds
        for document in documents:
            kubernetes_validate.validate(document, version, strict=True)
        job = documents[2]["spec"]
        rules = {rule["action"]: rule for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule}
        assert rules["Ignore"]["onExitCodes"]["values"] == [75] and rules["FailJob"]["onExitCodes"]["values"] == [2]
        assert documents[0]["metadata"]["name"] == job["template"]["spec"]["subdomain"]
        config = documents[1]["data"]["config.toml"]
        assert "[train]" in config and config.endswith("\n")
        print(f"ok: kubernetes {name}, {job['completions']} pods, schema {version}")
    documents[2]["spec"]["completions"] = "three"
    try:
        kubernetes_validate.validate(documents[2], version, strict=True)
    except kubernetes_validate.ValidationError:
        return True
    sys.exit("error: kubernetes-validate accepts a wrong type: this check checks nothing")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/cosmos-host")
    options = parser.parse_args()
    checked = [check_lepton(options.binary.resolve()), check_kubernetes(options.binary.resolve())]
    sys.exit(0 if any(checked) else 77)


if __name__ == "__main__":
    main()
