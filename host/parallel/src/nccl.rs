//! Collectives between GPUs.
//!
//! [`NcclGroup`] knows how a collective is cut into chunks, grouped, waited for and given up; what it asks of the library
//! and the device goes through [`NcclCalls`], so that all of it is tested where there is no GPU. [`CudaNccl`] is the real
//! one.
//!
//! NCCL chooses the order of a sum by itself: all ranks get the same bits and a run on the same machines repeats, but the
//! bits are not those of [`crate::ThreadGroup`].

#[cfg(feature = "nccl")]
mod cuda;
#[cfg(feature = "nccl")]
mod library;

use std::fmt;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::collective::{check_all_to_all, check_bytes, check_parts, check_peer, check_root};
use crate::{Collective, ParallelError, Result};

#[cfg(feature = "nccl")]
pub use cuda::{CudaMemory, CudaNccl};
#[cfg(feature = "nccl")]
pub use library::library_version;

/// Bytes of device memory through which host buffers go.
const STAGE_BYTES: usize = 64 << 20;
/// Bytes of the id that the ranks of a communicator share.
#[cfg(feature = "nccl")]
const ID_BYTES: usize = 128;

/// How values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// 32 bits.
    F32,
    /// bfloat16.
    Bf16,
    /// Plain bytes; they cannot be summed.
    U8,
}

impl Dtype {
    /// Bytes of a value.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 => 2,
            Dtype::U8 => 1,
        }
    }
}

/// How values are put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduce {
    /// Their sum.
    Sum,
    /// The largest.
    Max,
}

/// A call that runs on the device. `count` values are those of one rank's part, as in NCCL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Launch {
    /// `count` in, `count` out.
    AllReduce(Reduce),
    /// `count` in, `world · count` out.
    AllGather,
    /// `world · count` in, `count` out.
    ReduceScatter(Reduce),
    /// `count` in at the root, `count` out.
    Broadcast {
        /// The rank that gives.
        root: usize,
    },
    /// `count` in.
    Send {
        /// The rank that gets them.
        to: usize,
    },
    /// `count` out.
    Recv {
        /// The rank that gives them.
        from: usize,
    },
}

/// Whether what was asked for is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// It is.
    Done,
    /// Ask again.
    Running,
}

/// What one rank asks of NCCL and its device. Nothing here waits for another rank; errors are texts.
pub trait NcclCalls: Send + Sync {
    /// Device memory.
    type Memory: Send;

    /// Memory of `bytes` bytes, zeroed.
    fn alloc(&self, bytes: usize) -> std::result::Result<Self::Memory, String>;
    /// Bytes of a memory.
    fn bytes_of(&self, memory: &Self::Memory) -> usize;
    /// Copies to the device.
    fn upload(&self, memory: &mut Self::Memory, at: usize, bytes: &[u8]) -> std::result::Result<(), String>;
    /// Copies from the device what is finished.
    fn download(&self, memory: &Self::Memory, at: usize, bytes: &mut [u8]) -> std::result::Result<(), String>;
    /// The calls until [`NcclCalls::group_end`] run together.
    fn group_start(&self) -> std::result::Result<(), String>;
    /// Runs the calls since [`NcclCalls::group_start`].
    fn group_end(&self) -> std::result::Result<Progress, String>;
    /// Puts a call into the stream: it reads at byte `from` and writes at byte `to`, which may be the same.
    fn launch(
        &self,
        launch: Launch,
        memory: &mut Self::Memory,
        from: usize,
        to: usize,
        count: usize,
        dtype: Dtype,
    ) -> std::result::Result<Progress, String>;
    /// Whether the communicator has taken what it was given.
    fn progress(&self) -> std::result::Result<Progress, String>;
    /// Whether the stream has run all that was put into it.
    fn finished(&self) -> std::result::Result<Progress, String>;
    /// Ends the communicator, with what runs in it. May be called more than once.
    fn abort(&self);
}

