//! Tokenizers, the real one and small ones.

use cosmos_data::{DataError, Tokenizer};
use serde_json::{Value, json};
use tempfile::tempdir;

use super::write;

fn qwen() -> Option<Tokenizer> {
    let folder = cosmos_testkit::golden("tokenizer-qwen")?;
    Some(Tokenizer::load(folder).unwrap())
}

/// A byte-pair tokenizer with a few tokens.
fn small(change: impl Fn(&mut Value)) -> Vec<u8> {
    let mut file = json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "added_tokens": [{"id": 5, "content": "<end>", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}, "merges": ["a b", "ab c"]}
    });
    change(&mut file);
    file.to_string().into_bytes()
}

#[test]
fn real_tokenizer() {
    let Some(tokenizer) = qwen() else { return };
    assert_eq!(tokenizer.vocab_size(), tokenizer.id_end() as usize);
    assert!(tokenizer.vocab_size() > 151_643);
    assert_eq!(tokenizer.token_to_id("<|im_end|>"), Some(151_645));
    for text in ["Hello, world!", "", " two  spaces\n\n", "naïve 数学 🙂 \u{1F469}\u{200D}\u{1F680}", "x=\\frac{1}{2}"]
    {
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    }
    let ids = tokenizer.encode("a<|im_end|>", false).unwrap();
    assert_eq!(
        (tokenizer.decode(&ids, true).unwrap().as_str(), tokenizer.decode(&ids, false).unwrap().as_str()),
        ("a", "a<|im_end|>")
    );
    let error = tokenizer.decode(&[0, u32::MAX], false).unwrap_err();
    assert!(error.to_string().contains("no token with id 4294967295"), "{error}");
}

#[test]
fn streamed_text_is_whole() {
    let Some(tokenizer) = qwen() else { return };
    let text = "naïve 数学 🙂🙃 \u{1F469}\u{200D}\u{1F680} ok 𝔘𝔫𝔦";
    let ids = tokenizer.encode(text, false).unwrap();
    let mut stream = tokenizer.stream(true);
    let mut pieces = Vec::new();
    for id in &ids {
        let piece = stream.push(*id).unwrap();
        assert!(!piece.contains('\u{fffd}'), "{piece:?}");
        pieces.push(piece);
    }
    pieces.push(stream.finish().unwrap());
    assert_eq!(pieces.concat(), text);
    assert!(pieces.iter().filter(|piece| !piece.is_empty()).count() > 5);
    // Half a character at the end shows up when the stream ends.
    let smile = tokenizer.encode("🙃𝔘", false).unwrap();
    let mut stream = tokenizer.stream(true);
    let mut text: String = smile[..smile.len() - 1].iter().map(|id| stream.push(*id).unwrap()).collect();
    text += &stream.finish().unwrap();
    assert!(text.starts_with('🙃') && text.ends_with('\u{fffd}'), "{text:?}");
}

#[test]
fn differences_are_named() {
    let load = |change: &dyn Fn(&mut Value)| Tokenizer::from_bytes(&small(change), "t.json").unwrap();
    let first = load(&|_| ());
    assert_eq!((first.vocab_size(), first.id_end(), first.encode("abcab", false).unwrap()), (6, 6, vec![4, 3]));
    assert_eq!(first.encode("abcabc<end>ab", false).unwrap(), [4, 4, 5, 3], "truncation of the file is not kept");
    // Written another way, it is the same tokenizer.
    let same = load(&|file| file["model"]["merges"] = json!([["a", "b"], ["ab", "c"]]));
    assert_eq!((first.first_difference(&same), first.fingerprint()), (None, same.fingerprint()));
    let swapped = load(&|file| file["model"]["vocab"] = json!({"a": 0, "c": 1, "b": 2, "ab": 3, "abc": 4}));
    let difference = first.first_difference(&swapped).unwrap();
    assert!(difference.starts_with("id 1 is `b` in `t.json` and `c` in `t.json`"), "{difference}");
    let longer = load(&|file| {
        let mut added = file["added_tokens"][0].clone();
        (added["id"], added["content"]) = (json!(6), json!("<d>"));
        file["added_tokens"].as_array_mut().unwrap().push(added);
    });
    let difference = first.first_difference(&longer).unwrap();
    assert!(difference.starts_with("id 6 is no token in") && difference.contains("`<d>`"), "{difference}");
    let merges = load(&|file| file["model"]["merges"] = json!(["a b"]));
    let difference = first.first_difference(&merges).unwrap();
    assert!(difference.starts_with("merge 1 is `ab` + `c` in"), "{difference}");
}

#[test]
fn broken_ones_are_refused() {
    let dir = tempdir().unwrap();
    let error = Tokenizer::load(dir.path()).unwrap_err();
    assert!(error.to_string().ends_with("has no `tokenizer.json`"), "{error}");
    write(dir.path().join("tokenizer.model"), "");
    assert!(Tokenizer::load(dir.path()).unwrap_err().to_string().contains("convert it"));
    let path = dir.path().join("tokenizer.json");
    assert!(matches!(Tokenizer::load(&path), Err(DataError::Tokenizer { .. })));
    for text in ["", "{}", "[1]", "{\"model\": 3}"] {
        write(&path, text);
        let error = Tokenizer::load(&path).unwrap_err();
        assert!(error.to_string().contains(&path.display().to_string()) && error.hint().is_some(), "{error}");
    }
    let bytes = small(|file| file["model"]["merges"] = json!(["a z"]));
    assert!(Tokenizer::from_bytes(&bytes, &path).is_err());
    let bytes = small(|_| ());
    for cut in 1..bytes.len() {
        assert!(Tokenizer::from_bytes(&bytes[..cut], &path).is_err());
    }
}
