use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use super::*;
use crate::{ThreadGroup, ThreadRank};

pub(super) const PATIENT_MS: u64 = 30_000;

/// Stands in for NCCL and a GPU: memory is host memory, calls run over threads, and what the library may do to its caller
/// can be set: take its time, fail at a call, never end.
struct Stub {
    inner: ThreadRank,
    /// Calls of an open group. A group belongs to the thread that opened it, as in NCCL.
    group: Mutex<Option<Vec<Call>>>,
    /// How often progress is asked for before it is reported, for each call.
    slow: usize,
    asked: AtomicUsize,
    fails_at: Option<usize>,
    hangs_at: Option<usize>,
    launched: AtomicUsize,
    hanging: AtomicBool,
    aborted: Arc<AtomicUsize>,
    largest: Arc<AtomicUsize>,
}

struct Call {
    launch: Launch,
    memory: Arc<Mutex<Vec<u8>>>,
    from: usize,
    to: usize,
    count: usize,
    dtype: Dtype,
}

type Memory = Arc<Mutex<Vec<u8>>>;

impl Stub {
    fn new(inner: ThreadRank) -> Stub {
        Stub {
            inner,
            group: Mutex::new(None),
            slow: 0,
            asked: AtomicUsize::new(0),
            fails_at: None,
            hangs_at: None,
            launched: AtomicUsize::new(0),
            hanging: AtomicBool::new(false),
            aborted: Arc::default(),
            largest: Arc::default(),
        }
    }

    fn read(&self, call: &Call, parts: usize) -> Vec<f32> {
        let bytes = call.memory.lock().unwrap();
        let own = &bytes[call.from..call.from + parts * call.count * call.dtype.bytes()];
        match call.dtype {
            Dtype::U8 => own.iter().map(|byte| f32::from(*byte)).collect(),
            Dtype::Bf16 => {
                own.chunks_exact(2).map(|b| f32::from_bits(u32::from_ne_bytes([0, 0, b[0], b[1]]))).collect()
            }
            Dtype::F32 => own.chunks_exact(4).map(|b| f32::from_ne_bytes(b.try_into().unwrap())).collect(),
        }
    }

    fn write(&self, call: &Call, values: &[f32]) {
        let bytes: Vec<u8> = match call.dtype {
            Dtype::U8 => values.iter().map(|value| *value as u8).collect(),
            Dtype::Bf16 => values.iter().flat_map(|value| ((value.to_bits() >> 16) as u16).to_ne_bytes()).collect(),
            Dtype::F32 => bytes_of(values),
        };
        call.memory.lock().unwrap()[call.to..call.to + bytes.len()].copy_from_slice(&bytes);
    }

    fn execute(&self, call: &Call) -> Result<()> {
        let (world, count) = (self.inner.world(), call.count);
        match call.launch {
            Launch::AllReduce(reduce) => {
                let mut values = self.read(call, 1);
                match reduce {
                    Reduce::Sum => self.inner.all_reduce_sum(&mut values)?,
                    Reduce::Max => self.inner.all_reduce_max(&mut values)?,
                }
                self.write(call, &values);
            }
            Launch::AllGather => {
                let mut all = vec![0.0; count * world];
                self.inner.all_gather(&self.read(call, 1), &mut all)?;
                self.write(call, &all);
            }
            Launch::ReduceScatter(_) => {
                let mut mine = vec![0.0; count];
                self.inner.reduce_scatter_sum(&self.read(call, world), &mut mine)?;
                self.write(call, &mine);
            }
            Launch::Broadcast { root } => {
                let mut values = self.read(call, 1);
                self.inner.broadcast(root, &mut values)?;
                self.write(call, &values);
            }
            Launch::Send { to } if to == self.inner.rank() => {
                TO_SELF.with(|own| own.borrow_mut().push(self.read(call, 1)))
            }
            Launch::Recv { from } if from == self.inner.rank() => {
                let values = TO_SELF.with(|own| own.borrow_mut().remove(0));
                self.write(call, &values);
            }
            Launch::Send { to } => self.inner.send(to, &self.read(call, 1))?,
            Launch::Recv { from } => {
                let mut values = vec![0.0; count];
                self.inner.recv(from, &mut values)?;
                self.write(call, &values);
            }
        }
        Ok(())
    }
}

