//! A teacher on several ranks against the same teacher on one.

use cosmos_broker::{BrokerLimits, MemoryBroker, Rows, SampleId, TeacherResult};
use cosmos_config::{ConfigFile, Parallelism};

use super::*;
use crate::policy::PolicyRole;
use crate::roles::replica::tests::over_processes;
use crate::teacher::Wanted;

fn config(keys: &str) -> Config {
    let toml = format!(
        "[train.train_policy]\ntype = \"grpo\"\ntemperature = 0.9\n[distillation]\nenable = true\n\
         mini_batch = 2\nbatch_size_per_replica = 16\n{keys}\n"
    );
    ConfigFile::parse("run.toml", &toml).unwrap().resolve("20260102030405").unwrap().config
}

/// The quickstart's student as a teacher, on ranks of `parallelism`.
fn teacher(config: &Config, parallelism: Parallelism, party: Option<Arc<Party>>) -> Teacher {
    let folder = cosmos_testkit::repo_root().join("configs/quickstart/student");
    let wanted = Wanted::new(config, &PolicyRole::new(config, config.train.train_policy.grpo().unwrap()).unwrap().spec);
    let shape = ModelConfig::from_folder(&folder).unwrap();
    let spec = TeacherSpec { name: "math".into(), folder, config: shape, weight: 1.0, wanted, parallelism };
    Teacher::load(config, &spec, party).unwrap()
}

/// Requests of different lengths, one of which cannot be scored, and one of a validation.
fn requests(config: &Config) -> Vec<TeacherRequest> {
    let top_k = config.distillation.top_k;
    let id = |prompt: u64, i: u64| ((prompt * 7 + i * 3) % 11) as u32;
    let request = |prompt: u64| {
        let count = 3 + prompt % 4;
        let rows = 1 + count;
        let candidates = (0..rows * top_k.max(0) as u64).map(|i| id(prompt, i)).collect();
        TeacherRequest {
            sample: SampleId { epoch: 1, prompt, generation: 0 },
            weight_version: 0,
            prompt_ids: vec![id(prompt, 1), id(prompt, 2)],
            completion_ids: (0..count).map(|i| if prompt == 4 { 1_000_000 } else { id(prompt, i + 3) }).collect(),
            include_prompt: true,
            top_k: if prompt == 6 { -1 } else { top_k as i32 },
            candidate_ids: if top_k > 0 && prompt != 6 { Rows::of_width(top_k as usize, candidates) } else { None },
        }
    };
    (0..8).map(request).collect()
}

fn results(config: &Config, parallelism: Parallelism) -> (Vec<TeacherResult>, TeacherHead) {
    results_of(config, &mut teacher(config, parallelism, None))
}

fn results_of(config: &Config, teacher: &mut Teacher) -> (Vec<TeacherResult>, TeacherHead) {
    let queue = MemoryBroker::new(BrokerLimits::default());
    let requests = requests(config);
    let samples: Vec<SampleId> = requests.iter().map(|r| r.sample).collect();
    requests.into_iter().for_each(|request| queue.publish(request, 1000).unwrap());
    let stats = teacher.serve(&queue, "t", 0).unwrap();
    assert!(stats.tokens > 0);
    let mut fetched = queue.fetch(&samples, 0).unwrap();
    assert!(fetched.missing.is_empty(), "{:?}", fetched.missing);
    assert!(fetched.failed[0].1.contains("token 1000000 is beyond the teacher's vocabulary"), "{:?}", fetched.failed);
    fetched.results.sort_by_key(|result| result.sample.prompt);
    (fetched.results, teacher.head().unwrap())
}

/// Largest distance of two lists, relative to the largest value.
fn apart(own: &[f32], whole: &[f32]) -> f32 {
    assert_eq!(own.len(), whole.len());
    let finite = |v: &f32| v.is_finite();
    let largest = whole.iter().copied().filter(finite).fold(1e-6_f32, |best, v| best.max(v.abs()));
    let distance = |(a, b): (&f32, &f32)| if a == b { 0.0 } else { (a - b).abs() };
    own.iter().zip(whole).map(distance).fold(0.0, f32::max) / largest
}

