//! What goes wrong at large: who is killed, cut off, taken out; what the store and the disk forget.

use cosmos_controller::{Event, Order, Role};

use crate::process::Process;
use crate::world::{Action, Checked, HEARTBEATS_MS, World};

impl World {
    pub fn kill(&mut self, index: usize) {
        let process = &mut self.processes[index];
        if !process.alive {
            return;
        }
        process.alive = false;
        let (life, name) = (process.life, process.name.clone());
        self.note(|| format!("killed {name}"));
        self.after(HEARTBEATS_MS, Action::MissedHeartbeats(index, life));
        let delay = 20 + self.chance.below(800);
        self.after(delay, Action::Restart(index));
    }

    pub fn mishap(&mut self) -> Checked {
        if !self.faulty() {
            return Ok(());
        }
        let index = self.chance.below(self.processes.len() as u64) as usize;
        match self.chance.below(19) {
            0..=4 => self.kill(index),
            5 | 6 => {
                let ms = self.chance.below(900);
                let process = &mut self.processes[index];
                process.cut_off_until = self.now + ms;
                let life = process.life;
                self.after(HEARTBEATS_MS, Action::MissedHeartbeats(index, life));
            }
            7 | 8 if self.up => {
                self.up = false;
                let ms = self.chance.below(500);
                self.after(ms, Action::ControllerStarts);
            }
            9 => {
                self.store_kept = false;
                self.store.clear();
                self.requests.clear();
                self.answers.clear();
            }
            16 => {
                self.requests.clear();
                self.answers.clear();
            }
            17 => self.answers.clear(),
            10 => self.published.clear(),
            11 if self.up => {
                let replica = self.processes[index].name.clone();
                self.apply(Event::Lost { replica })?;
            }
            12 if self.faults.membership && self.processes.len() < 16 => {
                let role = [Role::Policy, Role::Rollout, Role::Teacher][self.chance.below(3) as usize];
                self.group_changed |= role == Role::Policy;
                self.add(role);
            }
            13 if self.faults.membership && self.up => {
                let finishes = |p: &Process| matches!(self.core.order_of(&p.name), Some((_, Order::Finish)));
                let finishing = self.processes.iter().position(|p| p.role == Role::Policy && finishes(p));
                self.remove(finishing.unwrap_or(index))?;
            }
            14 if self.faults.stops && self.up && !self.stopped_once => {
                self.stopped_once = true;
                self.apply(Event::StopRequested)?;
            }
            15 => {
                let role = self.processes[index].role;
                let all: Vec<usize> = (0..self.processes.len()).filter(|&i| self.processes[i].role == role).collect();
                all.into_iter().for_each(|i| self.kill(i));
            }
            18 if !self.faults.stops && !self.resumed => self.tear(),
            _ => {}
        }
        let pause = 1 + self.chance.below(2 * self.faults.mishap_every);
        self.after(pause, Action::Mishap);
        Ok(())
    }

    /// One for which there is another is taken out of the run.
    fn remove(&mut self, index: usize) -> Checked {
        let role = self.processes[index].role;
        let others = self.processes.iter().filter(|p| p.role == role && !p.removed).count();
        if others < 2 || self.processes[index].removed || !self.known.contains(&self.processes[index].name) {
            return Ok(());
        }
        // To take away the very policy that finishes is to say that it has finished.
        if matches!(self.core.order_of(&self.processes[index].name), Some((_, Order::Finish))) {
            return Ok(());
        }
        self.group_changed |= role == Role::Policy;
        if role == Role::Policy && matches!(self.core.order_of(&self.processes[index].name), Some((_, Order::Finish))) {
            // Who was told to finish holds the last weights and has nothing more to do.
            let state = self.processes[index].state.clone().filter(|s| s.step == self.core.step());
            self.finished = state.or(self.finished.take());
        }
        self.processes[index].removed = true;
        self.processes[index].alive = false;
        let replica = self.processes[index].name.clone();
        self.apply(Event::Removed { replica })
    }

    /// What is on disk of one of the newest states is no longer whole. (A run that is stopped is taken up here from the
    /// memory of its newest checkpoint, as one process does that has found it whole.)
    fn tear(&mut self) {
        let newest: Vec<u64> = self.files.keys().rev().take(2).copied().collect();
        let which = self.chance.below(newest.len() as u64) as usize;
        let Some(step) = newest.get(which).copied() else { return };
        self.note(|| format!("torn: the state of step {step}"));
        self.files.remove(&step);
        self.torn.insert(step);
    }
}
