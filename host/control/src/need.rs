//! Whom a run cannot go on without.

use std::fmt;
use std::sync::Arc;

use cosmos_controller::Role;

/// A role, or some of its replicas, of which the run needs one at least.
#[derive(Clone)]
pub struct Need {
    role: Role,
    /// For messages, as `teacher of `math``.
    pub(crate) called: String,
    is_one: Option<Arc<dyn Fn(&str) -> bool + Send + Sync>>,
}

impl Need {
    /// Some of a role, `called` so in messages: those whose names `is_one` knows. It must always say the same of a name.
    pub fn some_of(role: Role, called: &str, is_one: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        Self { role, called: called.to_owned(), is_one: Some(Arc::new(is_one)) }
    }

    pub(crate) fn is_met_by(&self, role: Role, replica: &str) -> bool {
        role == self.role && self.is_one.as_ref().is_none_or(|is_one| is_one(replica))
    }
}

impl From<Role> for Need {
    /// Any replica of the role.
    fn from(role: Role) -> Self {
        Self { role, called: role.name().to_owned(), is_one: None }
    }
}

impl fmt::Debug for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Need({})", self.called)
    }
}
