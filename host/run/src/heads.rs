//! Teachers' output heads on their way to whoever compares whole vocabularies.
//!
//! A teacher writes its head once, under a hash; the trainer reads it once and applies it to the hidden states that come
//! with every answer. Values are stored in 16 bits where that loses nothing (a checkpoint in bf16), else in 32.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use cosmos_config::Dtype;
use cosmos_engine::head::{self, Head};
use cosmos_engine::model::{Model, ModelConfig};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype as StoredDtype, TensorView};

use crate::error::{Result, Role, RunError};
use crate::shelf::Shelf;
use crate::weights::{decode, encode, hash};

/// The file on a teacher's shelf.
pub const HEAD_FILE: &str = "head.safetensors";
const TENSOR: &str = "head";
/// Names and hashes before the values.
const HEADER_BYTES_MAX: u64 = 1 << 20;
/// Pause between two looks for a head that is not there yet.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A teacher's output head.
#[derive(Debug, Clone, PartialEq)]
pub struct TeacherHead {
    /// The teacher.
    pub name: String,
    /// Folder or revision of its model, for messages.
    pub revision: String,
    /// Rows.
    pub vocab: usize,
    /// Width of the hidden states.
    pub hidden: usize,
    /// `[vocab, hidden]`.
    pub values_vh: Vec<f32>,
}

