//! The real NCCL on a real GPU.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtrMut};

use super::library::{Comm, Config, Functions, IN_PROGRESS, SUCCESS, UniqueId, functions};
use super::{Dtype, ID_BYTES, Launch, NcclCalls, NcclGroup, Progress, Reduce};
use crate::{Collective, ParallelError, Result};

/// Memory on a GPU.
pub type CudaMemory = CudaSlice<u8>;

/// One rank's communicator and the stream it works in.
pub struct CudaNccl {
    functions: &'static Functions,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// Null once it was aborted.
    comm: Mutex<Handle>,
    /// Set behind the last call, to ask whether it has run.
    last: Mutex<Option<CudaEvent>>,
}

struct Handle(Comm);

// SAFETY: NCCL lets any thread use a communicator, one at a time; the mutex around the handle sees to that.
unsafe impl Send for Handle {}

impl NcclGroup<CudaNccl> {
    /// Joins the group of `others`, which has a rank for each GPU and carries the communicator's id: GPU `ordinal` of this
    /// machine becomes the rank that this one is in `others`. All ranks of `others` call it.
    ///
    /// # Errors
    /// [`ParallelError::NoLibrary`] without driver or NCCL, [`ParallelError::Nccl`], and what `others` reports.
    pub fn join(others: &dyn Collective, ordinal: usize, wait_ms_max: u64) -> Result<Self> {
        let (rank, world) = (others.rank(), others.world());
        let failed = |reason: String| ParallelError::Nccl { operation: "connect", rank, reason };
        // Every rank tells whether it can, so that none waits in NCCL for one that cannot.
        let opened = open(ordinal, rank).and_then(|(functions, context, stream)| {
            let id = if rank == 0 { unique_id(functions).map_err(failed)?.to_vec() } else { vec![1] };
            Ok((functions, context, stream, id))
        });
        let mine = opened.as_ref().map_or(&[][..], |opened| &opened.3);
        let told = others.all_gather_bytes(mine, ID_BYTES)?;
        let (functions, context, stream, _) = opened?;
        if let Some(rank) = told.iter().position(Vec::is_empty) {
            let reason = "it has no GPU or no NCCL".into();
            return Err(ParallelError::Failed { rank, reason });
        }
        let id: [u8; ID_BYTES] = told[0][..].try_into().map_err(|_| failed("rank 0 sent what is no id".into()))?;
        let calls = CudaNccl::connect(functions, context, stream, UniqueId(id), rank, world, wait_ms_max)?;
        NcclGroup::over(calls, rank, world, wait_ms_max)
    }
}

/// The library, the GPU and a stream on it.
fn open(ordinal: usize, rank: usize) -> Result<(&'static Functions, Arc<CudaContext>, Arc<CudaStream>)> {
    let failed = |reason: String| ParallelError::Nccl { operation: "connect", rank, reason };
    // SAFETY: opens the driver's library by name; its initialisers run, as in any CUDA program.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return Err(ParallelError::NoLibrary { library: "the NVIDIA driver", tried: vec!["libcuda.so".into()] });
    }
    let functions = functions()?;
    let count = cudarc::driver::result::init().and_then(|()| CudaContext::device_count());
    let count = count.map_err(|error| failed(format!("the driver does not start: {error:?}")))?;
    if ordinal >= usize::try_from(count).unwrap_or(0) {
        return Err(failed(format!("GPU {ordinal} is not there: the machine has {count}, counted from 0")));
    }
    let context = CudaContext::new(ordinal).map_err(|error| failed(format!("GPU {ordinal}: {error:?}")))?;
    let stream = context.new_stream().map_err(|error| failed(format!("GPU {ordinal}: {error:?}")))?;
    Ok((functions, context, stream))
}

fn unique_id(functions: &Functions) -> std::result::Result<[u8; ID_BYTES], String> {
    let mut id = UniqueId([0; ID_BYTES]);
    // SAFETY: writes the 128 bytes of an id.
    let code = unsafe { (functions.get_unique_id)(&mut id) };
    if code == SUCCESS { Ok(id.0) } else { Err(functions.told(code)) }
}

