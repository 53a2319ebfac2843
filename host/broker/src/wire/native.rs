//! The teacher's messages in our frame.

use super::frame::{FloatFormat, FrameLimits, FrameReader, FrameWriter, Kind, id_bits};
use crate::{HiddenStates, Result, SampleId, TeacherRequest, TeacherResult};

const INCLUDE_PROMPT: u16 = 1;
const CANDIDATE_IDS: u16 = 2;
const CANDIDATE_LOGPROBS: u16 = 4;
const HIDDEN: u16 = 8;

/// How the floats of results travel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WireFloats {
    /// Log-probs and entropies (`distillation.wire_logprob_dtype`).
    pub logprobs: FloatFormat,
    /// Hidden states: the teacher's own format loses nothing.
    pub hidden: FloatFormat,
}

fn write_sample(out: &mut FrameWriter, sample: SampleId) {
    out.varint(sample.epoch.into());
    out.varint(sample.prompt);
    out.varint(sample.generation.into());
}

fn read_sample(reader: &mut FrameReader<'_>) -> Result<SampleId> {
    Ok(SampleId {
        epoch: reader.number("sample")?,
        prompt: reader.varint("sample")?,
        generation: reader.number("sample")?,
    })
}

/// The frame of a request.
pub fn encode_request(request: &TeacherRequest) -> Vec<u8> {
    let candidates = request.candidate_ids.as_ref();
    let mut flags = if request.include_prompt { INCLUDE_PROMPT } else { 0 };
    flags |= candidates.map_or(0, |_| CANDIDATE_IDS);
    let numbers = request.prompt_ids.len() + request.completion_ids.len() + candidates.map_or(0, |c| c.values().len());
    let mut out = FrameWriter::new(Kind::Request, flags, 64 + numbers * 3);
    write_sample(&mut out, request.sample);
    out.varint(request.weight_version);
    out.signed(request.top_k.into());
    out.ids(&request.prompt_ids);
    out.ids(&request.completion_ids);
    if let Some(rows) = candidates {
        out.id_rows(rows);
    }
    out.finish()
}

/// Reads the frame of a request and checks that its parts fit together.
///
/// # Errors
/// `BadBytes`, `BadMessage`.
pub fn decode_request(bytes: &[u8], limits: &FrameLimits) -> Result<TeacherRequest> {
    let mut reader = FrameReader::open(bytes, Kind::Request, limits)?;
    let flags = reader.flags();
    if flags & !(INCLUDE_PROMPT | CANDIDATE_IDS) != 0 {
        return Err(reader.bad("flags", format!("unknown flags {flags:#x}")));
    }
    let request = TeacherRequest {
        sample: read_sample(&mut reader)?,
        weight_version: reader.varint("weight_version")?,
        top_k: match i32::try_from(reader.signed("top_k")?) {
            Ok(top_k) => top_k,
            Err(_) => return Err(reader.bad("top_k", "beyond 32 bits")),
        },
        include_prompt: flags & INCLUDE_PROMPT != 0,
        prompt_ids: reader.ids("prompt_ids")?,
        completion_ids: reader.ids("completion_ids")?,
        candidate_ids: if flags & CANDIDATE_IDS != 0 { Some(reader.id_rows("candidate_ids")?) } else { None },
    };
    reader.end()?;
    request.check()?;
    Ok(request)
}

/// The frame of a result.
pub fn encode_result(result: &TeacherResult, floats: WireFloats) -> Vec<u8> {
    let mut flags = result.candidate_ids.as_ref().map_or(0, |_| CANDIDATE_IDS);
    flags |= result.candidate_logprobs.as_ref().map_or(0, |_| CANDIDATE_LOGPROBS);
    flags |= result.hidden.as_ref().map_or(0, |_| HIDDEN);
    let candidates = result.candidate_logprobs.as_ref().map_or(0, |rows| rows.values().len());
    let hidden = result.hidden.as_ref().map_or(0, |h| h.values_sh.len());
    let bytes = 64 + (result.token_logprobs_s.len() * 3 + candidates * 2) * 4 + hidden * floats.hidden.bytes();
    let mut out = FrameWriter::new(Kind::Result, flags, bytes);
    write_sample(&mut out, result.sample);
    out.varint(result.weight_version);
    out.text(&result.teacher);
    out.floats(&result.token_logprobs_s, floats.logprobs);
    out.floats(&result.entropies_s, floats.logprobs);
    out.ids(&result.top1_ids_s);
    if let Some(rows) = &result.candidate_logprobs {
        out.float_rows(rows, floats.logprobs);
    }
    if let Some(rows) = &result.candidate_ids {
        out.id_rows(rows);
    }
    if let Some(hidden) = &result.hidden {
        out.varint(hidden.width as u64);
        out.floats(&hidden.values_sh, floats.hidden);
    }
    out.finish()
}

