//! What the roles say to each other.

use std::fmt;
use std::str::FromStr;

use crate::{BrokerError, Result, Rows};

/// Which completion of which prompt. Unique within a run: the same prompt in another epoch is another sample.
///
/// The three numbers are 128 bits, so a sample and the UUID that the original keys its results with are one to one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SampleId {
    /// Epoch, counted from 1.
    pub epoch: u32,
    /// Row of the prompt in the dataset.
    pub prompt: u64,
    /// Which completion of that prompt, counted from 0.
    pub generation: u32,
}

impl SampleId {
    /// The sample as 32 hexadecimal digits in the grouping of a UUID.
    pub fn to_uuid(self) -> String {
        let bits = u128::from(self.epoch) << 96 | u128::from(self.prompt) << 32 | u128::from(self.generation);
        let digits = format!("{bits:032x}");
        [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]].join("-")
    }

    /// The sample of a UUID; any UUID has one.
    pub fn from_uuid(uuid: &str) -> Option<SampleId> {
        let bytes = uuid.as_bytes();
        let dash = |i| [8, 13, 18, 23].contains(&i);
        let well_formed = bytes.len() == 36
            && bytes.iter().enumerate().all(|(i, b)| if dash(i) { *b == b'-' } else { b.is_ascii_hexdigit() });
        if !well_formed {
            return None;
        }
        let bits = u128::from_str_radix(&uuid.replace('-', ""), 16).ok()?;
        Some(SampleId { epoch: (bits >> 96) as u32, prompt: (bits >> 32) as u64, generation: bits as u32 })
    }
}

impl fmt::Display for SampleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.epoch, self.prompt, self.generation)
    }
}

impl FromStr for SampleId {
    type Err = String;

    /// Reads what `Display` writes: `epoch/prompt/generation`.
    fn from_str(text: &str) -> std::result::Result<SampleId, String> {
        let bad = || format!("`{text}` is not a sample: expected `epoch/prompt/generation`");
        let mut parts = text.split('/');
        let mut next = || parts.next().ok_or_else(bad);
        let epoch = next()?.parse().map_err(|_| bad())?;
        let prompt = next()?.parse().map_err(|_| bad())?;
        let generation = next()?.parse().map_err(|_| bad())?;
        if parts.next().is_some() {
            return Err(bad());
        }
        Ok(SampleId { epoch, prompt, generation })
    }
}

/// A completion to be scored by the teacher.
///
/// Shapes: p prompt tokens, t completion tokens, s scored positions, which are t, or p - 1 + t with the prompt.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TeacherRequest {
    /// The sample.
    pub sample: SampleId,
    /// Version of the weights that wrote the completion.
    pub weight_version: u64,
    /// [p] token ids.
    pub prompt_ids: Vec<u32>,
    /// [t] token ids.
    pub completion_ids: Vec<u32>,
    /// Whether the prompt's tokens after the first are scored too.
    pub include_prompt: bool,
    /// 0: log-prob of each token; k > 0: of k candidates; -1: the teacher's last hidden states, for the whole vocabulary.
    pub top_k: i32,
    /// [s][k or k + 1] the student's candidates, for the teacher to score; none when the teacher picks its own.
    pub candidate_ids: Option<Rows<u32>>,
}

impl TeacherRequest {
    /// How many positions are scored (s).
    pub fn scored_positions(&self) -> usize {
        let prompt = if self.include_prompt { self.prompt_ids.len().saturating_sub(1) } else { 0 };
        prompt + self.completion_ids.len()
    }

    /// Checks that the parts fit together.
    ///
    /// # Errors
    /// [`BrokerError::BadMessage`].
    pub fn check(&self) -> Result<()> {
        let bad = |reason: String| Err(BrokerError::BadMessage { sample: self.sample, reason });
        if self.prompt_ids.is_empty() {
            return bad("the prompt has no token".into());
        }
        if self.completion_ids.is_empty() {
            return bad("the completion has no token".into());
        }
        if self.top_k < -1 {
            return bad(format!("`top_k` is {}, less than -1", self.top_k));
        }
        match &self.candidate_ids {
            Some(rows) if rows.len() != self.scored_positions() => {
                bad(format!("candidates for {} positions, but {} are scored", rows.len(), self.scored_positions()))
            }
            _ => Ok(()),
        }
    }
}

/// Hidden states before the output head.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HiddenStates {
    /// Numbers per position (h).
    pub width: usize,
    /// [s, h] row by row.
    pub values_sh: Vec<f32>,
}

/// What a teacher says of a completion. Which parts are filled follows from the request's `top_k`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TeacherResult {
    /// The sample.
    pub sample: SampleId,
    /// Version of the weights that wrote the completion, as in the request.
    pub weight_version: u64,
    /// Which teacher it was.
    pub teacher: String,
    /// [s] natural log-prob of each given token.
    pub token_logprobs_s: Vec<f32>,
    /// [s] entropy of the teacher's distribution in nats; empty when it was not measured.
    pub entropies_s: Vec<f32>,
    /// The teacher's most likely token at each scored position; empty when it was not asked for.
    pub top1_ids_s: Vec<u32>,
    /// [s][k] natural log-probs of the candidates.
    pub candidate_logprobs: Option<Rows<f32>>,
    /// [s][k] the candidates, when the teacher picked its own.
    pub candidate_ids: Option<Rows<u32>>,
    /// [s, h] for the whole vocabulary.
    pub hidden: Option<HiddenStates>,
}

