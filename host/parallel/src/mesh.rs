//! Which rank sits where, and who talks to whom.

use std::fmt;

use crate::{ParallelError, Result};

/// An axis of the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Axis {
    /// Pipeline stages: each rank holds some of the layers.
    Pp,
    /// Copies of the weights that see other data.
    DpReplicate,
    /// Ranks that see other data and hold a shard of the weights each.
    DpShard,
    /// Ranks that hold a part of each sequence.
    Cp,
    /// Ranks that hold a part of each matrix.
    Tp,
}

impl Axis {
    /// All axes, outermost first: neighbouring ranks differ along the last.
    pub const ALL: [Axis; 5] = [Axis::Pp, Axis::DpReplicate, Axis::DpShard, Axis::Cp, Axis::Tp];

    /// The name in configurations and messages.
    pub fn name(self) -> &'static str {
        match self {
            Axis::Pp => "pp",
            Axis::DpReplicate => "dp_replicate",
            Axis::DpShard => "dp_shard",
            Axis::Cp => "cp",
            Axis::Tp => "tp",
        }
    }
}

/// The sizes as configured. `dp_shard = -1` is inferred from the number of ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParallelDims {
    /// Pipeline stages.
    pub pp: i64,
    /// Copies of the weights.
    pub dp_replicate: i64,
    /// Shards of the weights, or -1.
    pub dp_shard: i64,
    /// Parts of a sequence.
    pub cp: i64,
    /// Parts of a matrix.
    pub tp: i64,
}

impl Default for ParallelDims {
    /// One rank.
    fn default() -> ParallelDims {
        ParallelDims { pp: 1, dp_replicate: 1, dp_shard: 1, cp: 1, tp: 1 }
    }
}

impl ParallelDims {
    fn sizes(&self) -> [i64; 5] {
        [self.pp, self.dp_replicate, self.dp_shard, self.cp, self.tp]
    }
}

/// Where a rank sits along each axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Coordinates {
    /// Pipeline stage.
    pub pp: usize,
    /// Copy of the weights.
    pub dp_replicate: usize,
    /// Shard of the weights.
    pub dp_shard: usize,
    /// Part of the sequence.
    pub cp: usize,
    /// Part of each matrix.
    pub tp: usize,
}

impl Coordinates {
    /// The coordinate along one axis.
    pub fn along(&self, axis: Axis) -> usize {
        self.as_array()[axis as usize]
    }

    fn as_array(&self) -> [usize; 5] {
        [self.pp, self.dp_replicate, self.dp_shard, self.cp, self.tp]
    }

    fn from_array([pp, dp_replicate, dp_shard, cp, tp]: [usize; 5]) -> Coordinates {
        Coordinates { pp, dp_replicate, dp_shard, cp, tp }
    }
}

/// Axes along which the ranks of a group differ; along the others they agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SubMesh {
    /// A single axis.
    Along(Axis),
    /// `dp_replicate` × `dp_shard`: the ranks that see different samples.
    Dp,
    /// `dp_shard` × `cp`: the ranks that shard the weights between them (FSDP).
    DpShardCp,
    /// `dp_replicate` × `dp_shard` × `cp`: the ranks whose losses and counts are summed.
    DpCp,
    /// The former × `tp`.
    DpCpTp,
    /// `cp` × `tp`: the ranks that divide the vocabulary at the head.
    CpTp,
    /// `pp` × `tp`: the ranks that hold one copy of the model between them.
    Mp,
    /// `pp` × `cp` × `tp`: the ranks that work on the same samples.
    PpCpTp,
    /// Every rank.
    World,
}

impl SubMesh {
    /// Every kind of group.
    pub const ALL: [SubMesh; 13] = [
        SubMesh::Along(Axis::Pp),
        SubMesh::Along(Axis::DpReplicate),
        SubMesh::Along(Axis::DpShard),
        SubMesh::Along(Axis::Cp),
        SubMesh::Along(Axis::Tp),
        SubMesh::Dp,
        SubMesh::DpShardCp,
        SubMesh::DpCp,
        SubMesh::DpCpTp,
        SubMesh::CpTp,
        SubMesh::Mp,
        SubMesh::PpCpTp,
        SubMesh::World,
    ];

