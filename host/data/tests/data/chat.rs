//! Chat templates: where they are found, what they may use, and what a hostile one can do.

use std::time::{Duration, Instant};

use cosmos_data::{ChatTemplate, DataError, Message};
use serde_json::{Map, Value, json};
use tempfile::tempdir;

use super::write;

fn render_with(source: &str, options: Value) -> Result<String, DataError> {
    let template = ChatTemplate::from_source("t.jinja", source, &[("bos_token", "<s>")])?;
    let messages = [Message::new("system", "Be brief."), Message::new("user", "Hi & <you>")];
    template.render(&messages, true, options.as_object().unwrap())
}

fn render(source: &str) -> String {
    render_with(source, json!({})).unwrap_or_else(|e| panic!("{source}: {e}"))
}

#[test]
fn what_hugging_face_offers() {
    let cases = [
        ("{{ bos_token }}{{ messages[1].content }}", "<s>Hi & <you>"),
        (
            "{%- for m in messages -%}\n  {% if loop.first %}{% continue %}{% endif %}\n{{ m['role'].upper() }}\n{%- endfor %}",
            "USER",
        ),
        ("{% for m in messages %}\n{% if m.role == 'user' %}\n  {{ m.role }}\n{% endif %}\n{% endfor %}\n", "  user\n"),
        (
            "{{ ' a '.strip() + 'x,y'.split(',')[-1] + 'abc'.removeprefix('a') + 'a=b=c'.rsplit('=', 1)[0] + '-'.join(['', 'q', '']) }}",
            "aybca=b-q-",
        ),
        ("{{ 'a  b c'.rsplit(None, 1)[0] ~ 'k:v'.partition(':')[2] ~ messages[::-1][0].role }}", "a  bvuser"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{% macro f(x, y='!') %}{{ x }}{{ y }}{% endmacro %}{{ f('a') }}", "a!"),
        ("{% generation %}a{% endgeneration %}{%- generation -%} b {%- endgeneration -%}", "ab"),
        ("{{ tools is defined }} {{ tools is none }} {{ x is defined }}{{ x }}", "True True False"),
        ("{{ none }} {{ true }} {{ 1.0 }} {{ [1, 'a'] }} {{ {'k': none} }}", "None True 1.0 [1, 'a'] {'k': None}"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('|') }}", "Hi & <you>"),
        ("{{ add_generation_prompt and messages|length > 1 }}", "True"),
        ("{{ 'é' in 'aé' }}{{ 'abc'[::-1] }}{{ 'x' * 3 }}{{ 7 // 2 }}{{ 'a' if false else 'b' }}", "Truecbaxxx3b"),
        ("{{ strftime_now('%Y')|length }}", "4"),
    ];
    for (source, expected) in cases {
        assert_eq!(render(source), expected, "{source}");
    }
}

#[test]
fn json_as_python_writes_it() {
    let tool = json!({"name": "f<é>", "args": {"x": [1, 2.5, null, true], "e": {}, "l": []}, "quote": "a\"\\\n\u{1}'", "big": 1e16});
    let cases = [
        (
            "{{ tools | tojson }}",
            r#"{"name": "f<é>", "args": {"x": [1, 2.5, null, true], "e": {}, "l": []}, "quote": "a\"\\\n\u0001'", "big": 1e+16}"#,
        ),
        (
            "{{ tools.args | tojson(indent=2) }}",
            "{\n  \"x\": [\n    1,\n    2.5,\n    null,\n    true\n  ],\n  \"e\": {},\n  \"l\": []\n}",
        ),
        ("{{ tools.name | tojson(ensure_ascii=true) }}", r#""f<\u00e9>""#),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}", r#"{"a":2,"b":1}"#),
    ];
    for (source, expected) in cases {
        assert_eq!(render_with(source, json!({"tools": tool})).unwrap(), expected, "{source}");
    }
    assert!(render_with("{{ nothing | tojson }}", json!({})).is_err());
}

#[test]
fn errors_name_file_and_line() {
    let error = render_with("a\n{% if %}", json!({})).unwrap_err();
    assert!(error.to_string().starts_with("chat template `t.jinja` line 2: syntax error"), "{error}");
    let error = render_with("a\n\n{{ raise_exception('roles must alternate') }}", json!({})).unwrap_err();
    assert_eq!(error.to_string(), "chat template `t.jinja` line 3: roles must alternate");
    let error = render_with("\n{{ messages[0].tool.name }}", json!({})).unwrap_err();
    assert!(error.to_string().contains("line 2: undefined value"), "{error}");
    assert!(render_with("{{ strftime_now('%Q%!') }}", json!({})).is_err());
    assert!(render_with("{% include 'secret' %}", json!({})).is_err());
}

#[test]
fn hostile_templates_end() {
    let sources = [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}x{% endfor %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{{ 'x' * 99999999999 }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(30) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x|tojson }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|tojson }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{{ 'ab'.replace('', 'x' * 1000000).replace('x', 'y' * 1000000) }}",
        "{{ 'x'.join('y' * 100000000) * 10000 }}",
        "{{ '%99999999999d' | format(1) }}{{ '{:>99999999999}'.format(1) }}",
        "{{ '{:>99999999999}'.format(1) }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ '{}'.format(ns.x) }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ [ns.x].index(ns.x) }}",
        "{% set ns = namespace(x=['a']) %}{% for i in range(30) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ 'x'.join(ns.x) }}",
        "{{ ('a,' * 10000000).rsplit(',')|length }}{{ ('a ' * 100000000).rsplit()|length }}",
    ];
    for source in sources {
        let start = Instant::now();
        let result = render_with(source, json!({}));
        println!("{:?} {source}", start.elapsed());
        assert!(start.elapsed() < Duration::from_secs(20), "{source}: {:?}", start.elapsed());
        assert!(result.map_or(true, |text| text.len() < 1 << 30), "{source}");
    }
    // Nested as deeply as the budget allows, built and thrown away.
    let deep = "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}";
    assert_eq!(render_with(&format!("{deep}{{{{ ns.x|length }}}}"), json!({})).unwrap(), "1");
    let deeper = format!(
        "{{% set ns = namespace(x=[]) %}}{{% for j in range(99999) %}}{}{{% endfor %}}",
        &deep[deep.find("{% for").unwrap()..]
    );
    assert!(render_with(&deeper, json!({"long": "x".repeat(30_000_000)})).is_err());
}

