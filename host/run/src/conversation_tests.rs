use std::path::Path;
use std::sync::Arc;

use cosmos_config::ConfigFile;
use cosmos_data::tokenizer::Tokenizer;
use cosmos_engine::generate::SamplingParams;
use cosmos_engine::model::{ModelConfig, random};
use serde_json::json;

use super::*;

/// Answers with a number that depends on what was said; the state counts the turns.
#[derive(Default)]
struct Counting {
    /// Does not open conversations about sevens.
    broken_start: bool,
    /// Fails the second step of conversations in which the model's first message had this many characters.
    broken_length: Option<usize>,
}

fn failure(item: usize, reason: &str) -> SampleFailure {
    SampleFailure { plugin: "test".into(), item, reason: reason.into() }
}

impl Partner for Counting {
    fn reset(
        &mut self,
        starts: &[EpisodeStart],
    ) -> std::result::Result<Vec<std::result::Result<Opened, SampleFailure>>, PluginError> {
        let open = |(item, start): (usize, &EpisodeStart)| {
            if self.broken_start && start.messages[0].content.starts_with('7') {
                return Err(failure(item, "no sevens"));
            }
            let tools = Some(json!([{"name": "add"}]));
            Ok(Opened { messages: start.messages.clone(), tools, state: vec![0] })
        };
        Ok(starts.iter().enumerate().map(open).collect())
    }

    fn step(
        &mut self,
        actions: &[Action],
    ) -> std::result::Result<Vec<std::result::Result<Turn, SampleFailure>>, PluginError> {
        let mut answers = Vec::new();
        for (item, action) in actions.iter().enumerate() {
            assert_eq!(u32::from(action.state[0]), action.turn, "the state comes back");
            let (turn, length) = (action.state[0], action.completion.chars().count());
            answers.push(if turn == 1 && self.broken_length == Some(usize::from(action.state[1])) {
                Err(failure(item, "lost the thread"))
            } else {
                Ok(Turn {
                    messages: vec![ChatMessage { role: "tool".into(), content: format!("{}+{turn}", length % 10) }],
                    state: vec![turn + 1, u8::try_from(length).unwrap()],
                    done: turn == 2,
                    reward: 0.25,
                    metrics: vec![("steps".into(), 1.0), ("length".into(), length as f64)],
                })
            });
        }
        Ok(answers)
    }
}

const TEMPLATE: &str = "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<eos>{% else %}:{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}={% endif %}";

fn quickstart() -> std::path::PathBuf {
    cosmos_testkit::repo_root().join("configs/quickstart/student")
}

fn text_with(template: &str) -> Text {
    let tokenizer = Arc::new(Tokenizer::load(quickstart()).unwrap());
    Text { tokenizer, chat: Some(Arc::new(ChatTemplate::from_source("t.jinja", template, &[]).unwrap())) }
}

fn conversations(partner: Counting, keys: &str) -> Conversations {
    let toml = format!("[train]\n[rollout.multi_turn_config]\nenable = true\n{keys}");
    let config = ConfigFile::parse("run.toml", &toml).unwrap().resolve("20260102030405").unwrap().config;
    Conversations::with_partner(Box::new(partner), ("test".into(), "counting".into()), &config)
}

fn sampling(slots: usize, n: usize) -> Sampling {
    Sampling {
        params: SamplingParams { seed: 3, ..SamplingParams::default() },
        n,
        response_tokens_max: 50,
        context_tokens_max: 60,
        stop_ids: vec![1],
        slots,
        kv_bytes_max: None,
        candidates: 3,
        logprobs: true,
        logprob_temperature: 1.0,
    }
}

fn jobs(text: &Text) -> Vec<Job> {
    let item = |content: &str| Item {
        source: 0,
        messages: vec![ChatMessage { role: "user".into(), content: content.into() }],
        prompt: content.into(),
        prompt_ids: text.tokenizer.encode(content, false).unwrap(),
        reference: None,
        response: None,
        metadata: Vec::new(),
        conversation: None,
    };
    let prompts = ["1+2", "7*8", "(3-4)", "9/3"];
    (10..).zip(prompts).map(|(ordinal, p)| Job { ordinal, item: Arc::new(item(p)) }).collect()
}

