//! Spreading independent pieces of one kernel over rayon's threads.

use std::cell::Cell;

use rayon::prelude::*;

thread_local! {
    /// Set while the caller already keeps every thread busy with larger pieces.
    static SERIAL: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` with kernels that stay on this thread: for callers that run as many of these as there are threads.
pub fn serial<R>(work: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            SERIAL.set(self.0);
        }
    }
    let _restore = Restore(SERIAL.replace(true));
    work()
}

/// Threads that a kernel called here may use.
pub fn available() -> usize {
    if SERIAL.get() { 1 } else { rayon::current_num_threads().max(1) }
}

/// Runs `work(0..count)`, on several threads if `spread` says that it is worth it. The pieces must not depend on each
/// other; which thread runs which cannot be told from the results.
pub fn each(count: usize, spread: bool, work: impl Fn(usize) + Sync + Send) {
    if count <= 1 || !spread || available() == 1 {
        (0..count).for_each(work);
    } else {
        (0..count).into_par_iter().with_max_len(1).for_each(work);
    }
}

/// As [`each`], over parts of `rows` that are `part` long (the last may be shorter).
pub fn each_part<T: Send>(rows: &mut [T], part: usize, spread: bool, work: impl Fn(usize, &mut [T]) + Sync + Send) {
    let part = part.max(1);
    if rows.len() <= part || !spread || available() == 1 {
        rows.chunks_mut(part).enumerate().for_each(|(index, rows)| work(index, rows));
    } else {
        rows.par_chunks_mut(part).enumerate().with_max_len(1).for_each(|(index, rows)| work(index, rows));
    }
}
