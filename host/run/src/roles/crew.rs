//! The ranks of a replica: threads that do the same, each with its own piece of the model.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use cosmos_parallel::{Mesh, RankGroups, ThreadWorld};

use crate::error::{Result, RunError};

type Work<S> = Arc<dyn Fn(&mut S) -> Result<Box<dyn std::any::Any + Send>> + Send + Sync>;
type Answered = (usize, Result<Box<dyn std::any::Any + Send>>);

/// Ranks with a state each.
pub enum Crew<S> {
    /// A single rank needs no thread.
    Alone(Box<S>),
    /// Several.
    Ranks(Ranks<S>),
}

/// Rank threads and the way to them.
pub struct Ranks<S> {
    orders: Vec<Sender<Work<S>>>,
    answers: Receiver<Answered>,
    threads: Vec<JoinHandle<()>>,
}

impl<S: Send + 'static> Crew<S> {
    /// One rank.
    pub fn alone(state: S) -> Self {
        Self::Alone(Box::new(state))
    }

    /// The ranks of `mesh`, each made by `make` from its groups, in a thread of its own where there are several. A rank that
    /// keeps the others waiting for `wait_ms_max` fails them all.
    pub fn on(
        mesh: Mesh,
        wait_ms_max: u64,
        make: impl Fn(RankGroups) -> Result<S> + Send + Sync + 'static,
    ) -> Result<Self> {
        Self::of(ThreadWorld::new(mesh, wait_ms_max)?, make)
    }

    /// A rank for each of `groups`, as [`Crew::on`].
    pub fn of(
        mut groups: Vec<RankGroups>,
        make: impl Fn(RankGroups) -> Result<S> + Send + Sync + 'static,
    ) -> Result<Self> {
        if groups.len() == 1
            && let Some(alone) = groups.pop()
        {
            return make(alone).map(Self::alone);
        }
        let make = Arc::new(make);
        let makers = groups.into_iter().map(|groups| {
            let make = Arc::clone(&make);
            Box::new(move || make(groups)) as Box<dyn FnOnce() -> Result<S> + Send>
        });
        Self::start(makers.collect())
    }

    /// A thread for each of `makers`, which makes the rank's state there. Ranks make theirs together.
    pub fn start(makers: Vec<Box<dyn FnOnce() -> Result<S> + Send>>) -> Result<Self> {
        let (report, answers) = channel::<Answered>();
        let (mut orders, mut threads) = (Vec::new(), Vec::new());
        for (rank, make) in makers.into_iter().enumerate() {
            let (order, work) = channel::<Work<S>>();
            let report = report.clone();
            let thread = std::thread::Builder::new()
                .name(format!("rank-{rank}"))
                .spawn(move || serve(rank, make, &work, &report))
                .map_err(|e| RunError::shared("rank", format!("rank {rank} cannot be started: {e}"), ""))?;
            orders.push(order);
            threads.push(thread);
        }
        let crew = Ranks { orders, answers, threads };
        crew.collect()?;
        Ok(Self::Ranks(crew))
    }

    /// How many ranks there are.
    pub fn ranks(&self) -> usize {
        match self {
            Self::Alone(_) => 1,
            Self::Ranks(ranks) => ranks.orders.len(),
        }
    }

    /// Every rank does `work`; what came of it, by rank. Of several failures the first rank's is reported.
    pub fn all<T: Send + 'static>(
        &mut self,
        work: impl Fn(&mut S) -> Result<T> + Send + Sync + 'static,
    ) -> Result<Vec<T>> {
        let ranks = match self {
            Self::Alone(state) => return work(state).map(|done| vec![done]),
            Self::Ranks(ranks) => ranks,
        };
        let work: Work<S> = Arc::new(move |state| work(state).map(|done| Box::new(done) as Box<_>));
        for (rank, order) in ranks.orders.iter().enumerate() {
            order.send(Arc::clone(&work)).map_err(|_| gone(rank))?;
        }
        let done = ranks.collect()?;
        done.into_iter()
            .enumerate()
            .map(|(rank, value)| value.downcast::<T>().map(|value| *value).map_err(|_| gone(rank)))
            .collect()
    }
}

impl<S> Ranks<S> {
    /// One answer of every rank.
    fn collect(&self) -> Result<Vec<Box<dyn std::any::Any + Send>>> {
        let mut answered: Vec<Option<Result<Box<dyn std::any::Any + Send>>>> =
            self.orders.iter().map(|_| None).collect();
        for _ in 0..answered.len() {
            // Every rank answers: collectives have deadlines, and a panic drops its end of the channel last.
            let (rank, answer) = self.answers.recv().map_err(|_| gone(0))?;
            answered[rank] = Some(answer);
        }
        answered.into_iter().enumerate().map(|(rank, answer)| answer.unwrap_or_else(|| Err(gone(rank)))).collect()
    }
}

impl<S> Drop for Ranks<S> {
    fn drop(&mut self) {
        self.orders.clear();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn gone(rank: usize) -> RunError {
    RunError::shared("rank", format!("rank {rank} of this replica has died"), "its last lines in the log say why")
}

fn serve<S>(
    rank: usize,
    make: Box<dyn FnOnce() -> Result<S> + Send>,
    work: &Receiver<Work<S>>,
    report: &Sender<Answered>,
) {
    let guarded = |doing: &mut dyn FnMut() -> Result<Box<dyn std::any::Any + Send>>| {
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(doing)).unwrap_or_else(|_| Err(gone(rank)))
    };
    let mut made = None;
    let mut make = Some(make);
    let started = guarded(&mut || {
        if let Some(make) = make.take() {
            made = Some(make()?);
        }
        Ok(Box::new(()) as Box<_>)
    });
    let _ = report.send((rank, started));
    let Some(mut state) = made else { return };
    while let Ok(work) = work.recv() {
        let done = guarded(&mut || work(&mut state));
        if report.send((rank, done)).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Makers = Vec<Box<dyn FnOnce() -> Result<usize> + Send>>;

    #[test]
    fn every_rank_does_the_work_with_its_own_state() {
        let makers: Makers = (0..3usize).map(|rank| Box::new(move || Ok(rank * 10)) as Box<_>).collect();
        let mut crew = Crew::start(makers).unwrap();
        crew.all(|state| {
            *state += 1;
            Ok(())
        })
        .unwrap();
        assert_eq!((crew.ranks(), crew.all(|state| Ok(*state)).unwrap()), (3, vec![1, 11, 21]));
        assert_eq!(Crew::alone(7usize).all(|state| Ok(*state)).unwrap(), [7]);
    }

    #[test]
    fn a_rank_that_fails_or_panics_is_named_and_the_others_go_on() {
        let makers: Makers = (0..2usize).map(|rank| Box::new(move || Ok(rank)) as Box<_>).collect();
        let mut crew = Crew::start(makers).unwrap();
        let failed = crew.all(|state| if *state == 1 { Err(gone(9)) } else { Ok(*state) }).unwrap_err();
        assert!(failed.to_string().contains("rank 9"), "{failed}");
        let panicked = crew
            .all(|state| {
                assert_ne!(*state, 1, "on purpose");
                Ok(())
            })
            .unwrap_err();
        assert!(panicked.to_string().contains("rank 1"), "{panicked}");
        assert_eq!(crew.all(|state| Ok(*state)).unwrap(), [0, 1]);
    }
}
