//! Which part of every parameter a rank holds.
//!
//! Tensor parallel ranks hold rectangles of the matrices: rows of those whose results are split (queries, keys, values,
//! gate, up, embedding, head), columns of those whose inputs are (attention output, down). A block's rectangles lie one
//! after the other in a flat buffer, and that buffer is cut into equal shards (FSDP). So a rank's piece of a parameter is
//! a run of a rectangle.

use std::ops::Range;

use crate::model::{ModelConfig, ParamSpec};
use crate::{EngineError, Result};

/// Part `index` of `len` things in `parts` parts whose sizes differ by at most one.
pub(crate) fn even(len: usize, parts: usize, index: usize) -> Range<usize> {
    len * index / parts..len * (index + 1) / parts
}

/// Query heads of a rank and the key-value heads that they look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HeadPart {
    pub heads: Range<usize>,
    pub kv_heads: Range<usize>,
}

/// The heads of each of `ranks` ranks; none if a rank would have no head. Key-value heads stay with all their query heads
/// as long as there is one for each rank; else ranks share one, each with some of its query heads. Either way all
/// key-value heads of a rank have the same number of query heads there.
pub(crate) fn split_heads(heads: usize, kv_heads: usize, ranks: usize) -> Option<Vec<HeadPart>> {
    let group = heads / kv_heads;
    if ranks <= kv_heads {
        let part = |rank| {
            let kv_heads = even(kv_heads, ranks, rank);
            HeadPart { heads: kv_heads.start * group..kv_heads.end * group, kv_heads }
        };
        return Some((0..ranks).map(part).collect());
    }
    let mut parts = Vec::with_capacity(ranks);
    for kv_head in 0..kv_heads {
        let sharing = even(ranks, kv_heads, kv_head).len();
        if sharing > group {
            return None;
        }
        for index in 0..sharing {
            let own = even(group, sharing, index);
            let first = kv_head * group;
            parts.push(HeadPart { heads: first + own.start..first + own.end, kv_heads: kv_head..kv_head + 1 });
        }
    }
    Some(parts)
}

/// What a tensor parallel rank has of every block, the embedding and the head.
#[derive(Debug, Clone)]
pub(crate) struct TpPart {
    pub heads: HeadPart,
    /// Whether ranks share key-value heads.
    pub shares_kv: bool,
    /// Whether this rank is the first of those that have its key-value heads.
    pub first_of_kv: bool,
    /// Whether this is the first rank.
    pub first: bool,
    /// Columns inside the SwiGLU.
    pub inner: Range<usize>,
    /// Rows of the embedding and the head.
    pub vocab: Range<usize>,
    /// How context parallel ranks divide this rank's heads during attention; numbered within them.
    pub context: Vec<HeadPart>,
}

impl TpPart {
    /// Rank `rank` of `tp`, in a mesh with `cp` context parallel ranks. All ranks agree on what cannot be cut.
    pub fn of(config: &ModelConfig, rank: usize, tp: usize, cp: usize) -> Result<Self> {
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let refuse = || {
            EngineError::invalid(
                format!("{heads} heads with {kv_heads} key-value heads cannot be cut over tp {tp} × cp {cp} ranks"),
                "choose `tp_size` and `cp_size` so that every rank gets a head",
            )
        };
        let parts = split_heads(heads, kv_heads, tp).ok_or_else(refuse)?;
        let mut contexts = Vec::with_capacity(tp);
        for part in &parts {
            contexts.push(split_heads(part.heads.len(), part.kv_heads.len(), cp).ok_or_else(refuse)?);
        }
        for (what, size, ranks) in
            [("`intermediate_size`", config.intermediate_size, tp), ("`vocab_size`", config.vocab_size, tp * cp)]
        {
            if size < ranks {
                return Err(EngineError::invalid(
                    format!("{what} {size} cannot be cut over {ranks} ranks (tp {tp} × cp {cp})"),
                    "choose a smaller `tp_size`",
                ));
            }
        }
        let (Some(own), Some(context)) = (parts.get(rank).cloned(), contexts.into_iter().nth(rank)) else {
            return Err(EngineError::invalid(format!("rank {rank} of {tp}"), ""));
        };
        Ok(Self {
            shares_kv: tp > kv_heads,
            first_of_kv: rank == 0 || parts[rank - 1].kv_heads != own.kv_heads,
            first: rank == 0,
            inner: even(config.intermediate_size, tp, rank),
            vocab: even(config.vocab_size, tp, rank),
            heads: own,
            context,
        })
    }

