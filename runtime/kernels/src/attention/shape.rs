//! The shape of an attention.

use std::ops::Range;

/// Shape of an attention and the rows that it is over.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// Rows of each sequence; together all rows.
    pub sequences: &'a [Range<usize>],
    /// Query heads H.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` neighbouring query heads.
    pub kv_heads: usize,
    /// Width D of a head, even.
    pub head_dim: usize,
    /// A query sees so many positions, its own included; `None`: all before it.
    pub window: Option<usize>,
    /// What products of queries and keys are multiplied by; 1 / √D in most models.
    pub scale: f32,
    /// Scores s, scaled, become `cap · tanh(s / cap)`; above 0. Source: Gemma Team 2024, <https://arxiv.org/abs/2408.00118>, section 2.
    pub soft_cap: Option<f32>,
}

impl Attention<'_> {
    /// Values of a row of q, k and v beside each other.
    pub fn row(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    pub(super) fn window(&self) -> usize {
        self.window.unwrap_or(usize::MAX)
    }

    /// Columns of a row's query head, key head and value head.
    pub(super) fn places(&self, head: usize) -> [usize; 3] {
        let group = self.heads / self.kv_heads;
        [head, self.heads + head / group, self.heads + self.kv_heads + head / group].map(|head| head * self.head_dim)
    }

    pub(super) fn check_heads(&self, rows: usize) {
        let (heads, kv_heads) = (self.heads, self.kv_heads);
        assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "{heads} heads for {kv_heads}");
        assert!(self.head_dim > 0 && self.head_dim.is_multiple_of(2), "a head of {}", self.head_dim);
        let width = kv_heads.checked_mul(2).and_then(|both| both.checked_add(heads)?.checked_mul(self.head_dim));
        assert!(width.and_then(|width| width.checked_mul(rows)).is_some(), "{rows} rows of {heads} heads");
        assert!(self.window != Some(0), "a query sees its own position");
        assert!(self.soft_cap.is_none_or(|cap| cap > 0.0), "scores are capped at {:?}", self.soft_cap);
    }

    pub(super) fn check(&self, rows: usize) {
        self.check_heads(rows);
        let mut end = 0;
        for sequence in self.sequences {
            assert!(sequence.start == end && sequence.end >= end, "sequences follow each other");
            end = sequence.end;
        }
        assert_eq!(end, rows, "the sequences are all rows");
    }
}
