//! Reports that cannot be true, and a bound on the time to the end.

use cosmos_controller::{ADDRESS_BYTES_MAX, Event, NAME_BYTES_MAX, Order, OrderId, Outcome, Role};

use crate::world::{Checked, RECOVERY_EVENTS, RECOVERY_MS, World};

impl World {
    /// Somebody who has got hold of the run's token says things that cannot be true. Nothing may come of it.
    pub fn be_hostile(&mut self) -> Checked {
        if !self.faulty() || !self.hostile.one_in(6) {
            return Ok(());
        }
        let index = self.hostile.below(self.processes.len() as u64) as usize;
        let (victim, role) = (self.processes[index].name.clone(), self.processes[index].role);
        let events = match self.hostile.below(4) {
            0 => self.false_joins(&victim, role),
            1 => self.false_reports(&victim),
            2 => self.wrong_answers(&victim),
            _ => flood(),
        };
        if self.core.is_over() {
            return Ok(());
        }
        let mut core = self.core.clone();
        for event in events {
            let said = format!("{event:?}");
            if let Ok(dispatches) = core.apply(event)
                && !dispatches.is_empty()
            {
                return Err(format!("{said} gave out orders: {dispatches:?}"));
            }
        }
        match core == self.core {
            true => Ok(()),
            false => Err(format!("a hostile report changed the controller: {:#?}", core.status())),
        }
    }

    fn false_joins(&mut self, victim: &str, role: Role) -> Vec<Event> {
        let join =
            |replica: String, role, address: Option<String>| Event::Joined { replica, role, holds: Some(1), address };
        let other = if role == Role::Policy { Role::Teacher } else { Role::Policy };
        let mut joins = vec![
            join(String::new(), Role::Policy, None),
            join("n".repeat(NAME_BYTES_MAX + 1), Role::Policy, None),
            join("new".into(), Role::Policy, Some("a".repeat(ADDRESS_BYTES_MAX + 1))),
        ];
        if self.core.status().replicas.iter().any(|r| r.name == victim) {
            joins.push(join(victim.to_string(), other, None));
        }
        joins
    }

    /// Orders of others, of other runs, and of nobody.
    fn false_reports(&mut self, victim: &str) -> Vec<Event> {
        let others = self.processes.iter().filter(|p| p.name != victim);
        let mut orders: Vec<OrderId> = others.filter_map(|p| Some(self.core.order_of(&p.name)?.0)).collect();
        orders.extend([OrderId(0), OrderId(1 << 60), OrderId(u64::MAX)]);
        let gone = Outcome::SamplesGone { samples: vec![0, 1] };
        let all = [
            Outcome::Trained,
            Outcome::Loaded,
            Outcome::Saved,
            Outcome::Validated,
            Outcome::WeightsGone,
            Outcome::StateGone,
            gone,
        ];
        let mut events = Vec::new();
        for order in orders {
            for replica in [victim, "nobody", ""] {
                let replica = replica.to_string();
                let outcomes = all.iter().cloned();
                events.extend(outcomes.map(|outcome| Event::Done { replica: replica.clone(), order, outcome }));
                events.push(Event::Failed { replica, order, reason: "so there".into() });
            }
        }
        events
    }

    /// The right order, but an answer that is none.
    fn wrong_answers(&mut self, victim: &str) -> Vec<Event> {
        let Some((id, order)) = self.core.order_of(victim).map(|(id, order)| (id, order.clone())) else {
            return Vec::new();
        };
        let n = self.setup.plan.n_generation;
        let generated = |samples: Vec<u64>| Outcome::Generated { samples };
        let wrong = match order {
            Order::Generate { prompts, only, .. } => {
                let mut asked: Vec<u64> = match only.is_empty() {
                    true => prompts.iter().flat_map(|p| p * n..p * n + n).collect(),
                    false => only,
                };
                let (first, last) = (asked[0], asked[asked.len() - 1]);
                let mut wrong =
                    vec![generated(vec![last + 1]), generated(vec![u64::MAX]), generated(vec![first, first])];
                if first > 0 {
                    wrong.push(generated(vec![first - 1]));
                }
                if asked.len() > 1 {
                    asked.reverse();
                    wrong.push(generated(asked));
                }
                wrong.extend([Outcome::Trained, Outcome::Loaded, Outcome::Validated]);
                wrong
            }
            Order::Train { share, .. } => {
                let beyond = share.last().map_or(0, |s| s.sample + 1);
                vec![
                    Outcome::SamplesGone { samples: vec![beyond] },
                    Outcome::StateGone,
                    Outcome::Loaded,
                    Outcome::WeightsGone,
                    Outcome::Saved,
                ]
            }
            Order::Load { step: 1.., publish: false, .. } => {
                vec![Outcome::Trained, Outcome::Saved, Outcome::WeightsGone]
            }
            Order::Load { .. } => vec![Outcome::Trained, Outcome::Saved, Outcome::WeightsGone, Outcome::StateGone],
            Order::Save { .. } => {
                vec![Outcome::Loaded, Outcome::Unpublished, Outcome::SamplesGone { samples: Vec::new() }]
            }
            Order::Validate { .. } => vec![Outcome::Loaded, generated(vec![0]), Outcome::Trained],
            Order::Leave | Order::Finish => vec![Outcome::Trained, Outcome::Loaded, Outcome::Saved],
        };
        wrong.into_iter().map(|outcome| Event::Done { replica: victim.to_string(), order: id, outcome }).collect()
    }

    /// Once nothing goes wrong any more, the run ends within what it takes to find out what is gone and to do all of it
    /// again, by one replica of each role where there were several.
    pub fn check_liveness(&self, calm: &World) -> Checked {
        let Some(since) = self.faults_ended else { return Ok(()) };
        let alone = if self.group_changed || self.setup.rollouts > 1 {
            self.setup.plan.policy_replicas * self.setup.rollouts
        } else {
            1
        };
        let (ms, events) = (self.now - since, self.events_after_faults);
        let (ms_max, events_max) = (RECOVERY_MS + 2 * alone * calm.now, RECOVERY_EVENTS + 2 * alone * calm.events);
        if ms > ms_max || events > events_max {
            return Err(format!(
                "{ms} ms and {events} events after the last fault, more than {ms_max} and {events_max}"
            ));
        }
        Ok(())
    }
}

/// Many who come and go.
fn flood() -> Vec<Event> {
    let name = |i: u64| format!("flood-{i}");
    let join = |i| Event::Joined { replica: name(i), role: Role::Teacher, holds: None, address: None };
    (0..40).map(join).chain((0..40).map(|i| Event::Removed { replica: name(i) })).collect()
}
