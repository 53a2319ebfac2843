//! Rollouts of several turns: the student speaks, a plugin's environment answers, until it says that the conversation is
//! over or a limit does.
//!
//! **Tokens are only ever appended.** What the model sampled stays as it was sampled and is never tokenized again; what
//! it hears is rendered by the chat template as the text behind its own message. So the sequence that is trained on is
//! the one that the model saw. A template that rewrites earlier turns (Qwen3's drops their thinking) would show the
//! model another past in each turn; here the past keeps what was said.
//!
//! **All conversations go on together.** A wave generates the next turn of every one that is not over, by continuous
//! batching, and then steps their environment in one call. Each turn computes the conversation so far again as its
//! prompt: a prefill is cheap beside decoding, and no slot waits for an environment. A draw is decided by the seed, the
//! prompt, the completion and the token's position in it, so waves and slots change nothing.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::time::Instant;

use cosmos_config::{Config, Resolved};
use cosmos_data::chat::{ChatTemplate, Message};
use cosmos_engine::generate::{FinishReason, GenerateRequest, Generated, generate};
use cosmos_engine::model::Model;
use cosmos_plugin::{Action, ChatMessage, Environment, EpisodeStart, Opened, PluginError, SampleFailure, Turn};
use serde_json::{Map, Value};

use crate::error::{Result, Role, RunError};
use crate::plugins::Plugins;
use crate::rollout::{self, Completion, Job, RolloutStats, Sampling};
use crate::task::{Item, Text};

/// Who talks with the model.
pub trait Partner {
    /// Opens conversations; as many results, in their order.
    fn reset(
        &mut self,
        starts: &[EpisodeStart],
    ) -> std::result::Result<Vec<std::result::Result<Opened, SampleFailure>>, PluginError>;

    /// Answers one message of each conversation; as many results, in their order.
    fn step(
        &mut self,
        actions: &[Action],
    ) -> std::result::Result<Vec<std::result::Result<Turn, SampleFailure>>, PluginError>;
}

impl Partner for Environment {
    fn reset(
        &mut self,
        starts: &[EpisodeStart],
    ) -> std::result::Result<Vec<std::result::Result<Opened, SampleFailure>>, PluginError> {
        Environment::reset(self, starts)
    }

    fn step(
        &mut self,
        actions: &[Action],
    ) -> std::result::Result<Vec<std::result::Result<Turn, SampleFailure>>, PluginError> {
        Environment::step(self, actions)
    }
}

/// The conversations of a run: who answers the student, and by which rules.
pub struct Conversations {
    partner: Box<dyn Partner>,
    /// Plugin and environment.
    name: (String, String),
    turns_max: u32,
    /// Whether the template is told the environment's tools.
    tools: bool,
    add_generation_prompt: bool,
    enable_thinking: bool,
}

/// What a conversation works with beside itself.
struct Room<'a> {
    text: &'a Text,
    chat: &'a ChatTemplate,
    sampling: &'a Sampling,
}

/// How far a conversation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The model is to speak next.
    Open,
    /// Over, by the environment's word (`true`) or a limit.
    Over(bool),
    /// Over and handed on.
    Gone,
    /// Left out.
    Failed,
}

/// One conversation.
struct Episode {
    ordinal: u64,
    index: usize,
    phase: Phase,
    prompt: String,
    prompt_ids: Vec<u32>,
    /// Variables of the template.
    options: Map<String, Value>,
    /// Everything said, as the template sees it, the opening included.
    messages: Vec<Message>,
    /// Messages of the opening.
    opening: usize,
    state: Vec<u8>,
    turns: u32,
    tokens: Vec<u32>,
    own: Vec<bool>,
    logprobs: Vec<f32>,
    candidate_ids: Vec<u32>,
    reward: f64,
    /// Sums over the steps, in the order of their first appearance.
    metrics: Vec<(String, f64)>,
}

impl Conversations {
    /// What `[rollout.multi_turn_config]` asks for; none when it is off.
    pub fn open(resolved: &Resolved, plugins: &Plugins) -> Result<Option<Self>> {
        if !resolved.config.rollout.multi_turn_config.enable {
            return Ok(None);
        }
        let (environment, plugin, name) = plugins.open_environment(resolved)?;
        Ok(Some(Self::with_partner(Box::new(environment), (plugin, name), &resolved.config)))
    }

