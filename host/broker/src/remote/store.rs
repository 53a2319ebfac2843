//! Blobs in Redis. A large one is kept in parts, the first of which is stored last and says how many there are.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use redis::Script;

use super::RedisLink;
use crate::wire::frame::{HEADER_BYTES, Kind};
use crate::wire::part::{PART_FIELDS_BYTES, PartHead, decode_part, encode_part};
use crate::{Result, Store, StoreLimits};

/// Keys that are asked for at once: their first parts lie in memory together.
const KEYS_AT_ONCE: usize = 16;

/// Blobs in Redis, under a prefix of the run.
pub struct RedisStore {
    link: Arc<RedisLink>,
    prefix: String,
    limits: StoreLimits,
    rejected: AtomicU64,
    put_head: Script,
}

impl RedisStore {
    /// The store of the run `prefix`.
    pub fn new(link: Arc<RedisLink>, prefix: &str, limits: StoreLimits) -> RedisStore {
        // Gives back the head of what it replaces, whose other parts are then of no use.
        let put_head = Script::new(
            "local old = redis.call('GETRANGE', KEYS[1], 0, 63)
             redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
             return old",
        );
        RedisStore { link, prefix: prefix.into(), limits, rejected: AtomicU64::new(0), put_head }
    }

    fn key(&self, key: &str) -> String {
        format!("{}:blob:{key}", self.prefix)
    }

    fn part_key(&self, key: &str, head: &PartHead, index: u64) -> String {
        format!("{}:part:{key}:{:x}-{:08x}:{index}", self.prefix, head.total, head.sum)
    }

    fn part_bytes(&self) -> usize {
        self.limits.part_bytes_max.max(1)
    }

    /// The keys of all parts after the first.
    fn other_parts(&self, key: &str, head: &PartHead) -> Vec<String> {
        (1..head.parts).map(|index| self.part_key(key, head, index)).collect()
    }

    /// The head in the first bytes of a part, whose data (and so whose checksum) is not at hand.
    fn peek(&self, start: &[u8]) -> Option<PartHead> {
        let fields = start.get(HEADER_BYTES..HEADER_BYTES + 32)?;
        let number = |i: usize| fields[8 * i..8 * i + 8].iter().rev().fold(0_u64, |n, byte| n << 8 | u64::from(*byte));
        let head = PartHead { total: number(0), parts: number(1), index: number(2), sum: number(3) as u32 };
        let parts_max = self.limits.blob_bytes_max.div_ceil(self.part_bytes() as u64).max(1);
        (start[5] == Kind::Part as u8 && head.parts <= parts_max).then_some(head)
    }

    fn delete(&self, keys: &[String]) -> Result<()> {
        for some in keys.chunks(1024) {
            self.link.run("removing blobs", |c| redis::cmd("UNLINK").arg(some).exec(c))?;
        }
        Ok(())
    }

    fn reject(&self, key: &str, reason: &str) {
        self.rejected.fetch_add(1, Ordering::Relaxed);
        tracing::warn!("redis `{}`: blob `{key}` dropped: {reason}", self.link.address());
    }

    /// The whole blob behind its first part.
    fn assemble(&self, key: &str, first: &[u8]) -> Result<Option<Vec<u8>>> {
        let (head, mut blob) = match decode_part(first, &self.limits) {
            Ok(part) => part,
            Err(error) => {
                self.reject(key, &error.to_string());
                return Ok(None);
            }
        };
        for index in 1..head.parts {
            let part_key = self.part_key(key, &head, index);
            let part = self.read(&[part_key])?.pop().unwrap_or_default();
            if part.is_empty() {
                // Replaced or removed while it was read.
                return Ok(None);
            }
            match decode_part(&part, &self.limits) {
                Ok((other, data))
                    if other == (PartHead { index, ..head }) && (blob.len() + data.len()) as u64 <= head.total =>
                {
                    blob.extend_from_slice(&data);
                }
                Ok((other, _)) => {
                    self.reject(key, &format!("part {index} says it is part {} of another blob", other.index));
                    return Ok(None);
                }
                Err(error) => {
                    self.reject(key, &error.to_string());
                    return Ok(None);
                }
            }
        }
        if blob.len() as u64 != head.total || (head.parts > 1 && crc32c::crc32c(&blob) != head.sum) {
            self.reject(key, "its parts do not make the whole");
            return Ok(None);
        }
        Ok(Some(blob))
    }