/// Reads the frame of a result.
///
/// # Errors
/// `BadBytes`.
pub fn decode_result(bytes: &[u8], limits: &FrameLimits) -> Result<TeacherResult> {
    let mut reader = FrameReader::open(bytes, Kind::Result, limits)?;
    let flags = reader.flags();
    if flags & !(CANDIDATE_IDS | CANDIDATE_LOGPROBS | HIDDEN) != 0 {
        return Err(reader.bad("flags", format!("unknown flags {flags:#x}")));
    }
    let has = |flag: u16| flags & flag != 0;
    let result = TeacherResult {
        sample: read_sample(&mut reader)?,
        weight_version: reader.varint("weight_version")?,
        teacher: reader.text("teacher")?.to_owned(),
        token_logprobs_s: reader.floats("token_logprobs")?,
        entropies_s: reader.floats("entropies")?,
        top1_ids_s: reader.ids("top1_ids")?,
        candidate_logprobs: has(CANDIDATE_LOGPROBS).then(|| reader.float_rows("candidate_logprobs")).transpose()?,
        candidate_ids: has(CANDIDATE_IDS).then(|| reader.id_rows("candidate_ids")).transpose()?,
        hidden: has(HIDDEN)
            .then(|| -> Result<HiddenStates> {
                Ok(HiddenStates { width: reader.number("hidden")?, values_sh: reader.floats("hidden")? })
            })
            .transpose()?,
    };
    reader.end()?;
    Ok(result)
}

/// The frame that says why a sample has no result.
pub fn encode_failure(sample: SampleId, reason: &str) -> Vec<u8> {
    const REASON_BYTES_MAX: usize = 4096;
    let mut end = reason.len().min(REASON_BYTES_MAX);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    let mut out = FrameWriter::new(Kind::Failure, 0, 64 + end);
    write_sample(&mut out, sample);
    out.text(&reason[..end]);
    out.finish()
}

/// Reads what [`encode_failure`] wrote.
///
/// # Errors
/// `BadBytes`.
pub fn decode_failure(bytes: &[u8], limits: &FrameLimits) -> Result<(SampleId, String)> {
    let mut reader = FrameReader::open(bytes, Kind::Failure, limits)?;
    let failure = (read_sample(&mut reader)?, reader.text("reason")?.to_owned());
    reader.end()?;
    Ok(failure)
}

/// Bytes through the broker for one scored token, without the few dozen bytes of each message's own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenBytes {
    /// Rollout to teacher.
    pub request: f64,
    /// Teacher to policy.
    pub result: f64,
}

