//! A tokenizer file is refused or turns any text into ids that it can turn back into text.
#![no_main]

use std::sync::Once;

use cosmos_data::tokenizer::Tokenizer;
use libfuzzer_sys::fuzz_target;

static HOOK: Once = Once::new();

fuzz_target!(|bytes: &[u8]| {
    // The library panics on some files, which `cosmos-data` turns into errors; the fuzzer's own hook would abort first. A
    // panic that nobody catches still ends the process.
    HOOK.call_once(|| std::panic::set_hook(Box::new(|panic| eprintln!("{panic}"))));
    let Ok(tokenizer) = Tokenizer::from_bytes(bytes, "tokenizer.json") else { return };
    for text in ["", "hello", "  1+2=3\n", "ünïcödé 🦀", "<|im_start|>"] {
        if let Ok(ids) = tokenizer.encode(text, false) {
            assert!(ids.iter().all(|id| *id < tokenizer.id_end()));
            let _ = tokenizer.decode(&ids, false);
        }
    }
});
