//! Which datasets and rewards of the plugins a configuration asks for. Everything that is unknown or unclear is refused
//! here, with its place, before anything is opened.

use std::collections::BTreeMap;

use cosmos_config::{DatasetNames, OneOrMany, Resolved};

use crate::error::{Result, RunError};
use crate::mixture::Part;
use crate::offers::{Miss, OfferRole, Offered, find, only, quoted};
use crate::plugins::{Plugins, text_of};

/// Rewards that are built into the original. Its configurations name them though the reward comes from a plugin here.
const BUILT_IN: [&str; 6] = ["direct_math", "boxed_math", "single_choice", "gsm8k", "format", "overlong"];
/// Stands for the columns of a table where plugins offer datasets too.
const COLUMNS: &str = "columns";
/// The original's default, which asks for nothing in particular.
const NOT_GIVEN: &str = "single_choice";

/// A reward in a sum.
#[derive(Debug, Clone, PartialEq)]
pub struct Weighted {
    /// Which one.
    pub offered: Offered,
    /// Its factor.
    pub weight: f64,
}

/// The datasets for `role`, with weights where they are mixed by weight. `None`: the columns of a table, since no plugin
/// offers one and none is named, or since `columns` is.
pub fn datasets(
    resolved: &Resolved,
    plugins: &Plugins,
    role: OfferRole,
) -> Result<Option<Vec<(Offered, Option<f64>)>>> {
    let host = &resolved.config.host;
    let (key, names) = match role {
        OfferRole::Validation => {
            let names = host.validation_dataset.as_ref().map(|names| match names {
                OneOrMany::One(name) => vec![(name.as_str(), None)],
                OneOrMany::Many(names) => names.iter().map(|name| (name.as_str(), None)).collect(),
            });
            ("validation_dataset", names)
        }
        _ => ("train_dataset", host.train_dataset.as_ref().map(DatasetNames::entries)),
    };
    let all = plugins.datasets();
    let Some(names) = names else {
        return match only(&all, role) {
            Ok(found) => Ok(found.map(|one| vec![(one.clone(), None)])),
            Err(choices) => Err(RunError::config(
                "",
                format!("the plugins offer several {} datasets: {}", role.word(), quoted(&choices)),
                format!("name one: `[host] {key} = \"{}\"`", choices[0]),
            )),
        };
    };
    let path = ["host", key];
    let place = |name: &str| text_of(resolved.place_of_name(&path, name));
    if names.is_empty() {
        let place = text_of(resolved.nearest_place(&path));
        return Err(RunError::config(place, format!("`host.{key}` names no dataset"), "name one, or leave it out"));
    }
    let means_columns = |name: &str| name == COLUMNS && matches!(find(&all, role, name), Err(Miss::Unknown { .. }));
    if names.iter().any(|(name, _)| means_columns(name)) {
        if names.len() == 1 {
            return Ok(None);
        }
        return Err(RunError::config(
            place(COLUMNS),
            format!("`host.{key}` names `{COLUMNS}` beside datasets of plugins"),
            "name the columns alone, or datasets of plugins alone",
        ));
    }
    let mut chosen: Vec<(Offered, Option<f64>)> = Vec::new();
    for (name, weight) in names {
        let offered = find(&all, role, name)
            .map_err(|miss| refused(place(name), &format!("host.{key}"), "dataset", name, miss))?;
        if chosen.iter().any(|(other, _)| other.plugin == offered.plugin && other.name == offered.name) {
            return Err(RunError::config(
                place(name),
                format!("`host.{key}` names the dataset `{}` twice", offered.full()),
                "use a table of weights to take more of one dataset",
            ));
        }
        if let Some(weight) = weight.filter(|w| !(w.is_finite() && *w > 0.0)) {
            return Err(RunError::config(
                place(name),
                format!("the weight of `{name}` in `host.{key}` is {weight}, but it must be above 0"),
                "leave the dataset out to take nothing of it",
            ));
        }
        chosen.push((offered.clone(), weight));
    }
    Ok(Some(chosen))
}

/// What a role's rewards are when no dataset has its own.
#[derive(Debug, Clone, PartialEq)]
pub enum Common {
    /// These, possibly none.
    Terms(Vec<Weighted>),
    /// Nothing was named and several would fit.
    Unclear(Vec<String>),
}

/// The training rewards of the configuration.
pub fn training_rewards(resolved: &Resolved, plugins: &Plugins) -> Result<Common> {
    let all = plugins.rewards();
    let named = match resolved.config.train.train_policy.grpo() {
        Some(grpo) => {
            let path = ["train", "train_policy", "reward_function"];
            named(resolved, &all, &path, &grpo.reward_function, OfferRole::Train)?
        }
        None => None,
    };
    Ok(match named {
        Some(terms) => Common::Terms(terms),
        None => the_only_one(&all, OfferRole::Train),
    })
}