/// What one token costs: its id and `top_k` candidates (of a vocabulary of `vocab` ids) to the teacher; its log-prob, those of
/// the candidates and `hidden` numbers of the last hidden state back (0 when none are sent). `measured` counts the entropies
/// and most likely tokens that come with them.
pub fn bytes_per_token(top_k: i32, vocab: u32, floats: WireFloats, hidden: usize, measured: bool) -> TokenBytes {
    let id = f64::from(id_bits(vocab.saturating_sub(1))) / 8.0;
    let number = floats.logprobs.bytes() as f64;
    let candidates = f64::from(top_k.max(0));
    let measures = if measured { number + id } else { 0.0 };
    TokenBytes {
        request: id * (1.0 + candidates),
        result: number * (1.0 + candidates) + measures + (hidden * floats.hidden.bytes()) as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rows;
    use proptest::prelude::*;

    fn limits() -> FrameLimits {
        FrameLimits::default()
    }

    fn sample() -> impl Strategy<Value = SampleId> {
        any::<(u32, u64, u32)>().prop_map(|(epoch, prompt, generation)| SampleId { epoch, prompt, generation })
    }

    fn requests() -> impl Strategy<Value = TeacherRequest> {
        let ids = || proptest::collection::vec(0..200_000_u32, 1..8);
        let row = proptest::collection::vec(any::<u32>(), 0..4);
        (sample(), any::<u64>(), ids(), ids(), any::<bool>(), -1..9_i32, proptest::option::of(row)).prop_map(
            |(sample, weight_version, prompt_ids, completion_ids, include_prompt, top_k, row)| {
                let mut request = TeacherRequest {
                    sample,
                    weight_version,
                    prompt_ids,
                    completion_ids,
                    include_prompt,
                    top_k,
                    candidate_ids: None,
                };
                let s = request.scored_positions();
                request.candidate_ids = row.map(|row| (0..s).map(|_| row.clone()).collect());
                request
            },
        )
    }

    fn results() -> impl Strategy<Value = TeacherResult> {
        let floats = || proptest::collection::vec(-60.0..0.0_f32, 0..6);
        let rows = proptest::collection::vec(floats(), 0..4);
        let hidden = proptest::option::of((1..5_usize, floats()));
        (sample(), any::<u64>(), ".{0,9}", floats(), floats(), proptest::option::of(rows), hidden).prop_map(
            |(sample, weight_version, teacher, logprobs, entropies, rows, hidden)| TeacherResult {
                sample,
                weight_version,
                teacher,
                top1_ids_s: logprobs.iter().map(|v| (-v) as u32).collect(),
                token_logprobs_s: logprobs,
                entropies_s: entropies,
                candidate_ids: rows.as_ref().map(|rows| rows.iter().map(|r| vec![9_u32; r.len()]).collect()),
                candidate_logprobs: rows.map(|rows| rows.into_iter().collect::<Rows<f32>>()),
                hidden: hidden.map(|(width, values_sh)| HiddenStates { width, values_sh }),
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(request in requests(), result in results(), reason in ".{0,60}") {
            prop_assert_eq!(decode_request(&encode_request(&request), &limits()), Ok(request.clone()));
            prop_assert_eq!(decode_result(&encode_result(&result, WireFloats::default()), &limits()), Ok(result));
            let failure = encode_failure(request.sample, &reason);
            prop_assert_eq!(decode_failure(&failure, &limits()), Ok((request.sample, reason)));
        }

        #[test]
        fn halves_are_within_their_error(result in results()) {
            let floats = WireFloats { logprobs: FloatFormat::F16, hidden: FloatFormat::Bf16 };
            let read = decode_result(&encode_result(&result, floats), &limits()).unwrap();
            for (a, b) in result.token_logprobs_s.iter().zip(&read.token_logprobs_s) {
                prop_assert!((a - b).abs() <= a.abs() / 2048.0 + 1e-7, "{} {}", a, b);
            }
            let hidden = |r: &TeacherResult| r.hidden.clone().unwrap_or_default().values_sh;
            for (a, b) in hidden(&result).iter().zip(&hidden(&read)) {
                prop_assert!((a - b).abs() <= a.abs() / 256.0 + 1e-30, "{} {}", a, b);
            }
        }

        /// The checksum catches chance; whoever writes a right checksum over wrong bytes gets no further.
        #[test]
        fn damaged_payloads_with_a_right_checksum_do_not_panic(request in requests(), result in results(), at: prop::sample::Index, byte: u8) {
            for frame in [encode_request(&request), encode_result(&result, WireFloats::default())] {
                let kind = if frame[5] == Kind::Request as u8 { Kind::Request } else { Kind::Result };
                let mut payload = frame[super::super::frame::HEADER_BYTES..].to_vec();
                let at = at.index(payload.len());
                payload[at] = byte;
                let mut out = FrameWriter::new(kind, u16::from_le_bytes([frame[6], frame[7]]), 0);
                out.raw(&payload);
                let bytes = out.finish();
                let _ = decode_request(&bytes, &limits());
                let _ = decode_result(&bytes, &limits());
            }
        }

        #[test]
        fn cut_frames_are_refused(request in requests(), cut: prop::sample::Index) {
            let bytes = encode_request(&request);
            prop_assert!(decode_request(&bytes[..cut.index(bytes.len())], &limits()).is_err());
        }
    }

    #[test]
    fn what_a_token_costs_is_what_frames_weigh() {
        let t = 10_000;
        let vocab = 151_936;
        let request = TeacherRequest {
            prompt_ids: vec![1],
            completion_ids: vec![vocab - 1; t],
            top_k: 8,
            candidate_ids: Rows::of_width(8, vec![vocab - 1; 8 * t]),
            ..TeacherRequest::default()
        };
        let result = TeacherResult {
            token_logprobs_s: vec![-1.0; t],
            candidate_logprobs: Rows::of_width(8, vec![-1.0; 8 * t]),
            hidden: Some(HiddenStates { width: 16, values_sh: vec![0.0; 16 * t] }),
            ..TeacherResult::default()
        };
        let floats = WireFloats { logprobs: FloatFormat::F16, hidden: FloatFormat::Bf16 };
        let expected = bytes_per_token(8, vocab, floats, 16, false);
        let close = |bytes: usize, each: f64| (bytes as f64 / t as f64 - each).abs() < 0.02;
        assert!(close(encode_request(&request).len(), expected.request), "{expected:?}");
        assert!(close(encode_result(&result, floats).len(), expected.result), "{expected:?}");
    }
}