/// A student of the quickstart's shape that ends its messages often.
fn student() -> Box<dyn Model> {
    let shape = ModelConfig::from_folder(&quickstart()).unwrap();
    random(&shape, "burn:flex", 7).unwrap()
}

fn rolled(partner: Counting, keys: &str, sampling: &Sampling) -> (Vec<Completion>, RolloutStats) {
    let text = text_with(TEMPLATE);
    let mut held = conversations(partner, keys);
    held.roll_out(student().as_mut(), &text, &jobs(&text), sampling, 4, &mut |_| Ok(()), &|| false).unwrap().unwrap()
}

#[test]
fn tokens_are_appended_and_masked() {
    let text = text_with(TEMPLATE);
    let (completions, stats) = rolled(Counting::default(), "", &sampling(8, 3));
    assert_eq!((completions.len(), stats.failed), (12, 0));
    assert_eq!(completions.iter().map(|c| c.sample).collect::<Vec<_>>(), (30..42).collect::<Vec<_>>());
    assert_eq!(stats.tokens as usize, completions.iter().map(Completion::own_len).sum::<usize>());
    let mut several = 0;
    for c in &completions {
        assert_eq!((c.own.len(), c.logprobs.len()), (c.tokens.len(), c.own_len()));
        assert_eq!(c.candidate_ids.len(), 3 * c.own_len());
        assert!(*c.own.last().unwrap(), "nothing is heard that is not answered");
        several += usize::from(c.turns() > 1);
        // The tokens are the messages as the template writes them, behind the prompt.
        let said = c.conversation.iter().rposition(|m| m.role == "assistant").unwrap();
        let mut expected = String::new();
        for m in &c.conversation[..=said] {
            expected += &if m.role == "assistant" { m.content.clone() } else { format!("<eos>:{}=", m.content) };
        }
        let decoded: Vec<u32> = c.tokens.iter().copied().filter(|id| *id < text.tokenizer.id_end()).collect();
        let found = text.tokenizer.decode(&decoded, false).unwrap().replace("<pad>", "").replace("<unk>", "");
        assert_eq!(found.strip_suffix("<eos>").unwrap_or(&found), expected);
        let heard: String = text
            .decode(&c.tokens.iter().zip(&c.own).filter(|(_, own)| !**own).map(|(id, _)| *id).collect::<Vec<_>>())
            .unwrap();
        let messages = c.conversation[..said].iter().filter(|m| m.role == "tool");
        assert_eq!(heard, messages.map(|m| format!(":{}=", m.content)).collect::<String>());
        assert_eq!(c.reward, Some(0.25 * c.turns() as f64));
        assert_eq!(c.reward_metrics[0], ("test/counting".into(), c.reward.unwrap()));
        assert_eq!(c.reward_metrics[1], ("test/steps".into(), c.turns() as f64));
        assert!(c.ids().len() <= 60 && c.tokens.len() <= 50);
        assert_eq!(c.text, c.conversation[said].content);
    }
    assert!(several > 3, "only {several} conversations have more than one turn");
    assert!(completions.iter().any(|c| c.stopped && c.turns() == 3));
}

