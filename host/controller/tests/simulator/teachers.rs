//! Teachers over a store that may forget: asked at least once, acknowledged after the answer is stored.

use cosmos_controller::{Order, OrderId, Role};

use crate::chance::mix;
use crate::world::{Action, Checked, IDLE_MS, Key, POLL_MS, World};

impl World {
    pub fn start_reading(&mut self, index: usize) {
        if self.processes[index].role == Role::Teacher {
            self.after(POLL_MS, Action::TeacherReads(index, self.processes[index].life));
        }
    }

    /// A policy joins the others once the teachers have answered about its whole share. What nobody is asked any more
    /// (the store has forgotten it) is asked again: the policy has the completion.
    pub fn look_for_answers(&mut self, index: usize, id: OrderId) -> Checked {
        let process = &self.processes[index];
        let Some((own, Order::Train { members, attempt, share, .. })) = &process.work else { return Ok(()) };
        if *own != id {
            return Ok(());
        }
        if self.setup.teachers > 0 {
            let mut missing = false;
            for sample in share {
                let key = (sample.order, sample.sample);
                let text = *process.fetched.get(&sample.sample).ok_or("trained on without its completion")?;
                match self.answers.get(&key) {
                    Some(answer) if *answer != scored(text) => return Err("an answer about another text".into()),
                    Some(_) => {}
                    None => {
                        missing = true;
                        self.requests.entry(key).or_insert((text, None));
                    }
                }
            }
            if missing {
                let life = process.life;
                self.after(25, Action::LooksForAnswers(index, life, id));
                return Ok(());
            }
        }
        let (attempt, members) = (*attempt, members.len());
        let ready = self.ready.entry(attempt).or_default();
        ready.insert(process.name.clone());
        if ready.len() == members {
            let ms = 10 + self.chance.below(100);
            self.after(ms, Action::Commit(attempt));
        }
        Ok(())
    }

    /// A teacher takes requests that nobody has, or that somebody has had for too long.
    pub fn read_requests(&mut self, index: usize) {
        let now = self.now;
        let free = |taken: &Option<u64>| taken.is_none_or(|since| since + IDLE_MS <= now);
        let read: Vec<Key> = self.requests.iter().filter(|(_, (_, t))| free(t)).map(|(key, _)| *key).take(8).collect();
        let life = self.processes[index].life;
        for key in read {
            if let Some((_, taken)) = self.requests.get_mut(&key) {
                *taken = Some(now);
            }
            let slow = self.unlucky(20);
            let ms = 2 + self.chance.below(if slow { 2 * IDLE_MS } else { 30 });
            self.after(ms, Action::Scored(index, life, key));
        }
        self.after(POLL_MS, Action::TeacherReads(index, life));
    }

    /// The request is acknowledged only now; another may have scored it, too.
    pub fn store_answer(&mut self, key: Key) {
        if let Some((text, _)) = self.requests.remove(&key) {
            self.answers.insert(key, scored(text));
        }
    }
}

/// What a teacher answers about a text.
fn scored(text: u64) -> u64 {
    mix(text, 0x7eac)
}
