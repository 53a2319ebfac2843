//! The adapter for `cosmos:plugin@0.2.x`: bindings of `wit/since-v0.2.0` and the translation of its types. It
//! changes only with its frozen package, that is, never; a later version gets a module of its own beside this one.

use wasmtime::Store;
use wasmtime::component::{HasSelf, Instance, InstancePre, Linker, Resource};

use crate::accept::RawOpened;
use crate::component_file::Offers;
use crate::guest::{Description, NotExported, Outcomes};
use crate::info::Offer;
use crate::lend::OpenRows;
use crate::sandbox::GuestState;
use crate::voice::Level;
use crate::{Action, ChatMessage, EpisodeStart, Example, Prompt, RewardSample, Score, TableRequest, Turn};

#[allow(missing_docs, dead_code)]
mod bindings {
    wasmtime::component::bindgen!({
        path: "../../wit/since-v0.2.0",
        // One world of all interfaces; which of them a component exports is its own choice.
        inline: "
            package cosmos:host;
            world everything {
                import cosmos:plugin/log@0.2.0;
                import cosmos:plugin/table@0.2.0;
                import cosmos:plugin/chat-template@0.2.0;
                export cosmos:plugin/metadata@0.2.0;
                export cosmos:plugin/dataset@0.2.0;
                export cosmos:plugin/reward@0.2.0;
                export cosmos:plugin/environment@0.2.0;
            }
        ",
        world: "cosmos:host/everything",
        // What the host gives is lowered from where it lies, without a copy.
        ownership: Borrowing { duplicate_if_necessary: true },
        imports: { default: trappable },
        exports: { default: async },
        with: { "cosmos:plugin/table.rows": crate::lend::OpenRows },
    });
}

use bindings::cosmos::plugin::{chat_template, log, table, types};
use bindings::exports::cosmos::plugin::{dataset, environment, metadata, reward};

/// Makes the import `log` of this version available.
pub(crate) fn link_log(linker: &mut Linker<GuestState>) -> wasmtime::Result<()> {
    log::add_to_linker::<_, HasSelf<_>>(linker, |state| state)
}

/// Makes the import `table` of this version available.
pub(crate) fn link_table(linker: &mut Linker<GuestState>) -> wasmtime::Result<()> {
    table::add_to_linker::<_, HasSelf<_>>(linker, |state| state)
}

/// Makes the import `chat-template` of this version available.
pub(crate) fn link_chat_template(linker: &mut Linker<GuestState>) -> wasmtime::Result<()> {
    chat_template::add_to_linker::<_, HasSelf<_>>(linker, |state| state)
}

impl types::Host for GuestState {}

impl log::Host for GuestState {
    fn write(&mut self, level: log::Level, message: String) -> wasmtime::Result<()> {
        let level = match level {
            log::Level::Trace => Level::Trace,
            log::Level::Debug => Level::Debug,
            log::Level::Info => Level::Info,
            log::Level::Warn => Level::Warn,
            log::Level::Error => Level::Error,
        };
        self.write_log(level, &message);
        Ok(())
    }
}

impl table::Host for GuestState {
    fn open(&mut self, source: table::Source) -> wasmtime::Result<Result<Resource<OpenRows>, String>> {
        let table::Source { name, subset, revision, splits } = source;
        self.open_table(&TableRequest { name, subset, revision, splits })
    }
}

impl table::HostRows for GuestState {
    fn len(&mut self, rows: Resource<OpenRows>) -> wasmtime::Result<u64> {
        self.rows_len(&rows)
    }

    fn columns(&mut self, rows: Resource<OpenRows>) -> wasmtime::Result<Vec<String>> {
        self.rows_columns(&rows)
    }

    fn read(
        &mut self,
        rows: Resource<OpenRows>,
        start: u64,
        count: u32,
        columns: Vec<String>,
    ) -> wasmtime::Result<Result<Vec<String>, String>> {
        self.read_rows(&rows, start, count, &columns)
    }

    fn drop(&mut self, rows: Resource<OpenRows>) -> wasmtime::Result<()> {
        self.close_rows(rows)
    }
}

