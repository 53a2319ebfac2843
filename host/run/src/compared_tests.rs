use std::sync::atomic::{AtomicBool, Ordering};

use cosmos_broker::{BrokerLimits, MemoryBroker};
use cosmos_config::{ConfigFile, Dtype};
use cosmos_engine::model::{ModelConfig, random};

use super::*;
use crate::heads::TeacherHead;
use crate::policy::PolicyRole;
use crate::shelf::{FolderShelf, Shelf, StoreShelf};
use crate::student::Student;
use crate::teacher::Wanted;
use crate::teachers;

fn folder() -> std::path::PathBuf {
    cosmos_testkit::repo_root().join("configs/quickstart/student")
}

fn shape() -> ModelConfig {
    ModelConfig::from_folder(&folder()).unwrap()
}

fn config(keys: &str) -> Config {
    let toml = format!(
        "[train]\nseed = 5\noptm_lr = 1e-2\noptm_warmup_steps = 0\n[host]\nrandom_init = true\n[train.train_policy]\ntype = \"grpo\"\nmini_batch = 2\ntemperature = 0.9\n\
         [distillation]\nenable = true\ntop_k = -1\n{keys}\n\
         [[distillation.teachers]]\nname = \"math\"\nmodel_name_or_path = \"m\"\nweight = 3.0\n\
         [[distillation.teachers]]\nname = \"code\"\nmodel_name_or_path = \"c\"\n"
    );
    ConfigFile::parse("run.toml", &toml).unwrap().resolve("20260102030405").unwrap().config
}

/// Two teachers; the second's head is wider.
fn two(config: &Config) -> Vec<TeacherRole> {
    let wanted = wanted(config);
    let second = ModelConfig { vocab_size: shape().vocab_size + 7, ..shape() };
    vec![
        TeacherRole::new("math", random(&shape(), "cpu", 21).unwrap(), wanted),
        TeacherRole::new("code", random(&second, "cpu", 22).unwrap(), wanted),
    ]
}

fn wanted(config: &Config) -> Wanted {
    Wanted::new(config, &PolicyRole::new(config, config.train.train_policy.grpo().unwrap()).unwrap().spec)
}

fn completions() -> Vec<Completion> {
    let completion = |sample: u64| {
        let id = |i: u64| ((sample * 7 + i * 3) % 11) as u32;
        let teachers: &[u32] = [&[0][..], &[1], &[0, 1], &[]][sample as usize % 4];
        let json = serde_json::json!({"sample": sample, "version": 0, "prompt": "", "prompt_ids": [id(1), id(2)],
            "tokens": (3..6 + sample % 3).map(id).collect::<Vec<_>>(), "text": "", "stopped": true, "logprobs": [],
            "candidate_ids": [], "advantage": 0, "teachers": teachers});
        serde_json::from_value::<Completion>(json).unwrap()
    };
    (0..6).map(completion).collect()
}

fn bits(values: &[Vec<f32>]) -> Vec<u32> {
    values.iter().flatten().map(|v| v.to_bits()).collect()
}

/// Teachers that answer from their own threads until `work` is done.
fn serving<R>(roles: Vec<TeacherRole>, queues: &[MemoryBroker], work: impl FnOnce() -> R) -> R {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for (mut role, queue) in roles.into_iter().zip(queues) {
            let over = &over;
            scope.spawn(move || {
                while !over.load(Ordering::SeqCst) {
                    role.drain(queue, "t", &|| false).unwrap();
                    std::thread::sleep(std::time::Duration::from_millis(2));
                }
            });
        }
        let result = work();
        over.store(true, Ordering::SeqCst);
        result
    })
}

/// The heads as another process gets them.
fn shipped<'a>(roles: &[TeacherRole], shelf_of: impl Fn(&str) -> Box<dyn Shelf>) -> Vec<Box<dyn Head + 'a>> {
    let heads = roles.iter().map(|role| {
        let shelf = shelf_of(&role.name);
        TeacherHead::of(&role.name, "test", role.model.as_ref()).unwrap().write(shelf.as_ref()).unwrap();
        TeacherHead::read(shelf.as_ref(), &role.name, role.model.config(), 0).unwrap().load("cpu").unwrap()
    });
    heads.map(|head| head as Box<dyn Head + 'a>).collect()
}

fn in_folders(dir: &std::path::Path) -> impl Fn(&str) -> Box<dyn Shelf> + '_ {
    move |name| Box::new(FolderShelf::open(&dir.join("teachers").join(name)).unwrap())
}

