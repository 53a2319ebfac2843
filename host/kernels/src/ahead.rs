//! Memory that will be read soon, fetched while something else is computed.
//!
//! Attention over cached tokens reads far more than it computes, products of matrices the reverse. Whoever knows what
//! attention will read names it here before the products that come first; these then ask for it a little with every step
//! of their sums, so that memory and arithmetic are busy at once. What has arrived may even be used between their tiles, before
//! other things take its place in the caches. Nothing but time depends on it.
#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

/// Numbers of a cache line.
pub(crate) const LINE: usize = 16;

/// Numbers that lie one after the other. Only their place is kept: a request for memory that is gone by then is ignored by
/// the processor.
#[derive(Clone, Copy)]
struct Span {
    at: *const f32,
    lines: usize,
    /// Whether it ends one of the things that were named.
    last: bool,
}

thread_local! {
    static SPANS: RefCell<VecDeque<Span>> = const { RefCell::new(VecDeque::new()) };
    static ASKED: Cell<usize> = const { Cell::new(0) };
    static MEANWHILE: Cell<Option<*mut (dyn FnMut() + 'static)>> = const { Cell::new(None) };
    static THEN: Cell<*const f32> = const { Cell::new(std::ptr::null()) };
}

/// Names what is read right after this thread's next product: the weights of the one that follows.
pub(crate) fn follow(numbers: &[f32]) {
    THEN.set(numbers.as_ptr());
}

/// What [`follow`] named, or null.
pub(crate) fn then() -> *const f32 {
    THEN.replace(std::ptr::null())
}

/// Forgets what this thread was to fetch, and names what its next products fetch instead: things in their order, each the
/// spans that it consists of.
pub fn fetch<'a, T: Iterator<Item = &'a [f32]>>(things: impl Iterator<Item = T>) {
    SPANS.with_borrow_mut(|queue| {
        queue.clear();
        for spans in things {
            queue.extend(spans.map(|span| Span { at: span.as_ptr(), lines: span.len().div_ceil(LINE), last: false }));
            queue.back_mut().into_iter().for_each(|span| span.last = true);
        }
    });
    ASKED.set(0);
}

/// How many of the things named to [`fetch`] this thread has wholly asked for.
pub fn asked() -> usize {
    ASKED.get()
}

/// What is still to be fetched, while a product asks for it.
pub(crate) struct Requests(VecDeque<Span>);

impl Requests {
    pub fn new() -> Self {
        Self(SPANS.take())
    }

    /// Where to ask for the next lines, `lines` at most, and for how many, if there is anything to ask for.
    #[inline(always)]
    pub fn take(&mut self, lines: usize) -> Option<(*const f32, usize)> {
        let span = self.0.front_mut()?;
        let (at, there) = (span.at, span.lines);
        if there > lines {
            (span.at, span.lines) = (at.wrapping_add(lines * LINE), there - lines);
        } else {
            ASKED.set(ASKED.get() + usize::from(span.last));
            self.0.pop_front();
        }
        Some((at, there.min(lines)))
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        SPANS.set(std::mem::take(&mut self.0));
    }
}

/// Runs `run`, of whose products those on this thread call `work` now and then.
///
/// # Panics
/// When `work` multiplies matrices itself.
pub fn along<R>(work: &mut (dyn FnMut() + '_), run: impl FnOnce() -> R) -> R {
    struct Restore(Option<*mut (dyn FnMut() + 'static)>);
    impl Drop for Restore {
        fn drop(&mut self) {
            MEANWHILE.set(self.0);
        }
    }
    // SAFETY: only the lifetime changes, and the pointer is gone before `work` is anyone else's again.
    let work = unsafe { std::mem::transmute::<*mut (dyn FnMut() + '_), *mut (dyn FnMut() + 'static)>(work) };
    let _restore = Restore(MEANWHILE.replace(Some(work)));
    run()
}

/// Where a product does what [`along`] was given.
pub(crate) fn meanwhile() {
    if let Some(work) = MEANWHILE.take() {
        // SAFETY: `along` runs on this thread and keeps it borrowed; nobody else has the pointer until it is put back.
        unsafe { (*work)() };
        MEANWHILE.set(Some(work));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_asked_for_in_order_and_once() {
        let (first, second) = ([0.0f32; 40], [0.0f32; 16]);
        fetch([vec![&first[..], &[]], vec![&second]].into_iter().map(Vec::into_iter));
        // 40 numbers are two lines and a half.
        let take = |lines| Requests::new().take(lines);
        let found: Vec<_> = std::iter::from_fn(|| take(2).map(|found| (found, asked()))).collect();
        assert_eq!(found[..2], [((first.as_ptr(), 2), 0), ((first[32..].as_ptr(), 1), 0)]);
        assert_eq!((found.len(), found[2].1, found[3]), (4, 1, ((second.as_ptr(), 1), 2)));
        // What comes later replaces what is left.
        fetch([[&first[..]].into_iter()].into_iter());
        fetch([[&second[..]].into_iter()].into_iter());
        assert_eq!((take(256), take(256), asked()), (Some((second.as_ptr(), 1)), None, 1));
    }

    #[test]
    fn work_is_done_along_with_what_runs() {
        let (mut outer, mut inner) = (0, 0);
        along(&mut || outer += 1, || {
            meanwhile();
            // Work that is away is not called by itself.
            along(
                &mut || {
                    inner += 1;
                    meanwhile()
                },
                meanwhile,
            );
            meanwhile();
        });
        meanwhile();
        assert_eq!((outer, inner), (2, 1));
    }
}
