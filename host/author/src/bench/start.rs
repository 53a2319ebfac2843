//! How a component starts: compiled anew, and from the cache.

use std::time::{Duration, Instant};

use cosmos_plugin::{LoadTimes, Plugin, PluginHost};
use serde::Serialize;

use super::{Options, load, median};
use crate::error::Result;

/// Cached starts that are measured: at least so many, then until the time is over.
const STARTS_MIN: usize = 5;
const STARTS_MAX: usize = 50;
const STARTS_TIME: Duration = Duration::from_secs(1);

/// Milliseconds until a plugin can be asked.
#[derive(Debug, Clone, Serialize)]
pub struct Start {
    /// Compile, instantiate and describe; none: it came from the cache and compiling again was not asked for.
    pub cold_ms: Option<f64>,
    /// With compiled code from the cache; none without a cache folder.
    pub cached: Option<Times>,
    /// Where the time of a cached start goes: the median of each part.
    pub parts: Option<LoadTimes>,
    /// From the loaded plugin to a reward that is ready: a thread, an instance, `init`.
    pub open: Option<Times>,
}

/// Several measurements of one thing.
#[derive(Debug, Clone, Serialize)]
pub struct Times {
    /// The middle one.
    pub median_ms: f64,
    /// The shortest.
    pub min_ms: f64,
    /// The longest.
    pub max_ms: f64,
    /// How many.
    pub count: usize,
}

impl Times {
    fn of(mut ms: Vec<f64>) -> Self {
        let median_ms = median(&mut ms);
        let (min_ms, max_ms) = (ms.first().copied().unwrap_or(0.0), ms.last().copied().unwrap_or(0.0));
        Self { median_ms, min_ms, max_ms, count: ms.len() }
    }
}

pub(super) fn measure(options: &Options, progress: &mut dyn FnMut(&str)) -> Result<(Plugin, Start)> {
    let mut cold_ms = None;
    if options.cold || options.cache.is_none() {
        progress("the start without a cache");
        let before = Instant::now();
        load(options, &PluginHost::new(None)?, 1)?;
        cold_ms = Some(ms(before));
    }
    progress("the start");
    // The first one may have to compile, and brings the file into the system's memory.
    let mut plugin = load(options, &PluginHost::new(options.cache.clone())?, 1)?;
    let (mut cached, mut parts) = (Vec::new(), Vec::new());
    let began = Instant::now();
    while options.cache.is_some() && goes_on(&cached, began) {
        let before = Instant::now();
        // A host of its own each time: as in a new process, nothing is kept but the cache's files.
        plugin = load(options, &PluginHost::new(options.cache.clone())?, 1)?;
        cached.push(ms(before));
        parts.push(plugin.load_times());
    }
    let mut open = Vec::new();
    let began = Instant::now();
    if let Some(reward) = &options.reward {
        while goes_on(&open, began) {
            let before = Instant::now();
            plugin.reward(reward, &options.settings)?;
            open.push(ms(before));
        }
    }
    let times = |ms: Vec<f64>| (!ms.is_empty()).then(|| Times::of(ms));
    Ok((plugin, Start { cold_ms, cached: times(cached), parts: middle(&parts), open: times(open) }))
}

/// The median of each part by itself.
fn middle(loads: &[LoadTimes]) -> Option<LoadTimes> {
    let of = |part: fn(&LoadTimes) -> f64| median(&mut loads.iter().map(part).collect::<Vec<_>>());
    (!loads.is_empty()).then(|| LoadTimes {
        read_ms: of(|load| load.read_ms),
        cached_ms: Some(of(|load| load.cached_ms.unwrap_or(0.0))),
        compile_ms: None,
        instantiate_ms: of(|load| load.instantiate_ms),
        describe_ms: of(|load| load.describe_ms),
    })
}

fn goes_on(done: &[f64], began: Instant) -> bool {
    done.len() < STARTS_MIN || done.len() < STARTS_MAX && began.elapsed() < STARTS_TIME
}

fn ms(before: Instant) -> f64 {
    before.elapsed().as_secs_f64() * 1e3
}
