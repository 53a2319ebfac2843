//! Rows of different lengths in two flat buffers.

/// Rows of different lengths in two flat buffers: candidates of every position, log-probs of every candidate.
#[derive(Debug, Clone, PartialEq)]
pub struct Rows<T> {
    values: Vec<T>,
    /// Where each row ends in `values`; rising.
    ends: Vec<usize>,
}

impl<T> Default for Rows<T> {
    fn default() -> Rows<T> {
        Rows { values: Vec::new(), ends: Vec::new() }
    }
}

impl<T> Rows<T> {
    /// No rows yet, with room for `rows` rows and `values` values.
    pub fn with_capacity(rows: usize, values: usize) -> Rows<T> {
        Rows { values: Vec::with_capacity(values), ends: Vec::with_capacity(rows) }
    }

    /// Rows of `width` values each; none when `values` does not divide.
    pub fn of_width(width: usize, values: Vec<T>) -> Option<Rows<T>> {
        if width == 0 || !values.len().is_multiple_of(width) {
            return None;
        }
        let ends = (1..=values.len() / width).map(|row| row * width).collect();
        Some(Rows { values, ends })
    }

    /// Appends a row.
    pub fn push(&mut self, row: impl IntoIterator<Item = T>) {
        self.values.extend(row);
        self.ends.push(self.values.len());
    }

    /// Appends a value to the row that [`Rows::end_row`] will end.
    pub(crate) fn push_value(&mut self, value: T) {
        self.values.push(value);
    }

    /// Ends the row of the values pushed since the last end.
    pub(crate) fn end_row(&mut self) {
        self.ends.push(self.values.len());
    }

    pub(crate) fn reserve(&mut self, rows: usize, values: usize) {
        self.ends.reserve(rows);
        self.values.reserve(values);
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// A row, or none past the last.
    pub fn row(&self, index: usize) -> Option<&[T]> {
        let end = *self.ends.get(index)?;
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        Some(&self.values[start..end])
    }

    /// All rows in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[T]> {
        (0..self.len()).map(|index| self.row(index).unwrap_or_default())
    }

    /// All values of all rows in order.
    pub fn values(&self) -> &[T] {
        &self.values
    }

    /// The length that all rows share; none when they differ or there is no row.
    pub fn width(&self) -> Option<usize> {
        let first = *self.ends.first()?;
        self.iter().all(|row| row.len() == first).then_some(first)
    }
}

impl<T, R: IntoIterator<Item = T>> FromIterator<R> for Rows<T> {
    fn from_iter<I: IntoIterator<Item = R>>(rows: I) -> Rows<T> {
        let mut all = Rows::default();
        for row in rows {
            all.push(row);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rows_keep_their_values(nested in proptest::collection::vec(proptest::collection::vec(any::<u32>(), 0..5), 0..8)) {
            let rows: Rows<u32> = nested.iter().cloned().collect();
            prop_assert_eq!(rows.iter().map(<[u32]>::to_vec).collect::<Vec<_>>(), nested.clone());
            prop_assert_eq!(rows.len(), nested.len());
            prop_assert_eq!(rows.row(nested.len()), None);
        }
    }

    #[test]
    fn rows_of_one_width() {
        let rows = Rows::of_width(2, vec![1, 2, 3, 4]).unwrap();
        assert_eq!((rows.len(), rows.width(), rows.row(1)), (2, Some(2), Some(&[3, 4][..])));
        assert_eq!(Rows::of_width(3, vec![1, 2, 3, 4]), None);
        assert_eq!(Rows::of_width(0, Vec::<u8>::new()), None);
        let ragged: Rows<i32> = [vec![1], vec![1, 2]].into_iter().collect();
        assert_eq!(ragged.width(), None);
    }
}