#[test]
fn waves_and_slots_change_nothing() {
    let alone = rolled(Counting::default(), "", &sampling(1, 3)).0;
    for slots in [5, 64] {
        let together = rolled(Counting::default(), "", &sampling(slots, 3)).0;
        for (a, b) in alone.iter().zip(&together) {
            assert_eq!(serde_json::to_value(a).unwrap(), serde_json::to_value(b).unwrap(), "{slots} slots");
        }
    }
    // A completion does not depend on how many siblings it has, and survives a checkpoint.
    let few = rolled(Counting::default(), "", &sampling(5, 2)).0;
    for (a, b) in few.iter().zip(alone.iter().filter(|c| c.sample % 3 < 2)) {
        assert_eq!((&a.tokens, &a.own, &a.logprobs), (&b.tokens, &b.own, &b.logprobs));
        let read: Completion = serde_json::from_str(&serde_json::to_string(b).unwrap()).unwrap();
        assert_eq!(serde_json::to_value(&read).unwrap(), serde_json::to_value(b).unwrap());
    }
    // What is sampled is what a decoder says after exactly these tokens: the recorded log-probs agree with scoring.
    let ids: Vec<Vec<u32>> = alone.iter().map(Completion::ids).collect();
    let requests: Vec<_> = ids
        .iter()
        .zip(&alone)
        .map(|(ids, c)| cosmos_engine::score::ScoreRequest { ids, first: c.prompt_ids.len(), candidates: None })
        .collect();
    let scored = cosmos_engine::score::score(student().as_mut(), &requests, &Default::default()).unwrap();
    for (scored, c) in scored.into_iter().zip(&alone) {
        let own = c.keep_own(scored.logprobs, 0);
        assert_eq!(own.len(), c.logprobs.len());
        assert!(own.iter().zip(&c.logprobs).all(|(a, b)| (a - b).abs() < 1e-3), "{own:?} {:?}", c.logprobs);
    }
}

#[test]
fn limits_end_a_conversation() {
    let (one, _) = rolled(Counting::default(), "max_assistant_turns = 1\n", &sampling(8, 3));
    assert!(one.iter().all(|c| c.turns() == 1 && c.own.iter().all(|own| *own) && !c.stopped));
    let short = Sampling { response_tokens_max: 9, ..sampling(8, 3) };
    let (short, _) = rolled(Counting::default(), "", &short);
    assert!(short.iter().all(|c| c.tokens.len() <= 9 && *c.own.last().unwrap()));
    assert!(short.iter().any(|c| c.turns() == 1 && !c.stopped));
}

#[test]
fn a_failure_costs_one_conversation() {
    let (all, _) = rolled(Counting::default(), "", &sampling(8, 3));
    let (rest, stats) = rolled(Counting { broken_start: true, ..Counting::default() }, "", &sampling(8, 3));
    assert_eq!((rest.len(), stats.failed), (9, 3));
    assert!(rest.iter().all(|c| c.sample / 3 != 11));
    let broken = all.iter().find(|c| c.turns() > 1).unwrap().conversation[0].content.chars().count();
    let partner = Counting { broken_length: Some(broken), ..Counting::default() };
    let (rest, stats) = rolled(partner, "", &sampling(8, 3));
    assert!(stats.failed > 0 && rest.len() + stats.failed as usize == 12);
    for c in &rest {
        let same = all.iter().find(|a| a.sample == c.sample).unwrap();
        assert_eq!(same.tokens, c.tokens, "the others go on as before");
    }
    // Their groups are smaller, and still normalised within themselves.
    let values: Vec<f64> = rest.iter().map(|c| c.sample as f64).collect();
    let advantages = crate::rollout::advantages(&rest, &values, 3, true);
    for group in rest.iter().zip(advantages).collect::<Vec<_>>().chunk_by(|a, b| a.0.sample / 3 == b.0.sample / 3) {
        assert!(group.iter().map(|g| g.1).sum::<f32>().abs() < 1e-5);
    }
}

