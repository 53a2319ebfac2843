//! Where rollouts leave completions and policies find them, with the teachers' queue beside it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cosmos_broker::wire::frame::{FloatFormat, FrameLimits};
use cosmos_broker::{Broker, QueueOptions, RedisBroker, RedisLink, SampleId, Store};
use cosmos_config::{Config, Dtype, WireDtype};
use cosmos_controller::{OrderId, SampleRef};

use crate::error::{Result, RunError};
use crate::roles::foreign::{self, Foreign};
use crate::roles::parcel;
use crate::rollout::Completion;
use crate::teacher::{self, Answer, Wanted};
use crate::teachers::{self, asks};

/// How long a completion that nobody has trained on is kept. Beyond it the controller has it written again.
const KEEP_MS_MAX: u64 = 24 * 3600 * 1000;
/// How long to wait for answers before those that are missing are asked for again.
const ASK_AGAIN: Duration = Duration::from_secs(10);
/// One look for answers, so that whoever waits can be asked to stop.
const LOOK_MS_MAX: u64 = 500;

/// The data plane of a run, seen from one role.
#[derive(Clone)]
pub struct Depot {
    /// Completions.
    pub store: Arc<dyn Store>,
    /// Requests to each of the teachers, and its answers.
    pub queues: Vec<Arc<dyn Broker>>,
    weights: Vec<f64>,
    n_generation: u64,
}

/// What became of waiting for the teacher.
pub enum Answers {
    /// The answers by sample; those that did not come within the deadline are missing.
    Come(HashMap<u64, Answer>),
    /// Asked to stop meanwhile.
    Stopped,
}

/// The queues of the run's teachers, in their order. `foreign`: this side of the original's wire, where that is spoken;
/// `name`: this process in its messages.
pub fn queues(
    link: &Arc<RedisLink>,
    run: &str,
    name: &str,
    config: &Config,
    foreign: Option<Foreign>,
) -> Result<Vec<Arc<dyn Broker>>> {
    if foreign::is_spoken(config) {
        let Some(foreign) = foreign else {
            return Err(RunError::shared(
                name,
                "it does not know the rows of the dataset that the original's wire names",
                "",
            ));
        };
        return Ok(vec![foreign.queue(Arc::clone(link), run, name, config)?]);
    }
    let teachers = config.distillation.each_teacher();
    let queue = |name: &str| {
        let mut options = QueueOptions::new(run, name);
        options.limits.requests_max = config.host.queue_samples_max;
        // They come rounded to these formats already, so that nothing is lost on the way.
        options.floats.logprobs = match config.distillation.wire_logprob_dtype {
            WireDtype::Float32 => FloatFormat::F32,
            WireDtype::Float16 => FloatFormat::F16,
        };
        options.floats.hidden = match config.distillation.hidden_dtype {
            Dtype::Float32 => FloatFormat::F32,
            Dtype::Bfloat16 => FloatFormat::Bf16,
            Dtype::Float16 => FloatFormat::F16,
        };
        Arc::new(RedisBroker::new(Arc::clone(link), options)) as Arc<dyn Broker>
    };
    Ok(match config.distillation.enable {
        true => teachers.iter().map(|teacher| queue(&teacher.name)).collect(),
        false => Vec::new(),
    })
}

impl Depot {
    /// Of a run.
    pub fn new(store: Arc<dyn Store>, queues: Vec<Arc<dyn Broker>>, config: &Config, n_generation: u64) -> Self {
        let weights = config.distillation.each_teacher().iter().map(|teacher| teacher.weight).collect();
        Self { store, queues, weights, n_generation }
    }

    fn key(sample: u64, order: OrderId) -> String {
        format!("completion/{}/{sample}", order.0)
    }

    /// The teacher's name of a sample: the order that it was written for keeps it apart from an earlier attempt. Orders of a
    /// resumed run begin far beyond the earlier ones, so their high half counts too.
    pub fn id(&self, sample: u64, order: OrderId) -> SampleId {
        let (low, high) = (order.0 as u32, (order.0 >> 32) as u32);
        let n = self.n_generation;
        SampleId {
            epoch: low.wrapping_add(high.wrapping_mul(0x9E37_79B9)),
            prompt: sample / n,
            generation: (sample % n) as u32,
        }
    }

    /// Leaves a completion that was written for `order`.
    pub fn put(&self, order: OrderId, completion: &Completion) -> Result<()> {
        let key = Self::key(completion.sample, order);
        Ok(self.store.put(&key, &parcel::encode(completion), KEEP_MS_MAX)?)
    }

