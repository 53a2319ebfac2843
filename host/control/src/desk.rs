//! The controller and who sits where: all that is restored from the ledger.

use std::collections::{BTreeMap, BTreeSet};

use cosmos_controller::{Event, Role};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::machine::Machine;
use crate::supervisor::Report;

/// A replica.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Seat {
    pub role: Role,
    /// Sequence number of the event by which it joined: tells apart processes that had the same name.
    pub incarnation: u64,
    pub address: Option<String>,
    pub lost: bool,
}

/// The controller and who sits where.
pub(crate) struct Desk<M> {
    pub machine: M,
    pub seats: BTreeMap<String, Seat>,
    /// Number of the last event.
    pub seq: u64,
}

#[derive(Serialize, Deserialize)]
struct Snapshot {
    machine: Value,
    seats: BTreeMap<String, Seat>,
}

impl<M: Machine> Desk<M> {
    pub fn new(machine: M) -> Self {
        Self { machine, seats: BTreeMap::new(), seq: 0 }
    }

    /// Takes an event: the report that it is, and who got an order by it.
    ///
    /// # Errors
    /// Why the controller refuses it; but for the sequence number, nothing has changed.
    pub fn apply(
        &mut self,
        seq: u64,
        event: Event,
        payload: Value,
    ) -> Result<(Option<Report>, BTreeSet<String>), String> {
        self.seq = seq;
        let report = match &event {
            Event::Done { replica, order, outcome } => {
                let own = self.machine.order_of(replica).filter(|(id, _)| id == order);
                own.filter(|_| self.machine.is_wanted(replica)).map(|(id, order)| Report {
                    seq,
                    replica: replica.clone(),
                    id,
                    order,
                    outcome: outcome.clone(),
                    payload,
                })
            }
            _ => None,
        };
        let woken = self.machine.apply(event.clone())?.into_iter().collect();
        match event {
            Event::Joined { replica, role, address, .. } => {
                self.seats.insert(replica, Seat { role, incarnation: seq, address, lost: false });
            }
            Event::Lost { replica } => {
                if let Some(seat) = self.seats.get_mut(&replica) {
                    seat.lost = true;
                }
            }
            Event::Removed { replica } => {
                self.seats.remove(&replica);
            }
            Event::Resumed => self.seats.clear(),
            Event::Done { .. } | Event::Failed { .. } | Event::GoOnWithout { .. } | Event::StopRequested => {}
        }
        Ok((report, woken))
    }

    /// The state in full, if the machine's can be written down.
    pub fn snapshot(&self) -> Option<Value> {
        let snapshot = Snapshot { machine: self.machine.snapshot()?, seats: self.seats.clone() };
        serde_json::to_value(snapshot).ok()
    }

    /// Takes over a snapshot.
    pub fn restore(&mut self, seq: u64, state: Value) -> Result<(), String> {
        let snapshot: Snapshot = serde_json::from_value(state).map_err(|e| format!("not a snapshot: {e}"))?;
        self.machine.restore(&snapshot.machine)?;
        self.seats = snapshot.seats;
        self.seq = seq;
        Ok(())
    }
}
