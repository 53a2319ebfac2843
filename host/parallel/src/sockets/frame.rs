//! The pieces in which buffers go over a connection.

use std::fmt;

/// The most bytes that follow a header.
pub(super) const CHUNK_BYTES_MAX: usize = 1 << 20;

/// Bytes of a header: magic 4, operation 1, nought 3, root 4, sequence 8, total 8, length 4; numbers little-endian.
pub(super) const HEADER_BYTES: usize = 32;

const MAGIC: [u8; 4] = *b"CPG1";

/// What a chunk belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    AllReduceSum,
    AllReduceMax,
    AllGather,
    ReduceScatterSum,
    Broadcast,
    Barrier,
    AllToAll,
    AllGatherBytes,
    Message,
    /// A part of a sum on its way through the processes of a group.
    Part,
    /// The sender has failed; the bytes say why.
    Abort,
}

impl Operation {
    const ALL: [Operation; 11] = [
        Operation::AllReduceSum,
        Operation::AllReduceMax,
        Operation::AllGather,
        Operation::ReduceScatterSum,
        Operation::Broadcast,
        Operation::Barrier,
        Operation::AllToAll,
        Operation::AllGatherBytes,
        Operation::Message,
        Operation::Part,
        Operation::Abort,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Operation::AllReduceSum => "all_reduce_sum",
            Operation::AllReduceMax => "all_reduce_max",
            Operation::AllGather => "all_gather",
            Operation::ReduceScatterSum => "reduce_scatter_sum",
            Operation::Broadcast => "broadcast",
            Operation::Barrier => "barrier",
            Operation::AllToAll => "all_to_all",
            Operation::AllGatherBytes => "all_gather_bytes",
            Operation::Message => "recv",
            Operation::Part => "sum",
            Operation::Abort => "abort",
        }
    }
}

/// What stands before a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub operation: Operation,
    pub root: Option<usize>,
    /// Which collective of its group, from 1; 0 for messages between two ranks.
    pub sequence: u64,
    /// Bytes that the ranks have to agree on.
    pub total: u64,
    /// Bytes that follow.
    pub len: usize,
}

impl Header {
    /// Begins a frame in `bytes`, which loses what it held.
    pub(super) fn start(&self, bytes: &mut Vec<u8>) {
        bytes.clear();
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&[self.operation as u8, 0, 0, 0]);
        // A world has fewer ranks than that, and a chunk fewer bytes.
        let root = self.root.map_or(u32::MAX, |root| root as u32);
        bytes.extend_from_slice(&root.to_le_bytes());
        bytes.extend_from_slice(&self.sequence.to_le_bytes());
        bytes.extend_from_slice(&self.total.to_le_bytes());
        bytes.extend_from_slice(&(self.len as u32).to_le_bytes());
    }

    /// Reads a header; what is wrong with it otherwise.
    pub(super) fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Header, String> {
        let number = |at: usize, len: usize| {
            bytes[at..at + len].iter().rev().fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
        };
        if bytes[..4] != MAGIC || bytes[5..8] != [0; 3] {
            return Err("it sent what is no frame of a group".into());
        }
        let Some(operation) = Operation::ALL.get(bytes[4] as usize).copied() else {
            return Err(format!("it sent a frame of unknown kind {}", bytes[4]));
        };
        let len = number(28, 4) as usize;
        if len > CHUNK_BYTES_MAX {
            return Err(format!("it announced a frame of {len} bytes; at most {CHUNK_BYTES_MAX} are allowed"));
        }
        let root = match number(8, 4) {
            none if none == u64::from(u32::MAX) => None,
            root => Some(root as usize),
        };
        Ok(Header { operation, root, sequence: number(12, 8), total: number(20, 8), len })
    }
}

impl fmt::Display for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` of {} bytes", self.operation.name(), self.total)?;
        if let Some(root) = self.root {
            write!(f, " from rank {root}")?;
        }
        if self.sequence > 0 { write!(f, " (number {}, {} bytes)", self.sequence, self.len) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn headers_come_back(kind in 0..11_usize, root in prop::option::of(0..4096_usize), sequence: u64, total: u64, len in 0..=CHUNK_BYTES_MAX) {
            let header = Header { operation: Operation::ALL[kind], root, sequence, total, len };
            let mut bytes = vec![7; 3];
            header.start(&mut bytes);
            let bytes: [u8; HEADER_BYTES] = bytes.try_into().unwrap();
            prop_assert_eq!(bytes[4] as usize, kind);
            prop_assert_eq!(Header::parse(&bytes), Ok(header));
        }

        #[test]
        fn any_bytes_are_a_bounded_header_or_an_error(mut bytes: [u8; HEADER_BYTES], magic: bool) {
            if magic {
                bytes[..4].copy_from_slice(&MAGIC);
                bytes[5..8].fill(0);
            }
            if let Ok(header) = Header::parse(&bytes) {
                prop_assert!(header.len <= CHUNK_BYTES_MAX);
            }
        }
    }
}