    /// The values of keys, no longer than a part may be; empty for one that is not there.
    fn read(&self, keys: &[String]) -> Result<Vec<Vec<u8>>> {
        let longest = self.part_bytes() + HEADER_BYTES + PART_FIELDS_BYTES;
        self.link.run("fetching blobs", |c| {
            let mut pipe = redis::pipe();
            for key in keys {
                // One byte more than the longest: what is too long is then seen to be.
                pipe.cmd("GETRANGE").arg(key).arg(0).arg(longest);
            }
            pipe.query(c)
        })
    }
}

impl Store for RedisStore {
    fn put(&self, key: &str, bytes: &[u8], keep_ms_max: u64) -> Result<()> {
        self.limits.check(key, bytes.len())?;
        let keep_ms = keep_ms_max.clamp(1, i64::MAX as u64 / 4);
        let parts: Vec<&[u8]> = if bytes.is_empty() { vec![bytes] } else { bytes.chunks(self.part_bytes()).collect() };
        let sum = crc32c::crc32c(bytes);
        let head = PartHead { total: bytes.len() as u64, parts: parts.len() as u64, index: 0, sum };
        for (index, data) in (0_u64..).zip(&parts).skip(1) {
            let frame = encode_part(PartHead { index, ..head }, data);
            let part_key = self.part_key(key, &head, index);
            self.link.run("storing a blob", |c| {
                redis::cmd("SET").arg(&part_key).arg(&frame).arg("PX").arg(keep_ms).exec(c)
            })?;
        }
        let frame = encode_part(head, parts[0]);
        let old: Vec<u8> =
            self.link.run("storing a blob", |c| self.put_head.key(self.key(key)).arg(&frame).arg(keep_ms).invoke(c))?;
        match self.peek(&old) {
            Some(old) if (old.total, old.sum) != (head.total, head.sum) => self.delete(&self.other_parts(key, &old)),
            _ => Ok(()),
        }
    }

    fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Vec<u8>>>> {
        let mut blobs = Vec::with_capacity(keys.len());
        for some in keys.chunks(KEYS_AT_ONCE) {
            some.iter().try_for_each(|key| self.limits.check_key(key))?;
            let firsts = self.read(&some.iter().map(|key| self.key(key)).collect::<Vec<_>>())?;
            for (key, first) in some.iter().zip(firsts) {
                blobs.push(if first.is_empty() { None } else { self.assemble(key, &first)? });
            }
        }
        Ok(blobs)
    }

    fn remove(&self, keys: &[String]) -> Result<()> {
        for some in keys.chunks(256) {
            let heads: Vec<Vec<u8>> = self.link.run("removing blobs", |c| {
                let mut pipe = redis::pipe();
                for key in some {
                    pipe.cmd("GETRANGE").arg(self.key(key)).arg(0).arg(63);
                }
                pipe.query(c)
            })?;
            // The heads first: a reader then finds nothing, where it would else find a blob without its end.
            self.delete(&some.iter().map(|key| self.key(key)).collect::<Vec<_>>())?;
            for (key, head) in some.iter().zip(&heads) {
                if let Some(head) = self.peek(head) {
                    self.delete(&self.other_parts(key, &head))?;
                }
            }
        }
        Ok(())
    }

    fn rejected(&self) -> u64 {
        self.rejected.load(Ordering::Relaxed)
    }
}