impl TeacherHead {
    /// The head of a teacher's model. Of a sharded one every rank must ask.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn of(name: &str, revision: &str, model: &dyn Model) -> Result<Self> {
        let config = model.config();
        Ok(Self {
            name: name.to_string(),
            revision: revision.to_string(),
            vocab: config.vocab_size,
            hidden: config.hidden_size,
            values_vh: head::values_of(model).role("teacher")?,
        })
    }

    /// Puts the head on the teacher's shelf. Replicas of a teacher write the same bytes, so it does not matter who is last.
    ///
    /// # Errors
    /// Those of the shelf.
    pub fn write(&self, shelf: &dyn Shelf) -> Result<()> {
        // The low half of every value is zero where it came from bf16.
        let half = self.values_vh.iter().all(|v| v.to_bits() & 0xffff == 0);
        let (dtype, stored) =
            if half { (Dtype::Bfloat16, StoredDtype::BF16) } else { (Dtype::Float32, StoredDtype::F32) };
        let bytes = encode(&self.values_vh, dtype);
        let meta = HashMap::from([
            ("teacher".to_string(), self.name.clone()),
            ("revision".to_string(), self.revision.clone()),
            ("sha256".to_string(), hash(&bytes)),
        ]);
        let wrong = |e: safetensors::SafeTensorError| {
            RunError::shared(shelf.place(), format!("the head of teacher `{}`: {e}", self.name), "")
        };
        let view = TensorView::new(stored, vec![self.vocab, self.hidden], &bytes).map_err(wrong)?;
        let file = safetensors::serialize([(TENSOR, view)], Some(meta)).map_err(wrong)?;
        shelf.put(HEAD_FILE, &file)
    }

    /// Reads the head of teacher `name`, whose model has the shape `config`, waiting until it is there and whole.
    ///
    /// # Errors
    /// The deadline, with the teacher's name and what was wrong last; those of the shelf.
    pub fn read(shelf: &dyn Shelf, name: &str, config: &ModelConfig, wait_ms_max: u64) -> Result<Self> {
        let begun = Instant::now();
        let bytes_max = (config.vocab_size as u64)
            .saturating_mul(config.hidden_size as u64)
            .saturating_mul(4)
            .saturating_add(HEADER_BYTES_MAX);
        loop {
            let reason = match shelf.get(HEAD_FILE, bytes_max)? {
                None => "it has not been written".to_string(),
                Some(bytes) => match Self::parse(&bytes, name, config) {
                    Ok(head) => return Ok(head),
                    Err(reason) => reason,
                },
            };
            if begun.elapsed() >= Duration::from_millis(wait_ms_max) {
                return Err(RunError::shared(
                    shelf.place(),
                    format!("waited {wait_ms_max} ms for the output head of teacher `{name}`: {reason}"),
                    format!("look at the log of teacher `{name}`, and whether both see the same folder or server"),
                ));
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    fn parse(bytes: &[u8], name: &str, config: &ModelConfig) -> std::result::Result<Self, String> {
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| e.to_string())?;
        let meta = header.metadata().clone().unwrap_or_default();
        let said = |key: &str| meta.get(key).cloned().unwrap_or_default();
        let file = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
        let view = file.tensor(TENSOR).map_err(|e| e.to_string())?;
        let dtype = match view.dtype() {
            StoredDtype::F32 => Dtype::Float32,
            StoredDtype::BF16 => Dtype::Bfloat16,
            other => return Err(format!("it is stored as {other:?}")),
        };
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        if view.shape() != [vocab, hidden] {
            return Err(format!("it is {:?}, the teacher's config says [{vocab}, {hidden}]", view.shape()));
        }
        if hash(view.data()) != said("sha256") {
            return Err("it is damaged".into());
        }
        if said("teacher") != name {
            return Err(format!("it is that of teacher `{}`", said("teacher")));
        }
        let values_vh = decode(view.data(), dtype);
        Ok(Self { name: name.to_string(), revision: said("revision"), vocab, hidden, values_vh })
    }

    /// The head on a device.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn load(&self, device: &str) -> Result<Box<dyn Head>> {
        head::load(device, self.vocab, self.hidden, &self.values_vh).role("teacher")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shelf::FolderShelf;

    fn shape() -> ModelConfig {
        let dir = tempfile::tempdir().unwrap();
        let json = r#"{"model_type": "llama", "vocab_size": 9, "hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 8}"#;
        std::fs::write(dir.path().join("config.json"), json).unwrap();
        ModelConfig::from_folder(dir.path()).unwrap()
    }

    #[test]
    fn a_head_comes_back_with_its_bits_and_16_bit_ones_in_half_the_space() {
        let dir = tempfile::tempdir().unwrap();
        let shelf = FolderShelf::open(dir.path()).unwrap();
        let config = shape();
        let model = cosmos_engine::model::random(&config, "cpu", 3).unwrap();
        let head = TeacherHead::of("math", "main", model.as_ref()).unwrap();
        head.write(&shelf).unwrap();
        let whole = std::fs::metadata(dir.path().join(HEAD_FILE)).unwrap().len();
        assert_eq!(TeacherHead::read(&shelf, "math", &config, 0).unwrap(), head);
        let rounded =
            TeacherHead { values_vh: decode(&encode(&head.values_vh, Dtype::Bfloat16), Dtype::Bfloat16), ..head };
        rounded.write(&shelf).unwrap();
        let half = std::fs::metadata(dir.path().join(HEAD_FILE)).unwrap().len();
        assert!(whole - half >= 70, "{whole} and {half}");
        assert_eq!(TeacherHead::read(&shelf, "math", &config, 0).unwrap(), rounded);
        assert_eq!(rounded.load("cpu").unwrap().vocab(), 9);
    }

    #[test]
    fn the_wait_names_the_teacher_and_damage_is_not_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let shelf = FolderShelf::open(dir.path()).unwrap();
        let config = shape();
        let error = || TeacherHead::read(&shelf, "math", &config, 20).unwrap_err().to_string();
        assert!(error().contains("waited 20 ms for the output head of teacher `math`: it has not been written"));
        let model = cosmos_engine::model::random(&config, "cpu", 3).unwrap();
        let head = TeacherHead::of("math", "main", model.as_ref()).unwrap();
        head.write(&shelf).unwrap();
        let good = std::fs::read(dir.path().join(HEAD_FILE)).unwrap();
        for at in (0..good.len()).step_by(5) {
            let mut bad = good.clone();
            bad[at] ^= 0x21;
            shelf.put(HEAD_FILE, &bad).unwrap();
            match TeacherHead::read(&shelf, "math", &config, 0) {
                // The revision is for messages only.
                Ok(read) => assert_eq!(read.values_vh, head.values_vh),
                Err(error) => assert!(error.to_string().contains("`math`"), "{error}"),
            }
        }
        TeacherHead { name: "code".into(), ..head.clone() }.write(&shelf).unwrap();
        assert!(error().contains("it is that of teacher `code`"));
        let other = ModelConfig { vocab_size: 8, ..config.clone() };
        let text = TeacherHead::read(&shelf, "code", &other, 0).unwrap_err().to_string();
        assert!(text.contains("it is [9, 4], the teacher's config says [8, 4]"), "{text}");
    }
}