/// One rank of a group of GPUs.
pub struct NcclGroup<C: NcclCalls> {
    calls: C,
    rank: usize,
    world: usize,
    wait_ms_max: u64,
    stage_bytes: usize,
    state: Mutex<State<C::Memory>>,
}

struct State<M> {
    stage: Option<M>,
    broken: Option<ParallelError>,
}

impl<C: NcclCalls> fmt::Debug for NcclGroup<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NcclGroup({} of {})", self.rank, self.world)
    }
}

impl<C: NcclCalls> NcclGroup<C> {
    /// Rank `rank` of `world`, over a communicator that exists. A call that is not done after `wait_ms_max` is given up.
    ///
    /// # Errors
    /// [`ParallelError::NoSuchRank`].
    pub fn over(calls: C, rank: usize, world: usize, wait_ms_max: u64) -> Result<Self> {
        check_root(rank, world)?;
        let state = Mutex::new(State { stage: None, broken: None });
        // Each chunk holds at least one value of every rank, in and out.
        let stage_bytes = STAGE_BYTES.max((2 * world + 1) * 4);
        Ok(Self { calls, rank, world, wait_ms_max, stage_bytes, state })
    }

    /// The calls, to make and fill memory for [`NcclGroup::on_device`].
    pub fn calls(&self) -> &C {
        &self.calls
    }

    /// A collective on device memory, f32 or bf16: reads at byte `from`, writes at byte `to`.
    ///
    /// # Errors
    /// Places outside of the memory, ranks that do not exist, sums of bytes; [`ParallelError::Nccl`].
    pub fn on_device(
        &self,
        launch: Launch,
        memory: &mut C::Memory,
        from: usize,
        to: usize,
        count: usize,
        dtype: Dtype,
    ) -> Result<()> {
        let operation = name(launch);
        let (reads, writes) = match launch {
            Launch::AllReduce(_) | Launch::Broadcast { .. } => (1, 1),
            Launch::AllGather => (1, self.world),
            Launch::ReduceScatter(_) => (self.world, 1),
            Launch::Send { .. } => (1, 0),
            Launch::Recv { .. } => (0, 1),
        };
        match launch {
            Launch::Broadcast { root } => check_root(root, self.world)?,
            Launch::Send { to: peer } | Launch::Recv { from: peer } => check_peer(peer, self.rank, self.world)?,
            _ => {}
        }
        if dtype == Dtype::U8 && matches!(launch, Launch::AllReduce(_) | Launch::ReduceScatter(_)) {
            return Err(self.error(operation, "plain bytes cannot be summed".into()));
        }
        let have = self.calls.bytes_of(memory);
        let end = |at: usize, parts: usize| {
            if parts == 0 {
                return Some(0);
            }
            count.checked_mul(parts)?.checked_mul(dtype.bytes())?.checked_add(at)
        };
        for (at, parts) in [(from, reads), (to, writes)] {
            if end(at, parts).is_none_or(|end| end > have) || !at.is_multiple_of(dtype.bytes()) {
                let reason = format!("{parts} × {count} values at byte {at} do not lie in {have} bytes");
                return Err(self.error(operation, reason));
            }
        }
        if count == 0 {
            return Ok(());
        }
        let mut state = self.healthy(operation)?;
        self.run(operation, &mut state, |calls, _| calls.launch(launch, memory, from, to, count, dtype))
    }

    fn error(&self, operation: &'static str, reason: String) -> ParallelError {
        ParallelError::Nccl { operation, rank: self.rank, reason }
    }