impl chat_template::Host for GuestState {
    fn render(
        &mut self,
        messages: Vec<types::MessageResult>,
        add_generation_prompt: bool,
        options: String,
    ) -> wasmtime::Result<Result<String, String>> {
        Ok(self.render_chat(&chat(messages), add_generation_prompt, &options))
    }
}

/// Where a component's exports of this version are.
#[derive(Clone)]
pub(crate) struct Indices {
    metadata: metadata::GuestIndices,
    dataset: Option<dataset::GuestIndices>,
    reward: Option<reward::GuestIndices>,
    environment: Option<environment::GuestIndices>,
}

impl Indices {
    pub(crate) fn find(pre: &InstancePre<GuestState>, offers: Offers) -> wasmtime::Result<Self> {
        Ok(Self {
            metadata: metadata::GuestIndices::new(pre)?,
            dataset: offers.dataset.then(|| dataset::GuestIndices::new(pre)).transpose()?,
            reward: offers.reward.then(|| reward::GuestIndices::new(pre)).transpose()?,
            environment: offers.environment.then(|| environment::GuestIndices::new(pre)).transpose()?,
        })
    }

    pub(crate) fn load(&self, store: &mut Store<GuestState>, instance: &Instance) -> wasmtime::Result<Exports> {
        Ok(Exports {
            metadata: self.metadata.load(&mut *store, instance)?,
            dataset: self.dataset.as_ref().map(|dataset| dataset.load(&mut *store, instance)).transpose()?,
            reward: self.reward.as_ref().map(|reward| reward.load(&mut *store, instance)).transpose()?,
            environment: self.environment.as_ref().map(|found| found.load(&mut *store, instance)).transpose()?,
        })
    }
}

/// One instance's exports of this version.
pub(crate) struct Exports {
    metadata: metadata::Guest,
    dataset: Option<dataset::Guest>,
    reward: Option<reward::Guest>,
    environment: Option<environment::Guest>,
}

impl Exports {
    pub(crate) async fn describe(&self, store: &mut Store<GuestState>) -> wasmtime::Result<Description> {
        let description = self.metadata.call_describe(store).await?;
        let datasets = description.datasets.into_iter();
        let rewards = description.rewards.into_iter();
        Ok(Description {
            name: description.name,
            version: description.version,
            summary: description.summary,
            datasets: datasets.map(|o| Offer { name: o.name, role: dataset_role(o.role).into() }).collect(),
            rewards: rewards.map(|o| Offer { name: o.name, role: reward_role(o.role).into() }).collect(),
            environments: description.environments.into_iter().map(|offer| offer.name).collect(),
            settings_schema: description.settings_schema,
            wants: description.wants,
        })
    }

    pub(crate) async fn init_dataset(
        &self,
        store: &mut Store<GuestState>,
        name: &str,
        settings: &str,
    ) -> wasmtime::Result<Result<(), String>> {
        self.dataset.as_ref().ok_or(NotExported)?.call_init(store, name, settings).await
    }

    pub(crate) async fn init_reward(
        &self,
        store: &mut Store<GuestState>,
        name: &str,
        settings: &str,
    ) -> wasmtime::Result<Result<(), String>> {
        self.reward.as_ref().ok_or(NotExported)?.call_init(store, name, settings).await
    }

    pub(crate) async fn init_environment(
        &self,
        store: &mut Store<GuestState>,
        name: &str,
        settings: &str,
    ) -> wasmtime::Result<Result<(), String>> {
        self.environment.as_ref().ok_or(NotExported)?.call_init(store, name, settings).await
    }

    pub(crate) async fn len(&self, store: &mut Store<GuestState>) -> wasmtime::Result<Result<u64, String>> {
        self.dataset.as_ref().ok_or(NotExported)?.call_len(store).await
    }

    pub(crate) async fn get_batch(
        &self,
        store: &mut Store<GuestState>,
        indices: &[u64],
    ) -> wasmtime::Result<Outcomes<Example>> {
        let examples = self.dataset.as_ref().ok_or(NotExported)?.call_get_batch(store, indices).await?;
        Ok(examples.into_iter().map(|result| result.map(example).map_err(|error| error.message)).collect())
    }

