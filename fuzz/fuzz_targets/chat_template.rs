//! A template is refused, fails with its line, or renders within its budget.
#![no_main]

use cosmos_data::chat::{ChatTemplate, Message};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|source: &str| {
    let Ok(template) = ChatTemplate::from_source("fuzz.jinja", source, &[("bos_token", "<s>"), ("eos_token", "</s>")]) else { return };
    let messages = [Message::new("system", "Be brief."), Message::new("user", "1+1?"), Message::new("assistant", "2")];
    let _ = template.render(&messages, true, &serde_json::Map::new());
    let _ = template.after_turn(&messages[..2], &messages[1..], true, &serde_json::Map::new());
});
