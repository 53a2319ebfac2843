use std::fs;
use std::path::Path;

use super::*;
use crate::burn_engine;
use crate::model::{Family, Model};

fn config() -> ModelConfig {
    let text = r#"{"model_type": "qwen3", "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "eos_token_id": [1, 2]}"#;
    ModelConfig::from_json(text, Path::new("config.json")).unwrap()
}

fn model(config: &ModelConfig) -> Box<dyn Model> {
    burn_engine::random(config, "burn:flex", 7).unwrap()
}

fn all(model: &dyn Model) -> Vec<Vec<f32>> {
    (0..model.params().len()).map(|index| model.read_param(index)).collect()
}

#[test]
fn fresh_weights_follow_the_seed() {
    let config = config();
    assert_eq!(random(&config, 3), random(&config, 3));
    assert_ne!(random(&config, 3), random(&config, 4));
    let values: Vec<f32> = random(&config, 3).swap_remove(0);
    let mean = values.iter().sum::<f32>() / values.len() as f32;
    let std = (values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / values.len() as f32).sqrt();
    assert!(mean.abs() < 0.004 && (std - 0.02).abs() < 0.003, "mean {mean}, std {std}");
}

#[test]
fn exported_and_read_back_single_and_in_shards() {
    for tied in [false, true] {
        let config = ModelConfig { tie_word_embeddings: tied, ..config() };
        let model = model(&config);
        let dir = tempfile::tempdir().unwrap();
        for (shard_bytes_max, files) in [(u64::MAX, 1), (4000, 2)] {
            let options = ExportOptions { shard_bytes_max, ..ExportOptions::default() };
            export(&*model, dir.path(), &options).unwrap();
            let back = burn_engine::load(dir.path(), "burn:flex").unwrap();
            assert_eq!(back.config(), &config);
            assert_eq!(all(&*back), all(&*model));
            let single = dir.path().join("model.safetensors").exists();
            let index = dir.path().join("model.safetensors.index.json").exists();
            assert_eq!((single, index), (files == 1, files > 1));
        }
    }
}

#[test]
fn bf16_rounds_once() {
    let model = model(&config());
    let dir = tempfile::tempdir().unwrap();
    export(&*model, dir.path(), &ExportOptions { dtype: Dtype::Bf16, ..ExportOptions::default() }).unwrap();
    let back = burn_engine::load(dir.path(), "burn:flex").unwrap();
    for (a, b) in all(&*model).concat().iter().zip(all(&*back).concat()) {
        assert_eq!(half::bf16::from_f32(*a).to_f32(), b);
    }
}

