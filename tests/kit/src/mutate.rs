//! Changes a WebAssembly component in ways that keep most of it valid, so that the parts behind the first check are
//! reached too: bytes, numbers, sections and names, at every level of nesting. What to do is read from a script, so that
//! a fuzzer or a property test can search and shrink it.

/// Changes of one script; more would leave nothing to recognise.
const CHANGES_MAX: usize = 12;
/// A result above this is cut off.
const BYTES_MAX: usize = 4 << 20;
/// Modules and components within components are entered this deep.
const DEPTH_MAX: usize = 8;

/// `seed` after the changes that `script` asks for; an empty script changes nothing. `other` is what is copied from.
pub fn mutate(seed: &[u8], other: &[u8], script: &[u8]) -> Vec<u8> {
    let mut script = Script { bytes: script };
    let mut bytes = seed.to_vec();
    for _ in 0..CHANGES_MAX {
        if script.bytes.is_empty() {
            break;
        }
        bytes = change(&bytes, other, &mut script, 0);
        bytes.truncate(BYTES_MAX);
    }
    bytes
}

/// Decisions, one after the other; zero when none are left.
struct Script<'a> {
    bytes: &'a [u8],
}

impl Script<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.bytes.split_first() else { return 0 };
        self.bytes = rest;
        *first
    }

    /// A number below `end`, or 0 when there is none.
    fn below(&mut self, end: usize) -> usize {
        let drawn = (0..3).fold(0usize, |sum, _| sum << 8 | usize::from(self.byte()));
        drawn.checked_rem(end).unwrap_or(0)
    }

    /// A number as attackers like them, in LEB128, at times longer than need be.
    fn leb(&mut self) -> Vec<u8> {
        const LIKED: [u64; 12] =
            [0, 1, 2, 63, 127, 128, 65_535, 65_536, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, u64::MAX];
        let choice = self.byte();
        let value = LIKED.get(usize::from(choice >> 4)).copied().unwrap_or_else(|| u64::from(self.byte()));
        let mut bytes = leb(value);
        if choice & 15 == 15 {
            *bytes.last_mut().expect("LEB128 has a byte") |= 0x80;
            bytes.extend([0x80, 0x80, 0]);
        }
        bytes
    }
}

fn leb(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let low = (value & 0x7f) as u8;
        value >>= 7;
        bytes.push(if value == 0 { low } else { low | 0x80 });
        if value == 0 {
            return bytes;
        }
    }
}

type Section<'a> = (u8, &'a [u8]);

/// The sections after the eight bytes of the head, or `None` when they cannot be told apart.
fn sections(bytes: &[u8]) -> Option<Vec<Section<'_>>> {
    let mut rest = bytes.strip_prefix(b"\0asm")?.get(4..)?;
    let mut found = Vec::new();
    while let Some((id, after)) = rest.split_first() {
        let (mut len, mut shift, mut at) = (0u64, 0, 0);
        loop {
            let byte = *after.get(at)?;
            at += 1;
            len |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                break;
            }
            if shift > 28 {
                return None;
            }
        }
        let body = after.get(at..)?.get(..usize::try_from(len).ok()?)?;
        found.push((*id, body));
        rest = &after[at + body.len()..];
    }
    Some(found)
}

