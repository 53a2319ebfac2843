//! What the loss of a row needs of its logits: found in the whole row, in parts of it that come one after the other, or put
//! together from the ranks' parts.

use std::ops::Range;

use cosmos_kernels::Isa;
use cosmos_kernels::vocabulary::RunningSums;
use rayon::prelude::*;

use super::divergence::{self, Divergence};
use crate::model::VocabShard;
use crate::score::shard::{self, PartStats, RowPart, pick};
use crate::score::softmax::{RowStats, apply_temperature};
use crate::{EngineError, Result};

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

/// The rows of a loss, whose logits come in parts of the vocabulary, one after the other.
#[derive(Debug, Default)]
pub(super) struct SeenRows(Vec<SeenRow>);

#[derive(Debug, Default)]
struct SeenRow {
    sums: RunningSums,
    /// Single logits that are wanted, by id; NaN before they have come.
    asked: Vec<(u32, f32)>,
}

impl SeenRows {
    /// Takes the logits `[rows, part]` of the ids from `first` on in, and divides them by the temperature. `asked` gives the ids
    /// whose logits are wanted of a row.
    ///
    /// # Errors
    /// Parts that do not follow each other.
    pub(super) fn add(
        &mut self,
        rows: Range<usize>,
        first: usize,
        logits_rp: &mut [f32],
        temperature: f32,
        asked: impl Fn(usize) -> Vec<u32> + Sync,
    ) -> Result<()> {
        if self.0.len() < rows.end {
            self.0.resize_with(rows.end, SeenRow::default);
        }
        let width = logits_rp.len() / rows.len().max(1);
        let own = &mut self.0[rows.clone()];
        if let Some(row) = own.iter().find(|row| row.sums.seen() != first) {
            let message = format!("logits from id {first} on of rows {rows:?}, of which {} are there", row.sums.seen());
            return Err(EngineError::invalid(message, ""));
        }
        logits_rp.par_chunks_mut(width.max(1)).zip(own).zip(rows).for_each(|((z_p, seen), row)| {
            if first == 0 {
                seen.asked = asked(row).into_iter().map(|id| (id, f32::NAN)).collect();
            }
            apply_temperature(z_p, temperature);
            seen.sums.add(Isa::best(), z_p);
            for (id, logit) in &mut seen.asked {
                if let Some(z) = (*id as usize).checked_sub(first).and_then(|at| z_p.get(at)) {
                    *logit = *z;
                }
            }
        });
        Ok(())
    }

    /// Logits of each row so far, the least where they differ.
    pub(super) fn vocab(&self) -> usize {
        self.0.iter().map(|row| row.sums.seen()).min().unwrap_or_default()
    }

    /// # Errors
    /// Another number of rows than `rows`.
    pub(super) fn check_rows(&self, rows: usize) -> Result<()> {
        if self.0.len() == rows {
            return Ok(());
        }
        Err(EngineError::invalid(format!("{} of {rows} rows of the loss were seen", self.0.len()), ""))
    }

    /// What was found in each; none where a number of the row is not finite.
    pub(super) fn into_facts(self) -> impl Iterator<Item = Option<Facts>> {
        self.0.into_iter().map(|SeenRow { sums, asked }| {
            let stats = RowStats::from_sums(sums.finish()?);
            Some(Facts { stats, logits: asked.into_iter().map(|(_, logit)| logit).collect(), teacher: None })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_in_parts_say_what_whole_rows_say() {
        let (rows, vocab, part) = (3, 2500, 1024);
        let logits_rv: Vec<f32> = (0..rows * vocab).map(|i| ((i * 7919) % 613) as f32 * 0.02 - 3.0).collect();
        let ids = |row: usize| vec![row as u32, 2499, 1023, 1024, 77];
        for temperature in [1.0, 0.7] {
            let mut seen = SeenRows::default();
            // Rows come in chunks within a part.
            for first in (0..vocab).step_by(part) {
                for chunk in [0..2, 2..3] {
                    let own = |r: usize| logits_rv[r * vocab + first..r * vocab + vocab.min(first + part)].to_vec();
                    let mut logits_rp: Vec<f32> = chunk.clone().flat_map(own).collect();
                    seen.add(chunk, first, &mut logits_rp, temperature, ids).unwrap();
                }
            }
            assert_eq!(seen.vocab(), vocab);
            seen.check_rows(rows).unwrap();
            for (row, found) in seen.into_facts().enumerate() {
                let mut whole_v = logits_rv[row * vocab..(row + 1) * vocab].to_vec();
                apply_temperature(&mut whole_v, temperature);
                let asked = Asked { ids: ids(row), teacher: None };
                let (found, expected) = (found.unwrap(), Facts::of(&asked, &whole_v, None).unwrap());
                assert_eq!(found.logits, expected.logits);
                assert_eq!(format!("{:?}", found.stats), format!("{:?}", expected.stats));
            }
        }
    }

    #[test]
    fn parts_that_do_not_follow_each_other_are_refused() {
        let mut seen = SeenRows::default();
        let asked = |_| vec![0];
        assert!(seen.add(0..1, 1024, &mut [0.0; 8], 1.0, asked).is_err());
        seen.add(0..1, 0, &mut [f32::NAN; 1024], 1.0, asked).unwrap();
        assert!(seen.add(0..1, 0, &mut [0.0; 1024], 1.0, asked).is_err());
        seen.add(0..1, 1024, &mut [0.0; 8], 1.0, asked).unwrap();
        assert!(seen.check_rows(2).unwrap_err().to_string().contains("1 of 2 rows"));
        // A number that was not finite is not forgotten.
        assert!(seen.vocab() == 1032 && seen.into_facts().all(|facts| facts.is_none()));
    }
}