#[test]
fn distant_teachers_give_the_bits_of_own_ones() {
    let (config, completions, dir) = (config(""), completions(), tempfile::tempdir().unwrap());
    let mut student = random(&shape(), "cpu", 9).unwrap();
    let mut roles = two(&config);
    let mut own = OwnTeachers { teachers: &mut roles, config: &config };
    let here = own.reverse_kl(student.as_mut(), &completions, 0.9, 2).unwrap();
    let queues: Vec<MemoryBroker> = roles.iter().map(|_| MemoryBroker::new(BrokerLimits::default())).collect();
    let heads = shipped(&roles, in_folders(dir.path()));
    assert!(dir.path().join("teachers/math/head.safetensors").is_file());
    let mut distant = DistantTeachers {
        queues: queues.iter().map(|q| q as &dyn Broker).collect(),
        heads,
        names: vec!["math".into(), "code".into()],
        weights: vec![3.0, 1.0],
        order: 4,
        wait_ms_max: 60_000,
    };
    let there = serving(roles, &queues, || distant.reverse_kl(student.as_mut(), &completions, 0.9, 2).unwrap());
    assert_eq!(bits(&here), bits(&there));
    assert_eq!(
        here.iter().map(Vec::len).collect::<Vec<_>>(),
        completions.iter().map(|c| c.tokens.len()).collect::<Vec<_>>()
    );
    assert!(here.iter().flatten().all(|kl| *kl > -1e-6) && here.iter().flatten().any(|kl| *kl > 1e-4));

    // Nobody serves: the wait ends and names the teacher, and what was asked is let go.
    distant.wait_ms_max = 30;
    let error = distant.reverse_kl(student.as_mut(), &completions, 0.9, 2).unwrap_err();
    assert!(error.to_string().contains("teacher `math` has not answered 4 of 4 requests within 30 ms"), "{error}");
    assert!(queues.iter().all(|q| q.stats().unwrap().waiting == 0));
}

#[test]
fn the_kl_to_a_mixture_is_that_of_its_distribution() {
    let (config, completions) = (config(""), completions());
    let mut student = random(&shape(), "cpu", 9).unwrap();
    let mut roles = two(&config);
    let kl = OwnTeachers { teachers: &mut roles, config: &config }
        .reverse_kl(student.as_mut(), &completions, 0.9, 3)
        .unwrap();
    let vocab = shape().vocab_size;
    let distributions = |model: &mut dyn Model, c: &Completion| -> Vec<Vec<f64>> {
        let ids = c.ids();
        let batch = cosmos_engine::batch::TokenBatch::new(&[&ids[..]]).unwrap();
        let at = |t: usize| cosmos_engine::batch::Position { b: 0, t };
        let positions: Vec<_> = (c.prompt_ids.len() - 1..ids.len() - 1).map(at).collect();
        let hidden_rh = model.hidden_rh(&batch, &positions).unwrap();
        let mut logits_rv = Vec::new();
        model.head_logits_rv(&hidden_rh, &mut logits_rv).unwrap();
        let rows = logits_rv.chunks(model.config().vocab_size).map(|row| {
            let e: Vec<f64> = row[..vocab].iter().map(|z| (f64::from(*z) / f64::from(0.9f32)).exp()).collect();
            let sum: f64 = e.iter().sum();
            e.iter().map(|e| e / sum).collect()
        });
        rows.collect()
    };
    for (completion, kl) in completions.iter().zip(&kl) {
        let p = distributions(student.as_mut(), completion);
        let q: Vec<_> = roles.iter_mut().map(|t| distributions(t.model.as_mut(), completion)).collect();
        let weights: [f64; 2] = match completion.teachers.as_slice() {
            [0] => [1.0, 0.0],
            [1] => [0.0, 1.0],
            _ => [0.75, 0.25],
        };
        for (row, got) in kl.iter().enumerate() {
            let mixture = |v: usize| weights[0] * q[0][row][v] + weights[1] * q[1][row][v];
            let expected: f64 = (0..vocab).map(|v| p[row][v] * (p[row][v] / mixture(v)).ln()).sum();
            assert!((f64::from(*got) - expected).abs() < 1e-5, "{got} and {expected}");
        }
    }
}

