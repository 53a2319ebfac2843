//! Real chat templates and tokenizers: the text of a prompt and its token ids.

use cosmos_data::{ChatTemplate, Message, Tokenizer};
use serde_json::{Map, Value};

#[test]
fn golden_chat() {
    let (Some(folder), Some(tokenizer)) = (cosmos_testkit::golden("chat"), cosmos_testkit::golden("tokenizer-qwen"))
    else {
        return;
    };
    let tokenizer = Tokenizer::load(&tokenizer).unwrap_or_else(|e| panic!("{e}"));
    let mut files: Vec<_> =
        std::fs::read_dir(&folder).expect("the golden folder is readable").flatten().map(|e| e.path()).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "json"));
    files.sort();
    assert!(!files.is_empty(), "no case in {}", folder.display());
    for file in files {
        let stem = file.file_stem().expect("it has a name").to_string_lossy().into_owned();
        let Some(path) = cosmos_testkit::shared_data(&format!("chat_templates/{stem}.jinja")) else { continue };
        let source = std::fs::read_to_string(&path).expect("the template is readable");
        let template =
            ChatTemplate::from_source(&path.display().to_string(), &source, &[]).unwrap_or_else(|e| panic!("{e}"));
        let cases = cosmos_testkit::read_json(&file);
        for (number, case) in cases.as_array().expect("a list of cases").iter().enumerate() {
            check(case, &template, &tokenizer, &format!("{stem} case {number}"));
        }
    }
}

fn check(case: &Value, template: &ChatTemplate, tokenizer: &Tokenizer, name: &str) {
    let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).expect("messages");
    let options: Map<String, Value> = case["options"].as_object().expect("options").clone();
    let prompt = case["add_generation_prompt"].as_bool().expect("add_generation_prompt");
    let text = template.render(&messages, prompt, &options).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(text, case["text"].as_str().expect("text"), "{name}");
    let expected: Vec<u32> = serde_json::from_value(case["ids"].clone()).expect("ids");
    let ids = tokenizer.encode(&text, false).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(ids, expected, "{name}");
    assert_eq!(tokenizer.decode(&ids, false).unwrap_or_else(|e| panic!("{name}: {e}")), text, "{name}");
}