impl TeacherResult {
    /// Checks that the result answers `request` and that its parts have the request's shapes.
    ///
    /// # Errors
    /// [`BrokerError::BadMessage`].
    pub fn check(&self, request: &TeacherRequest) -> Result<()> {
        let bad = |reason: String| Err(BrokerError::BadMessage { sample: request.sample, reason });
        if self.sample != request.sample {
            return bad(format!("the result is of sample `{}`", self.sample));
        }
        if self.weight_version != request.weight_version {
            return bad(format!(
                "the result is of weights {}, the request of weights {}",
                self.weight_version, request.weight_version
            ));
        }
        let s = request.scored_positions();
        let hidden_positions = self.hidden.as_ref().map(|h| {
            // A width of zero, or a ragged end, matches no count of positions.
            if h.width > 0 && h.values_sh.len().is_multiple_of(h.width) {
                h.values_sh.len() / h.width
            } else {
                usize::MAX
            }
        });
        let parts = [
            ("token log-probs", (!self.token_logprobs_s.is_empty()).then_some(self.token_logprobs_s.len())),
            ("entropies", (!self.entropies_s.is_empty()).then_some(self.entropies_s.len())),
            ("most likely tokens", (!self.top1_ids_s.is_empty()).then_some(self.top1_ids_s.len())),
            ("candidate log-probs", self.candidate_logprobs.as_ref().map(Rows::len)),
            ("candidates", self.candidate_ids.as_ref().map(Rows::len)),
            ("hidden states", hidden_positions),
        ];
        if let Some((name, _)) = parts.iter().find(|(_, positions)| positions.is_some_and(|p| p != s)) {
            return bad(format!("the result's {name} do not have the {s} positions that are scored"));
        }
        let ids = self.candidate_ids.as_ref().or(request.candidate_ids.as_ref());
        if let (Some(logprobs), Some(ids)) = (&self.candidate_logprobs, ids)
            && let Some(row) = logprobs.iter().zip(ids.iter()).position(|(a, b)| a.len() != b.len())
        {
            return bad(format!("position {row} has another number of candidates than of log-probs"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request() -> TeacherRequest {
        TeacherRequest { prompt_ids: vec![1, 2, 3], completion_ids: vec![4, 5], ..TeacherRequest::default() }
    }

    #[test]
    fn scored_positions_follow_the_prompt() {
        assert_eq!(request().scored_positions(), 2);
        assert_eq!(TeacherRequest { include_prompt: true, ..request() }.scored_positions(), 4);
    }

    #[test]
    fn parts_that_do_not_fit_are_named() {
        let candidates: Rows<u32> = [[1, 2]].into_iter().collect();
        let cases = [
            (TeacherRequest { prompt_ids: vec![], ..request() }, "the prompt has no token"),
            (TeacherRequest { completion_ids: vec![], ..request() }, "the completion has no token"),
            (TeacherRequest { top_k: -2, ..request() }, "less than -1"),
            (TeacherRequest { candidate_ids: Some(candidates), ..request() }, "candidates for 1 positions, but 2"),
        ];
        for (request, text) in cases {
            let error = request.check().unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
        request().check().unwrap();
    }

    #[test]
    fn a_result_must_answer_its_request() {
        let good = TeacherResult { token_logprobs_s: vec![-1.0, -2.0], ..TeacherResult::default() };
        good.check(&request()).unwrap();
        let rows = |widths: [usize; 2]| Some(widths.into_iter().map(|w| vec![-1.0_f32; w]).collect::<Rows<f32>>());
        let with_ids = TeacherRequest { candidate_ids: Some([[1, 2], [3, 4]].into_iter().collect()), ..request() };
        TeacherResult { candidate_logprobs: rows([2, 2]), ..good.clone() }.check(&with_ids).unwrap();
        let cases = [
            (TeacherResult { weight_version: 3, ..good.clone() }, "of weights 3"),
            (TeacherResult { token_logprobs_s: vec![-1.0], ..good.clone() }, "token log-probs"),
            (TeacherResult { hidden: Some(HiddenStates { width: 0, values_sh: vec![] }), ..good.clone() }, "hidden"),
            (TeacherResult { candidate_logprobs: rows([2, 3]), ..good.clone() }, "position 1 has another number"),
            (TeacherResult { sample: SampleId { prompt: 9, ..SampleId::default() }, ..good }, "of sample `0/9/0`"),
        ];
        for (result, text) in cases {
            let error = result.check(&with_ids).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }

    proptest! {
        #[test]
        fn samples_and_texts_are_one_to_one(epoch: u32, prompt: u64, generation: u32) {
            let sample = SampleId { epoch, prompt, generation };
            prop_assert_eq!(SampleId::from_uuid(&sample.to_uuid()), Some(sample));
            prop_assert_eq!(sample.to_string().parse(), Ok(sample));
        }

        #[test]
        fn no_text_panics(text in ".{0,40}") {
            let _ = SampleId::from_uuid(&text);
            let _ = text.parse::<SampleId>();
        }
    }

    #[test]
    fn a_foreign_uuid_comes_back_the_same() {
        let uuid = "3bab6c39-8d88-448a-beed-8d14f06d3fef";
        assert_eq!(SampleId::from_uuid(uuid).unwrap().to_uuid(), uuid);
        assert_eq!(SampleId::from_uuid("3bab6c398d88448abeed8d14f06d3fef"), None);
        assert_eq!(SampleId::from_uuid("3bab6c39-8d88-448a-beed-8d14f06d3fe+"), None);
    }
}