    fn with_partner(partner: Box<dyn Partner>, name: (String, String), config: &Config) -> Self {
        let turns = &config.rollout.multi_turn_config;
        Self {
            partner,
            name,
            turns_max: u32::try_from(turns.max_assistant_turns).unwrap_or(u32::MAX),
            tools: turns.enable_tools,
            add_generation_prompt: turns.add_generation_prompt,
            enable_thinking: turns.enable_thinking,
        }
    }

    /// `plugin/environment`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.name.0, self.name.1)
    }

    /// Name of the plugin.
    pub fn plugin(&self) -> &str {
        &self.name.0
    }

    /// Tries the environment and the chat template on a few prompts, so that what cannot work is refused before the run.
    pub fn check(&mut self, items: &[Item], text: &Text, sampling: &Sampling) -> Result<()> {
        let room = self.room(text, sampling)?;
        let starts: Vec<EpisodeStart> = items.iter().map(start).collect();
        let mut reason = None;
        for opened in self.partner.reset(&starts)? {
            if !self.tools && opened.as_ref().is_ok_and(|opened| opened.tools.is_some()) {
                tracing::warn!(
                    "environment `{}` names tools that the student is not shown: set `rollout.multi_turn_config.enable_tools = true`, unless its messages explain them",
                    self.name()
                );
            }
            match opened.map_err(|failure| failure.to_string()).and_then(|o| self.begin(0, 0, o, &room)) {
                Ok(episode) => {
                    self.check_tools(&episode, &room)?;
                    let next = [Message::new("user", "x")];
                    return match episode.delta(&episode.messages, &next, self.add_generation_prompt, &room) {
                        Ok(_) => Ok(()),
                        Err(why) => Err(RunError::config(
                            "",
                            format!("several turns do not work with this chat template: {why}"),
                            "`rollout.multi_turn_config.custom_chat_template_path` names another template",
                        )),
                    };
                }
                Err(why) => reason = Some(why),
            }
        }
        match reason {
            Some(why) => Err(RunError::config(
                "",
                format!(
                    "environment `{}` opens none of the first {} prompts; the last: {why}",
                    self.name(),
                    starts.len()
                ),
                "`plugin inspect` shows what the plugin expects",
            )),
            None => Ok(()),
        }
    }

    /// Tools that the template never shows would be missed for a whole run.
    fn check_tools(&self, episode: &Episode, room: &Room<'_>) -> Result<()> {
        let Some(tools) = episode.options.get("tools") else {
            if self.tools {
                tracing::warn!(
                    "`rollout.multi_turn_config.enable_tools` is true, but environment `{}` names no tools",
                    self.name()
                );
            }
            return Ok(());
        };
        let mut without = episode.options.clone();
        without.remove("tools");
        let opening = &episode.messages[..episode.opening];
        if tools.as_array().is_none_or(|t| !t.is_empty())
            && room.chat.render(opening, self.add_generation_prompt, &without)? == episode.prompt
        {
            return Err(RunError::config(
                "",
                "`rollout.multi_turn_config.enable_tools` is true, but the chat template does not show `tools`",
                "use a template that does (`custom_chat_template_path`), or set `enable_tools = false` and let the environment explain its tools",
            ));
        }
        Ok(())
    }

    fn room<'a>(&self, text: &'a Text, sampling: &'a Sampling) -> Result<Room<'a>> {
        let chat = text.chat.as_deref().ok_or_else(|| {
            RunError::config(
                "",
                "`rollout.multi_turn_config.enable` needs a chat template, and the student's folder has none",
                "put `chat_template.jinja` beside its `tokenizer.json`, or name a file with `rollout.multi_turn_config.custom_chat_template_path`",
            )
        })?;
        Ok(Room { text, chat, sampling })
    }

    /// Holds `n` conversations a job, in the order of their ordinals; those that fail are logged, counted and left out.
    /// `finished` sees each as soon as it is over. `stop` is asked between turns; a true answer abandons them all (`None`).
    pub fn roll_out(
        &mut self,
        model: &mut dyn Model,
        text: &Text,
        jobs: &[Job],
        sampling: &Sampling,
        version: u64,
        finished: &mut dyn FnMut(&Completion) -> Result<()>,
        stop: &dyn Fn() -> bool,
    ) -> Result<Option<(Vec<Completion>, RolloutStats)>> {
        let started = Instant::now();
        let room = self.room(text, sampling)?;
        let references: HashMap<u64, Option<String>> =
            jobs.iter().map(|job| (job.ordinal, job.item.reference.clone())).collect();
        let mut episodes = self.open_all(jobs, &room)?;
        let mut completions = Vec::with_capacity(episodes.len());
        let mut stats = RolloutStats::default();
        loop {
            let live: Vec<usize> = (0..episodes.len()).filter(|&i| episodes[i].phase == Phase::Open).collect();
            if live.is_empty() {
                break;
            }
            let Some(spoken) = speak(model, &episodes, &live, sampling, stop)? else {
                return Ok(None);
            };
            stats.tokens += spoken.iter().map(|g| g.tokens.len() as u64).sum::<u64>();
            let mut actions = Vec::with_capacity(live.len());
            for (&i, generated) in live.iter().zip(spoken) {
                actions.push(episodes[i].said(generated, &room)?);
            }
            for ((&i, action), turn) in live.iter().zip(&actions).zip(self.partner.step(&actions)?) {
                let heard = turn
                    .map_err(|failure| failure.to_string())
                    .and_then(|turn| self.heard(&mut episodes[i], turn, action.complete, &room));
                if let Err(why) = heard {
                    episodes[i].fail(sampling.n, &why);
                }
                if let Some(mut completion) = episodes[i].completion(&self.name, version, sampling.n as u64) {
                    completion.reference = references.get(&episodes[i].ordinal).cloned().flatten();
                    finished(&completion)?;
                    completions.push(completion);
                }
            }
        }
        stats.failed = episodes.iter().filter(|e| e.phase == Phase::Failed).count() as u64;
        completions.sort_by_key(|c| c.sample);
        stats.seconds = started.elapsed().as_secs_f64();
        Ok(Some((completions, stats)))
    }

    /// An episode for every completion of every job.
    fn open_all(&mut self, jobs: &[Job], room: &Room<'_>) -> Result<Vec<Episode>> {
        let n = room.sampling.n;
        let starts: Vec<EpisodeStart> = jobs.iter().flat_map(|job| std::iter::repeat_n(start(&job.item), n)).collect();
        let places = jobs.iter().flat_map(|job| (0..n).map(|index| (job.ordinal, index)));
        let mut episodes = Vec::with_capacity(starts.len());
        for ((ordinal, index), opened) in places.zip(self.partner.reset(&starts)?) {
            let begun = opened
                .map_err(|failure| failure.to_string())
                .and_then(|opened| self.begin(ordinal, index, opened, room));
            episodes.push(begun.unwrap_or_else(|why| {
                let mut episode = Episode::empty(ordinal, index);
                episode.fail(n, &why);
                episode
            }));
        }
        episodes.sort_by_key(|e| (e.ordinal, e.index));
        Ok(episodes)
    }

    fn begin(
        &self,
        ordinal: u64,
        index: usize,
        opened: Opened,
        room: &Room<'_>,
    ) -> std::result::Result<Episode, String> {
        let mut options = Map::from_iter([("enable_thinking".to_string(), Value::Bool(self.enable_thinking))]);
        if let Some(tools) = opened.tools.filter(|_| self.tools) {
            options.insert("tools".into(), tools);
        }
        if opened.messages.is_empty() {
            return Err(format!("environment `{}` opens the conversation without a message", self.name()));
        }
        let messages = said_by(&opened.messages);
        let prompt =
            room.chat.render(&messages, self.add_generation_prompt, &options).map_err(|error| error.to_string())?;
        let prompt_ids = room.text.tokenizer.encode(&prompt, false).map_err(|error| error.to_string())?;
        let context = room.sampling.context_tokens_max;
        if prompt_ids.is_empty() || prompt_ids.len() >= context {
            return Err(format!(
                "its opening of {} tokens leaves no room in the context of {context} (`policy.model_max_length`)",
                prompt_ids.len()
            ));
        }
        let opening = messages.len();
        let state = opened.state;
        Ok(Episode { prompt, prompt_ids, options, messages, opening, state, ..Episode::empty(ordinal, index) })
    }

    /// Takes in the environment's answer: the conversation is over, or what it said is appended.
    fn heard(
        &self,
        episode: &mut Episode,
        turn: Turn,
        complete: bool,
        room: &Room<'_>,
    ) -> std::result::Result<(), String> {
        episode.reward += turn.reward;
        for (name, value) in turn.metrics {
            match episode.metrics.iter_mut().find(|m| m.0 == name) {
                Some(metric) => metric.1 += value,
                None => episode.metrics.push((name, value)),
            }
        }
        episode.state = turn.state;
        let next = said_by(&turn.messages);
        let over = turn.done || !complete || episode.turns >= self.turns_max;
        if over {
            episode.phase = Phase::Over(turn.done && complete);
            episode.messages.extend(next);
            return Ok(());
        }
        if next.is_empty() {
            return Err(format!("environment `{}` says nothing, but does not end the conversation", self.name()));
        }
        // The last message is the model's, for which its own tokens stand.
        let history = &episode.messages[..episode.messages.len() - 1];
        let delta = episode.delta(history, &next, self.add_generation_prompt, room)?;
        episode.messages.extend(next);
        let response = episode.tokens.len() + delta.len();
        let sampling = room.sampling;
        if response >= sampling.response_tokens_max
            || episode.prompt_ids.len() + response >= sampling.context_tokens_max
        {
            // Without a token left to say there is nothing to hear for either.
            episode.phase = Phase::Over(false);
            return Ok(());
        }
        episode.own.resize(response, false);
        episode.tokens.extend(delta);
        Ok(())
    }
}

