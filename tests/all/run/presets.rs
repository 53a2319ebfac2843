//! The original's presets, a few steps each, with only model paths and sizes changed, on real data with tiny random
//! Qwen checkpoints and the real Qwen tokenizer.

use std::fs;
use std::path::{Path, PathBuf};

use cosmos_engine::model::{self, ModelConfig};
use cosmos_engine::weights::{ExportOptions, export};
use cosmos_testkit::{golden, shared_data};
use serde_json::json;

use super::{host, metrics, succeed, text};

/// A random checkpoint of a family at a tiny size, with the real tokenizer and chat template.
fn tiny_qwen(folder: &Path, family: &str, hidden: usize, seed: u64) -> Option<()> {
    let tokenizer = golden("tokenizer-qwen/tokenizer.json")?;
    let template = shared_data("chat_templates/qwen3.jinja")?;
    fs::create_dir_all(folder).unwrap();
    let config = json!({
        "architectures": [format!("{family}ForCausalLM")], "model_type": family.to_lowercase(),
        "hidden_size": hidden, "intermediate_size": hidden * 2, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": hidden / 2, "vocab_size": 151_936, "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "tie_word_embeddings": true, "hidden_act": "silu",
        "initializer_range": 0.02, "eos_token_id": 151_645, "torch_dtype": "float32",
    });
    let config = ModelConfig::from_json(&config.to_string(), &folder.join("config.json")).unwrap();
    let model = model::random(&config, "cpu", seed).unwrap();
    export(model.as_ref(), folder, &ExportOptions::default()).unwrap();
    fs::copy(tokenizer, folder.join("tokenizer.json")).unwrap();
    fs::copy(template, folder.join("chat_template.jinja")).unwrap();
    Some(())
}

/// A JSONL file with the columns that a plugin reads.
fn rows(path: &Path, rows: &[serde_json::Value]) -> PathBuf {
    let lines: Vec<String> = rows.iter().map(|r| r.to_string()).collect();
    fs::write(path, lines.join("\n")).unwrap();
    path.to_path_buf()
}

fn small(student: &Path, teacher: &Path, out: &Path) -> Vec<String> {
    [
        format!("policy.model_name_or_path={}", student.display()),
        format!("distillation.model_name_or_path={}", teacher.display()),
        format!("train.output_dir={}", out.display()),
        "train.timestamp=1".into(),
        "train.max_num_steps=2".into(),
        "train.train_batch_per_replica=16".into(),
        "rollout.max_response_length=6".into(),
        "validation.max_response_length=6".into(),
    ]
    .into_iter()
    .collect()
}

fn run_preset(config: &str, plugin: &str, sets: &[String], out: &Path) {
    let mut command = host();
    command.args(["run", "--config", config, "--plugin", plugin]);
    for set in sets {
        command.args(["--set", set]);
    }
    let output = succeed(&mut command);
    let steps = metrics(out);
    let trained: Vec<_> = steps.iter().filter(|m| m["train/teacher_kl_reversed"].is_number()).collect();
    assert_eq!(trained.len(), 2, "{}", text(&output));
    assert!(steps.iter().any(|m| m["val/reward_avg"].is_number()), "{}", text(&output));
}

#[test]
fn deepmath() {
    let (Some(aime), dir) = (shared_data("aime24.jsonl"), tempfile::tempdir().unwrap()) else { return };
    let (student, teacher, out) = (dir.path().join("student"), dir.path().join("teacher"), dir.path().join("out"));
    if tiny_qwen(&student, "Qwen3", 32, 1).and(tiny_qwen(&teacher, "Qwen3", 64, 2)).is_none() {
        return;
    }
    let questions = cosmos_testkit::read_jsonl(&aime);
    let train: Vec<_> = questions.iter().map(|q| json!({"question": q["problem"]})).collect();
    let train = rows(&dir.path().join("train.jsonl"), &train);
    let mut sets = small(&student, &teacher, &out);
    sets.extend([
        format!("train.train_policy.dataset.name={}", train.display()),
        format!("validation.dataset.name={}", aime.display()),
        "validation.dataset.test_size=4".into(),
    ]);
    run_preset("configs/qwen3/qwen3-8b-distill-deepmath.toml", "plugins/dist/deepmath.wasm", &sets, &out);
}

#[test]
fn countdown() {
    let dir = tempfile::tempdir().unwrap();
    let (student, teacher, out) = (dir.path().join("student"), dir.path().join("teacher"), dir.path().join("out"));
    if tiny_qwen(&student, "Qwen2", 32, 3).and(tiny_qwen(&teacher, "Qwen2", 64, 4)).is_none() {
        return;
    }
    let problem = |nums: [u32; 3], target: u32| {
        let ask = format!("Using the numbers {nums:?}, make {target}. Answer in <answer> tags.");
        json!({
            "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": "<answer>1+1</answer>"}],
            "prompt": [{"role": "user", "content": ask}], "nums": nums, "target": target,
        })
    };
    let all: Vec<_> = (1..40).map(|i| problem([i, i + 1, 2], i + 3)).collect();
    let file = rows(&dir.path().join("countdown.jsonl"), &all);
    let mut sets = small(&student, &teacher, &out);
    sets.extend([
        format!("train.train_policy.dataset.name={}", file.display()),
        format!("validation.dataset.name={}", file.display()),
        "validation.dataset.test_size=4".into(),
    ]);
    sets.extend(
        ["train.train_policy.dataset.subset=", "validation.dataset.subset=", "validation.dataset.split=train"]
            .map(String::from),
    );
    run_preset("configs/qwen2-5/qwen2-5-1.5b-distill-countdown.toml", "plugins/dist/countdown-hf.wasm", &sets, &out);
}
