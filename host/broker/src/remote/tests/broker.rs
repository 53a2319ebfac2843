//! The behaviour of every broker, over Redis.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::behaviour::{Bench, behaves};
use crate::{Broker, BrokerLimits};

struct Redis {
    link: Arc<RedisLink>,
    queues: AtomicU64,
    _server: RedisServer,
    _dir: tempfile::TempDir,
}

impl Redis {
    fn start() -> Option<Redis> {
        if !has_redis() {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let server = server(dir.path(), None, None, None);
        let link = RedisLink::connect(server.address(), soon()).unwrap();
        Some(Redis { link, queues: AtomicU64::new(0), _server: server, _dir: dir })
    }
}

impl Bench for Redis {
    fn broker(&self, limits: BrokerLimits) -> Arc<dyn Broker> {
        let queue = self.queues.fetch_add(1, Ordering::Relaxed).to_string();
        Arc::new(RedisBroker::new(self.link.clone(), QueueOptions { limits, ..QueueOptions::new("run", &queue) }))
    }

    fn pass_ms(&self, ms: u64) {
        std::thread::sleep(std::time::Duration::from_millis(ms));
    }
}

behaves!(Redis::start());
