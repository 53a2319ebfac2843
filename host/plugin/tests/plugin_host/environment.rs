//! Conversations of several turns.

use cosmos_plugin::{Action, Capabilities, ChatMessage, Environment, EpisodeStart, PluginError, World};

use crate::guests::{Bench, component, quick, text, wit_of};

fn bench() -> (Bench, std::path::PathBuf) {
    let bench = Bench::new();
    let path = bench.file("talk", &component(&text("environment"), &wit_of("0.2.0"), "environment-plugin"));
    (bench, path)
}

fn environment() -> Environment {
    let (bench, path) = bench();
    let plugin = bench.host.load(&path, &[], quick(), Capabilities::default()).unwrap();
    plugin.environment("e", "").unwrap()
}

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage { role: role.into(), content: content.into() }
}

fn start(content: &str, reference: Option<&str>) -> EpisodeStart {
    let metadata = vec![("k".into(), "v".into())];
    EpisodeStart { messages: vec![message("user", content)], reference: reference.map(String::from), metadata }
}

fn action(state: &[u8], completion: &str, turn: u32) -> Action {
    Action { state: state.into(), completion: completion.into(), turn, complete: turn.is_multiple_of(2) }
}

#[test]
fn a_plugin_says_that_it_has_environments() {
    let (bench, path) = bench();
    let seen = bench.host.inspect(&path).unwrap();
    assert_eq!((seen.world, seen.api_version.as_str()), (World::EnvironmentPlugin, "0.2.0"));
    let plugin = bench.host.load(&path, &[], quick(), Capabilities::default()).unwrap();
    assert_eq!(plugin.info().environments, ["e"]);
    let error = plugin.environment("f", "").unwrap_err();
    assert!(matches!(error, PluginError::UnknownOffer { .. }), "{error}");
    assert!(error.hint().unwrap().contains("`e` (environment)"), "{error}");
    assert!(plugin.reward("e", "").is_err());
}

#[test]
fn state_travels_from_turn_to_turn() {
    let mut environment = environment();
    let starts = [start("one", None), start("two", Some("[{\"name\": \"add\"}]"))];
    let opened: Vec<_> = environment.reset(&starts).unwrap().into_iter().map(Result::unwrap).collect();
    assert_eq!(opened[0].messages, [message("user", "one")]);
    assert_eq!((&opened[0].tools, opened[0].state.len()), (&None, 0));
    assert_eq!(opened[1].tools.as_ref().unwrap()[0]["name"], "add");

    let turns = environment.step(&[action(b"", "xyz", 0), action(b"ab", "q", 3)]).unwrap();
    let turn = turns[0].as_ref().unwrap();
    assert_eq!(turn.messages, [message("tool", "xyz")]);
    assert_eq!((turn.state.as_slice(), turn.done, turn.reward), (&b"x"[..], false, 0.0));
    let turn = turns[1].as_ref().unwrap();
    assert_eq!((turn.state.as_slice(), turn.reward), (&b"abq"[..], 3.0));
    assert_eq!(turn.metrics, [("m".to_string(), 3.0)]);

    let turns = environment.step(&[action(b"abq", "done", 4), action(b"", "c", 1), action(b"", "c", 2)]).unwrap();
    let turn = turns[0].as_ref().unwrap();
    assert!(turn.done && turn.messages.is_empty());
    assert_eq!((turns[1].as_ref().unwrap().reward, turns[2].as_ref().unwrap().reward), (0.0, 1.0));
    assert!(environment.step(&[]).unwrap().is_empty());
}

#[test]
fn a_turn_that_goes_wrong_costs_one_conversation() {
    let mut environment = environment();
    let steps = ["a", "!", "e", "n", "b", "?", "b b", "z"].map(|completion| action(b"s", completion, 1));
    let turns = environment.step(&steps).unwrap();
    let reason = |item: usize| {
        let failure = turns[item].as_ref().unwrap_err();
        assert_eq!((failure.item, failure.plugin.as_str()), (item, "talk"));
        failure.reason.clone()
    };
    assert!(turns[0].is_ok() && turns[7].is_ok());
    assert!(
        reason(1).contains("a panic, an abort or unreachable code, in `explode` called by `step`"),
        "{}",
        reason(1)
    );
    assert!(reason(2).contains("there is no message for the model"));
    assert!(reason(3).contains("the reward is NaN"));
    assert!(reason(4).contains("`state_bytes_max` = 65536"));
    assert_eq!(reason(5), "no");

    let starts = [start("a", None), start("b", Some("!")), start("c", Some("-")), start("d", Some("{}"))];
    let opened = environment.reset(&starts).unwrap();
    let reason = |item: usize| opened[item].as_ref().unwrap_err().reason.clone();
    assert!(opened[0].is_ok());
    assert!(reason(1).contains("in `explode`"), "{}", reason(1));
    assert!(reason(2).contains("opens without a message"));
    assert!(reason(3).contains("the tools are no JSON list"));
}

#[test]
fn many_conversations_keep_their_order() {
    let mut environment = environment();
    let steps: Vec<_> = (0..500).map(|turn| action(&[], if turn % 97 == 5 { "!" } else { "x" }, turn)).collect();
    for (item, turn) in environment.step(&steps).unwrap().into_iter().enumerate() {
        match turn {
            Ok(turn) => assert_eq!(turn.reward, item as f64),
            Err(failure) => assert_eq!((failure.item, item % 97), (item, 5)),
        }
    }
}
