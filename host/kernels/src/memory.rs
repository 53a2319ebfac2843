//! Memory that is used again: activations come and go with every tile, and fresh pages from the system cost more than
//! the arithmetic of a small model.
//!
//! Buffers are cut from large mappings, each from the first place that has room for it, and what is given back joins
//! the room beside it. So buffers of one size take the place of those of another, and the pages touched are about those
//! of the moment that needs most; an allocator for everything keeps sizes and threads apart, on large pages. Small
//! buffers, of which threads keep some, lie at the other end, where they do not split the room for large ones.
#![allow(unsafe_code)]

use std::alloc::{Layout, handle_alloc_error};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use memmap2::MmapMut;

/// Numbers of a mapping, unless one buffer needs more. Its pages are there once they are touched.
const CHUNK_LEN: usize = 64 << 20;
/// Numbers that may lie idle for later use before a mapping that is not used goes back to the system.
const IDLE_LEN_MAX: usize = 192 << 20;
/// Numbers in small buffers that a thread keeps to itself: what it wrote last is in its own cache, and nobody else need
/// be asked.
const OWN_LEN_MAX: usize = 256 << 10;
/// Most numbers of a small buffer.
const SMALL_LEN_MAX: usize = 64 << 10;
/// Buffers begin at multiples of this many numbers: a cache line.
const ALIGN: usize = 16;

/// A mapping, and where it has room.
struct Chunk {
    memory: NonNull<f32>,
    len: usize,
    /// Lengths of free places by their start: none is empty, and no two touch.
    free: BTreeMap<usize, usize>,
    /// Keeps the memory.
    _map: MmapMut,
}

// SAFETY: the pointer is into the mapping, which moves along.
unsafe impl Send for Chunk {}

impl Chunk {
    fn new(len: usize) -> Self {
        let refused = || -> ! {
            // As for every allocation that the system refuses.
            handle_alloc_error(Layout::array::<f32>(len).unwrap_or(Layout::new::<f32>()))
        };
        let Some(Ok(mut map)) = len.checked_mul(4).map(MmapMut::map_anon) else { refused() };
        #[cfg(target_os = "linux")]
        // Large pages spare the processor look-ups; without them everything works too.
        let _ = map.advise(memmap2::Advice::HugePage);
        let Some(memory) = NonNull::new(map.as_mut_ptr().cast()) else { refused() };
        Self { memory, len, free: BTreeMap::from([(0, len)]), _map: map }
    }

    /// The start of the first place for `len` numbers, or of the last for a small buffer.
    fn take(&mut self, len: usize) -> Option<usize> {
        let fits = |(_, room): &(&usize, &usize)| **room >= len;
        let small = len <= SMALL_LEN_MAX;
        let (&start, &room) = if small { self.free.iter().rfind(fits) } else { self.free.iter().find(fits) }?;
        self.free.remove(&start);
        let (own, rest) = if small { (start + room - len, start) } else { (start, start + len) };
        if room > len {
            self.free.insert(rest, room - len);
        }
        Some(own)
    }

    fn give(&mut self, place: &Range<usize>) {
        let Range { mut start, mut end } = *place;
        if let Some((&before, &room)) = self.free.range(..start).next_back()
            && before + room == start
        {
            start = before;
        }
        if let Some(room) = self.free.remove(&end) {
            end += room;
        }
        self.free.insert(start, end - start);
    }

    fn is_free(&self) -> bool {
        self.free.get(&0) == Some(&self.len)
    }
}

/// All mappings; those given back to the system leave their number.
struct Arena {
    chunks: Vec<Option<Chunk>>,
    idle: usize,
}

static ARENA: Mutex<Arena> = Mutex::new(Arena { chunks: Vec::new(), idle: 0 });

impl Arena {
    /// A place for `len` numbers, and whether its pages are new and thus zero.
    fn take(&mut self, len: usize) -> (Place, bool) {
        let found = self.chunks.iter_mut().enumerate().find_map(|(number, chunk)| {
            let chunk = chunk.as_mut()?;
            Some((number, chunk.take(len)?, chunk.memory))
        });
        let new = found.is_none();
        let (chunk, start, memory) = found.unwrap_or_else(|| {
            let mut chunk = Chunk::new(len.max(CHUNK_LEN));
            self.idle += chunk.len;
            let (start, memory) = (chunk.take(len).unwrap_or(0), chunk.memory);
            let number = self.chunks.iter().position(Option::is_none).unwrap_or(self.chunks.len());
            if number == self.chunks.len() {
                self.chunks.push(None);
            }
            self.chunks[number] = Some(chunk);
            (number, start, memory)
        });
        self.idle -= len;
        // SAFETY: the place lies within the chunk.
        let memory = unsafe { memory.add(start) };
        (Place { memory, chunk, range: start..start + len }, new)
    }