#[test]
fn several_ranks_say_what_one_says() {
    let one = || Parallelism { tp_size: 1, ..Parallelism::default() };
    let meshes = [
        ("tp 2", Parallelism { tp_size: 2, ..one() }),
        ("cp 2", Parallelism { cp_size: 2, ..one() }),
        ("pp 2", Parallelism { pp_size: 2, ..one() }),
        ("dp_shard 2", Parallelism { dp_shard_size: 2, ..one() }),
        ("dp_shard 3", Parallelism { dp_shard_size: 3, ..one() }),
        ("dp_replicate 2", Parallelism { dp_replicate_size: 2, ..one() }),
        ("dp_shard 2, tp 2", Parallelism { dp_shard_size: 2, tp_size: 2, ..one() }),
    ];
    for keys in ["top_k = 0", "top_k = 8", "top_k = 8\ntop_k_support = \"union\"", "top_k = -1"] {
        let config = config(&format!("model_name_or_path = \"m\"\n{keys}"));
        let (whole, head) = results(&config, one());
        assert_eq!(whole.len(), 7);
        for (mesh, parallelism) in &meshes {
            let (own, own_head) = results(&config, parallelism.clone());
            assert_eq!(own_head, head, "{keys}, {mesh}: the head");
            for (own, whole) in own.iter().zip(&whole) {
                assert_eq!((own.sample, &own.teacher), (whole.sample, &whole.teacher));
                assert_eq!(own.top1_ids_s, whole.top1_ids_s, "{keys}, {mesh}");
                let ids = |r: &TeacherResult| r.candidate_ids.as_ref().map(|rows| rows.values().to_vec());
                assert_eq!(ids(own), ids(whole), "{keys}, {mesh}: candidates");
                let of = |r: &TeacherResult| r.candidate_logprobs.as_ref().map(|rows| rows.values().to_vec());
                let hidden = |r: &TeacherResult| r.hidden.as_ref().map(|h| h.values_sh.clone());
                assert_eq!(hidden(own).is_some(), hidden(whole).is_some());
                for (what, own, whole) in [
                    ("log-probs", own.token_logprobs_s.clone(), whole.token_logprobs_s.clone()),
                    ("entropies", own.entropies_s.clone(), whole.entropies_s.clone()),
                    ("candidates", of(own).unwrap_or_default(), of(whole).unwrap_or_default()),
                    ("hidden states", hidden(own).unwrap_or_default(), hidden(whole).unwrap_or_default()),
                ] {
                    let apart = apart(&own, &whole);
                    // Only whole sums are split, and rounded to 16 bits on the way for hidden states.
                    let most = if what == "hidden states" { 4e-3 } else { 1e-5 };
                    assert!(apart <= most, "{keys}, {mesh}: {what} {apart:e}");
                    if mesh.starts_with("dp_replicate") {
                        assert_eq!(apart, 0.0, "{keys}, {mesh}: {what} keep their bits");
                    }
                }
            }
        }
    }
}

#[test]
fn a_teacher_over_two_processes_has_the_bits_of_one() {
    let sizes = || Parallelism { tp_size: 2, dp_shard_size: 2, ..Parallelism::default() };
    for keys in ["top_k = 0", "top_k = 8", "top_k = -1"] {
        let config = config(&format!("model_name_or_path = \"m\"\n{keys}"));
        let whole = results(&config, sizes());
        let several = over_processes(2, |party| {
            let mut teacher = teacher(&config, sizes(), Some(Arc::clone(&party)));
            if party.node() > 0 {
                return Err(teacher.follow(&StopFlag::default()).unwrap());
            }
            let results = results_of(&config, &mut teacher);
            party.go_home(&RoleOutcome::Done).unwrap();
            Ok(results)
        });
        let mut several = several.into_iter();
        assert!(several.next().unwrap().unwrap() == whole, "{keys}");
        assert_eq!(several.next().unwrap().err(), Some(RoleOutcome::Done));
    }
}

#[test]
fn sizes_that_do_not_fit_name_their_table() {
    let config =
        config("top_k = 0\nteachers = [{name = \"math\", model_name_or_path = \"m\", parallelism = {ep_size = 2}}]");
    let entry = &config.distillation.teachers[0];
    let wanted =
        Wanted::new(&config, &PolicyRole::new(&config, config.train.train_policy.grpo().unwrap()).unwrap().spec);
    let folder = cosmos_testkit::repo_root().join("configs/quickstart/student");
    let shape = ModelConfig::from_folder(&folder).unwrap();
    let parallelism = entry.parallelism.clone().unwrap();
    let spec = TeacherSpec { name: "math".into(), folder, config: shape, weight: 1.0, wanted, parallelism };
    let error = Teacher::load(&config, &spec, None).err().unwrap();
    assert!(error.to_string().contains("`distillation.teachers[0].parallelism`: `ep_size` is 2"), "{error}");
}