    /// Its place in [`SubMesh::ALL`].
    pub(crate) fn index(self) -> usize {
        match self {
            SubMesh::Along(axis) => axis as usize,
            SubMesh::Dp => 5,
            SubMesh::DpShardCp => 6,
            SubMesh::DpCp => 7,
            SubMesh::DpCpTp => 8,
            SubMesh::CpTp => 9,
            SubMesh::Mp => 10,
            SubMesh::PpCpTp => 11,
            SubMesh::World => 12,
        }
    }

    /// The axes, outermost first.
    pub fn axes(self) -> &'static [Axis] {
        match self {
            SubMesh::Along(Axis::Pp) => &[Axis::Pp],
            SubMesh::Along(Axis::DpReplicate) => &[Axis::DpReplicate],
            SubMesh::Along(Axis::DpShard) => &[Axis::DpShard],
            SubMesh::Along(Axis::Cp) => &[Axis::Cp],
            SubMesh::Along(Axis::Tp) => &[Axis::Tp],
            SubMesh::Dp => &[Axis::DpReplicate, Axis::DpShard],
            SubMesh::DpShardCp => &[Axis::DpShard, Axis::Cp],
            SubMesh::DpCp => &[Axis::DpReplicate, Axis::DpShard, Axis::Cp],
            SubMesh::DpCpTp => &[Axis::DpReplicate, Axis::DpShard, Axis::Cp, Axis::Tp],
            SubMesh::CpTp => &[Axis::Cp, Axis::Tp],
            SubMesh::Mp => &[Axis::Pp, Axis::Tp],
            SubMesh::PpCpTp => &[Axis::Pp, Axis::Cp, Axis::Tp],
            SubMesh::World => &Axis::ALL,
        }
    }
}

/// The ranks of a replica along the five axes, outermost first: pp, dp_replicate, dp_shard, cp, tp.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mesh {
    sizes: [usize; 5],
}

impl Mesh {
    /// The mesh of one rank.
    pub fn one() -> Mesh {
        Mesh { sizes: [1; 5] }
    }

    /// A mesh of `world` ranks.
    ///
    /// # Errors
    /// Sizes below 1, sizes whose product is not `world`, or `pp` and `dp_replicate` both above 1.
    pub fn new(dims: ParallelDims, world: usize) -> Result<Mesh> {
        let given = dims.sizes();
        for (axis, size) in Axis::ALL.into_iter().zip(given) {
            if size < 1 && !(axis == Axis::DpShard && size == -1) {
                return Err(ParallelError::BadSize { axis: axis.name(), size });
            }
        }
        let product = |sizes: &[(Axis, i64)]| sizes.iter().fold(1_u128, |p, (_, s)| p.saturating_mul(*s as u128));
        let mut named: Vec<(Axis, i64)> = Axis::ALL.into_iter().zip(given).collect();
        if dims.dp_shard == -1 {
            named.retain(|(axis, _)| *axis != Axis::DpShard);
            let others = product(&named);
            if world == 0 || !(world as u128).is_multiple_of(others) {
                return Err(ParallelError::CannotInfer { sizes: spelt(&named), product: others, world });
            }
            // The quotient of a usize.
            named.insert(2, (Axis::DpShard, (world as u128 / others) as i64));
        }
        if product(&named) != world as u128 {
            return Err(ParallelError::WorldMismatch { sizes: spelt(&named), product: product(&named), world });
        }
        let mut sizes = [0; 5];
        for (slot, (_, size)) in sizes.iter_mut().zip(&named) {
            // At least 1 and no larger than the world.
            *slot = *size as usize;
        }
        let mesh = Mesh { sizes };
        let (pp, replicate) = (mesh.size(Axis::Pp), mesh.size(Axis::DpReplicate));
        if pp > 1 && replicate > 1 {
            let (first, second) = (Axis::Pp.name(), Axis::DpReplicate.name());
            return Err(ParallelError::Conflict { first, first_size: pp, second, second_size: replicate });
        }
        Ok(mesh)
    }

