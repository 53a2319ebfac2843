//! Incremental steps: tokens appended to their sequences, block after block.
//!
//! Groups of tokens go through the blocks in turn. A group's attention reads its sequences' keys and values, far more than
//! any cache near a core holds; while the group before it is in its products, which read little beside their weights, these
//! fetch one sequence after the other, and each is attended to as soon as it is there.

use std::cell::RefCell;
use std::ops::Range;

use cosmos_kernels::memory::Buffer;
use cosmos_kernels::page::{Page, attend};
use cosmos_kernels::{ahead, threads};

use super::cache::Cache;
use super::layout::CpuBlock;
use super::matrix::Factor;
use super::network::Run;
use super::{CpuEngine, TILE_TOKENS};
use crate::block::{BlockEngine, DecodeRow};
use crate::{EngineError, Result};

/// Single tokens of at most as many sequences go through a block together on a thread.
const STEP_ROWS: usize = 32;
/// Two groups of this many are better than one of all, though their products read the weights twice.
const STEP_ROWS_MIN: usize = 16;
/// Tokens of prompts that a thread takes through a block together: their activations stay in the second cache.
const PROMPT_ROWS: usize = 128;
/// Single tokens are spread over the threads when they read more than this many numbers.
const ATTEND_SPREAD: usize = 1 << 18;

/// A group's tokens in one block, while they are appended to their caches and attended to.
struct Attending {
    rows: Vec<DecodeRow>,
    x: Buffer,
    qkv: Buffer,
    /// Rows that were appended.
    appended: usize,
    /// What attention gives, `[rows, heads · dim]`, for the first `done` rows.
    mixed: Buffer,
    done: usize,
}

/// The way of some tokens through the blocks: block after block, group after group.
struct Walk<'a> {
    blocks: &'a [CpuBlock],
    rows: &'a [DecodeRow],
    /// Rows of the last block that are read.
    wanted: &'a [u32],
    groups: Vec<Range<usize>>,
}

impl Walk<'_> {
    fn steps(&self) -> usize {
        self.blocks.len() * self.groups.len()
    }

    /// A step's block and group. After the last come those of the next token.
    fn at(&self, step: usize) -> (usize, usize) {
        (step / self.groups.len() % self.blocks.len(), step % self.groups.len())
    }

    fn rows(&self, step: usize) -> &[DecodeRow] {
        &self.rows[self.groups[self.at(step).1].clone()]
    }

    /// Rows of a step's group that are read after it, where these are not all.
    fn wanted(&self, step: usize) -> Option<Vec<u32>> {
        let (layer, at) = self.at(step);
        if layer + 1 < self.blocks.len() {
            return None;
        }
        let group = &self.groups[at];
        let own = self.wanted.iter().filter(|row| group.contains(&(**row as usize)));
        let own: Vec<u32> = own.map(|row| row - group.start as u32).collect();
        (own.len() < group.len()).then_some(own)
    }
}

impl CpuEngine {
    /// All `blocks` over `rows`, whose activations are `x`: those of the rows `wanted`, in order.
    pub(super) fn walk(
        &self,
        blocks: &[CpuBlock],
        kv: &mut [&mut [Cache]],
        rows: &[DecodeRow],
        wanted: &[u32],
        x: &[f32],
    ) -> Result<Buffer> {
        let hidden = self.layout.hidden;
        // Tokens of a prompt read what is written on the way.
        let single = rows.windows(2).all(|pair| pair[0].slot != pair[1].slot);
        let walk = Walk { blocks, rows, wanted, groups: groups(rows.len(), single) };
        let parts = walk.groups.iter().map(|at| Buffer::of(&x[at.start * hidden..at.end * hidden]));
        let mut streams: Vec<Buffer> = parts.collect();
        let mut coming = None;
        for step in 0..walk.steps() {
            let (layer, at) = walk.at(step);
            let run = self.run(blocks[layer].weights());
            let o = run.weights.o.weight;
            let mut own = match coming.take() {
                Some(own) => own,
                None => self.begin(&walk, step, kv, std::mem::take(&mut streams[at]), o)?,
            };
            self.attend_rest(kv[layer], &mut own)?;
            let next = step + 1;
            let (next_layer, next_at) = walk.at(next);
            if walk.groups.len() > 1 && next < walk.steps() {
                coming = Some(self.begin(&walk, next, kv, std::mem::take(&mut streams[next_at]), o)?);
            }
            let next_kv = &mut *kv[next_layer];
            if single {
                let rows = coming.as_ref().map_or(walk.rows(next), |coming| &coming.rows);
                ahead::fetch(rows.iter().map(|row| next_kv[row.slot].read()));
            }
            let (then, _) = walk.at(next + usize::from(coming.is_some()));
            let then = blocks[then].weights().qkv.weight;
            streams[at] = match &mut coming {
                Some(coming) if single && threads::available() == 1 => {
                    let mut found = Ok(());
                    let mut work = || {
                        if found.is_ok() {
                            found = self.attend_asked(next_kv, coming);
                        }
                    };
                    let x = ahead::along(&mut work, || finish(&run, own, then));
                    found.and(x)
                }
                _ => finish(&run, own, then),
            }?;
        }
        let mut all = Buffer::dirty(streams.iter().map(|x| x.len()).sum());
        let mut end = 0;
        for x in &streams {
            all[end..end + x.len()].copy_from_slice(x);
            end += x.len();
        }
        Ok(all)
    }