    pub(crate) async fn score_batch(
        &self,
        store: &mut Store<GuestState>,
        samples: &[RewardSample],
    ) -> wasmtime::Result<Outcomes<Score>> {
        let guest = self.reward.as_ref().ok_or(NotExported)?;
        let metadata: Vec<_> = samples.iter().map(|sample| pairs(&sample.metadata)).collect();
        let lowered: Vec<_> = samples
            .iter()
            .zip(&metadata)
            .map(|(sample, metadata)| reward::Sample {
                prompt: &sample.prompt,
                completion: &sample.completion,
                reference: sample.reference.as_deref().unwrap_or_default(),
                metadata,
            })
            .collect();
        let scores = guest.call_score_batch(store, &lowered).await?;
        Ok(scores.into_iter().map(|result| result.map(score).map_err(|error| error.message)).collect())
    }

    pub(crate) async fn reset_batch(
        &self,
        store: &mut Store<GuestState>,
        starts: &[EpisodeStart],
    ) -> wasmtime::Result<Outcomes<RawOpened>> {
        let guest = self.environment.as_ref().ok_or(NotExported)?;
        let parts: Vec<_> = starts.iter().map(|start| (borrowed(&start.messages), pairs(&start.metadata))).collect();
        let lowered: Vec<_> = starts
            .iter()
            .zip(&parts)
            .map(|(start, (messages, metadata))| environment::Start {
                messages,
                reference: start.reference.as_deref().unwrap_or_default(),
                metadata,
            })
            .collect();
        let opened = guest.call_reset_batch(store, &lowered).await?;
        let lift = |opened: environment::Opened| RawOpened {
            messages: chat(opened.messages),
            tools: opened.tools,
            state: opened.state,
        };
        Ok(opened.into_iter().map(|result| result.map(lift).map_err(|error| error.message)).collect())
    }

    pub(crate) async fn step_batch(
        &self,
        store: &mut Store<GuestState>,
        actions: &[Action],
    ) -> wasmtime::Result<Outcomes<Turn>> {
        let guest = self.environment.as_ref().ok_or(NotExported)?;
        let lowered: Vec<_> = actions
            .iter()
            .map(|action| environment::Action {
                state: &action.state,
                completion: &action.completion,
                turn: action.turn,
                complete: action.complete,
            })
            .collect();
        let outcomes = guest.call_step_batch(store, &lowered).await?;
        let lift = |outcome: environment::Outcome| Turn {
            messages: chat(outcome.messages),
            state: outcome.state,
            done: outcome.done,
            reward: outcome.reward,
            metrics: metrics(outcome.metrics),
        };
        Ok(outcomes.into_iter().map(|result| result.map(lift).map_err(|error| error.message)).collect())
    }
}

fn chat(messages: Vec<types::MessageResult>) -> Vec<ChatMessage> {
    messages.into_iter().map(|message| ChatMessage { role: message.role, content: message.content }).collect()
}

fn borrowed(messages: &[ChatMessage]) -> Vec<types::MessageParam<'_>> {
    messages.iter().map(|message| types::MessageParam { role: &message.role, content: &message.content }).collect()
}

fn pairs(pairs: &[(String, String)]) -> Vec<types::StringPairParam<'_>> {
    pairs.iter().map(|(key, value)| types::StringPairParam { key, value }).collect()
}

fn example(example: dataset::Example) -> Example {
    let prompt = match example.prompt {
        types::Prompt::Text(text) => Prompt::Text(text),
        types::Prompt::Messages(messages) => Prompt::Messages(chat(messages)),
    };
    let metadata = example.metadata.into_iter().map(|pair| (pair.key, pair.value)).collect();
    Example { prompt, reference: example.reference, response: example.response, metadata }
}

fn score(score: reward::Score) -> Score {
    Score { value: score.value, metrics: metrics(score.metrics) }
}

fn metrics(metrics: Vec<reward::Metric>) -> Vec<(String, f64)> {
    metrics.into_iter().map(|metric| (metric.name, metric.value)).collect()
}

fn dataset_role(role: metadata::DatasetRole) -> &'static str {
    match role {
        metadata::DatasetRole::Train => "train",
        metadata::DatasetRole::Validation => "validation",
    }
}

fn reward_role(role: metadata::RewardRole) -> &'static str {
    match role {
        metadata::RewardRole::Train => "train",
        metadata::RewardRole::Validation => "validation",
        metadata::RewardRole::Filter => "filter",
    }
}
