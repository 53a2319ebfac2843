//! Memory that will be read soon, fetched while something else is computed.
//!
//! Attention over cached tokens reads far more than it computes, products of matrices the reverse. Whoever knows what
//! attention will read names it here before the products that come first; these then ask for a line with every step of
//! their sums, so that memory and arithmetic are busy at once. Nothing but time depends on it.

use std::cell::RefCell;
use std::collections::VecDeque;

/// Numbers of a cache line.
pub(crate) const LINE: usize = 16;

/// Numbers that lie one after the other. Only their place is kept: a request for memory that is gone by then is ignored by
/// the processor.
#[derive(Clone, Copy)]
struct Span {
    at: *const f32,
    lines: usize,
}

thread_local! {
    static SPANS: RefCell<VecDeque<Span>> = const { RefCell::new(VecDeque::new()) };
}

/// Forgets what this thread was to fetch, and names what its next products fetch instead, in the order of `spans`.
pub fn fetch<'a>(spans: impl Iterator<Item = &'a [f32]>) {
    SPANS.with_borrow_mut(|queue| {
        queue.clear();
        queue.extend(spans.map(|span| Span { at: span.as_ptr(), lines: span.len().div_ceil(LINE) }));
    });
}

/// Where to ask for the next `lines` lines, if there is anything to ask for. Those beyond a span's end do no harm.
pub(crate) fn take(lines: usize) -> Option<*const f32> {
    SPANS.with_borrow_mut(|queue| {
        let span = queue.front_mut()?;
        let at = span.at;
        if span.lines > lines {
            *span = Span { at: at.wrapping_add(lines * LINE), lines: span.lines - lines };
        } else {
            queue.pop_front();
        }
        Some(at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_asked_for_in_order_and_once() {
        let (first, second) = ([0.0f32; 40], [0.0f32; 16]);
        fetch([&first[..], &[], &second].into_iter());
        // 40 numbers are two lines and a half.
        let found: Vec<_> = std::iter::from_fn(|| take(2)).collect();
        assert_eq!(found[..2], [first.as_ptr(), first[32..].as_ptr()]);
        assert_eq!((found.len(), found[found.len() - 1]), (4, second.as_ptr()));
        // What comes later replaces what is left.
        fetch([&first[..]].into_iter());
        fetch([&second[..]].into_iter());
        assert_eq!((take(256), take(256)), (Some(second.as_ptr()), None));
    }
}