/// The validation rewards of the configuration: its own, else the plugins', else those of training.
pub fn validation_rewards(resolved: &Resolved, plugins: &Plugins) -> Result<Common> {
    let all = plugins.rewards();
    let names = &resolved.config.validation.reward_function;
    let path = ["validation", "reward_function"];
    if let Some(terms) = named(resolved, &all, &path, names, OfferRole::Validation)? {
        return Ok(Common::Terms(terms));
    }
    match the_only_one(&all, OfferRole::Validation) {
        Common::Terms(none) if none.is_empty() => training_rewards(resolved, plugins),
        found => Ok(found),
    }
}

fn the_only_one(all: &[Offered], role: OfferRole) -> Common {
    match only(all, role) {
        Ok(found) => {
            Common::Terms(found.map(|one| Weighted { offered: one.clone(), weight: 1.0 }).into_iter().collect())
        }
        Err(choices) => Common::Unclear(choices),
    }
}

/// The rewards that a key names; `None` when it asks for nothing in particular.
fn named(
    resolved: &Resolved,
    all: &[Offered],
    path: &[&str],
    names: &BTreeMap<String, f64>,
    role: OfferRole,
) -> Result<Option<Vec<Weighted>>> {
    let key = path.join(".");
    let unclaimed = |name: &str| BUILT_IN.contains(&name) && matches!(find(all, role, name), Err(Miss::Unknown { .. }));
    if names.is_empty() || (names.len() == 1 && names.contains_key(NOT_GIVEN) && unclaimed(NOT_GIVEN)) {
        return Ok(None);
    }
    if names.keys().all(|name| unclaimed(name)) {
        return stand_in(resolved, all, path, names, role);
    }
    let mut terms: Vec<Weighted> = Vec::new();
    for (name, weight) in names {
        let place = || text_of(resolved.place_of_name(path, name));
        let offered = find(all, role, name).map_err(|miss| refused(place(), &key, "reward", name, miss))?;
        if !weight.is_finite() {
            return Err(RunError::config(place(), format!("the weight of `{name}` in `{key}` is {weight}"), ""));
        }
        if terms.iter().any(|t| t.offered.plugin == offered.plugin && t.offered.name == offered.name) {
            let message = format!("`{key}` names the reward `{}` twice", offered.full());
            return Err(RunError::config(place(), message, "give it one weight"));
        }
        terms.push(Weighted { offered: offered.clone(), weight: *weight });
    }
    Ok(Some(terms))
}

/// Names of the original's own rewards stand for the only reward that the plugins offer.
fn stand_in(
    resolved: &Resolved,
    all: &[Offered],
    path: &[&str],
    names: &BTreeMap<String, f64>,
    role: OfferRole,
) -> Result<Option<Vec<Weighted>>> {
    let key = path.join(".");
    let written: Vec<String> = names.keys().cloned().collect();
    let place = || text_of(written.first().and_then(|name| resolved.place_of_name(path, name)));
    let (own, quoted_names) = ("built into the original and offered by no plugin", quoted(&written));
    match only(all, role) {
        Ok(Some(one)) => {
            tracing::warn!(
                "{}`{key}` names {quoted_names}, {own}: `{}`, the plugins' only {} reward, takes the place",
                place(),
                one.full(),
                role.word()
            );
            Ok(Some(vec![Weighted { offered: one.clone(), weight: 1.0 }]))
        }
        Ok(None) => {
            tracing::warn!(
                "{}`{key}` names {quoted_names}, {own}; the plugins have no {} reward in its place",
                place(),
                role.word()
            );
            Ok(None)
        }
        Err(choices) => Err(RunError::config(
            place(),
            format!("`{key}` names {quoted_names}, {own}, and several could take the place: {}", quoted(&choices)),
            format!("name one: `{key} = \"{}\"`", choices[0]),
        )),
    }
}

/// How groups are filtered.
#[derive(Debug, Clone, PartialEq)]
pub enum Filter {
    /// By the training reward itself.
    Total,
    /// By the sum of these.
    Terms(Vec<Offered>),
}