    fn give(&mut self, place: &Place) {
        let Some(chunk) = self.chunks.get_mut(place.chunk).and_then(Option::as_mut) else { return };
        self.idle += place.range.len();
        chunk.give(&place.range);
        // What is large was one buffer's own.
        if chunk.is_free() && (self.idle > IDLE_LEN_MAX || chunk.len > CHUNK_LEN) {
            self.idle -= chunk.len;
            self.chunks[place.chunk] = None;
        }
    }
}

/// Where numbers lie. Belongs to the arena it was taken from, to which its owner gives it back.
#[derive(Debug)]
struct Place {
    memory: NonNull<f32>,
    chunk: usize,
    range: Range<usize>,
}

// SAFETY: a place is one owner's.
unsafe impl Send for Place {}
// SAFETY: as above; shared, it is only read.
unsafe impl Sync for Place {}

impl Place {
    const fn none() -> Self {
        Self { memory: NonNull::dangling(), chunk: 0, range: 0..0 }
    }

    fn len(&self) -> usize {
        self.range.len()
    }

    fn give_back(self) {
        // A poisoned lock still guards whole places.
        ARENA.lock().unwrap_or_else(PoisonError::into_inner).give(&self);
    }
}

/// Idle places of one thread, shortest first.
struct Own {
    places: Vec<Place>,
    len: usize,
}

impl Own {
    /// A place for `len` numbers, and not for many more: that is left for those who need it.
    fn take(&mut self, len: usize) -> Option<Place> {
        let at = self.places.partition_point(|place| place.len() < len);
        self.places.get(at).filter(|place| place.len() <= 2 * len + 1024)?;
        let place = self.places.remove(at);
        self.len -= place.len();
        Some(place)
    }

    /// Keeps `place` if there is room for it, or gives it back.
    fn keep(&mut self, place: Place) -> Option<Place> {
        if place.len() > SMALL_LEN_MAX || self.len + place.len() > OWN_LEN_MAX {
            return Some(place);
        }
        let at = self.places.partition_point(|other| other.len() < place.len());
        self.len += place.len();
        self.places.insert(at, place);
        None
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        self.places.drain(..).for_each(Place::give_back);
    }
}

thread_local! {
    static OWN: RefCell<Own> = const { RefCell::new(Own { places: Vec::new(), len: 0 }) };
}

/// A buffer of numbers; its memory is kept for the next one when it is dropped.
#[derive(Debug)]
pub struct Buffer {
    place: Place,
    len: usize,
}

impl Buffer {
    /// No numbers.
    pub const fn empty() -> Self {
        Self { place: Place::none(), len: 0 }
    }

    /// `len` numbers, and whether they are known to be zero.
    fn new(len: usize) -> (Self, bool) {
        if len == 0 {
            return (Self::empty(), true);
        }
        let room = len.next_multiple_of(ALIGN);
        let own = OWN.try_with(|own| own.borrow_mut().take(room)).ok().flatten();
        let (place, new) =
            own.map_or_else(|| ARENA.lock().unwrap_or_else(PoisonError::into_inner).take(room), |place| (place, false));
        (Self { place, len }, new)
    }

    /// `len` numbers that hold anything: whoever asks overwrites all of them.
    pub fn dirty(len: usize) -> Self {
        Self::new(len).0
    }

    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        let (mut buffer, zero) = Self::new(len);
        if !zero {
            buffer.fill(0.0);
        }
        buffer
    }

    /// A copy of `values`.
    pub fn of(values: &[f32]) -> Self {
        let mut buffer = Self::dirty(values.len());
        buffer.copy_from_slice(values);
        buffer
    }

    /// Room for `len` numbers, which hold anything: its own, or new where that is less.
    pub fn room(&mut self, len: usize) -> &mut [f32] {
        if self.len < len {
            *self = Self::empty();
            *self = Self::dirty(len);
        }
        &mut self[..len]
    }
}

impl Default for Buffer {
    fn default() -> Self {
        Self::empty()
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        Self::of(self)
    }
}

