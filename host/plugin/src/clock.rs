//! How long the running call may still take, as the guest's thread, its timer and the waiting caller all see it.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Time between two epochs, and so the grain of every deadline.
pub(crate) const TICK: Duration = Duration::from_millis(10);

/// Epochs within `time`, at least one.
pub(crate) fn ticks(time: Duration) -> u64 {
    u64::try_from(time.as_millis() / TICK.as_millis()).unwrap_or(u64::MAX - 1) + 1
}

/// The clock of one worker. It is restarted for each call.
#[derive(Debug)]
pub(crate) struct CallClock(Mutex<Running>);

#[derive(Debug)]
struct Running {
    started: Instant,
    limit: Duration,
    /// Time that a download took, which is not the guest's fault.
    excused: Duration,
    /// A download under way: since when, and for how long it may go on.
    excuse: Option<(Instant, Duration)>,
}

impl CallClock {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Running {
            started: Instant::now(),
            limit: Duration::ZERO,
            excused: Duration::ZERO,
            excuse: None,
        }))
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn start(&self, limit: Duration) {
        *self.running() = Running { started: Instant::now(), limit, excused: Duration::ZERO, excuse: None };
    }

    /// The limit of the running call, without what was excused.
    pub(crate) fn limit(&self) -> Duration {
        self.running().limit
    }

    /// What is left, or `None` when the time is up.
    pub(crate) fn left(&self) -> Option<Duration> {
        let running = self.running();
        let left = match running.excuse {
            Some((since, max)) => max.checked_sub(since.elapsed()),
            None => (running.limit + running.excused).checked_sub(running.started.elapsed()),
        };
        left.filter(|left| !left.is_zero())
    }

    /// How long the time has been up.
    pub(crate) fn overdue(&self) -> Duration {
        let running = self.running();
        match running.excuse {
            Some((since, max)) => since.elapsed().saturating_sub(max),
            None => running.started.elapsed().saturating_sub(running.limit + running.excused),
        }
    }

    /// Runs host work that has a limit of its own, `max` for all such work of one call.
    pub(crate) fn excuse<T>(&self, max: Duration, work: impl FnOnce() -> T) -> T {
        let since = Instant::now();
        let max = {
            let mut running = self.running();
            let max = max.saturating_sub(running.excused);
            running.excuse = Some((since, max));
            max
        };
        let done = work();
        let mut running = self.running();
        running.excuse = None;
        running.excused += since.elapsed().min(max);
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn excused_time_does_not_count() {
        let clock = CallClock::new();
        assert_eq!(clock.left(), None);
        clock.start(Duration::from_millis(200));
        clock.excuse(Duration::from_secs(60), || {
            assert!(clock.left().unwrap() > Duration::from_secs(50));
            std::thread::sleep(Duration::from_millis(250));
        });
        assert!(clock.left().is_some());
        assert_eq!(clock.overdue(), Duration::ZERO);
        clock.start(Duration::from_millis(20));
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(clock.left(), None);
        assert!(clock.overdue() >= Duration::from_millis(10));
    }

    #[test]
    fn ticks_round_up() {
        assert_eq!(ticks(Duration::ZERO), 1);
        assert_eq!(ticks(Duration::from_millis(25)), 3);
        assert!(ticks(Duration::MAX) > 1 << 40);
    }
}
