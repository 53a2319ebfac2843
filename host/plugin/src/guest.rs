//! A component's side of the contract, whichever version of it the component was built against.

use wasmtime::component::{Instance, InstancePre, Linker};
use wasmtime::{Engine, Store};

use crate::accept::RawOpened;
use crate::component_file::{Api, Offers, own_interface};
use crate::grant::Need;
use crate::info::Offer;
use crate::sandbox::GuestState;
use crate::{Action, EpisodeStart, Example, RewardSample, Score, Turn, since_v0_1_0, since_v0_2_0};

/// What a guest gave for each item of a batch: the item's own result, or the plugin's reason.
pub(crate) type Outcomes<T> = Vec<Result<T, String>>;

/// The component lacks the interface that is asked. Only a plugin that offers what it does not export gets here.
#[derive(Debug, thiserror::Error)]
#[error("the component does not export this interface")]
pub(crate) struct NotExported;

/// `metadata.describe`, before it is checked.
pub(crate) struct Description {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) summary: String,
    pub(crate) datasets: Vec<Offer>,
    pub(crate) rewards: Vec<Offer>,
    pub(crate) environments: Vec<String>,
    pub(crate) settings_schema: String,
    pub(crate) wants: Vec<String>,
}

/// The linker for a component with these imports. What is not needed is not linked; what is not granted was refused
/// before this.
pub(crate) fn link(engine: &Engine, imports: &[String]) -> wasmtime::Result<Linker<GuestState>> {
    let mut linker = Linker::new(engine);
    if imports.iter().any(|name| Need::of(name) == Need::Wasi) {
        wasmtime_wasi::p2::add_to_linker_async(&mut linker)?;
    }
    let mut linked = Vec::new();
    for (interface, version) in imports.iter().filter_map(|name| own_interface(name)) {
        // Imports of other versions were refused before this.
        let Some(api) = Api::of(version) else { continue };
        if linked.contains(&(api, interface)) {
            continue;
        }
        match (api, interface) {
            (Api::V0_1, "log") => since_v0_1_0::link_log(&mut linker)?,
            (Api::V0_1, "table") => since_v0_1_0::link_table(&mut linker)?,
            (Api::V0_1, "chat-template") => since_v0_1_0::link_chat_template(&mut linker)?,
            (Api::V0_2, "log") => since_v0_2_0::link_log(&mut linker)?,
            (Api::V0_2, "table") => since_v0_2_0::link_table(&mut linker)?,
            (Api::V0_2, "chat-template") => since_v0_2_0::link_chat_template(&mut linker)?,
            _ => {}
        }
        linked.push((api, interface));
    }
    Ok(linker)
}

/// Where a component's exports are.
#[derive(Clone)]
pub(crate) enum Indices {
    V0_1(since_v0_1_0::Indices),
    V0_2(since_v0_2_0::Indices),
}

impl Indices {
    /// Finds what the component offers, and checks its types.
    pub(crate) fn find(pre: &InstancePre<GuestState>, api: Api, offers: Offers) -> wasmtime::Result<Self> {
        Ok(match api {
            Api::V0_1 => Self::V0_1(since_v0_1_0::Indices::find(pre, offers)?),
            Api::V0_2 => Self::V0_2(since_v0_2_0::Indices::find(pre, offers)?),
        })
    }

    pub(crate) fn load(&self, store: &mut Store<GuestState>, instance: &Instance) -> wasmtime::Result<Exports> {
        Ok(match self {
            Self::V0_1(indices) => Exports::V0_1(indices.load(store, instance)?),
            Self::V0_2(indices) => Exports::V0_2(indices.load(store, instance)?),
        })
    }
}

/// One instance's exports.
pub(crate) enum Exports {
    V0_1(since_v0_1_0::Exports),
    V0_2(since_v0_2_0::Exports),
}

type GuestStore = Store<GuestState>;
type Answer<T> = wasmtime::Result<T>;

impl Exports {
    pub(crate) async fn describe(&self, store: &mut GuestStore) -> Answer<Description> {
        match self {
            Self::V0_1(guest) => guest.describe(store).await,
            Self::V0_2(guest) => guest.describe(store).await,
        }
    }

    pub(crate) async fn init_dataset(
        &self,
        store: &mut GuestStore,
        name: &str,
        settings: &str,
    ) -> Answer<Result<(), String>> {
        match self {
            Self::V0_1(guest) => guest.init_dataset(store, name, settings).await,
            Self::V0_2(guest) => guest.init_dataset(store, name, settings).await,
        }
    }

    pub(crate) async fn init_reward(
        &self,
        store: &mut GuestStore,
        name: &str,
        settings: &str,
    ) -> Answer<Result<(), String>> {
        match self {
            Self::V0_1(guest) => guest.init_reward(store, name, settings).await,
            Self::V0_2(guest) => guest.init_reward(store, name, settings).await,
        }
    }

    pub(crate) async fn init_environment(
        &self,
        store: &mut GuestStore,
        name: &str,
        settings: &str,
    ) -> Answer<Result<(), String>> {
        match self {
            Self::V0_1(_) => Err(NotExported.into()),
            Self::V0_2(guest) => guest.init_environment(store, name, settings).await,
        }
    }

    pub(crate) async fn len(&self, store: &mut GuestStore) -> Answer<Result<u64, String>> {
        match self {
            Self::V0_1(guest) => guest.len(store).await,
            Self::V0_2(guest) => guest.len(store).await,
        }
    }

    pub(crate) async fn get_batch(&self, store: &mut GuestStore, indices: &[u64]) -> Answer<Outcomes<Example>> {
        match self {
            Self::V0_1(guest) => guest.get_batch(store, indices).await,
            Self::V0_2(guest) => guest.get_batch(store, indices).await,
        }
    }

    pub(crate) async fn score_batch(
        &self,
        store: &mut GuestStore,
        samples: &[RewardSample],
    ) -> Answer<Outcomes<Score>> {
        match self {
            Self::V0_1(guest) => guest.score_batch(store, samples).await,
            Self::V0_2(guest) => guest.score_batch(store, samples).await,
        }
    }

    pub(crate) async fn reset_batch(
        &self,
        store: &mut GuestStore,
        starts: &[EpisodeStart],
    ) -> Answer<Outcomes<RawOpened>> {
        match self {
            Self::V0_1(_) => Err(NotExported.into()),
            Self::V0_2(guest) => guest.reset_batch(store, starts).await,
        }
    }

    pub(crate) async fn step_batch(&self, store: &mut GuestStore, actions: &[Action]) -> Answer<Outcomes<Turn>> {
        match self {
            Self::V0_1(_) => Err(NotExported.into()),
            Self::V0_2(guest) => guest.step_batch(store, actions).await,
        }
    }
}