impl Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // SAFETY: the place holds at least `len` numbers, zeros or what was written, until the buffer is dropped.
        unsafe { std::slice::from_raw_parts(self.place.memory.as_ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above, and no other buffer has this place.
        unsafe { std::slice::from_raw_parts_mut(self.place.memory.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.len == 0 {
            return;
        }
        let mut place = Some(std::mem::replace(&mut self.place, Place::none()));
        // A thread that is ending has nothing of its own any more.
        let _ = OWN.try_with(|own| place = place.take().and_then(|place| own.borrow_mut().keep(place)));
        if let Some(place) = place {
            place.give_back();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn buffers_have_the_length_that_was_asked_for() {
        let first = Buffer::of(&[1.0; 5000]);
        drop(first);
        let second = Buffer::dirty(4000);
        assert_eq!(second.len(), 4000);
        assert!(Buffer::zeros(4500).iter().all(|x| *x == 0.0));
        assert_eq!(&*Buffer::of(&[1.0, 2.0]), [1.0, 2.0]);
        assert!(Buffer::zeros(0).is_empty());
        let mut room = Buffer::empty();
        assert_eq!((room.room(30).len(), room.room(20).len(), room.len()), (30, 20, 30));
    }

    #[test]
    fn what_is_given_back_serves_other_sizes() {
        let mut arena = Arena { chunks: Vec::new(), idle: 0 };
        let len = 2 * SMALL_LEN_MAX;
        let [first, second, _third] = [(); 3].map(|()| arena.take(len).0);
        arena.give(&first);
        assert_eq!(arena.take(2 * len).0.range, 3 * len..5 * len);
        arena.give(&second);
        assert_eq!((arena.take(2 * len).0.range, arena.chunks.len()), (0..2 * len, 1));
        // Small ones lie at the other end.
        let small = arena.take(1600).0;
        assert_eq!((small.range.clone(), arena.take(160).0.range.end), (CHUNK_LEN - 1600..CHUNK_LEN, CHUNK_LEN - 1600));
        arena.give(&small);
        assert_eq!(arena.take(800).0.range.end, CHUNK_LEN);
        // One that is larger than a mapping has its own, which goes with it.
        let (large, new) = arena.take(CHUNK_LEN + ALIGN);
        assert_eq!((large.chunk, large.range.start, new), (1, 0, true));
        arena.give(&large);
        assert!(arena.chunks[1].is_none() && arena.idle < CHUNK_LEN);
        let (other, new) = arena.take(CHUNK_LEN);
        assert_eq!((other.chunk, new), (1, true));
        arena.give(&other);
        assert!(!arena.take(CHUNK_LEN).1);
    }

    #[test]
    fn mappings_beyond_what_may_lie_idle_are_given_up() {
        let mut arena = Arena { chunks: Vec::new(), idle: 0 };
        let count = IDLE_LEN_MAX / CHUNK_LEN + 2;
        let places: Vec<Place> = (0..count).map(|_| arena.take(CHUNK_LEN).0).collect();
        places.iter().for_each(|place| arena.give(place));
        assert_eq!(arena.idle, IDLE_LEN_MAX);
        assert_eq!(arena.chunks.iter().flatten().count(), IDLE_LEN_MAX / CHUNK_LEN);
    }

    #[test]
    fn a_thread_that_ends_leaves_its_places_to_others() {
        let place = std::thread::spawn(|| Buffer::of(&[1.0; 900]).as_ptr().addr()).join().unwrap();
        let held: Vec<Buffer> = std::iter::repeat_with(|| Buffer::dirty(900)).take(10_000).collect();
        assert!(held.iter().any(|buffer| buffer.as_ptr().addr() == place));
    }

    proptest! {
        #[test]
        fn buffers_do_not_touch(
            steps in prop::collection::vec((1usize..3000, any::<prop::sample::Index>(), any::<bool>()), 1..60),
        ) {
            let mut held: Vec<(f32, Buffer)> = Vec::new();
            for (mark, (len, which, drops)) in steps.into_iter().enumerate() {
                if drops && !held.is_empty() {
                    held.swap_remove(which.index(held.len()));
                }
                let mut buffer = Buffer::dirty(len);
                buffer.fill(mark as f32);
                held.push((mark as f32, buffer));
                prop_assert!(held.iter().all(|(mark, buffer)| buffer.iter().all(|x| x == mark)));
            }
        }
    }
}
