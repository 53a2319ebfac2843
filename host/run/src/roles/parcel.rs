//! A finished completion on its way from a rollout to the policies, as bytes. Floats keep their bits.

use cosmos_broker::wire::frame::{FloatFormat, FrameLimits, FrameReader, FrameWriter, Kind};
use cosmos_broker::{BrokerError, Rows};
use cosmos_plugin::ChatMessage;

use crate::rollout::Completion;

/// Bytes of one text of a completion: a prompt, or everything said.
const TEXT_BYTES_MAX: usize = 64 << 20;
/// Entries of a list: numbers of the rewards, messages of a conversation.
const ENTRIES_MAX: u64 = 1 << 16;

const STOPPED: u16 = 1;
const REWARDED: u16 = 2;
const REFERENCED: u16 = 4;

/// A completion as a frame.
pub fn encode(completion: &Completion) -> Vec<u8> {
    let c = completion;
    let flag = |set: bool, flag: u16| if set { flag } else { 0 };
    let flags = flag(c.stopped, STOPPED) | flag(c.reward.is_some(), REWARDED) | flag(c.reference.is_some(), REFERENCED);
    let mut out = FrameWriter::new(Kind::Completion, flags, 64 + c.prompt.len() + c.text.len() + 8 * c.tokens.len());
    out.varint(c.sample);
    out.varint(c.version);
    out.varint(c.versions.len() as u64);
    for (version, tokens) in &c.versions {
        out.varint(*version);
        out.varint(u64::from(*tokens));
    }
    out.ids(&c.teachers);
    out.ids(&c.prompt_ids);
    out.ids(&c.tokens);
    out.ids(&c.own.iter().map(|own| u32::from(*own)).collect::<Vec<_>>());
    out.floats(&c.logprobs, FloatFormat::F32);
    // As one row: there may be more candidates than a list of positions may have.
    out.id_rows(&std::iter::once(c.candidate_ids.clone()).collect());
    out.fixed(u64::from(c.advantage.to_bits()));
    if let Some(reward) = c.reward {
        out.fixed(reward.to_bits());
    }
    out.varint(c.reward_metrics.len() as u64);
    for (name, value) in &c.reward_metrics {
        out.text(name);
        out.fixed(value.to_bits());
    }
    out.varint(c.reward_failed.len() as u64);
    c.reward_failed.iter().for_each(|name| out.text(name));
    out.blob(c.prompt.as_bytes());
    out.blob(c.text.as_bytes());
    out.varint(c.conversation.len() as u64);
    for message in &c.conversation {
        out.text(&message.role);
        out.blob(message.content.as_bytes());
    }
    if let Some(reference) = &c.reference {
        out.blob(reference.as_bytes());
    }
    out.finish()
}

/// The completion in a frame.
///
/// # Errors
/// `BadBytes` for anything that [`encode`] does not write.
pub fn decode(bytes: &[u8], limits: &FrameLimits) -> cosmos_broker::Result<Completion> {
    let mut from = FrameReader::open(bytes, Kind::Completion, limits)?;
    let flags = from.flags();
    if flags & !(STOPPED | REWARDED | REFERENCED) != 0 {
        return Err(from.bad("flags", format!("unknown flags {flags:#x}")));
    }
    let sample = from.varint("sample")?;
    let version = from.varint("version")?;
    let mut versions = Vec::new();
    for _ in 0..entries(&mut from, "versions")? {
        versions.push((from.varint("versions")?, from.number("versions")?));
    }
    let teachers = from.ids("teachers")?;
    let prompt_ids = from.ids("prompt_ids")?;
    let tokens = from.ids("tokens")?;
    let own: Vec<bool> = from.ids("own")?.into_iter().map(|own| own != 0).collect();
    if !own.is_empty() && own.len() != tokens.len() {
        return Err(from.bad("own", format!("{} marks for {} tokens", own.len(), tokens.len())));
    }
    let logprobs = from.floats("logprobs")?;
    let candidates: Rows<u32> = from.id_rows("candidate_ids")?;
    let advantage = from.fixed("advantage")?;
    let advantage = u32::try_from(advantage).map_err(|_| from.bad("advantage", "no 32-bit float"))?;
    let reward = if flags & REWARDED != 0 { Some(f64::from_bits(from.fixed("reward")?)) } else { None };
    let mut reward_metrics = Vec::new();
    for _ in 0..entries(&mut from, "reward_metrics")? {
        let name = from.text("reward_metrics")?.to_string();
        reward_metrics.push((name, f64::from_bits(from.fixed("reward_metrics")?)));
    }
    let mut reward_failed = Vec::new();
    for _ in 0..entries(&mut from, "reward_failed")? {
        reward_failed.push(from.text("reward_failed")?.to_string());
    }
    let prompt = long_text(&mut from, "prompt")?;
    let text = long_text(&mut from, "text")?;
    let mut conversation = Vec::new();
    for _ in 0..entries(&mut from, "conversation")? {
        let role = from.text("role")?.to_string();
        conversation.push(ChatMessage { role, content: long_text(&mut from, "content")? });
    }
    let reference = if flags & REFERENCED != 0 { Some(long_text(&mut from, "reference")?) } else { None };
    from.end()?;
    Ok(Completion {
        sample,
        version,
        versions,
        teachers,
        prompt,
        prompt_ids,
        tokens,
        own,
        text,
        conversation,
        stopped: flags & STOPPED != 0,
        logprobs,
        candidate_ids: candidates.values().to_vec(),
        reward,
        reward_metrics,
        reward_failed,
        advantage: f32::from_bits(advantage),
        reference,
    })
}