#[test]
fn what_cannot_work_is_refused_before_the_run() {
    let check = |template: &str, keys: &str, partner: Counting| {
        let text = text_with(template);
        let jobs = jobs(&text);
        let items: Vec<Item> = jobs.iter().map(|j| j.item.as_ref().clone()).collect();
        conversations(partner, keys).check(&items, &text, &sampling(4, 2)).map_err(|e| e.to_string())
    };
    assert_eq!(check(TEMPLATE, "", Counting::default()), Ok(()));
    let with_tools = format!("{{% if tools %}}{{{{ tools|length }}}}{{% endif %}}{TEMPLATE}");
    assert_eq!(check(&with_tools, "enable_tools = true\n", Counting::default()), Ok(()));
    let refused = [
        (TEMPLATE, "enable_tools = true\n", "does not show `tools`"),
        ("{% for m in messages %}{{ m.content }}; {% endfor %}", "", "none of the student's stop tokens"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "", "as it is"),
    ];
    for (template, keys, why) in refused {
        let error = check(template, keys, Counting::default()).unwrap_err();
        assert!(error.contains(why), "{error}");
    }
    let text = Text { chat: None, ..text_with(TEMPLATE) };
    let error = conversations(Counting::default(), "").check(&[], &text, &sampling(4, 2)).unwrap_err();
    assert!(error.to_string().contains("needs a chat template") && error.hint().is_some(), "{error}");
}

#[test]
fn the_template_knows_tools_and_thinking() {
    let template = format!(
        "{{% if enable_thinking %}}({{% endif %}}{{% if tools %}}{{{{ tools|length }}}}{{% endif %}}{TEMPLATE}"
    );
    let text = text_with(&template);
    let first = |keys: &str| {
        let rolled = conversations(Counting::default(), keys).roll_out(
            student().as_mut(),
            &text,
            &jobs(&text),
            &sampling(8, 1),
            0,
            &mut |_| Ok(()),
            &|| false,
        );
        rolled.unwrap().unwrap().0.remove(0).prompt
    };
    assert_eq!(first(""), ":1+2=");
    assert_eq!(first("enable_tools = true\n"), "1:1+2=");
    assert_eq!(first("enable_thinking = true\n"), "(:1+2=");
    assert_eq!(first("add_generation_prompt = false\n"), ":1+2");
}

/// The real template and tokenizer: what is appended turn by turn is what the template makes of the whole.
#[test]
fn qwen_conversations_are_what_the_template_says() {
    let (Some(folder), Some(template)) =
        (cosmos_testkit::golden("tokenizer-qwen"), cosmos_testkit::shared_data("chat_templates/qwen3.jinja"))
    else {
        return;
    };
    let chat = ChatTemplate::load_file(&template, Path::new(&folder)).unwrap();
    let text = Text { tokenizer: Arc::new(Tokenizer::load(&folder).unwrap()), chat: Some(Arc::new(chat)) };
    let chat = text.chat.as_deref().unwrap();
    let encode = |part: &str| text.tokenizer.encode(part, false).unwrap();
    let im_end = text.tokenizer.token_to_id("<|im_end|>").unwrap();
    let end_of_text = text.tokenizer.token_to_id("<|endoftext|>").unwrap();
    let sampling = Sampling { stop_ids: vec![im_end, end_of_text], ..sampling(4, 1) };
    let room = Room { text: &text, chat, sampling: &sampling };
    let say = |role: &str, content: &str| Message::new(role, content);
    let call = "<tool_call>\n{\"name\": \"calculator\", \"arguments\": {\"expression\": \"1/3\"}}\n</tool_call>";
    let tools = json!([{"type": "function", "function": {"name": "calculator", "parameters": {}}}]);
    let talks: Vec<(Value, Vec<Message>, Vec<(&str, Vec<Message>)>)> = vec![
        (Value::Null, vec![say("user", "Hi")], vec![("Hello!", vec![say("user", "Ünïcode 🙂?\n")])]),
        (
            tools.clone(),
            vec![say("system", "Be brief."), say("user", "1/3 of 6?")],
            vec![
                (call, vec![say("tool", "1/3")]),
                ("Thus 2.\n\n#### 2", vec![say("user", "Sure?")]),
                (call, vec![say("tool", "1/3"), say("tool", " 4\n"), say("user", "and")]),
                ("", vec![say("tool", "nothing")]),
            ],
        ),
    ];
    for (tools, opening, turns) in talks {
        let options = Map::from_iter([("tools".to_string(), tools), ("enable_thinking".into(), true.into())]);
        let mut ids = encode(&chat.render(&opening, true, &options).unwrap());
        let mut messages = opening;
        for (said, heard) in turns {
            let episode = Episode { options: options.clone(), ..Episode::empty(0, 0) };
            ids.extend(encode(said));
            ids.push(im_end);
            ids.extend(episode.delta(&messages, &heard, true, &room).unwrap());
            messages.push(say("assistant", said));
            messages.extend(heard);
            assert_eq!(ids, encode(&chat.render(&messages, true, &options).unwrap()), "{messages:?}");
        }
    }
    // Thinking that the template would drop later stays: only what follows the message is asked of it.
    let episode = Episode { options: Map::new(), ..Episode::empty(0, 0) };
    let delta = episode.delta(&[say("user", "Hi")], &[say("user", "Again")], true, &room).unwrap();
    assert_eq!(delta, encode("\n<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\n"));
    let thinking_off = Map::from_iter([("enable_thinking".to_string(), Value::Bool(false))]);
    let episode = Episode { options: thinking_off, ..Episode::empty(0, 0) };
    let delta = episode.delta(&[say("user", "Hi")], &[say("tool", "4")], true, &room).unwrap();
    let expected = "\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n";
    assert_eq!(delta, encode(expected));
}

