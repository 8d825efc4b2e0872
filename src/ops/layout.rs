//! How the rows of a batch map to sequences: no padding, and a shared prompt is one segment.

use crate::{Error, Result};

/// Rows `row..row + len` of a batch are positions `pos..pos + len` of sequence `slot`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub row: usize,
    pub len: usize,
    pub slot: usize,
    pub pos: usize,
}

/// Rows `start..start + len` of a batch: one prompt, or one continuation of a parent segment.
///
/// A token attends to every token of the parent, then causally to its own segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pub start: usize,
    pub len: usize,
    /// Index of the segment it continues, which has no parent itself and comes earlier.
    pub parent: Option<usize>,
}

/// A whole training batch: segments which cover rows `0..tokens` in order, without gaps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Layout {
    pub segments: Vec<Segment>,
}

impl Layout {
    /// Check and wrap segments.
    ///
    /// # Errors
    /// [`Error::Internal`] when rows overlap or leave a gap, a segment is empty, or a parent is
    /// not an earlier segment without a parent.
    pub fn new(segments: Vec<Segment>) -> Result<Self> {
        let mut next = 0;
        for (index, segment) in segments.iter().enumerate() {
            if segment.start != next || segment.len == 0 {
                return Err(Error::Internal(format!(
                    "segment {index} of the batch starts at row {} with {} rows, expected a \
                     non-empty segment at row {next}",
                    segment.start, segment.len
                )));
            }
            next += segment.len;
            if let Some(parent) = segment.parent
                && (parent >= index || segments[parent].parent.is_some())
            {
                return Err(Error::Internal(format!(
                    "segment {index} of the batch continues segment {parent}, which is not an \
                     earlier prompt"
                )));
            }
        }
        Ok(Self { segments })
    }

    /// Independent sequences of the given lengths, one after the other.
    ///
    /// # Errors
    /// [`Error::Internal`] when a length is zero.
    pub fn from_lengths(lengths: &[usize]) -> Result<Self> {
        let mut start = 0;
        let mut segments = Vec::with_capacity(lengths.len());
        for &len in lengths {
            segments.push(Segment {
                start,
                len,
                parent: None,
            });
            start += len;
        }
        Self::new(segments)
    }

    /// Number of rows.
    pub fn tokens(&self) -> usize {
        self.segments.last().map_or(0, |last| last.start + last.len)
    }

    /// Position of the first token of a segment: the length of its parent.
    pub fn offset(&self, segment: usize) -> usize {
        self.segments[segment]
            .parent
            .map_or(0, |parent| self.segments[parent].len)
    }

    /// The segment that covers `row`.
    pub fn segment_of(&self, row: usize) -> Segment {
        let after = self.segments.partition_point(|s| s.start <= row);
        self.segments[after - 1]
    }

    /// Position of every row in its sequence.
    pub fn positions(&self) -> Vec<u32> {
        let mut positions = Vec::with_capacity(self.tokens());
        for (index, segment) in self.segments.iter().enumerate() {
            let offset = self.offset(index);
            positions.extend((offset..offset + segment.len).map(|position| position as u32));
        }
        positions
    }

    /// One span a segment, the slot being the segment's index.
    pub fn spans(&self) -> Vec<Span> {
        self.segments
            .iter()
            .enumerate()
            .map(|(slot, segment)| Span {
                row: segment.start,
                len: segment.len,
                slot,
                pos: self.offset(slot),
            })
            .collect()
    }

    /// The rows of every prompt with what continues it: runs that begin with a segment without
    /// parent.
    pub fn pieces(&self) -> Vec<std::ops::Range<usize>> {
        let mut pieces: Vec<std::ops::Range<usize>> = Vec::new();
        for segment in &self.segments {
            let end = segment.start + segment.len;
            match pieces.last_mut() {
                Some(piece) if segment.parent.is_some() => piece.end = end,
                _ => pieces.push(segment.start..end),
            }
        }
        pieces
    }

    /// The children of every segment in order; empty for children and lonely prompts.
    pub fn children(&self) -> Vec<Vec<usize>> {
        let mut children = vec![Vec::new(); self.segments.len()];
        for (index, segment) in self.segments.iter().enumerate() {
            if let Some(parent) = segment.parent {
                children[parent].push(index);
            }
        }
        children
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(start: usize, len: usize, parent: Option<usize>) -> Segment {
        Segment { start, len, parent }
    }

    #[test]
    fn positions_of_children_continue_the_parent() {
        let layout = Layout::new(vec![
            segment(0, 3, None),
            segment(3, 2, Some(0)),
            segment(5, 1, Some(0)),
            segment(6, 2, None),
        ])
        .unwrap();
        assert_eq!(layout.tokens(), 8);
        assert_eq!(layout.positions(), [0, 1, 2, 3, 4, 3, 0, 1]);
        assert_eq!(layout.children(), [vec![1, 2], vec![], vec![], vec![]]);
        assert_eq!(layout.pieces(), [0..6, 6..8]);
        assert_eq!(
            layout.spans()[1],
            Span {
                row: 3,
                len: 2,
                slot: 1,
                pos: 3
            }
        );
    }

    #[test]
    fn gaps_and_wrong_parents_are_refused() {
        assert!(Layout::new(vec![segment(1, 3, None)]).is_err());
        assert!(Layout::new(vec![segment(0, 0, None)]).is_err());
        assert!(Layout::new(vec![segment(0, 3, Some(0))]).is_err());
        assert!(
            Layout::new(vec![
                segment(0, 3, None),
                segment(3, 1, Some(0)),
                segment(4, 1, Some(1))
            ])
            .is_err()
        );
        assert!(Layout::from_lengths(&[2, 3]).is_ok());
    }
}