/// Generates the next turn of each of `live`, in their order. `None`: asked to stop.
fn speak(
    model: &mut dyn Model,
    episodes: &[Episode],
    live: &[usize],
    sampling: &Sampling,
    stop: &dyn Fn() -> bool,
) -> Result<Option<Vec<Generated>>> {
    let mut requests: Vec<GenerateRequest> = Vec::with_capacity(live.len());
    for episode in live.iter().map(|&i| &episodes[i]) {
        let prompt = [episode.prompt_ids.as_slice(), &episode.tokens].concat();
        let sibling = |r: &&mut GenerateRequest| {
            let alike = r.first_position == episode.tokens.len() && r.prompt == prompt;
            r.id == episode.ordinal && r.first_index + r.n == episode.index && alike
        };
        match requests.last_mut().filter(sibling) {
            // Completions that begin alike share their prefill.
            Some(request) => request.n += 1,
            None => requests.push(GenerateRequest {
                id: episode.ordinal,
                prompt,
                n: 1,
                max_new_tokens: sampling.response_tokens_max - episode.tokens.len(),
                first_index: episode.index,
                first_position: episode.tokens.len(),
            }),
        }
    }
    let mut spoken: HashMap<(u64, usize), Generated> = HashMap::with_capacity(live.len());
    let mut abandoned = false;
    generate(model, &requests, &sampling.params, &sampling.options(), &mut |generated| {
        spoken.insert((generated.id, generated.index), generated);
        abandoned = stop();
        if abandoned { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
    .role("student")?;
    if abandoned {
        return Ok(None);
    }
    Ok(live.iter().map(|&i| spoken.remove(&(episodes[i].ordinal, episodes[i].index))).collect())
}

/// Completions of `jobs`: conversations where the run holds them, else single answers.
pub fn roll_out(
    conversations: Option<&mut Conversations>,
    model: &mut dyn Model,
    text: &Text,
    jobs: &[Job],
    sampling: &Sampling,
    version: u64,
    finished: &mut dyn FnMut(&Completion) -> Result<()>,
    stop: &dyn Fn() -> bool,
) -> Result<Option<(Vec<Completion>, RolloutStats)>> {
    match conversations {
        Some(conversations) => conversations.roll_out(model, text, jobs, sampling, version, finished, stop),
        None => rollout::roll_out(model, text, jobs, sampling, version, finished, stop),
    }
}

impl Episode {
    fn empty(ordinal: u64, index: usize) -> Self {
        Self {
            ordinal,
            index,
            phase: Phase::Open,
            prompt: String::new(),
            prompt_ids: Vec::new(),
            options: Map::new(),
            messages: Vec::new(),
            opening: 0,
            state: Vec::new(),
            turns: 0,
            tokens: Vec::new(),
            own: Vec::new(),
            logprobs: Vec::new(),
            candidate_ids: Vec::new(),
            reward: 0.0,
            metrics: Vec::new(),
        }
    }

    fn fail(&mut self, n: usize, why: &str) {
        self.phase = Phase::Failed;
        tracing::warn!("conversation {} left out: {why}", self.ordinal * n as u64 + self.index as u64);
    }

    /// Takes in what the model said.
    fn said(&mut self, generated: Generated, room: &Room<'_>) -> Result<Action> {
        let complete = generated.finish == FinishReason::Stop;
        let end = generated.tokens.len() - usize::from(complete);
        let completion = room.text.decode(&generated.tokens[..end])?;
        self.messages.push(Message::new("assistant", completion.as_str()));
        self.tokens.extend(generated.tokens);
        self.own.resize(self.tokens.len(), true);
        self.logprobs.extend(generated.logprobs);
        self.candidate_ids.extend(generated.candidate_ids);
        let turn = self.turns;
        self.turns += 1;
        Ok(Action { state: std::mem::take(&mut self.state), completion, turn, complete })
    }

    /// The tokens that stand between the model's last message, which it ended itself, and its next one. The stop token
    /// that it sampled stands for the one with which the template ends a message.
    fn delta(
        &self,
        history: &[Message],
        next: &[Message],
        add_generation_prompt: bool,
        room: &Room<'_>,
    ) -> std::result::Result<Vec<u32>, String> {
        let after = room
            .chat
            .after_turn(history, next, add_generation_prompt, &self.options)
            .map_err(|error| error.to_string())?;
        let encode = |text: &str| room.text.tokenizer.encode(text, false).map_err(|error| error.to_string());
        let closing = encode(&after.closing)?;
        let end = closing.iter().position(|id| room.sampling.stop_ids.contains(id)).ok_or_else(|| {
            format!(
                "it ends an assistant's message with {:?}, which holds none of the student's stop tokens ({:?} in `generation_config.json`), so the student would not end its messages there",
                after.closing, room.sampling.stop_ids
            )
        })?;
        let mut whole = encode(&after.whole)?;
        if whole.get(..=end) != closing.get(..=end) {
            return Err("its end of a message is tokenized in another way once more messages follow".into());
        }
        Ok(whole.split_off(end + 1))
    }

    /// What is trained on, once it is over; there is nothing left of it then.
    fn completion(&mut self, names: &(String, String), version: u64, n: u64) -> Option<Completion> {
        let Phase::Over(stopped) = self.phase else { return None };
        let gone = Self { phase: Phase::Gone, ..Self::empty(self.ordinal, self.index) };
        Some(std::mem::replace(self, gone).into_completion(names, stopped, version, n))
    }

    fn into_completion(
        self,
        (plugin, environment): &(String, String),
        stopped: bool,
        version: u64,
        n: u64,
    ) -> Completion {
        let conversation: Vec<ChatMessage> = self.messages[self.opening..].iter().map(plain).collect();
        let last = conversation.iter().rev().find(|m| m.role == "assistant");
        let mut reward_metrics = vec![(format!("{plugin}/{environment}"), self.reward)];
        reward_metrics.extend(self.metrics.into_iter().map(|(name, value)| (format!("{plugin}/{name}"), value)));
        Completion {
            sample: self.ordinal * n + self.index as u64,
            version,
            versions: vec![(version, self.tokens.len() as u32)],
            teachers: Vec::new(),
            prompt: self.prompt,
            prompt_ids: self.prompt_ids,
            text: last.map(|m| m.content.clone()).unwrap_or_default(),
            tokens: self.tokens,
            own: self.own,
            conversation,
            stopped,
            logprobs: self.logprobs,
            candidate_ids: self.candidate_ids,
            reward: Some(self.reward),
            reward_metrics,
            reward_failed: Vec::new(),
            advantage: 0.0,
            reference: None,
        }
    }
}

fn start(item: &Item) -> EpisodeStart {
    EpisodeStart { messages: item.messages.clone(), reference: item.reference.clone(), metadata: item.metadata.clone() }
}

fn said_by(messages: &[ChatMessage]) -> Vec<Message> {
    messages.iter().map(|m| Message::new(&m.role, &m.content)).collect()
}

fn plain(message: &Message) -> ChatMessage {
    let content = message.content.as_ref().and_then(Value::as_str).unwrap_or_default();
    ChatMessage { role: message.role.clone(), content: content.to_string() }
}

#[cfg(test)]
#[path = "conversation_tests.rs"]
mod tests;