thread_local! {
    static TO_SELF: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

impl NcclCalls for Stub {
    type Memory = Memory;

    fn alloc(&self, bytes: usize) -> std::result::Result<Memory, String> {
        Ok(Arc::new(Mutex::new(vec![0; bytes])))
    }
    fn bytes_of(&self, memory: &Memory) -> usize {
        memory.lock().unwrap().len()
    }
    fn upload(&self, memory: &mut Memory, at: usize, bytes: &[u8]) -> std::result::Result<(), String> {
        memory.lock().unwrap().get_mut(at..at + bytes.len()).ok_or("beyond the memory")?.copy_from_slice(bytes);
        Ok(())
    }
    fn download(&self, memory: &Memory, at: usize, bytes: &mut [u8]) -> std::result::Result<(), String> {
        bytes.copy_from_slice(memory.lock().unwrap().get(at..at + bytes.len()).ok_or("beyond the memory")?);
        Ok(())
    }
    fn group_start(&self) -> std::result::Result<(), String> {
        assert!(self.group.lock().unwrap().replace(Vec::new()).is_none(), "a group in a group");
        Ok(())
    }
    fn group_end(&self) -> std::result::Result<Progress, String> {
        let mut calls = self.group.lock().unwrap().take().expect("a group that was begun");
        if self.fails_at.is_some_and(|at| self.launched.load(Ordering::Relaxed) > at) {
            return Ok(Progress::Done);
        }
        // All sends of a group go out before any receive waits.
        calls.sort_by_key(|call| matches!(call.launch, Launch::Recv { .. }));
        calls.iter().try_for_each(|call| self.execute(call)).map_err(|error| error.to_string())?;
        Ok(Progress::Running)
    }
    fn launch(
        &self,
        launch: Launch,
        memory: &mut Memory,
        from: usize,
        to: usize,
        count: usize,
        dtype: Dtype,
    ) -> std::result::Result<Progress, String> {
        let number = self.launched.fetch_add(1, Ordering::Relaxed);
        self.largest.fetch_max(count, Ordering::Relaxed);
        if self.fails_at == Some(number) {
            return Err("unhandled system error (NCCL result 2)".into());
        }
        if self.hangs_at == Some(number) {
            self.hanging.store(true, Ordering::Relaxed);
            return Ok(Progress::Running);
        }
        let call = Call { launch, memory: memory.clone(), from, to, count, dtype };
        if let Some(group) = self.group.lock().unwrap().as_mut() {
            group.push(call);
            return Ok(Progress::Running);
        }
        self.execute(&call).map_err(|error| error.to_string())?;
        self.asked.store(0, Ordering::Relaxed);
        Ok(Progress::Running)
    }
    fn progress(&self) -> std::result::Result<Progress, String> {
        let slow = self.asked.fetch_add(1, Ordering::Relaxed) < self.slow;
        Ok(if slow { Progress::Running } else { Progress::Done })
    }
    fn finished(&self) -> std::result::Result<Progress, String> {
        Ok(if self.hanging.load(Ordering::Relaxed) { Progress::Running } else { Progress::Done })
    }
    fn abort(&self) {
        self.aborted.fetch_add(1, Ordering::Relaxed);
    }
}

/// All operations, with whole numbers, whose sums are exact in any order.
pub(super) fn everything(group: &dyn Collective, lens: [usize; 4]) {
    let (rank, world) = (group.rank(), group.world());
    let value = |rank: usize, i: usize| ((rank * 7 + i * 3) % 101) as f32;
    for len in lens {
        let of = |rank: usize, len: usize| -> Vec<f32> { (0..len).map(|i| value(rank, i)).collect() };
        let total = |at: usize| (0..world).map(|rank| value(rank, at)).sum::<f32>();
        let mut sum = of(rank, len);
        group.all_reduce_sum(&mut sum).unwrap();
        assert!(sum.iter().enumerate().all(|(i, got)| *got == total(i)));
        let mut most = of(rank, len);
        if let Some(last) = most.last_mut().filter(|_| rank == world - 1) {
            *last = f32::NAN;
        }
        group.all_reduce_max(&mut most).unwrap();
        for (i, got) in most.iter().enumerate() {
            let expected = (0..world).map(|rank| value(rank, i)).fold(f32::MIN, f32::max);
            assert!(if i + 1 == len { got.is_nan() } else { *got == expected }, "{i}: {got}");
        }
        let mut all = vec![0.0; len * world];
        group.all_gather(&of(rank, len), &mut all).unwrap();
        assert_eq!(all, (0..world).flat_map(|rank| of(rank, len)).collect::<Vec<_>>());
        let mut mine = vec![0.0; len];
        group.reduce_scatter_sum(&of(rank, len * world), &mut mine).unwrap();
        assert!(mine.iter().enumerate().all(|(i, got)| *got == total(rank * len + i)));
        let mut swapped = vec![0.0; len * world];
        group.all_to_all(&of(rank, len * world), &mut swapped).unwrap();
        let expected: Vec<f32> =
            (0..world).flat_map(|from| of(from, len * world)[rank * len..][..len].to_vec()).collect();
        assert_eq!(swapped, expected);
        let mut from_last = of(rank, len);
        group.broadcast(world - 1, &mut from_last).unwrap();
        assert_eq!(from_last, of(world - 1, len));
        for from in 0..world - 1 {
            if rank == from {
                group.send(from + 1, &of(rank, len)).unwrap();
            } else if rank == from + 1 {
                let mut got = vec![0.0; len];
                group.recv(from, &mut got).unwrap();
                assert_eq!(got, of(from, len));
            }
        }
        let names = group.all_gather_bytes(&vec![rank as u8; rank + len % 7], 100).unwrap();
        assert!(names.iter().enumerate().all(|(r, name)| *name == vec![r as u8; r + len % 7]));
        group.barrier().unwrap();
    }
    let error = group.all_gather_bytes(&vec![0; rank + 1], world - 1).unwrap_err();
    assert!(error.to_string().contains(&format!("rank {} brings {world} bytes", world - 1)), "{error}");
}

fn on_every<T: Send>(world: usize, work: impl Fn(Stub) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = ThreadGroup::of(world, PATIENT_MS)
            .into_iter()
            .map(|rank| scope.spawn(move || work(Stub::new(rank))))
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

#[test]
fn operations_in_chunks_of_any_size() {
    for (world, stage_bytes) in [(1, 1 << 20), (2, 1 << 20), (3, 64), (4, 1000), (2, 20)] {
        on_every(world, |mut stub| {
            stub.slow = 3;
            let (rank, largest) = (stub.inner.rank(), stub.largest.clone());
            let mut group = NcclGroup::over(stub, rank, world, PATIENT_MS).unwrap();
            group.stage_bytes = stage_bytes;
            everything(&group, if stage_bytes > 1000 { [0, 1, 5, 1000] } else { [0, 1, 5, 30] });
            assert!(largest.load(Ordering::Relaxed) <= stage_bytes);
        });
    }
}

#[test]
fn a_call_that_fails_names_rank_and_operation_and_ends_the_communicator() {
    // The first call alone, and one in the middle of a group.
    for (fails_at, operation) in [(0, "all_reduce_sum"), (1, "all_to_all")] {
        let stub = Stub { fails_at: Some(fails_at), ..Stub::new(ThreadGroup::of(1, PATIENT_MS).remove(0)) };
        let aborted = stub.aborted.clone();
        let group = NcclGroup::over(stub, 0, 1, PATIENT_MS).unwrap();
        let error = match fails_at {
            0 => group.all_reduce_sum(&mut [1.0]).unwrap_err(),
            _ => group.all_to_all(&[1.0], &mut [0.0]).unwrap_err(),
        };
        let expected = format!("`{operation}`: NCCL at rank 0: unhandled system error (NCCL result 2)");
        assert_eq!(error.to_string(), expected);
        assert!(error.hint().is_some());
        assert_eq!(aborted.load(Ordering::Relaxed), 1);
        // A group that was begun is closed, and nothing more reaches the library.
        assert!(group.calls().group.lock().unwrap().is_none());
        let launched = group.calls().launched.load(Ordering::Relaxed);
        assert!(matches!(group.barrier(), Err(ParallelError::Broken { rank: 0, .. })));
        assert_eq!(group.calls().launched.load(Ordering::Relaxed), launched);
        drop(group);
        assert_eq!(aborted.load(Ordering::Relaxed), 2);
    }
}

#[test]
fn a_call_that_never_ends_is_given_up_at_the_deadline() {
    // Stuck in the communicator, and stuck in the stream.
    for slow in [usize::MAX, 0] {
        let inner = ThreadGroup::of(1, PATIENT_MS).remove(0);
        let stub = Stub { slow, hangs_at: Some(0), ..Stub::new(inner) };
        let aborted = stub.aborted.clone();
        let group = NcclGroup::over(stub, 0, 1, 30).unwrap();
        let text = group.broadcast(0, &mut [1.0]).unwrap_err().to_string();
        assert_eq!(text, "`broadcast`: NCCL at rank 0: not done within 30 ms: another rank is late or gone");
        assert_eq!(aborted.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn device_memory_of_both_kinds_and_its_bounds() {
    on_every(2, |stub| {
        let rank = stub.inner.rank();
        let group = NcclGroup::over(stub, rank, 2, PATIENT_MS).unwrap();
        let mut memory = group.calls().alloc(16).unwrap();
        let bf16 = |value: f32| ((value.to_bits() >> 16) as u16).to_ne_bytes();
        let mine: Vec<u8> = [1.0, 2.0].iter().flat_map(|value| bf16(value * (rank + 1) as f32)).collect();
        group.calls().upload(&mut memory, 0, &mine).unwrap();
        group.on_device(Launch::AllReduce(Reduce::Sum), &mut memory, 0, 0, 2, Dtype::Bf16).unwrap();
        group.on_device(Launch::AllGather, &mut memory, 0, 4, 2, Dtype::Bf16).unwrap();
        let mut got = [0; 12];
        group.calls().download(&memory, 0, &mut got).unwrap();
        assert_eq!(got.to_vec(), [3.0, 6.0].map(bf16).concat().repeat(3));
        let refused = |launch, from, to, count, dtype| {
            group.on_device(launch, &mut memory.clone(), from, to, count, dtype).unwrap_err().to_string()
        };
        let all = Launch::AllGather;
        let text = refused(all, 0, 4, 2, Dtype::F32);
        assert_eq!(text, format!("`all_gather`: NCCL at rank {rank}: 2 × 2 values at byte 4 do not lie in 16 bytes"));
        assert!(refused(all, 0, 3, 1, Dtype::Bf16).contains("at byte 3"));
        assert!(refused(Launch::Send { to: 1 - rank }, 0, 0, usize::MAX, Dtype::F32).contains("do not lie"));
        assert!(refused(Launch::Recv { from: rank }, 0, 0, 1, Dtype::F32).contains("not in a world"));
        assert!(refused(Launch::AllReduce(Reduce::Max), 0, 0, 1, Dtype::U8).contains("cannot be summed"));
    });
}
