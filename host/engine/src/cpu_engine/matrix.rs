//! A weight matrix as products read it: f32 in panels, or in fewer bits.

use cosmos_kernels::Isa;
use cosmos_kernels::gemm::{Left, Packed, Right, Shape, gemm};
use cosmos_kernels::narrow::{Format, Narrow, round_bf16};

use crate::model::WeightFormat;

/// The formats of a model's matrices; none is f32.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Formats {
    /// Those of the blocks.
    pub blocks: Option<Format>,
    /// The head.
    pub head: Option<Format>,
    /// The embedding, where it is not the head.
    pub embedding: Option<Format>,
}

impl Formats {
    pub fn of(format: WeightFormat) -> Self {
        let (blocks, head, embedding) = match format {
            WeightFormat::F32 => (None, None, None),
            WeightFormat::Bf16 => (Some(Format::Bf16), Some(Format::Bf16), Some(Format::Bf16)),
            WeightFormat::Int8 { head: true } => (Some(Format::Int8), Some(Format::Int8), None),
            // An error of the head's is one of the logits, with nothing behind it to dampen it.
            WeightFormat::Int8 { head: false } => (Some(Format::Int8), Some(Format::Bf16), None),
        };
        Self { blocks, head, embedding }
    }

    /// A norm or a bias: rounded where all weights are bf16, so that the model is the one that a rollout in another process
    /// has, whose weights travel like that.
    pub fn vector(&self, values: &[f32]) -> Vec<f32> {
        let mut own = values.to_vec();
        if self.blocks == Some(Format::Bf16) {
            round_bf16(&mut own);
        }
        own
    }
}

/// `[n, k]`, for `x · Wᵀ`.
#[derive(Debug)]
pub enum Matrix {
    /// In f32.
    Whole(Packed),
    /// In fewer bits.
    Narrow(Narrow),
}

impl Default for Matrix {
    fn default() -> Self {
        Self::Whole(Packed::default())
    }
}

impl Matrix {
    /// From `n` rows of `k` numbers.
    pub fn of(isa: Isa, format: Option<Format>, values: &[f32], n: usize, k: usize) -> Self {
        let mut matrix = Self::default();
        matrix.set(isa, format, values, n, k);
        matrix
    }

    pub fn n(&self) -> usize {
        match self {
            Self::Whole(packed) => packed.n(),
            Self::Narrow(narrow) => narrow.n(),
        }
    }

    pub fn k(&self) -> usize {
        match self {
            Self::Whole(packed) => packed.k(),
            Self::Narrow(narrow) => narrow.k(),
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Whole(packed) => packed.bytes(),
            Self::Narrow(narrow) => narrow.bytes(),
        }
    }

    /// Takes other values, in the memory that it has.
    pub fn set(&mut self, isa: Isa, format: Option<Format>, values: &[f32], n: usize, k: usize) {
        match (&mut *self, format) {
            (Self::Whole(packed), None) => packed.set_transposed(isa, values, k, n, k),
            (Self::Narrow(narrow), Some(format)) if (narrow.n(), narrow.k(), narrow.format()) == (n, k, format) => {
                narrow.set(isa, 0, values);
            }
            (_, None) => *self = Self::Whole(Packed::transposed(isa, values, n, k)),
            (_, Some(format)) => *self = Self::Narrow(Narrow::transposed(isa, format, values, n, k)),
        }
    }

    /// It as a product reads it.
    pub fn factor(&self) -> Factor<'_> {
        match self {
            Self::Whole(packed) => Factor::Wide(Right::Packed(packed)),
            Self::Narrow(narrow) => Factor::Narrow(narrow),
        }
    }

    /// It as one that holds its values itself; none in f32, where they are kept elsewhere.
    pub fn narrow(&self) -> Option<&Narrow> {
        match self {
            Self::Whole(_) => None,
            Self::Narrow(narrow) => Some(narrow),
        }
    }

    /// As [`Matrix::narrow`].
    pub fn narrow_mut(&mut self) -> Option<&mut Narrow> {
        match self {
            Self::Whole(_) => None,
            Self::Narrow(narrow) => Some(narrow),
        }
    }
}

/// Wᵀ of `x · Wᵀ`, `k × n`.
#[derive(Clone, Copy)]
pub enum Factor<'a> {
    /// In f32.
    Wide(Right<'a>),
    /// In fewer bits.
    Narrow(&'a Narrow),
}

impl Factor<'_> {
    /// Says that a product with it follows the next one of this thread.
    pub fn follows(self) {
        if let Self::Wide(Right::Packed(packed)) = self {
            packed.follows();
        }
    }

    /// `y = x · Wᵀ`, or `y += x · Wᵀ`.
    pub fn product(self, isa: Isa, shape: Shape, x: &[f32], y: &mut [f32], add: bool) {
        match self {
            Self::Wide(right) => gemm(isa, shape, Left::Rows(x, shape.k), right, y, shape.n, add),
            Self::Narrow(narrow) => narrow.product(isa, shape.m, x, y, add),
        }
    }
}