impl CudaNccl {
    fn connect(
        functions: &'static Functions,
        context: Arc<CudaContext>,
        stream: Arc<CudaStream>,
        id: UniqueId,
        rank: usize,
        world: usize,
        wait_ms_max: u64,
    ) -> Result<CudaNccl> {
        let failed = |reason: String| ParallelError::Nccl { operation: "connect", rank, reason };
        context.bind_to_thread().map_err(|error| failed(format!("{error:?}")))?;
        let (mut comm, mut config) = (std::ptr::null_mut(), Config::non_blocking());
        let (ranks, own) = (world as c_int, rank as c_int);
        // SAFETY: `comm` and `config` outlive the call; the ranks are within a world that fits an int.
        let code = unsafe { (functions.comm_init_rank_config)(&mut comm, ranks, id, own, &mut config) };
        let calls = CudaNccl { functions, context, stream, comm: Mutex::new(Handle(comm)), last: Mutex::new(None) };
        let mut progress = calls.told(code);
        let begun = Instant::now();
        while progress == Ok(Progress::Running) {
            if begun.elapsed() >= Duration::from_millis(wait_ms_max) {
                calls.abort();
                return Err(failed(format!("the {world} ranks were not together within {wait_ms_max} ms")));
            }
            std::thread::sleep(Duration::from_millis(1));
            progress = calls.progress();
        }
        match progress {
            Ok(_) => Ok(calls),
            Err(reason) => {
                calls.abort();
                Err(failed(reason))
            }
        }
    }

    fn told(&self, code: c_int) -> std::result::Result<Progress, String> {
        match code {
            SUCCESS => Ok(Progress::Done),
            IN_PROGRESS => Ok(Progress::Running),
            code => Err(self.functions.told(code)),
        }
    }

    fn comm(&self) -> std::result::Result<MutexGuard<'_, Handle>, String> {
        let comm = self.comm.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if comm.0.is_null() { Err("the communicator was ended".into()) } else { Ok(comm) }
    }
}

fn driver(error: cudarc::driver::DriverError) -> String {
    format!("CUDA: {error:?}")
}

impl NcclCalls for CudaNccl {
    type Memory = CudaMemory;

    fn alloc(&self, bytes: usize) -> std::result::Result<CudaMemory, String> {
        self.context.bind_to_thread().map_err(driver)?;
        self.stream.alloc_zeros::<u8>(bytes).map_err(driver)
    }

    fn bytes_of(&self, memory: &CudaMemory) -> usize {
        memory.len()
    }

    fn upload(&self, memory: &mut CudaMemory, at: usize, bytes: &[u8]) -> std::result::Result<(), String> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.context.bind_to_thread().map_err(driver)?;
        let mut view = memory.try_slice_mut(at..at + bytes.len()).ok_or("a copy beyond the memory")?;
        self.stream.memcpy_htod(bytes, &mut view).map_err(driver)
    }

    fn download(&self, memory: &CudaMemory, at: usize, bytes: &mut [u8]) -> std::result::Result<(), String> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.context.bind_to_thread().map_err(driver)?;
        let view = memory.try_slice(at..at + bytes.len()).ok_or("a copy beyond the memory")?;
        self.stream.memcpy_dtoh(&view, bytes).map_err(driver)?;
        self.stream.synchronize().map_err(driver)
    }

    fn group_start(&self) -> std::result::Result<(), String> {
        // SAFETY: takes nothing.
        self.told(unsafe { (self.functions.group_start)() }).map(drop)
    }

    fn group_end(&self) -> std::result::Result<Progress, String> {
        // SAFETY: takes nothing; the buffers of the group's calls are held by the caller until they have run.
        self.told(unsafe { (self.functions.group_end)() })
    }

    fn launch(
        &self,
        launch: Launch,
        memory: &mut CudaMemory,
        from: usize,
        to: usize,
        count: usize,
        dtype: Dtype,
    ) -> std::result::Result<Progress, String> {
        self.context.bind_to_thread().map_err(driver)?;
        let comm = self.comm()?;
        let most = memory.len();
        if from > most || to > most {
            return Err("a call beyond the memory".into());
        }
        let kind: c_int = match dtype {
            Dtype::U8 => 1,
            Dtype::F32 => 7,
            Dtype::Bf16 => 9,
        };
        let by = |reduce: Reduce| -> c_int {
            match reduce {
                Reduce::Sum => 0,
                Reduce::Max => 2,
            }
        };
        let base = {
            let (base, _ordered) = memory.device_ptr_mut(&self.stream);
            base
        };
        let (input, output) = ((base + from as u64) as *const c_void, (base + to as u64) as *mut c_void);
        let (comm, stream, f) = (comm.0, self.stream.cu_stream().cast::<c_void>(), self.functions);
        // SAFETY: the communicator is alive; `NcclGroup` has checked that what is read and written lies in `memory`, and
        // keeps it until the stream has run the call or the communicator was aborted.
        let code = unsafe {
            match launch {
                Launch::AllReduce(reduce) => (f.all_reduce)(input, output, count, kind, by(reduce), comm, stream),
                Launch::AllGather => (f.all_gather)(input, output, count, kind, comm, stream),
                Launch::ReduceScatter(reduce) => {
                    (f.reduce_scatter)(input, output, count, kind, by(reduce), comm, stream)
                }
                Launch::Broadcast { root } => (f.broadcast)(input, output, count, kind, root as c_int, comm, stream),
                Launch::Send { to } => (f.send)(input, count, kind, to as c_int, comm, stream),
                Launch::Recv { from } => (f.recv)(output, count, kind, from as c_int, comm, stream),
            }
        };
        self.told(code)
    }

    fn progress(&self) -> std::result::Result<Progress, String> {
        let comm = self.comm()?;
        let mut state = SUCCESS;
        // SAFETY: the communicator is alive; writes one int.
        let asked = unsafe { (self.functions.comm_get_async_error)(comm.0, &mut state) };
        self.told(asked)?;
        let progress = self.told(state)?;
        if progress == Progress::Done {
            // All that was given is in the stream now: the event goes behind it.
            let event = self.stream.record_event(None).map_err(driver)?;
            *self.last.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(event);
        }
        Ok(progress)
    }

    fn finished(&self) -> std::result::Result<Progress, String> {
        // A rank that dies while the kernel runs shows here.
        {
            let comm = self.comm()?;
            let mut state = SUCCESS;
            // SAFETY: as in `progress`.
            let asked = unsafe { (self.functions.comm_get_async_error)(comm.0, &mut state) };
            self.told(asked).and_then(|_| self.told(state))?;
        }
        let last = self.last.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match last.as_ref().map(CudaEvent::try_is_complete) {
            None | Some(Ok(true)) => Ok(Progress::Done),
            Some(Ok(false)) => Ok(Progress::Running),
            Some(Err(error)) => Err(driver(error)),
        }
    }

    fn abort(&self) {
        let mut comm = self.comm.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if !comm.0.is_null() {
            let _ = self.context.bind_to_thread();
            // SAFETY: the communicator is alive, and never used again.
            unsafe { (self.functions.comm_abort)(comm.0) };
            comm.0 = std::ptr::null_mut();
        }
    }
}

