//! Which of the plugins' offers a name in the configuration means.

use cosmos_config::nearest;
use serde::Serialize;

/// What a dataset or reward is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OfferRole {
    /// Training.
    Train,
    /// Validation.
    Validation,
    /// Leaving out groups that teach nothing.
    Filter,
}

impl OfferRole {
    /// As plugins write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "validation",
            Self::Filter => "filter",
        }
    }

    /// As sentences say it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Train => "training",
            Self::Validation => "validation",
            Self::Filter => "filter",
        }
    }
}

/// A dataset or reward of a loaded plugin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offered {
    /// Index of the plugin.
    pub plugin: usize,
    /// Name that the plugin gives itself.
    pub plugin_name: String,
    /// Its file without the extension, which names it too.
    pub stem: String,
    /// Name of the dataset or reward.
    pub name: String,
    /// `train`, `validation` or `filter`.
    pub role: String,
}

impl Offered {
    /// `plugin/offer`.
    pub fn full(&self) -> String {
        format!("{}/{}", self.plugin_name, self.name)
    }

    fn same(&self, other: &Self) -> bool {
        self.plugin == other.plugin && self.name == other.name
    }
}

/// Why a name means nothing, or too much.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Miss {
    /// Nothing is called so.
    Unknown {
        /// What is called almost so.
        nearest: Option<String>,
        /// All that is offered.
        offered: Vec<String>,
    },
    /// Several things are.
    Ambiguous {
        /// Them, in full.
        choices: Vec<String>,
    },
}

/// The offer that `reference` names: `plugin/offer`, an offer's name, or the name of a plugin with one offer for `role`.
/// An offer for another role is found too: who writes its name wants that one.
pub fn find<'a>(all: &'a [Offered], role: OfferRole, reference: &str) -> Result<&'a Offered, Miss> {
    let called = |o: &Offered, name: &str| o.plugin_name == name;
    // A file's name counts where no plugin calls itself so.
    let filed = |o: &Offered, name: &str| o.stem == name && !all.iter().any(|other| called(other, name));
    let mut found: Vec<&Offered> = all.iter().filter(|o| o.full() == reference).collect();
    if found.is_empty() {
        let in_file = |o: &&Offered| filed(o, &o.stem) && format!("{}/{}", o.stem, o.name) == reference;
        found = all.iter().filter(in_file).collect();
    }
    if found.is_empty() {
        let of_plugin = |o: &&Offered| (called(o, reference) || filed(o, reference)) && o.role == role.name();
        found = all.iter().filter(|o| o.name == reference).chain(all.iter().filter(of_plugin)).collect();
    }
    let mut distinct: Vec<&Offered> = Vec::new();
    for offer in found {
        match distinct.iter_mut().find(|o| o.same(offer)) {
            Some(known) if offer.role == role.name() => *known = offer,
            Some(_) => {}
            None => distinct.push(offer),
        }
    }
    match distinct.as_slice() {
        [one] => Ok(one),
        [] => {
            let offered = full_names(all.iter());
            let near = nearest(reference, offered.iter().map(String::as_str))
                .or_else(|| nearest(reference, all.iter().map(|o| o.name.as_str())));
            Err(Miss::Unknown { nearest: near.map(str::to_string), offered })
        }
        several => Err(Miss::Ambiguous { choices: full_names(several.iter().copied()) }),
    }
}

/// The only offer for `role`, or none; several are the error.
pub fn only(all: &[Offered], role: OfferRole) -> Result<Option<&Offered>, Vec<String>> {
    let fitting: Vec<&Offered> = all.iter().filter(|o| o.role == role.name()).collect();
    match fitting.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(one)),
        several => Err(full_names(several.iter().copied())),
    }
}

fn full_names<'a>(offers: impl Iterator<Item = &'a Offered>) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for name in offers.map(Offered::full) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// Names between backticks, for messages.
pub fn quoted(names: &[String]) -> String {
    names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offers() -> Vec<Offered> {
        let offer = |plugin, plugin_name: &str, stem: &str, name: &str, role: &str| Offered {
            plugin,
            plugin_name: plugin_name.into(),
            stem: stem.into(),
            name: name.into(),
            role: role.into(),
        };
        vec![
            offer(0, "countdown", "countdown", "countdown", "train"),
            offer(0, "countdown", "countdown", "countdown", "validation"),
            offer(1, "math", "deepmath", "zero", "train"),
            offer(1, "math", "deepmath", "math", "validation"),
            offer(2, "form", "form", "length", "train"),
            offer(2, "form", "form", "tags", "train"),
            offer(3, "other", "other", "length", "filter"),
        ]
    }

    #[test]
    fn a_name_is_found_by_each_of_its_forms() {
        let all = offers();
        let found = |role, name: &str| find(&all, role, name).map(|o| (o.full(), o.role.clone())).unwrap();
        let pair = |a: &str, b: &str| (a.to_string(), b.to_string());
        assert_eq!(found(OfferRole::Train, "countdown"), pair("countdown/countdown", "train"));
        assert_eq!(found(OfferRole::Validation, "countdown"), pair("countdown/countdown", "validation"));
        assert_eq!(found(OfferRole::Train, "tags"), pair("form/tags", "train"));
        assert_eq!(found(OfferRole::Train, "form/length"), pair("form/length", "train"));
        // By its file, and for another role than it was offered for.
        assert_eq!(found(OfferRole::Train, "deepmath/math"), pair("math/math", "validation"));
        assert_eq!(found(OfferRole::Train, "deepmath"), pair("math/zero", "train"));
        assert_eq!(found(OfferRole::Filter, "other"), pair("other/length", "filter"));
    }

    #[test]
    fn what_is_unclear_lists_the_choices() {
        let all = offers();
        let choices = |role, name: &str| match find(&all, role, name).unwrap_err() {
            Miss::Ambiguous { choices } => choices,
            other => panic!("{other:?}"),
        };
        assert_eq!(choices(OfferRole::Train, "length"), ["form/length", "other/length"]);
        assert_eq!(choices(OfferRole::Train, "form"), ["form/length", "form/tags"]);
        // The plugin's only training reward, and the reward of that name.
        assert_eq!(choices(OfferRole::Train, "math"), ["math/math", "math/zero"]);
        let Miss::Unknown { nearest, offered } = find(&all, OfferRole::Train, "form/lenght").unwrap_err() else {
            panic!("it is offered nowhere")
        };
        assert_eq!((nearest.as_deref(), offered.len()), (Some("form/length"), 6));
        assert!(matches!(find(&all, OfferRole::Train, "gsm8k"), Err(Miss::Unknown { nearest: None, .. })));
    }

    #[test]
    fn the_only_one_of_a_role() {
        let all = offers();
        assert_eq!(only(&all, OfferRole::Filter).unwrap().unwrap().full(), "other/length");
        assert_eq!(only(&all, OfferRole::Train).unwrap_err().len(), 4);
        assert_eq!(only(&[], OfferRole::Train), Ok(None));
    }
}