    /// The completions of `samples`, and those that are no longer there (or damaged, which is logged).
    pub fn get(&self, samples: &[SampleRef]) -> Result<(Vec<Completion>, Vec<u64>)> {
        let keys: Vec<String> = samples.iter().map(|s| Self::key(s.sample, s.order)).collect();
        let mut found = Vec::with_capacity(samples.len());
        let mut gone = Vec::new();
        for (sample, blob) in samples.iter().zip(self.store.get_many(&keys)?) {
            match blob.map(|bytes| parcel::decode(&bytes, &FrameLimits::default())) {
                Some(Ok(completion)) if completion.sample == sample.sample && completion.version == sample.version => {
                    found.push(completion);
                }
                Some(Ok(completion)) => {
                    tracing::warn!(
                        "sample {} of weights {} lies where sample {} of weights {} belongs: it is written again",
                        completion.sample,
                        completion.version,
                        sample.sample,
                        sample.version
                    );
                    gone.push(sample.sample);
                }
                Some(Err(error)) => {
                    tracing::warn!("sample {}: {error}: it is written again", sample.sample);
                    gone.push(sample.sample);
                }
                None => gone.push(sample.sample),
            }
        }
        Ok((found, gone))
    }

    /// Lets go of samples: completions, requests and answers.
    pub fn forget(&self, samples: &[SampleRef]) -> Result<()> {
        let keys: Vec<String> = samples.iter().map(|s| Self::key(s.sample, s.order)).collect();
        self.store.remove(&keys)?;
        let ids: Vec<SampleId> = samples.iter().map(|s| self.id(s.sample, s.order)).collect();
        self.queues.iter().try_for_each(|queue| queue.forget(&ids))?;
        Ok(())
    }

    /// Asks a completion's teachers about it, which was written for `order`. A second copy changes nothing.
    pub fn ask(&self, order: OrderId, completion: &Completion, wanted: &Wanted, wait_ms_max: u64) -> Result<()> {
        let id = self.id(completion.sample, order);
        for (_, queue) in self.queues.iter().enumerate().filter(|(teacher, _)| asks(completion, *teacher)) {
            queue.publish(teacher::request_of(id, completion, wanted), wait_ms_max)?;
        }
        Ok(())
    }

    /// What the teachers say of `completions`, which are those of `samples` in their order. What is missing is asked for
    /// again every few seconds, since a broker that was restarted has forgotten it; what has not come at the deadline is left
    /// out. `progress` is told how many answers are missing; `stop` is asked meanwhile.
    pub fn answers(
        &self,
        samples: &[SampleRef],
        completions: &[Completion],
        wanted: &Wanted,
        wait_ms_max: u64,
        progress: &dyn Fn(usize),
        stop: &dyn Fn() -> bool,
    ) -> Result<Answers> {
        let deadline = Instant::now() + Duration::from_millis(wait_ms_max);
        let mut said = Vec::with_capacity(self.queues.len());
        for (teacher, queue) in self.queues.iter().enumerate() {
            let mut open: HashMap<SampleId, &Completion> = HashMap::new();
            for (sample, completion) in samples.iter().zip(completions).filter(|(_, c)| asks(c, teacher)) {
                open.insert(self.id(sample.sample, sample.order), completion);
            }
            match wait(queue.as_ref(), open, wanted, deadline, progress, stop)? {
                Some(answers) => said.push(answers),
                None => return Ok(Answers::Stopped),
            }
        }
        let answers = teachers::mix(completions, said, &self.weights)?;
        if answers.len() < completions.len() {
            tracing::warn!(
                "{} of {} completions have no answer of all their teachers within {wait_ms_max} ms; they are left out of the loss",
                completions.len() - answers.len(),
                completions.len()
            );
        }
        Ok(Answers::Come(answers))
    }
}

/// The answers of one teacher; none when asked to stop.
fn wait(
    queue: &dyn Broker,
    mut open: HashMap<SampleId, &Completion>,
    wanted: &Wanted,
    deadline: Instant,
    progress: &dyn Fn(usize),
    stop: &dyn Fn() -> bool,
) -> Result<Option<HashMap<u64, Answer>>> {
    let mut answers = HashMap::with_capacity(open.len());
    // They may have been fetched already, by a policy that died before it had trained on them.
    let mut asked: Option<Instant> = None;
    while !open.is_empty() {
        if stop() {
            return Ok(None);
        }
        let left = deadline.saturating_duration_since(Instant::now()).as_millis() as u64;
        if left == 0 {
            break;
        }
        let mut ids: Vec<SampleId> = open.keys().copied().collect();
        ids.sort_unstable();
        let fetched = queue.fetch(&ids, LOOK_MS_MAX.min(left))?;
        for (id, reason) in fetched.failed {
            if let Some(completion) = open.remove(&id) {
                tracing::warn!("the teacher could not score sample {}: {reason}", completion.sample);
            }
        }
        for result in fetched.results {
            if let Some(completion) = open.remove(&result.sample) {
                answers.insert(completion.sample, teacher::answer_of(result));
            }
        }
        progress(open.len());
        if asked.is_none_or(|at| at.elapsed() >= ASK_AGAIN) {
            asked = Some(Instant::now());
            for (id, completion) in &open {
                queue.publish(teacher::request_of(*id, completion, wanted), left.min(ASK_AGAIN.as_millis() as u64))?;
            }
        }
    }
    Ok(Some(answers))
}