impl Drop for CudaNccl {
    fn drop(&mut self) {
        self.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{PATIENT_MS, everything};
    use super::*;
    use crate::ThreadGroup;

    #[test]
    fn without_a_gpu_every_rank_gets_an_error() {
        // SAFETY: as in `open`.
        if unsafe { cudarc::driver::sys::is_culib_present() } {
            eprintln!("skipped: this machine has a driver");
            return;
        }
        let errors: Vec<String> = std::thread::scope(|scope| {
            let threads: Vec<_> = ThreadGroup::of(2, PATIENT_MS)
                .into_iter()
                .map(|rank| scope.spawn(move || NcclGroup::join(&rank, 0, 1000).err().unwrap().to_string()))
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        for error in errors {
            assert!(error.starts_with("the NVIDIA driver cannot be loaded: libcuda.so"), "{error}");
        }
    }

    /// One rank per GPU of this machine; a single one works too.
    #[test]
    #[ignore = "needs a GPU and NCCL; tests/gpu.sh runs it"]
    fn nccl_on_every_gpu() {
        cudarc::driver::result::init().expect("a driver that starts");
        let gpus = CudaContext::device_count().expect("the number of GPUs") as usize;
        assert!(gpus > 0, "no GPU");
        println!("NCCL {} on {gpus} GPUs", super::super::library_version().expect("NCCL"));
        std::thread::scope(|scope| {
            for rank in ThreadGroup::of(gpus, PATIENT_MS) {
                scope.spawn(move || {
                    let ordinal = rank.rank();
                    let group = NcclGroup::join(&rank, ordinal, PATIENT_MS).expect("a group");
                    everything(&group, [0, 1, 1000, 20_000_000]);
                    // bf16 on the device: 1 + … + n in every place.
                    let one = |value: f32| ((value.to_bits() >> 16) as u16).to_ne_bytes();
                    let mut memory = group.calls().alloc(2 * 1000).expect("memory");
                    let mine: Vec<u8> = std::iter::repeat_n(one((ordinal + 1) as f32), 1000).flatten().collect();
                    group.calls().upload(&mut memory, 0, &mine).expect("upload");
                    group.on_device(Launch::AllReduce(Reduce::Sum), &mut memory, 0, 0, 1000, Dtype::Bf16).expect("sum");
                    let mut got = vec![0; 2000];
                    group.calls().download(&memory, 0, &mut got).expect("download");
                    let sum = one((gpus * (gpus + 1) / 2) as f32);
                    assert!(got.chunks_exact(2).all(|value| value == sum));
                });
            }
        });
    }
}