    /// The rectangle of a parameter that this rank holds, and whether it is the first of the ranks that hold it.
    fn region(&self, config: &ModelConfig, spec: &ParamSpec) -> (Region, bool) {
        let dim = config.head_dim;
        let wide = |range: &Range<usize>| range.start * dim..range.end * dim;
        let rows_of = |rows: Range<usize>| Region::rows(spec, rows);
        let columns_of = |columns: Range<usize>| Region::columns(spec, columns);
        let has = |part: &str| spec.name.contains(part);
        if has("embed_tokens") || has("lm_head") {
            (rows_of(self.vocab.clone()), true)
        } else if has("q_proj.") {
            (rows_of(wide(&self.heads.heads)), true)
        } else if has("k_proj.") || has("v_proj.") {
            (rows_of(wide(&self.heads.kv_heads)), self.first_of_kv)
        } else if has("gate_proj.") || has("up_proj.") {
            (rows_of(self.inner.clone()), true)
        } else if has("o_proj.weight") {
            (columns_of(wide(&self.heads.heads)), true)
        } else if has("down_proj.weight") {
            (columns_of(self.inner.clone()), true)
        } else {
            // Norms, and biases that are added to a sum over ranks: the same on every rank.
            (rows_of(0..spec.shape[0]), self.first)
        }
    }
}

/// A rectangle of a matrix, or a part of a vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Region {
    rows: Range<usize>,
    columns: Range<usize>,
    /// Columns of the whole matrix; 1 for a vector.
    width: usize,
}

impl Region {
    fn rows(spec: &ParamSpec, rows: Range<usize>) -> Self {
        let width = spec.shape[1..].iter().product();
        Self { rows, columns: 0..width, width }
    }

    fn columns(spec: &ParamSpec, columns: Range<usize>) -> Self {
        Self { rows: 0..spec.shape[0], columns, width: spec.shape[1..].iter().product() }
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.rows.len() * self.columns.len()
    }

    /// Where values `part` of the rectangle, row after row, lie in the whole: runs of (first, length), in order.
    pub fn runs(&self, part: Range<usize>) -> Vec<(usize, usize)> {
        let mut runs: Vec<(usize, usize)> = Vec::new();
        let own = self.columns.len();
        let mut at = part.start;
        while at < part.end {
            let (row, column) = (at / own, at % own);
            let len = (own - column).min(part.end - at);
            let first = (self.rows.start + row) * self.width + self.columns.start + column;
            match runs.last_mut() {
                Some((last, len_before)) if *last + *len_before == first => *len_before += len,
                _ => runs.push((first, len)),
            }
            at += len;
        }
        runs
    }
}

/// A parameter in the flat buffer of its group.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    /// In the buffer.
    pub range: Range<usize>,
    /// Of the parameter.
    pub region: Region,
    /// Whether this is the first tensor parallel rank that holds it.
    pub first_holder: bool,
}

/// A group of parameters that is put together at once: the embedding, a block, the last norm, the head.
#[derive(Debug, Clone)]
pub(crate) struct GroupPlan {
    /// Index of the first parameter in [`ModelConfig::params`].
    pub first: usize,
    pub places: Vec<Place>,
    /// Values of the buffer.
    pub len: usize,
}

/// All groups of a model as a tensor parallel rank has them: the embedding, each block, the norm, the head unless tied.
pub(crate) fn group_plans(config: &ModelConfig, part: &TpPart) -> Vec<GroupPlan> {
    let mut lists = vec![config.embed_params()];
    lists.extend((0..config.num_hidden_layers).map(|layer| config.block_params(layer)));
    lists.push(config.norm_params());
    lists.push(config.head_params());
    lists.retain(|list| !list.is_empty());
    let mut first = 0;
    let plan = |list: Vec<ParamSpec>| {
        let mut len = 0;
        let place = |spec: &ParamSpec| {
            let (region, first_holder) = part.region(config, spec);
            len += region.len();
            Place { range: len - region.len()..len, region, first_holder }
        };
        let places: Vec<Place> = list.iter().map(place).collect();
        first += places.len();
        GroupPlan { first: first - places.len(), places, len }
    };
    lists.into_iter().map(plan).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_head_has_one_rank_and_its_keys_with_it() {
        for (heads, kv_heads) in [(6, 3), (4, 4), (8, 1), (4, 2), (32, 8)] {
            let group = heads / kv_heads;
            for ranks in 1..=heads {
                let Some(parts) = split_heads(heads, kv_heads, ranks) else { continue };
                assert_eq!(parts.len(), ranks);
                let all: Vec<usize> = parts.iter().flat_map(|part| part.heads.clone()).collect();
                assert_eq!(all, (0..heads).collect::<Vec<_>>());
                for part in parts {
                    let needed: std::collections::BTreeSet<usize> =
                        part.heads.clone().map(|head| head / group).collect();
                    assert_eq!(needed.into_iter().collect::<Vec<_>>(), part.kv_heads.clone().collect::<Vec<_>>());
                    assert!(part.heads.len().is_multiple_of(part.kv_heads.len()) && !part.heads.is_empty());
                }
            }
            assert_eq!(split_heads(heads, kv_heads, heads + 1), None);
        }
    }

    #[test]
    fn runs_cover_the_rectangle() {
        let spec = ParamSpec { name: "x".into(), shape: vec![3, 4] };
        let region = Region::columns(&spec, 1..3);
        assert_eq!((region.len(), region.runs(0..6)), (6, vec![(1, 2), (5, 2), (9, 2)]));
        assert_eq!(region.runs(1..4), [(2, 1), (5, 2)]);
        assert_eq!(Region::rows(&spec, 1..3).runs(1..7), [(5, 6)]);
        assert!(region.runs(3..3).is_empty());
    }
}