/// Answers of a real teacher about real conversations, and what a step makes of them.
mod training {
    use std::collections::HashMap;

    use cosmos_broker::{BrokerLimits, MemoryBroker};
    use cosmos_config::Config;
    use cosmos_engine::head::{Head, ModelHead};

    use super::*;
    use crate::policy::{PolicyRole, StepOutcome};
    use crate::student::Student;
    use crate::teacher::{Answer, TeacherHidden, TeacherRole, Wanted, collect, request};

    fn config(keys: &str) -> Config {
        let toml = format!(
            "[train]\nseed = 5\noptm_lr = 1e-2\n[host]\nrandom_init = true\n[train.train_policy]\ntype = \"grpo\"\nmini_batch = 4\n[distillation]\nenable = true\n{keys}"
        );
        ConfigFile::parse("run.toml", &toml).unwrap().resolve("20260102030405").unwrap().config
    }

    struct Setup {
        config: Config,
        role: PolicyRole,
        completions: Vec<Completion>,
        answers: HashMap<u64, Answer>,
    }

    fn teacher(role: &PolicyRole, config: &Config) -> TeacherRole {
        let shape = ModelConfig::from_folder(&quickstart()).unwrap();
        TeacherRole::new("t", random(&shape, "burn:flex", 99).unwrap(), Wanted::new(config, &role.spec))
    }

    fn setup(keys: &str) -> Setup {
        let config = config(keys);
        let role = PolicyRole::new(&config, config.train.train_policy.grpo().unwrap()).unwrap();
        let mut teacher = teacher(&role, &config);
        let k = teacher.wanted().student_candidates();
        let sampling = Sampling { candidates: k, ..sampling(64, 2) };
        let mut completions = rolled(Counting::default(), "", &sampling).0;
        for completion in &mut completions {
            completion.advantage = (completion.sample % 3) as f32 - 1.0;
        }
        let broker = MemoryBroker::new(BrokerLimits::default());
        request(&broker, &completions, 2, teacher.wanted(), 1000).unwrap();
        teacher.drain(&broker, "t", &|| false).unwrap();
        let samples: Vec<u64> = completions.iter().map(|c| c.sample).collect();
        let answers = collect(&broker, &samples, 2, 1000).unwrap();
        assert_eq!(answers.len(), completions.len());
        Setup { config, role, completions, answers }
    }

