//! Controller, endpoint and clients together, over real HTTP.

mod faults;
mod hostile;
mod ledger;
mod life;
mod real;

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use cosmos_controller::{Event, Order, OrderId, Role};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::machine::{Ending, Machine};
use crate::{Client, ClientOptions, Deadlines, Endpoint, EndpointOptions, Identity, Report, Target, Turn};

/// A machine small enough to see through: hands out `total` prompts one by one to the rollouts, each until it is done, and
/// then sends everybody home.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rounds {
    left: VecDeque<u64>,
    done: Vec<u64>,
    total: u64,
    free: Vec<String>,
    orders: BTreeMap<String, (OrderId, Order)>,
    next: u64,
    stopping: bool,
    pub missing: u64,
}

impl Rounds {
    pub fn new(total: u64) -> Self {
        Self {
            left: (0..total).collect(),
            done: Vec::new(),
            total,
            free: Vec::new(),
            orders: BTreeMap::new(),
            next: 0,
            stopping: false,
            missing: 0,
        }
    }

    fn release(&mut self, replica: &str) {
        self.free.retain(|name| name != replica);
        if let Some((_, Order::Generate { prompts, .. })) = self.orders.remove(replica) {
            prompts.into_iter().for_each(|prompt| self.left.push_front(prompt));
        }
    }

    fn give(&mut self) -> Vec<String> {
        let mut given = Vec::new();
        let over = self.is_over();
        for replica in std::mem::take(&mut self.free) {
            let order = if over {
                if self.stopping { Order::Leave } else { Order::Finish }
            } else if let Some(prompt) = self.left.pop_front() {
                Order::Generate { prompts: vec![prompt], only: Vec::new(), version: 0 }
            } else {
                self.free.push(replica);
                continue;
            };
            let id = OrderId(self.next);
            self.next += 1;
            self.orders.insert(replica.clone(), (id, order));
            given.push(replica);
        }
        given
    }

    fn is_over(&self) -> bool {
        self.stopping || self.done.len() as u64 == self.total
    }
}

impl Machine for Rounds {
    fn apply(&mut self, event: Event) -> Result<Vec<String>, String> {
        match event {
            Event::Joined { replica, .. } => {
                self.release(&replica);
                self.free.push(replica);
            }
            Event::Lost { replica } | Event::Removed { replica } => self.release(&replica),
            Event::Done { replica, order, .. } => {
                if self.orders.get(&replica).is_some_and(|(id, _)| *id == order)
                    && let Some((_, Order::Generate { prompts, .. })) = self.orders.remove(&replica)
                {
                    self.done.extend(prompts);
                    self.free.push(replica);
                }
            }
            Event::Failed { order: OrderId(u64::MAX), .. } => return Err("there is no such order".into()),
            Event::Failed { replica, order, .. } => {
                if self.orders.get(&replica).is_some_and(|(id, _)| *id == order) {
                    self.release(&replica);
                    self.free.push(replica);
                }
            }
            Event::GoOnWithout { policies } => self.missing = self.missing.saturating_sub(policies),
            Event::StopRequested => self.stopping = true,
            Event::Resumed => {
                let names: Vec<String> = self.orders.keys().cloned().collect();
                names.iter().for_each(|name| self.release(name));
                self.free.clear();
                self.stopping = false;
            }
        }
        Ok(self.give())
    }

    fn order_of(&self, replica: &str) -> Option<(OrderId, Order)> {
        self.orders.get(replica).cloned()
    }

    fn is_wanted(&self, replica: &str) -> bool {
        self.orders.contains_key(replica)
    }

    fn snapshot(&self) -> Option<Value> {
        serde_json::to_value(self).ok()
    }

    fn restore(&mut self, snapshot: &Value) -> Result<(), String> {
        *self = serde_json::from_value(snapshot.clone()).map_err(|e| e.to_string())?;
        Ok(())
    }

    fn ending(&self) -> Option<Ending> {
        self.is_over().then_some(if self.stopping { Ending::Saved } else { Ending::Done })
    }

    fn policies_missing(&self) -> u64 {
        self.missing
    }

    fn is_stopping(&self) -> bool {
        self.stopping
    }

    fn summary(&self) -> Value {
        let mut summary = json!({"done": self.done.len(), "total": self.total});
        if self.missing > 0 {
            summary["missing"] = self.missing.into();
        }
        summary
    }
}

pub fn identity() -> Identity {
    Identity { config: [("train.seed".into(), "1".into())].into(), plugins: BTreeMap::new(), version: "1".into() }
}

pub fn options(folder: &Path) -> EndpointOptions {
    EndpointOptions {
        address: ([127, 0, 0, 1], 0).into(),
        token: None,
        run_folder: folder.into(),
        identity: identity(),
        info: json!({"broker": "here"}),
        needs: Vec::new(),
        reopen: false,
        deadlines: Deadlines::default(),
    }
}

pub fn start(folder: &Path, total: u64) -> (Endpoint, mpsc::Receiver<Report>) {
    Endpoint::start(options(folder), Rounds::new(total)).unwrap()
}

pub fn client(folder: &Path, name: &str) -> Client {
    client_as(folder, name, Role::Rollout)
}

pub fn client_as(folder: &Path, name: &str, role: Role) -> Client {
    let target = Target::Run(folder.into());
    Client::new(ClientOptions { target, replica: name.into(), role, wait_ms_max: 20_000 }).unwrap()
}

/// The next order; the test's own deadline is far away and names nobody because there is nobody to blame but the test.
pub fn order(client: &Client) -> (OrderId, Order) {
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(60) {
        match client.next(1_000).unwrap() {
            Turn::Order(id, order) => return (id, order),
            Turn::Idle => {}
            Turn::Rejoin => panic!("`{}` has to join again", client.replica()),
        }
    }
    panic!("no order for `{}`", client.replica())
}

pub fn prompt_of(order: &Order) -> u64 {
    match order {
        Order::Generate { prompts, .. } => prompts[0],
        other => panic!("{other:?} is not Generate"),
    }
}

/// Waits for something that has to happen.
pub fn until(what: &str, mut happened: impl FnMut() -> bool) {
    let started = Instant::now();
    while !happened() {
        assert!(started.elapsed() < Duration::from_secs(60), "{what} has not happened");
        std::thread::sleep(Duration::from_millis(5));
    }
}
