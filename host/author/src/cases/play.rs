//! Conversations of recorded completions with an environment.

use cosmos_plugin::{Action, ChatMessage, Environment, EpisodeStart, Plugin, PluginError};
use serde_json::{Map, Value, json};

use super::judge::{Answers, failed, numbers};
use super::{Case, Question};

/// A conversation under way.
struct Talk<'a> {
    completions: &'a [String],
    state: Vec<u8>,
    turns: Vec<Value>,
    reward: f64,
    over: bool,
    got: Map<String, Value>,
}

/// Opens the conversation of each case and says its completions, all conversations turn by turn, as a run does.
pub(super) fn play(plugin: &Plugin, name: &str, settings: &str, cases: &[&Case]) -> Answers {
    let mut environment = plugin.environment(name, settings)?;
    let mut talks = open(&mut environment, cases)?;
    let turns_max = talks.iter().map(|talk| talk.completions.len()).max().unwrap_or(0);
    for turn in 0..turns_max {
        let mut speaking: Vec<&mut Talk> =
            talks.iter_mut().filter(|talk| !talk.over && turn < talk.completions.len()).collect();
        let actions: Vec<Action> = speaking
            .iter()
            .map(|talk| Action {
                state: talk.state.clone(),
                completion: talk.completions[turn].clone(),
                turn: turn as u32,
                complete: true,
            })
            .collect();
        for (talk, answer) in speaking.iter_mut().zip(environment.step(&actions)?) {
            match answer {
                Ok(answer) => {
                    talk.reward += answer.reward;
                    talk.over = answer.done;
                    talk.turns.push(json!({
                        "messages": shown(&answer.messages),
                        "done": answer.done,
                        "reward": answer.reward,
                        "metrics": numbers(answer.metrics),
                    }));
                    talk.state = answer.state;
                }
                Err(failure) => {
                    talk.over = true;
                    talk.turns.push(Value::Object(failed(&failure.reason)));
                }
            }
        }
    }
    Ok(talks
        .into_iter()
        .map(|mut talk| {
            // A conversation that could not be opened has its error alone.
            if !talk.got.contains_key("error") {
                talk.got.insert("turns".into(), talk.turns.into());
                talk.got.insert("reward".into(), talk.reward.into());
            }
            talk.got
        })
        .collect())
}

fn open<'a>(environment: &mut Environment, cases: &[&'a Case]) -> Result<Vec<Talk<'a>>, PluginError> {
    let mut talks = Vec::with_capacity(cases.len());
    let mut starts = Vec::with_capacity(cases.len());
    for case in cases {
        let Question::Completions { messages, completions } = &case.question else { continue };
        starts.push(EpisodeStart {
            messages: messages.clone(),
            reference: case.reference.clone(),
            metadata: case.metadata.clone(),
        });
        talks.push(Talk {
            completions,
            state: Vec::new(),
            turns: Vec::new(),
            reward: 0.0,
            over: false,
            got: Map::new(),
        });
    }
    for (talk, opened) in talks.iter_mut().zip(environment.reset(&starts)?) {
        match opened {
            Ok(opened) => {
                talk.state = opened.state;
                talk.got.insert("messages".into(), shown(&opened.messages));
                talk.got.insert("tools".into(), opened.tools.unwrap_or(Value::Null));
            }
            Err(failure) => {
                talk.over = true;
                talk.got = failed(&failure.reason);
            }
        }
    }
    Ok(talks)
}

fn shown(messages: &[ChatMessage]) -> Value {
    json!(messages)
}

#[cfg(test)]
mod tests {
    use cosmos_plugin::{Capabilities, Limits, PluginHost};

    use crate::cases::{Judged, Verdict, judge, read};

    /// Cases for the guest of `tests/guests/environment.wat`: it answers a completion with the completion as a `tool`
    /// message, its reward is the number of the turn, `d` ends it, `!` traps.
    fn verdicts(cases: &str) -> Vec<Verdict> {
        let root = cosmos_testkit::repo_root();
        let read_file = |path: &str| std::fs::read_to_string(root.join(path)).unwrap();
        let mut resolve = wit_parser::Resolve::default();
        let package = resolve.push_str("plugin.wit", &read_file("wit/since-v0.2.0/plugin.wit")).unwrap();
        let world = resolve.select_world(&[package], Some("environment-plugin")).unwrap();
        let mut module = wat::parse_str(read_file("tests/guests/environment.wat")).unwrap();
        let encoding = wit_component::StringEncoding::UTF8;
        wit_component::embed_component_metadata(&mut module, &resolve, world, encoding).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (component, file) = (folder.path().join("talk.wasm"), folder.path().join("c.jsonl"));
        std::fs::write(&component, cosmos_plugin::componentize(&module).unwrap()).unwrap();
        std::fs::write(&file, cases).unwrap();
        let host = PluginHost::new(None).unwrap();
        let plugin = host.load(&component, &[], Limits::default(), Capabilities::default()).unwrap();
        judge(&plugin, &read(&[file]).unwrap(), &serde_json::Map::new(), None).unwrap()
    }

    #[test]
    fn a_conversation_is_compared_turn_by_turn() {
        let verdicts = verdicts(concat!(
            r#"{"prompt": "hello", "completions": ["one", "two", "done", "never said"], "expect": {"#,
            r#""messages": [{"role": "user", "content": "hello"}], "reward": 3, "turns": ["#,
            r#"{"messages": [{"role": "tool", "content": "one"}], "done": false, "metrics": {"m": 1}}, "#,
            r#"{"reward": 1}, {"done": true, "messages": []}]}}"#,
            "\n",
            r#"{"prompt": "hello", "completions": ["one", "!", "x"], "expect": {"turns": [{"done": true}, {"reward": 1}]}}"#,
            "\n",
            r#"{"prompt": "hello", "completions": ["one", "!"], "expect": {"turns": [{}, {"error": "explode"}]}}"#,
            "\n",
            r#"{"prompt": "hello", "reference": [], "completions": []}"#,
            "\n",
        ));
        let judged: Vec<Judged> = verdicts.iter().map(|verdict| verdict.judged).collect();
        assert_eq!(judged, [Judged::Agrees, Judged::Differs, Judged::Agrees, Judged::ExpectsNothing], "{verdicts:#?}");
        let differing: Vec<&str> = verdicts[1].differences.iter().map(|d| d.what.as_str()).collect();
        assert_eq!(differing, ["turns[0].done", "turns[1].error"]);
    }

    #[test]
    fn a_conversation_that_does_not_open_is_a_failure() {
        let verdicts = verdicts(concat!(
            r#"{"prompt": "hello", "reference": {}, "completions": ["x"], "expect": {"error": "tools are no JSON list"}}"#,
            "\n",
            r#"{"prompt": "hello", "reference": {}, "completions": ["x"], "expect": {"reward": 0}}"#,
        ));
        assert!(verdicts[0].agrees(), "{verdicts:#?}");
        assert_eq!(verdicts[1].differences[0].what, "error");
    }
}