#[test]
fn a_single_teacher_elsewhere_gives_the_number_of_one_here() {
    let toml = "[train]\n[train.train_policy]\ntype = \"grpo\"\n[distillation]\nenable = true\n";
    let config = ConfigFile::parse("run.toml", toml).unwrap().resolve("20260102030405").unwrap().config;
    let mut completions = completions();
    completions.iter_mut().for_each(|c| c.teachers.clear());
    let mut student = random(&shape(), "cpu", 9).unwrap();
    let mut roles = two(&config);
    roles.truncate(1);
    let here = OwnTeachers { teachers: &mut roles, config: &config }
        .reverse_kl(student.as_mut(), &completions, 1.0, 2)
        .unwrap();
    let queues = [MemoryBroker::new(BrokerLimits::default())];
    let store: std::sync::Arc<dyn cosmos_broker::Store> = std::sync::Arc::new(cosmos_broker::MemoryStore::default());
    let heads = shipped(&roles, |name| Box::new(StoreShelf::new(store.clone(), &format!("teachers/{name}"), 60_000)));
    let mut distant = DistantTeachers {
        queues: vec![&queues[0]],
        heads,
        names: vec!["teacher".into()],
        weights: vec![1.0],
        order: 0,
        wait_ms_max: 60_000,
    };
    let there = serving(roles, &queues, || distant.reverse_kl(student.as_mut(), &completions, 1.0, 2).unwrap());
    for (a, b) in here.iter().flatten().zip(there.iter().flatten()) {
        assert!((a - b).abs() < 1e-6, "{a} and {b}");
    }
}

/// Weights and mean loss after one step with heads of `heads`.
fn step(config: &Config, roles: &mut [TeacherRole], shipped_heads: bool) -> (Vec<u32>, f64) {
    let completions = completions();
    let queues: Vec<MemoryBroker> = roles.iter().map(|_| MemoryBroker::new(BrokerLimits::default())).collect();
    let queues: Vec<&dyn Broker> = queues.iter().map(|q| q as &dyn Broker).collect();
    teachers::request(&queues, &completions, 1, &wanted(config), 1000).unwrap();
    for (role, queue) in roles.iter_mut().zip(&queues) {
        role.drain(*queue, "t", &|| false).unwrap();
    }
    let answers = teachers::collect(&queues, &completions, 1, &[3.0, 1.0], 1000).unwrap();
    assert_eq!(answers.len(), completions.len());
    let dir = tempfile::tempdir().unwrap();
    let mut heads: Vec<Box<dyn Head + '_>> = match shipped_heads {
        true => shipped(roles, in_folders(dir.path())),
        false => roles.iter_mut().map(|t| Box::new(ModelHead(t.model.as_mut())) as Box<dyn Head + '_>).collect(),
    };
    let role = PolicyRole::new(config, config.train.train_policy.grpo().unwrap()).unwrap();
    let mut student = Student::load(config, &folder(), 10).unwrap();
    let outcome = role.step(&mut student, &mut heads, None, &completions, answers, 0).unwrap();
    assert_eq!((outcome.report.missing_samples, outcome.skipped), (0, 0));
    let weights = student.weights(true).unwrap();
    (weights.iter().flat_map(|t| t.values.iter().map(|v| v.to_bits())).collect(), outcome.report.total)
}

#[test]
fn a_step_on_shipped_heads_has_the_bits_of_one_on_whole_models() {
    let config = config("");
    let mut roles = two(&config);
    assert_eq!(step(&config, &mut roles, false), step(&config, &mut roles, true));
}

#[test]
fn hidden_states_in_16_bits_change_the_loss_by_little() {
    let exact = config("");
    let (_, loss) = step(&exact, &mut two(&exact), true);
    for (dtype, name, bound) in [(Dtype::Bfloat16, "bfloat16", 3e-3), (Dtype::Float16, "float16", 4e-4)] {
        let half = config(&format!("hidden_dtype = \"{name}\""));
        assert_eq!(wanted(&half).hidden_dtype, dtype);
        let (_, rounded) = step(&half, &mut two(&half), true);
        let change = ((rounded - loss) / loss).abs();
        println!("{name}: loss {rounded} in place of {loss}, {change:e} of it");
        assert!(change > 0.0 && change < bound, "{name}: {change:e}");
    }
}