#[test]
fn tokenizer_and_generation_config_come_along() {
    let (source, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(source.path().join("tokenizer.json"), "{}").unwrap();
    fs::write(source.path().join("chat_template.jinja"), "{{ messages }}").unwrap();
    fs::write(source.path().join("generation_config.json"), r#"{"eos_token_id": [5, 6], "top_k": 20}"#).unwrap();
    let options = ExportOptions { source: Some(source.path().into()), ..ExportOptions::default() };
    export(&*model(&config()), dir.path(), &options).unwrap();
    assert_eq!(fs::read_to_string(dir.path().join("chat_template.jinja")).unwrap(), "{{ messages }}");
    let generation = crate::model::GenerationConfig::from_folder(dir.path(), &config()).unwrap();
    assert_eq!((generation.eos_token_ids.as_slice(), generation.top_k), ([5, 6].as_slice(), Some(20)));
    let partial = fs::read_dir(dir.path())
        .unwrap()
        .filter(|e| e.as_ref().unwrap().path().extension().is_some_and(|e| e == "partial"))
        .count();
    assert_eq!(partial, 0);
}

/// An exported folder, damaged by `damage`; the error that loading gives.
fn damaged(damage: &dyn Fn(&Path)) -> String {
    let dir = tempfile::tempdir().unwrap();
    export(&*model(&config()), dir.path(), &ExportOptions::default()).unwrap();
    damage(dir.path());
    let error = burn_engine::load(dir.path(), "burn:flex").err().expect("a damaged checkpoint loads");
    error.to_string().replace(&format!("{}/", dir.path().display()), "")
}

#[test]
fn damage_is_named() {
    let weights = |dir: &Path, change: &dyn Fn(Vec<u8>) -> Vec<u8>| {
        let path = dir.join("model.safetensors");
        fs::write(&path, change(fs::read(&path).unwrap())).unwrap();
    };
    let config_key = |dir: &Path, key: &str, value: serde_json::Value| {
        let path = dir.join("config.json");
        let mut config: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        config[key] = value;
        fs::write(&path, config.to_string()).unwrap();
    };
    let found = damaged(&|dir| fs::remove_file(dir.join("model.safetensors")).unwrap());
    assert!(found.starts_with("model.safetensors: no such file"), "{found}");
    let found = damaged(&|dir| fs::remove_file(dir.join("config.json")).unwrap());
    assert!(found.starts_with("config.json: no such file"), "{found}");
    let found = damaged(&|dir| weights(dir, &|bytes| bytes[..bytes.len() - 5].to_vec()));
    assert!(found.starts_with("model.safetensors: the tensors that the header lists"), "{found}");
    let found = damaged(&|dir| weights(dir, &|bytes| bytes[..5].to_vec()));
    assert!(found.starts_with("model.safetensors: holds 5 bytes"), "{found}");
    for claimed in [u64::MAX, 1 << 20] {
        let found = damaged(&|dir| weights(dir, &|bytes| [&claimed.to_le_bytes(), &bytes[8..]].concat()));
        assert!(found.starts_with(&format!("model.safetensors: the header claims {claimed} bytes")), "{found}");
    }
    let found = damaged(&|dir| weights(dir, &|bytes| [&bytes[..8], b"xx", &bytes[10..]].concat()));
    assert!(found.starts_with("model.safetensors: is not safetensors"), "{found}");
    let found = damaged(&|dir| config_key(dir, "vocab_size", serde_json::json!(21)));
    assert!(found.contains("has shape [20, 16], expected [21, 16]"), "{found}");
    let found = damaged(&|dir| config_key(dir, "num_hidden_layers", serde_json::json!(3)));
    assert!(
        found.starts_with("model.safetensors: tensor `model.layers.2.input_layernorm.weight` and 10 more is missing"),
        "{found}"
    );
    let found = damaged(&|dir| config_key(dir, "num_hidden_layers", serde_json::json!(1)));
    assert!(found.starts_with("model.safetensors: unexpected tensor `model.layers.1."), "{found}");
}

#[test]
fn shards_must_be_there_and_plainly_named() {
    let sharded = |damage: &dyn Fn(&Path)| {
        damaged(&|dir| {
            export(&*model(&config()), dir, &ExportOptions { shard_bytes_max: 4000, ..ExportOptions::default() })
                .unwrap();
            damage(dir);
        })
    };
    let found = sharded(&|dir| fs::remove_file(second_shard(dir)).unwrap());
    assert!(found.contains("no such file, but the index names it"), "{found}");
    let found = sharded(&|dir| {
        fs::write(dir.join("model.safetensors.index.json"), r#"{"weight_map": {"a": "../b"}}"#).unwrap()
    });
    assert!(found.contains("tensor `a` is in `\"../b\"`"), "{found}");
}

fn second_shard(dir: &Path) -> std::path::PathBuf {
    let mut files: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.to_string_lossy().contains("-of-"))
        .collect();
    files.sort();
    files.swap_remove(1)
}

#[test]
fn every_family_has_a_name() {
    for family in [Family::Qwen2, Family::Qwen3, Family::Llama] {
        assert!(family.architecture().to_lowercase().starts_with(family.model_type()));
    }
}