#[test]
fn long_conversations_are_within_the_budget() {
    let source = "{% for m in messages %}{% set c = m.content.strip() %}{{ '<' + m.role + '>' + c.split('</think>')[-1] }}\n{% endfor %}";
    let template = ChatTemplate::from_source("t", source, &[]).unwrap();
    let messages: Vec<_> = (0..1000).map(|_| Message::new("user", "word ".repeat(2000))).collect();
    assert!(template.render(&messages, false, &Map::new()).unwrap().len() > 9_000_000);
    let one = [Message::new("user", "word ".repeat(19_000))];
    assert!(template.render(&one, false, &Map::new()).unwrap().len() > 90_000);
}

#[test]
fn found_in_a_model_folder() {
    let dir = tempdir().unwrap();
    let error = ChatTemplate::load(dir.path()).unwrap_err();
    assert!(matches!(error, DataError::NoTemplate { .. }) && error.hint().is_some(), "{error}");
    let one = [Message::new("user", "x")];
    let text =
        |options: Value| ChatTemplate::load(dir.path()).unwrap().render(&one, false, options.as_object().unwrap());
    let config = dir.path().join("tokenizer_config.json");
    write(&config, json!({"chat_template": "{{ bos_token }}A{{ eos_token }}", "bos_token": {"content": "<b>"}, "eos_token": "<e>", "pad_token": null}).to_string());
    assert_eq!(text(json!({})).unwrap(), "<b>A<e>");
    assert_eq!(ChatTemplate::load(dir.path()).unwrap().special_token("eos_token"), Some("<e>"));
    assert_eq!(text(json!({"bos_token": "!"})).unwrap(), "!A<e>");
    write(&config, json!({"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T{{ tools|length }}"}]}).to_string());
    assert_eq!((text(json!({})).unwrap(), text(json!({"tools": [1, 2]})).unwrap()), ("D".into(), "T2".into()));
    write(&config, json!({"chat_template": [{"name": "rag", "template": "R"}]}).to_string());
    let error = text(json!({})).unwrap_err();
    assert!(error.to_string().ends_with("has no chat template; it has `rag`"), "{error}");
    write(dir.path().join("chat_template.jinja"), "J{{ messages[0].content }}\n");
    assert_eq!(text(json!({})).unwrap(), "Jx");
    write(&config, "{\n\"chat_template\": ");
    assert!(ChatTemplate::load(dir.path()).unwrap_err().to_string().contains("line 2 is broken"));
}

#[test]
fn messages_keep_their_keys() {
    let text = r#"{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":{"b":1,"a":[2.0]}}}]}"#;
    let message: Message = serde_json::from_str(text).unwrap();
    assert_eq!(message.content, None);
    assert_eq!(serde_json::to_string(&message).unwrap(), text);
    let source = "{{ messages[0].content is defined }} {{ messages[0].tool_calls[0].function.arguments | tojson }}";
    let template = ChatTemplate::from_source("t", source, &[]).unwrap();
    assert_eq!(template.render(&[message], false, &Map::new()).unwrap(), r#"False {"b": 1, "a": [2.0]}"#);
}

#[test]
fn the_clock_can_be_stopped() {
    let mut template = ChatTemplate::from_source("t", "{{ strftime_now('%d %b %Y %H:%M') }}", &[]).unwrap();
    template.set_clock(1_700_000_000).unwrap();
    assert_eq!(template.render(&[], false, &Map::new()).unwrap(), "14 Nov 2023 22:13");
    assert!(template.set_clock(i64::MAX).is_err());
}

#[test]
fn what_follows_a_turn() {
    let chatml = "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}";
    let after = |source: &str, next: &[Message]| {
        ChatTemplate::from_source("t.jinja", source, &[]).unwrap().after_turn(
            &[Message::new("user", "zqMessageq zqMessageqq?")],
            next,
            true,
            &Map::new(),
        )
    };
    let found = after(chatml, &[Message::new("tool", "4"), Message::new("user", "and?")]).unwrap();
    assert_eq!(found.closing, "<|end|>\n");
    assert_eq!(found.whole, "<|end|>\n<|tool|>4<|end|>\n<|user|>and?<|end|>\n<|assistant|>");
    let refused = [
        ("{% for m in messages %}{{ m.content }}{{ m.content }};{% endfor %}", "more than once"),
        ("{% for m in messages %}{{ m.content.upper() }};{% endfor %}", "as it is"),
        (
            "{% for m in messages %}{{ m.content }}{% if loop.last %}.{% else %},{% endif %}{% endfor %}",
            "in another way",
        ),
        (
            "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}{{ m.content }}{% endfor %}",
            "no tools here",
        ),
    ];
    for (source, why) in refused {
        let error = after(source, &[Message::new("tool", "4")]).unwrap_err().to_string();
        assert!(error.starts_with("chat template `t.jinja`") && error.contains(why), "{error}");
    }
}
