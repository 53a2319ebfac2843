use super::*;
use crate::ManualClock;
use crate::behaviour::{Bench, behaves};

/// A memory broker whose time a test moves.
#[derive(Default)]
struct Memory {
    clock: Arc<ManualClock>,
}

impl Bench for Memory {
    fn broker(&self, limits: BrokerLimits) -> Arc<dyn Broker> {
        Arc::new(MemoryBroker::with_clock(limits, Arc::new(SteppedClock(self.clock.clone(), SystemClock::default()))))
    }

    fn pass_ms(&self, ms: u64) {
        self.clock.advance_ms(ms);
    }
}

/// The steps of a test on top of the machine's clock, for the tests whose threads wait.
struct SteppedClock(Arc<ManualClock>, SystemClock);

impl Clock for SteppedClock {
    fn now_ms(&self) -> u64 {
        self.0.now_ms() + self.1.now_ms()
    }
}

behaves!(Some(Memory::default()));