    /// Queries, keys and values of a step's tokens, and whose attention is wanted; `then` is the matrix of the next product.
    fn begin(
        &self,
        walk: &Walk<'_>,
        step: usize,
        kv: &mut [&mut [Cache]],
        x: Buffer,
        then: Factor<'_>,
    ) -> Result<Attending> {
        let (heads, rows, layer) = (self.layout.heads, walk.rows(step), walk.at(step).0);
        let run = self.run(walk.blocks[layer].weights());
        let longest = rows.iter().map(|row| row.position + 1).max().unwrap_or(0);
        let turns = self.geometry(longest);
        then.follows();
        let raw = run.project(run.weights.qkv, &run.norm(&x, run.weights.input_norm));
        let qkv = run.turned(&raw, &turns, |index| rows[index].position);
        let mixed = Buffer::dirty(rows.len() * heads.width());
        let mut all = Attending { rows: rows.to_vec(), x, qkv, appended: 0, mixed, done: 0 };
        let Some(wanted) = walk.wanted(step) else { return Ok(all) };
        self.append(kv[layer], &mut all, rows.len())?;
        Ok(Attending {
            rows: wanted.iter().map(|row| rows[*row as usize]).collect(),
            x: pick(&all.x, &wanted, self.layout.hidden),
            qkv: pick(&all.qkv, &wanted, heads.row()),
            appended: wanted.len(),
            mixed: Buffer::dirty(wanted.len() * heads.width()),
            done: 0,
        })
    }

    /// Appends the keys and values of the first `count` rows to the caches.
    fn append(&self, kv: &mut [Cache], to: &mut Attending, count: usize) -> Result<()> {
        let heads = self.layout.heads;
        for index in to.appended..count {
            let (row, qkv) = (to.rows[index], &to.qkv[index * heads.row()..][..heads.row()]);
            let kv = &mut kv[row.slot];
            if kv.len() != row.position {
                return Err(EngineError::invalid(
                    format!("slot {} holds {} tokens, token {} cannot follow", row.slot, kv.len(), row.position),
                    "",
                ));
            }
            let (keys, values) = qkv[heads.width()..].split_at(heads.kv_heads * heads.dim);
            kv.push(keys, values)?;
            to.appended = index + 1;
        }
        Ok(())
    }

    /// Attends for the rows that were appended when this was called before, and appends those whose keys and values were
    /// all asked for since: what was just written is better not read at once.
    fn attend_asked(&self, kv: &mut [Cache], to: &mut Attending) -> Result<()> {
        let width = self.layout.heads.width();
        let mut pages = Vec::new();
        for index in to.done..to.appended {
            self.attend(kv, &to.rows, &to.qkv, index, &mut pages, &mut to.mixed[index * width..][..width]);
        }
        to.done = to.appended;
        self.append(kv, to, ahead::asked().min(to.rows.len()))
    }

    /// Appends and attends for the rows that are left.
    fn attend_rest(&self, kv: &mut [Cache], to: &mut Attending) -> Result<()> {
        let width = self.layout.heads.width();
        self.append(kv, to, to.rows.len())?;
        let Attending { rows, qkv, mixed, done, .. } = to;
        let (kv, left) = (&*kv, rows.len() - *done);
        let read: usize = rows[*done..].iter().map(|row| row.position).sum::<usize>() * width;
        let each = left.div_ceil(8 * self.lanes()).max(1);
        threads::each_part(&mut mixed[*done * width..], each * width, read > ATTEND_SPREAD, |part, mixed| {
            let mut pages = Vec::new();
            for (index, out) in mixed.chunks_exact_mut(width).enumerate() {
                self.attend(kv, rows, qkv, *done + part * each + index, &mut pages, out);
            }
        });
        Ok(())
    }

    /// Attention of one of `rows`: `[heads · dim]`; `pages` is scratch.
    fn attend<'a>(
        &self,
        kv: &'a [Cache],
        rows: &[DecodeRow],
        qkv: &[f32],
        index: usize,
        pages: &mut Vec<&'a Page>,
        out: &mut [f32],
    ) {
        thread_local! {
            /// Held while one token is attended to, which stays on its thread.
            static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
        }
        let heads = self.layout.heads;
        let row = rows[index];
        pages.clear();
        pages.extend(kv[row.slot].pages());
        let queries = &qkv[index * heads.row()..][..heads.width()];
        let next = rows.get(index + 1).and_then(|row| kv[row.slot].pages().next());
        SCORES.with_borrow_mut(|scores| {
            attend(self.isa, heads, pages, row.position + 1, queries, scores, out, next);
        });
    }
}

/// Tokens that go through a block together.
fn groups(rows: usize, single: bool) -> Vec<Range<usize>> {
    let size = match (single, threads::available() > 1) {
        (true, _) => rows.div_ceil(rows.div_ceil(STEP_ROWS).max((rows / STEP_ROWS_MIN).clamp(1, 2))),
        (false, false) => PROMPT_ROWS,
        // Its kernels spread over the threads, which wants many rows.
        (false, true) => TILE_TOKENS,
    };
    (0..rows).step_by(size.max(1)).map(|at| at..rows.min(at + size)).collect()
}

/// The rest of a block after the attention; `then` is the matrix of the product after those of this.
fn finish(run: &Run<'_>, own: Attending, then: Factor<'_>) -> Result<Buffer> {
    run.weights.gate_up.weight.follows();
    let z = run.add_projected(run.weights.o, &own.mixed, own.x)?;
    run.weights.down.weight.follows();
    let gate_up = run.gate_up(&z);
    then.follows();
    run.finish(z, &gate_up)
}

/// The rows `wanted` of some that are `width` wide.
fn pick(rows: &[f32], wanted: &[u32], width: usize) -> Buffer {
    let mut own = Buffer::dirty(wanted.len() * width);
    for (own, row) in own.chunks_exact_mut(width).zip(wanted) {
        own.copy_from_slice(&rows[*row as usize * width..][..width]);
    }
    own
}