/// The filter that the configuration asks for.
pub fn filter(resolved: &Resolved, plugins: &Plugins) -> Result<Option<Filter>> {
    let Some(grpo) = resolved.config.train.train_policy.grpo() else { return Ok(None) };
    let path = ["train", "train_policy", "filter_reward_metric"];
    let key = path.join(".");
    let names: BTreeMap<String, f64> = grpo.filter_reward_metric.iter().map(|name| (name.clone(), 1.0)).collect();
    let several = resolved.config.rollout.n_generation > 1;
    if names.is_empty() {
        let by_variant = grpo.variant == cosmos_config::Variant::Dapo && several && !grpo.bypass_reward;
        return Ok(by_variant.then_some(Filter::Total));
    }
    let place = text_of(resolved.nearest_place(&path));
    let terms = named(resolved, &plugins.rewards(), &path, &names, OfferRole::Filter)?;
    if grpo.bypass_reward {
        tracing::warn!("{place}`{key}` is not used: rewards are bypassed (`train.train_policy.bypass_reward`)");
        return Ok(None);
    }
    if !several {
        return Err(RunError::config(
            place,
            format!("`{key}` compares the completions of a prompt, but `rollout.n_generation` is 1"),
            "raise `rollout.n_generation`, or leave the filter out",
        ));
    }
    Ok(Some(match terms {
        Some(terms) => Filter::Terms(terms.into_iter().map(|t| t.offered).collect()),
        None => Filter::Total,
    }))
}

/// The rewards of each dataset in `parts`: those of `host.rewards`, else the common ones. Empty lists: none at all.
pub fn routes(
    resolved: &Resolved,
    plugins: &Plugins,
    parts: &[Part],
    common: Common,
    role: OfferRole,
) -> Result<Vec<Vec<Weighted>>> {
    let (datasets, rewards) = (plugins.datasets(), plugins.rewards());
    let mut own: Vec<Option<Vec<Weighted>>> = vec![None; parts.len()];
    for (name, weights) in &resolved.config.host.rewards {
        let place = text_of(resolved.place_of_name(&["host", "rewards"], name));
        let offered = find(&datasets, role, name)
            .map_err(|miss| refused(place.clone(), "host.rewards", "dataset", name, miss))?;
        let path = ["host", "rewards", name.as_str()];
        let Some(terms) = named(resolved, &rewards, &path, &weights.weights, role)? else {
            let message = format!("`host.rewards` names no reward of a plugin for `{name}`");
            return Err(RunError::config(place, message, "name one, or leave the line out"));
        };
        let is_it =
            |part: &Part| part.offered.as_ref().is_some_and(|o| o.plugin == offered.plugin && o.name == offered.name);
        if let Some(index) = parts.iter().position(is_it) {
            own[index] = Some(terms);
        }
    }
    let missing = parts.iter().zip(&own).find(|(_, own)| own.is_none()).map(|(part, _)| part);
    let terms = match (common, missing) {
        (_, None) => Vec::new(),
        (Common::Terms(terms), Some(part)) => {
            if terms.is_empty() && own.iter().any(Option::is_some) {
                return Err(RunError::config(
                    text_of(resolved.nearest_place(&["host", "rewards"])),
                    format!("the dataset `{}` has no {} reward", part.name, role.word()),
                    format!("add `[host.rewards] \"{}\" = …`", part.name),
                ));
            }
            terms
        }
        (Common::Unclear(choices), Some(part)) => {
            let (table, key) = match role {
                OfferRole::Validation => ("validation", "reward_function"),
                _ => ("train.train_policy", "reward_function"),
            };
            let per_dataset = match parts.len() {
                1 => String::new(),
                _ => format!(", or one for each dataset: `[host.rewards] \"{}\" = \"{}\"`", part.name, choices[0]),
            };
            return Err(RunError::config(
                "",
                format!("the plugins offer several {} rewards: {}", role.word(), quoted(&choices)),
                format!("name one, or several with weights: `[{table}] {key} = \"{}\"`{per_dataset}", choices[0]),
            ));
        }
    };
    Ok(own.into_iter().map(|own| own.unwrap_or_else(|| terms.clone())).collect())
}

/// A name that means nothing, or too much.
fn refused(place: String, key: &str, kind: &str, name: &str, miss: Miss) -> RunError {
    match miss {
        Miss::Unknown { nearest, offered } => {
            let near = nearest.map(|n| format!("did you mean `{n}`? ")).unwrap_or_default();
            let offered = match offered.as_slice() {
                [] => format!("the plugins offer no {kind} at all; pass one that does with `--plugin FILE.wasm`"),
                names => format!("the plugins offer {}", quoted(names)),
            };
            RunError::config(place, format!("`{key}` names `{name}`, a {kind} that no plugin offers"), near + &offered)
        }
        Miss::Ambiguous { choices } => RunError::config(
            place,
            format!("`{key}` names `{name}`, which may be any of {}", quoted(&choices)),
            format!("write it in full, such as `{}`", choices[0]),
        ),
    }
}