fn join(head: &[u8], sections: &[Section<'_>]) -> Vec<u8> {
    let mut bytes = head.to_vec();
    for (id, body) in sections {
        bytes.push(*id);
        bytes.extend(leb(body.len() as u64));
        bytes.extend_from_slice(body);
    }
    bytes
}

/// One change somewhere in `bytes`, with the lengths of the sections around it made to fit.
fn change(bytes: &[u8], other: &[u8], script: &mut Script<'_>, depth: usize) -> Vec<u8> {
    let kind = script.byte() % 16;
    let Some(found) = sections(bytes).filter(|found| !found.is_empty()) else {
        return change_bytes(bytes, script);
    };
    let mut parts = found.clone();
    let at = script.below(parts.len());
    let (id, body) = parts[at];
    let made: Vec<u8>;
    match kind {
        0..=3 if depth < DEPTH_MAX && matches!(id, 1 | 4) && body.starts_with(b"\0asm") => {
            made = change(body, other, script, depth + 1);
            parts[at].1 = &made;
        }
        0..=7 => {
            made = change_bytes(body, script);
            parts[at].1 = &made;
        }
        8 => parts[at].1 = &body[..script.below(body.len() + 1)],
        9 => parts.insert(script.below(found.len() + 1), found[at]),
        10 => {
            parts.remove(at);
        }
        11 => {
            let with = script.below(parts.len());
            parts.swap(at, with);
        }
        12 => {
            let theirs = sections(other).unwrap_or_default();
            if let Some(section) = theirs.get(script.below(theirs.len())) {
                parts.insert(at, *section);
            }
        }
        13 => {
            // The whole file within itself, as a component and as a module.
            made = bytes.to_vec();
            parts.insert(at, (if script.byte().is_multiple_of(2) { 4 } else { 1 }, &made));
        }
        14 => parts[at].0 = script.byte() % 16,
        _ => {
            made = change_name(bytes, script);
            return made;
        }
    }
    join(&bytes[..8], &parts)
}

/// A byte, a number, or a few bytes more or less.
fn change_bytes(bytes: &[u8], script: &mut Script<'_>) -> Vec<u8> {
    let mut made = bytes.to_vec();
    let at = script.below(made.len() + 1);
    match script.byte() % 5 {
        0 => {
            if let Some(byte) = made.get_mut(at) {
                *byte ^= 1 << (script.byte() % 8);
            }
        }
        1 => {
            if let Some(byte) = made.get_mut(at) {
                *byte = script.byte();
            }
        }
        2 => {
            let end = (at + 1 + script.below(4)).min(made.len());
            made.splice(at.min(end)..end, script.leb());
        }
        3 => {
            let end = (at + script.below(9)).min(made.len());
            made.drain(at.min(end)..end);
        }
        _ => {
            let end = (at + script.below(65)).min(made.len());
            let again = made[at.min(end)..end].to_vec();
            made.splice(at..at, again);
        }
    }
    made
}

/// Another letter or digit in a name of the contract, of the same length.
fn change_name(bytes: &[u8], script: &mut Script<'_>) -> Vec<u8> {
    const NAME: &[u8] = b"cosmos:plugin/";
    let mut made = bytes.to_vec();
    let starts: Vec<usize> =
        made.windows(NAME.len()).enumerate().filter(|(_, window)| *window == NAME).map(|(at, _)| at).collect();
    if let Some(start) = starts.get(script.below(starts.len())) {
        let at = start + NAME.len() + script.below(16);
        if let Some(byte) = made.get_mut(at) {
            *byte = b"0123456789.@-az\xff"[script.below(16)];
        }
    }
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    fn component() -> Vec<u8> {
        let module = join(b"\0asm\x01\0\0\0", &[(1, &[0]), (3, &[0])]);
        join(b"\0asm\x0d\0\x01\0", &[(1, &module), (0, b"\x04name"), (11, b"cosmos:plugin/reward@0.1.0")])
    }

    #[test]
    fn an_empty_script_changes_nothing_and_any_other_is_harmless() {
        let seed = component();
        assert_eq!(mutate(&seed, &seed, &[]), seed);
        assert_eq!(join(&seed[..8], &sections(&seed).unwrap()), seed);
        let mut changed = 0;
        for number in 0..20_000u32 {
            let script: Vec<u8> = number.wrapping_mul(0x9e37_79b9).to_le_bytes().repeat(1 + number as usize % 5);
            changed += usize::from(mutate(&seed, b"\0asm\x0d\0\x01\0", &script) != seed);
        }
        assert!(changed > 15_000, "{changed}");
    }

    #[test]
    fn what_is_no_wasm_is_changed_too() {
        assert_eq!(mutate(b"", b"", &[1, 2, 3, 4, 5, 6, 7, 8]).len(), 0);
        assert_ne!(mutate(b"hello", b"", &[0, 0, 0, 1, 1, 65]), b"hello");
    }
}
