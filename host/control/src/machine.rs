//! What the endpoint needs of a controller.

use cosmos_controller::{Controller, Event, Order, OrderId};
use serde_json::Value;

/// How a run ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ending {
    /// All steps are made.
    Done,
    /// It was saved, to be resumed.
    Saved,
    /// It gave up: going on would have led nowhere.
    GaveUp,
}

/// A controller: a pure function of the events so far.
pub trait Machine: Send + 'static {
    /// Takes an event; who has a new order by it. The same events in the same order give the same orders.
    ///
    /// # Errors
    /// Why the event cannot be true; nothing has changed.
    fn apply(&mut self, event: Event) -> std::result::Result<Vec<String>, String>;

    /// What the replica is to do at the moment, as the controller sees it.
    fn order_of(&self, replica: &str) -> Option<(OrderId, Order)>;

    /// Whether the result of what the replica is doing still counts.
    fn is_wanted(&self, replica: &str) -> bool;

    /// Its state, for a shorter ledger; none if it cannot be written down.
    fn snapshot(&self) -> Option<Value>;

    /// Takes over what [`snapshot`](Self::snapshot) gave; the reason if that is impossible.
    fn restore(&mut self, snapshot: &Value) -> std::result::Result<(), String>;

    /// How the run ended, once nothing more is to be done but to send everybody home.
    fn ending(&self) -> Option<Ending>;

    /// Policies that were planned, have not joined and are still waited for.
    fn policies_missing(&self) -> u64;

    /// Whether somebody has asked to save and leave.
    fn is_stopping(&self) -> bool;

    /// Numbers for people: steps, samples and the like.
    fn summary(&self) -> Value;
}

impl Machine for Controller {
    fn apply(&mut self, event: Event) -> std::result::Result<Vec<String>, String> {
        let dispatched = Controller::apply(self, event).map_err(|refused| refused.to_string())?;
        Ok(dispatched.into_iter().map(|dispatch| dispatch.replica).collect())
    }

    fn order_of(&self, replica: &str) -> Option<(OrderId, Order)> {
        Controller::order_of(self, replica).map(|(id, order)| (id, order.clone()))
    }

    fn is_wanted(&self, replica: &str) -> bool {
        Controller::is_wanted(self, replica)
    }

    fn snapshot(&self) -> Option<Value> {
        serde_json::to_value(self).ok()
    }

    fn restore(&mut self, snapshot: &Value) -> std::result::Result<(), String> {
        *self = serde_json::from_value(snapshot.clone()).map_err(|e| format!("not a controller's state: {e}"))?;
        Ok(())
    }

    fn ending(&self) -> Option<Ending> {
        self.is_over().then(|| match (self.gave_up(), self.was_stopped()) {
            (true, _) => Ending::GaveUp,
            (false, true) => Ending::Saved,
            (false, false) => Ending::Done,
        })
    }

    fn policies_missing(&self) -> u64 {
        Controller::policies_missing(self)
    }

    fn is_stopping(&self) -> bool {
        Controller::is_stopping(self)
    }

    fn summary(&self) -> Value {
        let mut summary = serde_json::to_value(self.status()).unwrap_or_default();
        // The endpoint knows more of them: when they were heard from, and what they say of themselves.
        if let Some(summary) = summary.as_object_mut() {
            summary.remove("replicas");
        }
        summary
    }
}
