use super::*;

fn parse(text: &str) -> Result<ModelConfig> {
    ModelConfig::from_json(text, Path::new("x/config.json"))
}

fn with(changes: &[(&str, Value)]) -> String {
    let mut value = json!({
        "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    });
    for (key, change) in changes {
        value[*key] = change.clone();
    }
    value.to_string()
}

#[test]
fn old_and_new_rope_keys_mean_the_same() {
    let old = parse(&with(&[("rope_theta", json!(5e5)), ("rope_scaling", json!({"type": "linear", "factor": 2.0}))]))
        .unwrap();
    let new =
        parse(&with(&[("rope_parameters", json!({"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}))])).unwrap();
    assert_eq!(old, new);
    assert_eq!(old.rope_scaling, Some(RopeScaling::Linear { factor: 2.0 }));
}

#[test]
fn written_and_read_back() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32});
    for changes in [
        vec![
            ("rope_scaling", llama3),
            ("eos_token_id", json!([1, 2])),
            ("attention_bias", json!(true)),
            ("mlp_bias", json!(true)),
        ],
        vec![("model_type", json!("qwen2")), ("tie_word_embeddings", json!(true))],
        vec![("model_type", json!("qwen3")), ("head_dim", json!(8)), ("eos_token_id", json!(3))],
    ] {
        let config = parse(&with(&changes)).unwrap();
        assert_eq!(parse(&config.to_json("float32").to_string()).unwrap(), config);
    }
}

#[test]
fn defaults_of_the_families() {
    assert_eq!(parse(&with(&[])).unwrap().head_dim, 4);
    assert_eq!(parse(&with(&[("model_type", json!("qwen3"))])).unwrap().head_dim, 128);
    let qwen2 = parse(&with(&[("model_type", json!("qwen2"))])).unwrap();
    assert!(qwen2.qkv_bias && !qwen2.o_bias && !qwen2.qk_norm);
}

#[test]
fn parameter_count_counts_every_spec() {
    for changes in [vec![], vec![("tie_word_embeddings", json!(true)), ("model_type", json!("qwen3"))]] {
        let config = parse(&with(&changes)).unwrap();
        assert_eq!(config.parameter_count(), config.params().iter().map(|p| p.len() as u64).sum::<u64>());
    }
}

#[test]
fn what_does_not_run_is_refused_by_name() {
    for (key, value, needle) in [
        ("hidden_act", json!("gelu"), "`hidden_act` is `gelu`"),
        ("use_sliding_window", json!(true), "`use_sliding_window`"),
        ("model_type", json!("mixtral"), "`mixtral`"),
        ("num_key_value_heads", json!(3), "no multiple"),
        ("head_dim", json!(5), "even"),
        ("vocab_size", json!(-1), "`vocab_size` is `-1`"),
        ("vocab_size", json!(1e30), "`vocab_size`"),
        ("vocab_size", Value::Null, "`vocab_size` is missing"),
        ("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0}), "`yarn`"),
        ("rope_scaling", json!({"rope_type": "linear"}), "`rope_scaling.factor` is missing"),
        ("eos_token_id", json!("</s>"), "`eos_token_id`"),
        ("tie_word_embeddings", json!("yes"), "`tie_word_embeddings`"),
        ("quantization_config", json!({"bits": 4}), "quantized"),
    ] {
        let error = parse(&with(&[(key, value)])).unwrap_err().to_string();
        assert!(error.contains(needle) && error.starts_with("x/config.json"), "{error}");
    }
}

#[test]
fn generation_config_falls_back_to_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let config = parse(&with(&[("eos_token_id", json!([7, 8])), ("bos_token_id", json!(1))])).unwrap();
    assert_eq!(GenerationConfig::from_folder(dir.path(), &config).unwrap().eos_token_ids, [7, 8]);
    std::fs::write(
        dir.path().join("generation_config.json"),
        r#"{"eos_token_id": 5, "top_k": 20, "temperature": 0.6}"#,
    )
    .unwrap();
    let found = GenerationConfig::from_folder(dir.path(), &config).unwrap();
    assert_eq!((found.eos_token_ids.as_slice(), found.top_k, found.bos_token_id), ([5].as_slice(), Some(20), Some(1)));
}