    /// The number of ranks.
    pub fn world(&self) -> usize {
        self.sizes.iter().product()
    }

    /// The size of an axis.
    pub fn size(&self, axis: Axis) -> usize {
        self.sizes[axis as usize]
    }

    /// The number of ranks in a group.
    pub fn group_size(&self, sub: SubMesh) -> usize {
        sub.axes().iter().map(|axis| self.size(*axis)).product()
    }

    /// Where a rank sits.
    ///
    /// # Errors
    /// [`ParallelError::NoSuchRank`].
    pub fn coordinates(&self, rank: usize) -> Result<Coordinates> {
        if rank >= self.world() {
            return Err(ParallelError::NoSuchRank { rank, world: self.world() });
        }
        let mut rest = rank;
        let mut at = [0; 5];
        for (place, size) in at.iter_mut().zip(self.sizes).rev() {
            (*place, rest) = (rest % size, rest / size);
        }
        Ok(Coordinates::from_array(at))
    }

    /// The rank that sits there; none outside the mesh.
    pub fn rank(&self, at: Coordinates) -> Option<usize> {
        let inside = at.as_array().into_iter().zip(self.sizes).all(|(place, size)| place < size);
        inside.then(|| self.rank_of(at.as_array()))
    }

    fn rank_of(&self, at: [usize; 5]) -> usize {
        at.into_iter().zip(self.sizes).fold(0, |rank, (place, size)| rank * size + place)
    }

    /// The ranks of `rank`'s group, `rank` among them, in rising order.
    ///
    /// # Errors
    /// [`ParallelError::NoSuchRank`].
    pub fn group(&self, rank: usize, sub: SubMesh) -> Result<Vec<usize>> {
        let mut at = self.coordinates(rank)?.as_array();
        let members = (0..self.group_size(sub)).map(|index| {
            let mut rest = index;
            for axis in sub.axes().iter().rev() {
                at[*axis as usize] = rest % self.size(*axis);
                rest /= self.size(*axis);
            }
            self.rank_of(at)
        });
        Ok(members.collect())
    }

    /// All groups of a kind; every rank is in exactly one.
    pub fn groups(&self, sub: SubMesh) -> Vec<Vec<usize>> {
        // A group is listed at its first rank.
        (0..self.world()).filter_map(|rank| self.group(rank, sub).ok().filter(|group| group[0] == rank)).collect()
    }
}

impl fmt::Display for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sizes: Vec<_> = Axis::ALL.into_iter().zip(self.sizes.map(|s| s as i64)).collect();
        f.write_str(&spelt(&sizes))
    }
}