    fn step(setup: &Setup, answers: HashMap<u64, Answer>) -> (StepOutcome, Vec<f32>) {
        let mut student = Student::load(&setup.config, &quickstart(), 10).unwrap();
        let mut teacher = teacher(&setup.role, &setup.config);
        let mut heads: Vec<Box<dyn Head + '_>> = vec![Box::new(ModelHead(teacher.model.as_mut()))];
        let outcome = setup.role.step(&mut student, &mut heads, None, &setup.completions, answers, 0).unwrap();
        let weights = student.weights(true).unwrap().into_iter().flat_map(|t| t.values).collect();
        (outcome, weights)
    }

    /// Puts nonsense wherever the teacher speaks of a token that the model did not sample.
    fn spoil(answer: &Answer, completion: &Completion, lead: usize) -> Answer {
        let rows = lead + completion.tokens.len();
        let heard = |row: usize| row >= lead && !completion.own[row - lead];
        let spoil = |values: &[f32]| -> Vec<f32> {
            let width = (values.len() / rows).max(1);
            values.iter().enumerate().map(|(i, v)| if heard(i / width) { f32::NAN } else { *v }).collect()
        };
        let spoil_ids = |values: &[u32]| -> Vec<u32> {
            let width = (values.len() / rows).max(1);
            values.iter().enumerate().map(|(i, v)| if heard(i / width) { 4_000_000 } else { *v }).collect()
        };
        Answer {
            logprobs: spoil(&answer.logprobs),
            entropy: spoil(&answer.entropy),
            top1: spoil_ids(&answer.top1),
            candidate_ids: spoil_ids(&answer.candidate_ids),
            candidate_logprobs: spoil(&answer.candidate_logprobs),
            hidden: answer
                .hidden
                .iter()
                .map(|h| TeacherHidden { values_rh: spoil(&h.values_rh), ..h.clone() })
                .collect(),
        }
    }

    #[test]
    fn what_the_teacher_says_about_heard_tokens_does_not_count() {
        let objectives = [
            "top_k = 0\n",
            "top_k = 0\ninclude_prompt = true\nkl_discount_factor = 0.9\n",
            "top_k = 4\ntop_k_support = \"student\"\n",
            "top_k = 4\ntop_k_support = \"union\"\n",
            "top_k = 3\ntop_k_support = \"teacher\"\nobjective = \"cosmos_gjsd\"\n",
            "top_k = -1\n",
        ];
        for keys in objectives {
            let setup = setup(keys);
            let heard: usize = setup.completions.iter().map(|c| c.tokens.len() - c.own_len()).sum();
            assert!(heard > 10, "{heard}");
            let (outcome, weights) = step(&setup, setup.answers.clone());
            let own: usize = setup.completions.iter().map(Completion::own_len).sum();
            let include_prompt = keys.contains("include_prompt");
            let lead = |c: &Completion| if include_prompt { c.prompt_ids.len() - 1 } else { 0 };
            let prompt: usize = setup.completions.iter().map(lead).sum();
            assert_eq!((outcome.report.tokens, outcome.report.non_finite_rows), (own + prompt, 0), "{keys}");
            assert_eq!(outcome.report.kl.len(), own + prompt);
            for c in &setup.completions {
                let kl = &outcome.kl_of[&c.sample];
                assert_eq!(kl.len(), c.own_len());
                let spread = c.spread(kl, f32::NAN);
                assert!(spread.iter().zip(&c.own).all(|(kl, own)| kl.is_finite() == *own));
            }
            let spoiled =
                setup.completions.iter().map(|c| (c.sample, spoil(&setup.answers[&c.sample], c, lead(c)))).collect();
            let (same, same_weights) = step(&setup, spoiled);
            assert_eq!(same.report, outcome.report, "{keys}");
            assert!(weights == same_weights, "{keys}: the weights differ");
            // The same nonsense at one token of the model's own is noticed.
            if keys == "top_k = 0\n" {
                let mut answers = setup.answers.clone();
                let first = &setup.completions[0];
                answers.get_mut(&first.sample).unwrap().logprobs[0] = f32::NAN;
                assert_eq!(step(&setup, answers).0.report.non_finite_rows, 1);
            }
        }
    }
}
