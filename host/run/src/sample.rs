//! Chat with a model folder.

use std::ops::ControlFlow;
use std::path::Path;

use cosmos_data::chat::Message;
use cosmos_engine::generate::{GenerateOptions, GenerateRequest, SamplingParams, generate_streaming};
use cosmos_engine::model::{self, GenerationConfig, Model};

use crate::error::{Result, Role};
use crate::task::Text;

/// A model ready to answer.
pub struct Chat {
    model: Box<dyn Model>,
    text: Text,
    stop_ids: Vec<u32>,
}

impl Chat {
    /// Loads a model folder onto `device`.
    pub fn load(folder: &Path, device: &str) -> Result<Self> {
        let text = Text::load(folder)?;
        let model = model::load(folder, device).role("model")?;
        let stop_ids = GenerationConfig::from_folder(folder, model.config()).role("model")?.eos_token_ids;
        Ok(Self { model, text, stop_ids })
    }

    /// Whether the model has a chat template; without one, text is continued as it stands.
    pub fn has_template(&self) -> bool {
        self.text.chat.is_some()
    }

    /// The prompt of a conversation.
    pub fn prompt(&self, turns: &[(String, String)]) -> Result<String> {
        if !self.has_template() {
            return Ok(turns.iter().map(|(_, content)| content.as_str()).collect());
        }
        let messages: Vec<Message> = turns.iter().map(|(role, content)| Message::new(role, content)).collect();
        self.text.render_messages(&messages, true)
    }

    /// Completes `prompt`. `piece` gets the text as it comes, in whole characters. Returns the whole completion.
    pub fn complete(
        &mut self,
        prompt: &str,
        params: &SamplingParams,
        tokens_max: usize,
        piece: &mut dyn FnMut(&str),
    ) -> Result<String> {
        let ids = self.text.tokenizer.encode(prompt, false)?;
        let request =
            GenerateRequest { id: 0, prompt: ids, n: 1, max_new_tokens: tokens_max, ..GenerateRequest::default() };
        let options = GenerateOptions {
            slots: 1,
            stop_ids: self.stop_ids.clone(),
            context_limit: self.model.config().max_position_embeddings,
            ..GenerateOptions::default()
        };
        let tokenizer = &self.text.tokenizer;
        let mut stream = tokenizer.stream(true);
        let mut whole = String::new();
        let mut failed = None;
        let mut token = |_: u64, id: u32| {
            // Ids beyond the tokenizer have no text.
            if id >= tokenizer.id_end() {
                return;
            }
            match stream.push(id) {
                Ok(text) => {
                    piece(&text);
                    whole.push_str(&text);
                }
                Err(error) => failed = Some(error),
            }
        };
        generate_streaming(self.model.as_mut(), &[request], params, &options, &mut token, &mut |_| {
            ControlFlow::Continue(())
        })
        .role("model")?;
        if let Some(error) = failed {
            return Err(error.into());
        }
        let rest = stream.finish()?;
        piece(&rest);
        whole.push_str(&rest);
        Ok(whole)
    }
}