    fn healthy(&self, operation: &'static str) -> Result<MutexGuard<'_, State<C::Memory>>> {
        let state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match &state.broken {
            None => Ok(state),
            Some(error) => Err(ParallelError::Broken { operation, rank: self.rank, reason: error.to_string() }),
        }
    }

    /// Ends the communicator: a rank that has failed must not leave the others in a kernel that never ends.
    fn give_up(&self, state: &mut State<C::Memory>, error: ParallelError) -> ParallelError {
        self.calls.abort();
        state.broken.get_or_insert_with(|| error.clone());
        error
    }

    /// Makes calls and waits until the stream has run them.
    fn run(
        &self,
        operation: &'static str,
        state: &mut State<C::Memory>,
        calls: impl FnOnce(&C, &mut State<C::Memory>) -> std::result::Result<Progress, String>,
    ) -> Result<()> {
        let begun = Instant::now();
        let mut progress = calls(&self.calls, state);
        for poll in [C::progress, C::finished] {
            if progress == Ok(Progress::Done) {
                progress = poll(&self.calls);
            }
            while progress == Ok(Progress::Running) {
                let waited = begun.elapsed();
                if waited >= Duration::from_millis(self.wait_ms_max) {
                    let reason = format!("not done within {} ms: another rank is late or gone", self.wait_ms_max);
                    return Err(self.give_up(state, self.error(operation, reason)));
                }
                // Short ones end within microseconds; nobody should spin for long ones.
                if waited < Duration::from_millis(1) {
                    std::thread::yield_now();
                } else {
                    std::thread::sleep(Duration::from_micros(100));
                }
                // A call that was not taken yet is asked for at the communicator, whatever comes then.
                progress = poll(&self.calls);
            }
        }
        progress.map(drop).map_err(|reason| self.give_up(state, self.error(operation, reason)))
    }

    /// One chunk of host memory: uploads `bytes`, runs the calls, downloads `into` from byte `to`.
    fn staged(
        &self,
        operation: &'static str,
        state: &mut State<C::Memory>,
        bytes: &[u8],
        calls: impl FnOnce(&C, &mut C::Memory) -> std::result::Result<Progress, String>,
        to: usize,
        into: &mut [u8],
    ) -> Result<()> {
        let stage_bytes = self.stage_bytes;
        self.run(operation, state, |device, state| {
            let mut stage = match state.stage.take() {
                Some(stage) => stage,
                None => device.alloc(stage_bytes)?,
            };
            let launched = device.upload(&mut stage, 0, bytes).and_then(|()| calls(device, &mut stage));
            // Kept in any case: what was launched may still write there.
            state.stage = Some(stage);
            launched
        })?;
        if into.is_empty() {
            return Ok(());
        }
        let got = match &state.stage {
            Some(stage) => self.calls.download(stage, to, into),
            None => Err("the staging memory is gone".into()),
        };
        got.map_err(|reason| self.give_up(state, self.error(operation, reason)))
    }

    /// Ranges of at most as many values as fit when a chunk needs `parts` of them.
    fn chunks(&self, len: usize, parts: usize, value_bytes: usize) -> impl Iterator<Item = Range<usize>> + use<C> {
        let most = (self.stage_bytes / (parts * value_bytes)).max(1);
        (0..len).step_by(most).map(move |start| start..(start + most).min(len))
    }

    fn reduce(&self, operation: &'static str, values: &mut [f32], reduce: Reduce) -> Result<()> {
        let mut state = self.healthy(operation)?;
        for range in self.chunks(values.len(), 1, 4) {
            let mut bytes = bytes_of(&values[range.clone()]);
            let count = range.len();
            let sent = bytes.clone();
            let launch = |device: &C, stage: &mut C::Memory| {
                device.launch(Launch::AllReduce(reduce), stage, 0, 0, count, Dtype::F32)
            };
            self.staged(operation, &mut state, &sent, launch, 0, &mut bytes)?;
            put_floats(&mut values[range], &bytes);
        }
        Ok(())
    }

    /// All ranks' bytes, of equal length.
    fn gather(&self, operation: &'static str, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut state = self.healthy(operation)?;
        let mut all = vec![Vec::with_capacity(mine.len()); self.world];
        // Multiples of 16, so that values of any kind stay in their places.
        let most = (self.stage_bytes / (self.world + 1)).next_multiple_of(16).saturating_sub(16).max(1);
        for chunk in mine.chunks(most) {
            let len = chunk.len();
            let mut got = vec![0; len * self.world];
            let launch =
                |device: &C, stage: &mut C::Memory| device.launch(Launch::AllGather, stage, 0, len, len, Dtype::U8);
            self.staged(operation, &mut state, chunk, launch, len, &mut got)?;
            for (all, part) in all.iter_mut().zip(got.chunks_exact(len)) {
                all.extend_from_slice(part);
            }
        }
        Ok(all)
    }
}

fn name(launch: Launch) -> &'static str {
    match launch {
        Launch::AllReduce(Reduce::Sum) => "all_reduce_sum",
        Launch::AllReduce(Reduce::Max) => "all_reduce_max",
        Launch::AllGather => "all_gather",
        Launch::ReduceScatter(_) => "reduce_scatter_sum",
        Launch::Broadcast { .. } => "broadcast",
        Launch::Send { .. } => "send",
        Launch::Recv { .. } => "recv",
    }
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

fn put_floats(values: &mut [f32], bytes: &[u8]) {
    for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(4)) {
        *value = f32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
}

impl<C: NcclCalls> Collective for NcclGroup<C> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.world
    }

    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<()> {
        self.reduce("all_reduce_sum", values, Reduce::Sum)
    }

    fn all_reduce_max(&self, values: &mut [f32]) -> Result<()> {
        // NCCL does not say what becomes of NaN, so they travel as marks beside the values.
        let mut marks: Vec<f32> = values.iter().map(|value| f32::from(u8::from(value.is_nan()))).collect();
        values.iter_mut().filter(|value| value.is_nan()).for_each(|value| *value = f32::NEG_INFINITY);
        self.reduce("all_reduce_max", values, Reduce::Max)?;
        self.reduce("all_reduce_max", &mut marks, Reduce::Max)?;
        values.iter_mut().zip(marks).filter(|(_, mark)| *mark > 0.0).for_each(|(value, _)| *value = f32::NAN);
        Ok(())
    }

    fn all_gather(&self, mine: &[f32], all: &mut [f32]) -> Result<()> {
        check_parts("all_gather", mine.len(), all.len(), self.world)?;
        let got = self.gather("all_gather", &bytes_of(mine))?;
        for (rank, bytes) in got.iter().enumerate() {
            put_floats(&mut all[rank * mine.len()..], bytes);
        }
        Ok(())
    }

    fn reduce_scatter_sum(&self, all: &[f32], mine: &mut [f32]) -> Result<()> {
        let operation = "reduce_scatter_sum";
        check_parts(operation, mine.len(), all.len(), self.world)?;
        let mut state = self.healthy(operation)?;
        let part = mine.len();
        for range in self.chunks(part, self.world + 1, 4) {
            let (count, to) = (range.len(), range.len() * 4 * self.world);
            let sent: Vec<u8> = (0..self.world).flat_map(|rank| bytes_of(&all[rank * part..][range.clone()])).collect();
            let mut got = vec![0; count * 4];
            let launch = |device: &C, stage: &mut C::Memory| {
                device.launch(Launch::ReduceScatter(Reduce::Sum), stage, 0, to, count, Dtype::F32)
            };
            self.staged(operation, &mut state, &sent, launch, to, &mut got)?;
            put_floats(&mut mine[range], &got);
        }
        Ok(())
    }

    fn broadcast(&self, root: usize, values: &mut [f32]) -> Result<()> {
        let operation = "broadcast";
        check_root(root, self.world)?;
        let mut state = self.healthy(operation)?;
        for range in self.chunks(values.len(), 1, 4) {
            let sent = bytes_of(&values[range.clone()]);
            let (count, mut got) = (range.len(), sent.clone());
            let launch = |device: &C, stage: &mut C::Memory| {
                device.launch(Launch::Broadcast { root }, stage, 0, 0, count, Dtype::F32)
            };
            self.staged(operation, &mut state, &sent, launch, 0, &mut got)?;
            put_floats(&mut values[range], &got);
        }
        Ok(())
    }

    fn barrier(&self) -> Result<()> {
        self.reduce("barrier", &mut [0.0], Reduce::Sum)
    }

    fn all_to_all(&self, send: &[f32], received: &mut [f32]) -> Result<()> {
        let operation = "all_to_all";
        let (world, part) = (self.world, check_all_to_all(send.len(), received.len(), self.world)?);
        let mut state = self.healthy(operation)?;
        for range in self.chunks(part, 2 * world, 4) {
            let (count, bytes) = (range.len(), range.len() * 4);
            let sent: Vec<u8> = (0..world).flat_map(|rank| bytes_of(&send[rank * part..][range.clone()])).collect();
            let mut got = vec![0; bytes * world];
            let launch = |device: &C, stage: &mut C::Memory| {
                device.group_start()?;
                let mut pairs = Ok(());
                for rank in 0..world {
                    let (from, to) = (rank * bytes, (world + rank) * bytes);
                    pairs = pairs
                        .and_then(|()| device.launch(Launch::Send { to: rank }, stage, from, from, count, Dtype::F32))
                        .and_then(|_| device.launch(Launch::Recv { from: rank }, stage, to, to, count, Dtype::F32))
                        .map(drop);
                }
                // A group that was begun must be ended, or the thread's next calls would belong to it.
                let ended = device.group_end();
                pairs.and(ended)
            };
            self.staged(operation, &mut state, &sent, launch, world * bytes, &mut got)?;
            for rank in 0..world {
                let at = rank * part + range.start;
                put_floats(&mut received[at..at + count], &got[rank * bytes..(rank + 1) * bytes]);
            }
        }
        Ok(())
    }

    /// As everywhere, but returns only when the other rank takes the values: two ranks must not both send first.
    fn send(&self, to: usize, values: &[f32]) -> Result<()> {
        check_peer(to, self.rank, self.world)?;
        let mut state = self.healthy("send")?;
        for range in self.chunks(values.len(), 1, 4) {
            let count = range.len();
            let launch =
                |device: &C, stage: &mut C::Memory| device.launch(Launch::Send { to }, stage, 0, 0, count, Dtype::F32);
            self.staged("send", &mut state, &bytes_of(&values[range]), launch, 0, &mut [])?;
        }
        Ok(())
    }

    fn recv(&self, from: usize, values: &mut [f32]) -> Result<()> {
        check_peer(from, self.rank, self.world)?;
        let mut state = self.healthy("recv")?;
        for range in self.chunks(values.len(), 1, 4) {
            let count = range.len();
            let mut got = vec![0; count * 4];
            let launch = |device: &C, stage: &mut C::Memory| {
                device.launch(Launch::Recv { from }, stage, 0, 0, count, Dtype::F32)
            };
            self.staged("recv", &mut state, &[], launch, 0, &mut got)?;
            put_floats(&mut values[range], &got);
        }
        Ok(())
    }

    fn all_gather_bytes(&self, mine: &[u8], bytes_max: usize) -> Result<Vec<Vec<u8>>> {
        let operation = "all_gather_bytes";
        // The lengths first, also of a rank that brings too much, so that all ranks see who it is.
        let lens = self.gather(operation, &(mine.len() as u64).to_ne_bytes())?;
        let lens: Vec<usize> = lens
            .iter()
            .map(|bytes| bytes[..].try_into().map_or(usize::MAX, |bytes| u64::from_ne_bytes(bytes) as usize))
            .collect();
        for (rank, len) in lens.iter().enumerate() {
            check_bytes(operation, rank, *len, bytes_max)?;
        }
        let mut padded = mine.to_vec();
        padded.resize(lens.iter().copied().max().unwrap_or(0), 0);
        let mut all = self.gather(operation, &padded)?;
        all.iter_mut().zip(lens).for_each(|(bytes, len)| bytes.truncate(len));
        Ok(all)
    }
}

impl<C: NcclCalls> Drop for NcclGroup<C> {
    fn drop(&mut self) {
        // Nothing of this rank runs any more; a rank that still waits for it must not wait for ever.
        self.calls.abort();
    }
}

#[cfg(test)]
mod tests;