fn spelt(sizes: &[(Axis, i64)]) -> String {
    sizes.iter().map(|(axis, size)| format!("{} {size}", axis.name())).collect::<Vec<_>>().join(" × ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mesh(pp: i64, dp_replicate: i64, dp_shard: i64, cp: i64, tp: i64, world: usize) -> Result<Mesh> {
        Mesh::new(ParallelDims { pp, dp_replicate, dp_shard, cp, tp }, world)
    }

    #[test]
    fn the_order_of_the_axes() {
        let mesh = mesh(2, 1, -1, 2, 2, 16).unwrap();
        assert_eq!(mesh.to_string(), "pp 2 × dp_replicate 1 × dp_shard 2 × cp 2 × tp 2");
        assert_eq!(mesh.group(0, SubMesh::Along(Axis::Tp)).unwrap(), [0, 1]);
        assert_eq!(mesh.group(0, SubMesh::Along(Axis::Cp)).unwrap(), [0, 2]);
        assert_eq!(mesh.group(0, SubMesh::Along(Axis::DpShard)).unwrap(), [0, 4]);
        assert_eq!(mesh.group(0, SubMesh::Along(Axis::Pp)).unwrap(), [0, 8]);
        assert_eq!(mesh.group(5, SubMesh::DpShardCp).unwrap(), [1, 3, 5, 7]);
        assert_eq!(mesh.group(5, SubMesh::PpCpTp).unwrap(), [4, 5, 6, 7, 12, 13, 14, 15]);
        assert_eq!(mesh.groups(SubMesh::Mp), [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]);
        let at = Coordinates { pp: 1, dp_replicate: 0, dp_shard: 0, cp: 1, tp: 1 };
        assert_eq!((mesh.rank(at), mesh.coordinates(11).unwrap()), (Some(11), at));
        assert_eq!(mesh.rank(Coordinates { tp: 2, ..at }), None);
        assert_eq!(mesh.coordinates(16), Err(ParallelError::NoSuchRank { rank: 16, world: 16 }));
    }

    #[test]
    fn the_guilty_numbers_are_named() {
        let cases = [
            (mesh(1, 1, 3, 1, 2, 8), "pp 1 × dp_replicate 1 × dp_shard 3 × cp 1 × tp 2 = 6, but the world has 8 ranks"),
            (
                mesh(1, 1, -1, 1, 3, 8),
                "cannot infer `dp_shard`: 8 ranks do not divide by pp 1 × dp_replicate 1 × cp 1 × tp 3 = 3",
            ),
            (
                mesh(1, 1, -1, 1, 1, 0),
                "cannot infer `dp_shard`: 0 ranks do not divide by pp 1 × dp_replicate 1 × cp 1 × tp 1 = 1",
            ),
            (mesh(1, 1, 1, 0, 1, 1), "`cp` is 0; expected at least 1"),
            (mesh(1, 1, -2, 1, 1, 1), "`dp_shard` is -2; expected at least 1, or -1 to infer it"),
            (mesh(2, 2, 1, 1, 1, 4), "`pp` is 2 and `dp_replicate` is 2: they cannot both be larger than 1"),
        ];
        for (mesh, text) in cases {
            let error = mesh.unwrap_err();
            assert_eq!(error.to_string(), text);
            assert!(error.hint().is_some());
        }
        assert!(mesh(i64::MAX, 1, i64::MAX, i64::MAX, i64::MAX, 8).is_err());
    }

    fn meshes() -> impl Strategy<Value = Mesh> {
        (1..4_i64, 1..4_i64, 1..4_i64, 1..3_i64, 1..4_i64).prop_map(|(pp, r, s, c, t)| {
            let r = if pp > 1 { 1 } else { r };
            mesh(pp, r, s, c, t, (pp * r * s * c * t) as usize).unwrap()
        })
    }

    proptest! {
        #[test]
        fn ranks_and_coordinates_are_one_to_one(mesh in meshes()) {
            for rank in 0..mesh.world() {
                prop_assert_eq!(mesh.rank(mesh.coordinates(rank).unwrap()), Some(rank));
            }
        }

        #[test]
        fn groups_split_the_world(mesh in meshes()) {
            for (index, sub) in SubMesh::ALL.into_iter().enumerate() {
                prop_assert_eq!(sub.index(), index);
                let mut all: Vec<usize> = mesh.groups(sub).concat();
                all.sort();
                prop_assert_eq!(all, (0..mesh.world()).collect::<Vec<_>>());
                for group in mesh.groups(sub) {
                    prop_assert!(group.is_sorted() && group.len() == mesh.group_size(sub));
                    for rank in &group {
                        prop_assert_eq!(&mesh.group(*rank, sub).unwrap(), &group);
                        // Members agree along every axis that is not the group's.
                        let (a, b) = (mesh.coordinates(*rank).unwrap(), mesh.coordinates(group[0]).unwrap());
                        let others = Axis::ALL.into_iter().filter(|axis| !sub.axes().contains(axis));
                        prop_assert!(others.into_iter().all(|axis| a.along(axis) == b.along(axis)));
                    }
                }
            }
        }

        #[test]
        fn an_inferred_shard_count_fits(pp in 1..4_i64, cp in 1..4_i64, tp in 1..4_i64, world in 0..64_usize) {
            match mesh(pp, 1, -1, cp, tp, world) {
                Ok(mesh) => prop_assert_eq!(mesh.world(), world),
                Err(_) => prop_assert!(world == 0 || world % (pp * cp * tp) as usize != 0),
            }
        }
    }
}