fn entries(from: &mut FrameReader<'_>, field: &'static str) -> Result<u64, BrokerError> {
    let count = from.varint(field)?;
    if count > ENTRIES_MAX {
        return Err(from.bad(field, format!("{count} entries, more than {ENTRIES_MAX}")));
    }
    Ok(count)
}

fn long_text(from: &mut FrameReader<'_>, field: &'static str) -> Result<String, BrokerError> {
    let bytes = from.blob(field, TEXT_BYTES_MAX)?;
    std::str::from_utf8(bytes).map(str::to_string).map_err(|e| from.bad(field, e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn completion() -> impl Strategy<Value = Completion> {
        let numbers = (any::<u64>(), any::<u64>(), any::<bool>(), any::<u32>(), proptest::option::of(any::<u64>()));
        let tokens = (0usize..20).prop_flat_map(|n| {
            let ids = proptest::collection::vec(any::<u32>(), n);
            let own = prop_oneof![Just(Vec::new()), proptest::collection::vec(any::<bool>(), n)];
            (ids, own)
        });
        let lists = (
            proptest::collection::vec(any::<u32>(), 1..8),
            proptest::collection::vec(any::<u32>(), 0..12),
            proptest::collection::vec(any::<u32>(), 0..12),
        );
        let texts = (".{0,12}", ".{0,12}", proptest::option::of(".{0,8}"));
        let named = (
            proptest::collection::vec((".{0,6}", any::<u64>()), 0..3),
            proptest::collection::vec(".{0,6}", 0..3),
            proptest::collection::vec((".{0,6}", ".{0,6}"), 0..3),
        );
        (numbers, tokens, lists, texts, named).prop_map(
            |(
                (sample, version, stopped, advantage, reward),
                (tokens, own),
                (prompt_ids, logprobs, candidate_ids),
                (prompt, text, reference),
                (metrics, reward_failed, said),
            )| Completion {
                sample,
                version,
                versions: prompt_ids.iter().map(|id| (version, *id)).collect(),
                teachers: reward_failed.iter().map(|name: &String| name.len() as u32).collect(),
                prompt,
                prompt_ids,
                tokens,
                own,
                text,
                conversation: said.into_iter().map(|(role, content)| ChatMessage { role, content }).collect(),
                stopped,
                logprobs: logprobs.into_iter().map(f32::from_bits).collect(),
                candidate_ids,
                reward: reward.map(f64::from_bits),
                reward_metrics: metrics.into_iter().map(|(name, bits)| (name, f64::from_bits(bits))).collect(),
                reward_failed,
                advantage: f32::from_bits(advantage),
                reference,
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_sent_arrives(completion in completion()) {
            let bytes = encode(&completion);
            let read = decode(&bytes, &FrameLimits::default()).unwrap();
            // As JSON floats are written as their bits, so that NaN equals itself.
            prop_assert_eq!(serde_json::to_value(&read).unwrap(), serde_json::to_value(&completion).unwrap());
        }

        #[test]
        fn damage_is_refused(completion in completion(), at: prop::sample::Index, bit in 0u8..8) {
            let mut bytes = encode(&completion);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(decode(&bytes, &FrameLimits::default()).is_err());
        }

        #[test]
        fn foreign_payloads_never_panic(payload in proptest::collection::vec(any::<u8>(), 0..120), flags: u16) {
            let mut out = FrameWriter::new(Kind::Completion, flags & 7, 0);
            out.raw(&payload);
            let _ = decode(&out.finish(), &FrameLimits::default());
        }
    }
}
