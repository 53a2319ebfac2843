//! What the loss of a row needs of its logits: found in the whole row, or put together from the ranks' parts of it.

use rayon::prelude::*;

use super::divergence::{self, Divergence};
use crate::Result;
use crate::model::VocabShard;
use crate::score::shard::{self, PartStats, RowPart, pick};
use crate::score::softmax::RowStats;

/// What is wanted of a row.
#[derive(Debug, Clone, Default)]
pub(super) struct Asked {
    /// Ids whose logits are wanted: the target, then the candidates.
    pub ids: Vec<u32>,
    /// Whether the teacher's row counts, and with which β and bound its divergence.
    pub teacher: Option<(f64, Option<f64>)>,
}

/// What was found in a row. All ranks that share the vocabulary find the same.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    pub stats: RowStats,
    /// Logits of [`Asked::ids`], in order.
    pub logits: Vec<f32>,
    /// The teacher's row and the divergence over the whole vocabulary, whose derivatives stand in the teacher's row now.
    pub teacher: Option<(RowStats, Divergence)>,
}

impl Facts {
    /// From a row with all ids; none when a number of it is not finite.
    pub(super) fn of(asked: &Asked, z_v: &[f32], teacher_v: Option<&mut [f32]>) -> Option<Facts> {
        let stats = RowStats::of(z_v)?;
        let teacher = match (asked.teacher, teacher_v) {
            (Some((beta, clip)), Some(teacher_v)) => {
                let teacher = RowStats::of(teacher_v)?;
                let found = divergence::over_vocabulary(z_v, &stats, teacher_v, &teacher, beta, clip);
                Some((teacher, found))
            }
            _ => None,
        };
        Some(Facts { stats, logits: asked.ids.iter().map(|&id| z_v[id as usize]).collect(), teacher })
    }

    /// From the parts `[rows, shard.len]` of a chunk, of which every rank has its own. `teacher_rv` is empty or as large.
    ///
    /// # Errors
    /// Ranks that are late, gone or have other rows.
    pub(super) fn of_parts(
        shard: &VocabShard,
        asked: &[Asked],
        logits_rv: &[f32],
        teacher_rv: &mut [f32],
    ) -> Result<Vec<Option<Facts>>> {
        let own = shard.len;
        let teacher_row = |r: usize| teacher_rv.get(r * own..(r + 1) * own);
        let parts: Vec<RowPart> = asked
            .par_iter()
            .zip(logits_rv.par_chunks(own))
            .enumerate()
            .map(|(r, (asked, z_v))| RowPart {
                own: PartStats::of(z_v, shard.first),
                other: asked.teacher.and(teacher_row(r)).map(|teacher_v| PartStats::of(teacher_v, shard.first)),
                picked: asked.ids.iter().map(|&id| pick(shard, z_v, id)).collect(),
                top: Vec::new(),
            })
            .collect();
        let whole = shard::join(shard, &parts, 0)?;
        let mut divergences = vec![Divergence::default(); asked.len()];
        if whole.iter().any(|row| row.other.is_some()) {
            let rows = teacher_rv.par_chunks_mut(own).zip(logits_rv.par_chunks(own)).zip(asked).zip(&whole);
            let local: Vec<Divergence> = rows
                .map(|(((teacher_v, z_v), asked), row)| match (asked.teacher, row.own, row.other.flatten()) {
                    (Some((beta, clip)), Some(own), Some(teacher)) => {
                        divergence::over_vocabulary(z_v, &own, teacher_v, &teacher, beta, clip)
                    }
                    _ => Divergence::default(),
                })
                .collect();
            let numbers = |d: &Divergence| [d.value, d.gradient_sum, f64::from(u8::from(d.clipped))];
            let sums = shard::sum(shard, &local.iter().flat_map(numbers).collect::<Vec<f64>>())?;
            divergences = sums
                .chunks_exact(3)
                .map(|sum| Divergence {
                    value: sum[0],
                    gradient_sum: sum[1],
                    clipped: sum[2] > 0.0,
                    student_mass: 1.0,
                    teacher_mass: 1.0,
                })
                .collect();
        }
        let facts = whole.into_iter().zip(divergences).map(|(row, divergence)| {
            let teacher = match row.other {
                Some(teacher) => Some((teacher?, divergence)),
                None => None,
            };
            Some(Facts { stats: row.own?, logits: row.picked, teacher })
        });
        Ok(facts.collect())
    }
}
