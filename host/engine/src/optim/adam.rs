//! Adam and AdamW in PyTorch's order of operations.

use cosmos_kernels::memory::Buffer;
use rayon::prelude::*;

use crate::batch::{Position, TokenBatch};
use crate::model::{HeadLoss, Model, ParamSpec, Part, Updater};
use crate::{EngineError, Result};

/// Values per task and per partial sum of the norm; fixed, so that a norm never depends on the number of cores.
const SLICE: usize = 1 << 16;

/// Settings of the optimizer.
#[derive(Debug, Clone, PartialEq)]
pub struct AdamConfig {
    /// AdamW: the decay multiplies the parameter. Off: it is added to the gradient (Adam).
    pub decoupled_weight_decay: bool,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Applied to every parameter.
    pub weight_decay: f64,
}

impl Default for AdamConfig {
    fn default() -> Self {
        Self { decoupled_weight_decay: true, beta1: 0.9, beta2: 0.999, eps: 1e-6, weight_decay: 0.01 }
    }
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepStats {
    /// Global L2 norm before clipping, summed in f64.
    pub grad_norm: f64,
    /// Whether the gradient was scaled down.
    pub clipped: bool,
    /// Whether the gradient was finite. If not, nothing was updated.
    pub finite: bool,
}

/// First and second moments of one parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// Mean of the gradient.
    pub m: Vec<f32>,
    /// Mean of its square.
    pub v: Vec<f32>,
}

/// [`Moments`] where they lie.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MomentsView<'a> {
    /// Mean of the gradient.
    pub m: &'a [f32],
    /// Mean of its square.
    pub v: &'a [f32],
}

impl MomentsView<'_> {
    /// A copy.
    pub fn to_moments(self) -> Moments {
        Moments { m: self.m.to_vec(), v: self.v.to_vec() }
    }
}

/// The optimizer and its state, one entry per parameter of the model it was made for.
#[derive(Debug, Clone)]
pub struct Adam {
    config: AdamConfig,
    steps: u64,
    specs: Vec<ParamSpec>,
    /// Where each parameter's values begin in the moments, and where the last one's end.
    starts: Vec<usize>,
    /// The moments of all parameters, one after the other: memory comes in large pages, and hundreds of allocations would lose
    /// a part of one each.
    m: Buffer,
    v: Buffer,
}

impl Adam {
    /// Fresh state for these parameters (`model.params()`).
    pub fn new(config: AdamConfig, params: &[ParamSpec]) -> Self {
        let mut starts = vec![0];
        for spec in params {
            starts.push(starts.last().unwrap_or(&0) + spec.len());
        }
        let len = starts.last().copied().unwrap_or(0);
        Self { config, steps: 0, specs: params.to_vec(), starts, m: Buffer::zeros(len), v: Buffer::zeros(len) }
    }

    /// Updates done so far; skipped ones do not count.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Settings.
    pub fn config(&self) -> &AdamConfig {
        &self.config
    }

    /// One update with the gradients that the model has accumulated. `clip` bounds the global norm as
    /// `clip_grad_norm_` does; none or one of at most 0 leaves the gradient as it is. The gradients stay: call
    /// [`Model::zero_grads`] afterwards.
    ///
    /// # Errors
    /// A model whose parameters are not those of [`Adam::new`].
    pub fn step(&mut self, model: &mut dyn Model, lr: f64, clip: Option<f64>) -> Result<StepStats> {
        self.check(model)?;
        let grad_norm = model.sum_of_squares(&sum_of_squares)?.sqrt();
        if !grad_norm.is_finite() {
            return Ok(StepStats { grad_norm, clipped: false, finite: false });
        }
        let factor = match clip {
            Some(max) if max > 0.0 => (max / (grad_norm + 1e-6)).min(1.0),
            _ => 1.0,
        };
        self.steps += 1;
        let rule = Rule::new(&self.config, lr, factor, self.steps);
        let (starts, m, v) = (&self.starts, &mut self.m, &mut self.v);
        let mut wrong = None;
        model.update_params(&mut |index, parameter, gradient| match starts.get(index..index + 2) {
            Some(&[start, end]) if end - start == parameter.len() && gradient.len() == parameter.len() => {
                rule.update(parameter, gradient, &mut m[start..end], &mut v[start..end])
            }
            _ => wrong = Some(index),
        })?;
        if let Some(index) = wrong {
            return Err(EngineError::invalid(
                format!("parameter {index} has another size than its optimizer state"),
                "",
            ));
        }
        Ok(StepStats { grad_norm, clipped: factor < 1.0, finite: true })
    }

    /// Forward, backward and one update without clipping, each parameter being updated as soon as its gradient is complete
    /// ([`Model::forward_backward_update`]): the weights and moments have the bits of [`Adam::step`]; the norm, whose
    /// squares come in another order, is the same but for its last digits.
    ///
    /// # Errors
    /// As [`Adam::step`] and [`Model::forward_backward_update`]; [`EngineError::NotFinite`] where a gradient was found not to
    /// be finite after other parameters were updated. Model and optimizer are then of no step and must be loaded again.
    pub fn step_in_backward(
        &mut self,
        model: &mut dyn Model,
        lr: f64,
        batch: &TokenBatch,
        positions: &[Position],
        loss: &mut dyn HeadLoss,
    ) -> Result<StepStats> {
        self.check(model)?;
        let rule = Rule::new(&self.config, lr, 1.0, self.steps + 1);
        let mut updating = Updating {
            rule,
            specs: &self.specs,
            starts: &self.starts,
            m: &mut self.m,
            v: &mut self.v,
            squares: 0.0,
            begun: false,
        };
        let finite = match model.forward_backward_update(batch, positions, loss, &mut updating) {
            Err(EngineError::NotFinite { half: false, .. }) => false,
            result => result?,
        };
        let grad_norm = if finite { updating.squares.sqrt() } else { f64::NAN };
        self.steps += u64::from(finite);
        Ok(StepStats { grad_norm, clipped: false, finite })
    }

    fn check(&self, model: &dyn Model) -> Result<()> {
        if model.params() == self.specs {
            return Ok(());
        }
        Err(EngineError::invalid("the optimizer was made for other parameters than this model has", ""))
    }

    /// Every parameter's name and moments, in the model's order, for a checkpoint.
    pub fn state(&self) -> impl Iterator<Item = (&str, MomentsView<'_>)> {
        self.specs.iter().zip(&self.starts).map(|(spec, &start)| {
            let own = start..start + spec.len();
            (spec.name.as_str(), MomentsView { m: &self.m[own.clone()], v: &self.v[own] })
        })
    }

    /// Bytes of the moments.
    pub fn bytes(&self) -> usize {
        4 * (self.m.len() + self.v.len())
    }

    /// Takes the state of a checkpoint: the number of steps and, by name, the moments.
    ///
    /// # Errors
    /// A parameter without moments, or with moments of another size, by name. Nothing is changed then.
    pub fn load_state(&mut self, steps: u64, moments_of: &mut dyn FnMut(&str) -> Option<Moments>) -> Result<()> {
        let mut loaded = Vec::with_capacity(self.specs.len());
        for spec in &self.specs {
            let Some(moments) = moments_of(&spec.name) else {
                return Err(EngineError::invalid(
                    format!("the checkpoint has no optimizer state for `{}`", spec.name),
                    "resume with the model that the checkpoint was made with",
                ));
            };
            if moments.m.len() != spec.len() || moments.v.len() != spec.len() {
                return Err(EngineError::invalid(
                    format!(
                        "optimizer state of `{}`: {} and {} values, {} expected",
                        spec.name,
                        moments.m.len(),
                        moments.v.len(),
                        spec.len()
                    ),
                    "resume with the model that the checkpoint was made with",
                ));
            }
            loaded.push(moments);
        }
        for (moments, start) in loaded.into_iter().zip(&self.starts) {
            self.m[*start..start + moments.m.len()].copy_from_slice(&moments.m);
            self.v[*start..start + moments.v.len()].copy_from_slice(&moments.v);
        }
        self.steps = steps;
        Ok(())
    }
}

/// Sum of squares in f64; partial sums in a fixed order.
fn sum_of_squares(values: &[f32]) -> f64 {
    let parts: Vec<f64> =
        values.par_chunks(SLICE).map(|slice| slice.iter().map(|&g| f64::from(g) * f64::from(g)).sum()).collect();
    parts.iter().sum()
}

/// An update that goes on while a backward does.
struct Updating<'a> {
    rule: Rule,
    specs: &'a [ParamSpec],
    starts: &'a [usize],
    m: &'a mut [f32],
    v: &'a mut [f32],
    /// Of the gradients so far.
    squares: f64,
    /// Whether something was updated.
    begun: bool,
}

impl Updater for Updating<'_> {
    fn update(&mut self, index: usize, part: Part, values: &mut [f32], gradient: &[f32]) -> Result<()> {
        let span = part.span();
        let fits = values.len() == span.len() && gradient.len() == part.len();
        let own = match self.starts.get(index..index + 2) {
            Some(&[start, end]) if fits && span.end <= end - start => start + span.start..start + span.end,
            _ => {
                let message =
                    format!("{} values of parameter {index} in {span:?} have no optimizer state", values.len());
                return Err(EngineError::invalid(message, ""));
            }
        };
        let squares = sum_of_squares_in_lanes(gradient);
        if !squares.is_finite() {
            return Err(EngineError::NotFinite { tensor: self.specs[index].name.clone(), half: self.begun });
        }
        (self.squares, self.begun) = (self.squares + squares, true);
        self.rule.update_part(part, values, gradient, &mut self.m[own.clone()], &mut self.v[own]);
        Ok(())
    }
}

/// As [`sum_of_squares`], in an order that vectors can follow.
fn sum_of_squares_in_lanes(values: &[f32]) -> f64 {
    const LANES: usize = 16;
    let square = |g: f32| f64::from(g) * f64::from(g);
    let slice = |slice: &[f32]| {
        let (lanes, rest) = slice.as_chunks::<LANES>();
        let mut sums = [0.0f64; LANES];
        for values in lanes {
            sums.iter_mut().zip(values).for_each(|(sum, g)| *sum += square(*g));
        }
        sums.iter().sum::<f64>() + rest.iter().map(|g| square(*g)).sum::<f64>()
    };
    let parts: Vec<f64> = values.par_chunks(SLICE).map(slice).collect();
    parts.iter().sum()
}

/// The constants of one step, rounded to f32 where PyTorch rounds them.
struct Rule {
    clip: f32,
    decay_into_gradient: f32,
    shrink: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    root_correction2: f32,
    eps: f32,
    minus_step_size: f32,
}

impl Rule {
    fn new(config: &AdamConfig, lr: f64, clip: f64, step: u64) -> Self {
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        let decoupled = config.decoupled_weight_decay;
        Self {
            clip: clip as f32,
            decay_into_gradient: if decoupled { 0.0 } else { config.weight_decay as f32 },
            shrink: if decoupled { (1.0 - lr * config.weight_decay) as f32 } else { 1.0 },
            one_minus_beta1: (1.0 - config.beta1) as f32,
            beta2: config.beta2 as f32,
            one_minus_beta2: (1.0 - config.beta2) as f32,
            root_correction2: correction(config.beta2).sqrt() as f32,
            eps: config.eps as f32,
            minus_step_size: (-lr / correction(config.beta1)) as f32,
        }
    }

    fn update(&self, parameter: &mut [f32], gradient: &[f32], m: &mut [f32], v: &mut [f32]) {
        let slices = parameter.par_chunks_mut(SLICE).zip(gradient.par_chunks(SLICE));
        let state = m.par_chunks_mut(SLICE).zip(v.par_chunks_mut(SLICE));
        slices.zip(state).for_each(|((p, g), (m, v))| self.update_slice(p, g, m, v));
    }

    /// As [`Rule::update`] for rows that lie apart; the gradient's lie together.
    fn update_part(&self, part: Part, values: &mut [f32], gradient: &[f32], m: &mut [f32], v: &mut [f32]) {
        let Part { rows, width, stride, .. } = part;
        if rows == 1 || width == 0 {
            return self.update(values, gradient, m, v);
        }
        let each = (SLICE / width).clamp(1, rows);
        let slices = values.par_chunks_mut(each * stride).zip(gradient.par_chunks(each * width));
        let state = m.par_chunks_mut(each * stride).zip(v.par_chunks_mut(each * stride));
        slices.zip(state).for_each(|((p, g), (m, v))| {
            let state = m.chunks_mut(stride).zip(v.chunks_mut(stride));
            for ((p, g), (m, v)) in p.chunks_mut(stride).zip(g.chunks(width)).zip(state) {
                self.update_slice(&mut p[..width], g, &mut m[..width], &mut v[..width]);
            }
        });
    }

    fn update_slice(&self, parameter: &mut [f32], gradient: &[f32], m: &mut [f32], v: &mut [f32]) {
        for (((p, &g), m), v) in parameter.iter_mut().zip(gradient).zip(m).zip(v) {
            let g = g * self.clip + self.decay_into_gradient * *p;
            *p *= self.shrink;
            *m += self.one_minus_beta1 * (g - *m);
            *v = *v * self.beta2 + self.one_minus_beta2 * (g * g);
            let denominator = v.sqrt() / self.root_correction2 + self.eps;
            *p += self.minus_step_size * (*m / denominator);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::fake::FakeModel;

    fn model(values: &[f32], gradient: &[f32]) -> FakeModel {
        FakeModel::with_param("w", values, gradient)
    }

    /// PyTorch 2.x, `AdamW([1.0, -2.0, 0.5], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)`, worked by hand:
    /// the first step moves each weight by lr against the gradient's sign after shrinking it by 1 − lr·wd.
    #[test]
    fn first_step_has_the_size_of_the_learning_rate() {
        let mut m = model(&[1.0, -2.0, 0.5], &[0.3, -4.0, 0.02]);
        let config = AdamConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, decoupled_weight_decay: true };
        let mut adam = Adam::new(config, m.params());
        let stats = adam.step(&mut m, 0.1, None).unwrap();
        assert!(stats.finite && !stats.clipped);
        assert!((stats.grad_norm - (0.09f64 + 16.0 + 0.0004).sqrt()).abs() < 1e-6);
        for (got, want) in m.read_param(0).iter().zip([0.99 - 0.1, -1.98 + 0.1, 0.495 - 0.1]) {
            assert!((got - want).abs() < 1e-6, "{got} {want}");
        }
    }

    #[test]
    fn many_steps_follow_the_recurrence_in_double_precision() {
        for decoupled in [true, false] {
            let config =
                AdamConfig { decoupled_weight_decay: decoupled, beta1: 0.8, beta2: 0.9, eps: 1e-3, weight_decay: 0.2 };
            let mut fake = model(&[0.7], &[0.0]);
            let mut adam = Adam::new(config.clone(), fake.params());
            let (mut p, mut m, mut v) = (0.7f64, 0.0f64, 0.0f64);
            for step in 1..=20 {
                let gradient = (step as f64 * 1.3).sin();
                fake.set_gradient(&[gradient as f32]);
                adam.step(&mut fake, 0.05, Some(0.5)).unwrap();
                let mut g = gradient * (0.5 / (gradient.abs() + 1e-6)).min(1.0);
                if decoupled {
                    p *= 1.0 - 0.05 * 0.2
                } else {
                    g += 0.2 * p
                }
                m = 0.8 * m + 0.2 * g;
                v = 0.9 * v + 0.1 * g * g;
                let (c1, c2) = (1.0 - 0.8f64.powi(step), 1.0 - 0.9f64.powi(step));
                p -= 0.05 / c1 * m / ((v / c2).sqrt() + 1e-3);
                assert!((f64::from(fake.read_param(0)[0]) - p).abs() < 2e-6, "step {step}");
            }
        }
    }

    #[test]
    fn clips_only_when_asked_and_needed() {
        for (clip, clipped) in
            [(None, false), (Some(0.0), false), (Some(-1.0), false), (Some(1.0), true), (Some(100.0), false)]
        {
            let mut m = model(&[1.0, 1.0], &[3.0, 4.0]);
            let mut adam = Adam::new(AdamConfig::default(), m.params());
            let stats = adam.step(&mut m, 0.1, clip).unwrap();
            assert_eq!((stats.grad_norm, stats.clipped), (5.0, clipped), "{clip:?}");
        }
    }

    #[test]
    fn a_gradient_that_is_not_finite_changes_nothing() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut m = model(&[1.0, 1.0], &[3.0, bad]);
            let mut adam = Adam::new(AdamConfig::default(), m.params());
            let stats = adam.step(&mut m, 0.1, Some(1.0)).unwrap();
            assert!(!stats.finite);
            assert_eq!((m.read_param(0), adam.steps()), (vec![1.0, 1.0], 0));
            assert!(adam.state().all(|(_, s)| s.m == [0.0, 0.0] && s.v == [0.0, 0.0]));
        }
    }

    /// A backward that completes the gradients of two parameters one after the other.
    struct InTurn {
        fake: FakeModel,
        specs: Vec<ParamSpec>,
        values: [Vec<f32>; 2],
        gradients: [Vec<f32>; 2],
    }

    impl InTurn {
        fn new(gradients: [Vec<f32>; 2]) -> Self {
            let spec = |name: &str| ParamSpec { name: name.into(), shape: vec![2] };
            let values = [vec![1.0, 1.0], vec![2.0, 2.0]];
            Self { fake: FakeModel::new(), specs: vec![spec("first"), spec("second")], values, gradients }
        }

        fn step(&mut self, adam: &mut Adam) -> Result<StepStats> {
            let mut loss = crate::objective::SftLoss::new(&[], 1.0)?;
            adam.step_in_backward(self, 0.1, &TokenBatch::new(&[&[1]])?, &[], &mut loss)
        }
    }

    impl Model for InTurn {
        fn config(&self) -> &crate::model::ModelConfig {
            self.fake.config()
        }
        fn params(&self) -> &[ParamSpec] {
            &self.specs
        }
        fn read_param(&self, index: usize) -> Vec<f32> {
            self.values[index].clone()
        }
        fn write_param(&mut self, index: usize, values: &[f32]) -> Result<()> {
            self.values[index].copy_from_slice(values);
            Ok(())
        }
        fn hidden_rh(&mut self, batch: &TokenBatch, positions: &[Position]) -> Result<Vec<f32>> {
            self.fake.hidden_rh(batch, positions)
        }
        fn head_logits_rv(&mut self, hidden_rh: &[f32], out: &mut Vec<f32>) -> Result<()> {
            self.fake.head_logits_rv(hidden_rh, out)
        }
        fn head_chunk_rows(&self) -> usize {
            1
        }
        fn forward_backward(&mut self, _: &TokenBatch, _: &[Position], _: &mut dyn HeadLoss) -> Result<()> {
            Ok(())
        }
        fn forward_backward_update(
            &mut self,
            _: &TokenBatch,
            _: &[Position],
            _: &mut dyn HeadLoss,
            updater: &mut dyn Updater,
        ) -> Result<bool> {
            for index in [1, 0] {
                for at in 0..2 {
                    updater.update(
                        index,
                        Part::whole(at..at + 1),
                        &mut self.values[index][at..=at],
                        &self.gradients[index][at..=at],
                    )?;
                }
            }
            Ok(true)
        }
        fn read_grad(&self, index: usize) -> Vec<f32> {
            self.gradients[index].clone()
        }
        fn zero_grads(&mut self) {}
        fn update_params(&mut self, update: &mut dyn FnMut(usize, &mut [f32], &mut [f32])) -> Result<()> {
            let pairs = self.values.iter_mut().zip(&mut self.gradients).enumerate();
            pairs.for_each(|(index, (values, gradient))| update(index, values, gradient));
            Ok(())
        }
        fn decoder(&mut self, _: usize, _: usize) -> Result<Box<dyn crate::model::Decoder + '_>> {
            Err(EngineError::invalid("nothing to decode", ""))
        }
    }

    #[test]
    fn updates_in_turn_are_those_at_once() {
        let gradients = || [vec![0.5, -3.0], vec![0.25, 7.0]];
        let (mut at_once, mut in_turn) = (InTurn::new(gradients()), InTurn::new(gradients()));
        let (mut a, mut b) = [(); 2].map(|()| Adam::new(AdamConfig::default(), at_once.params())).into();
        for _ in 0..3 {
            let (x, y) = (a.step(&mut at_once, 0.1, None).unwrap(), in_turn.step(&mut b).unwrap());
            assert!((x.grad_norm / y.grad_norm - 1.0).abs() < 1e-14 && y.finite && !y.clipped);
        }
        assert_eq!((at_once.values, a.steps()), (in_turn.values, b.steps()));
        assert!(a.state().eq(b.state()));
    }

    #[test]
    fn a_gradient_that_is_not_finite_is_left_out_while_nothing_has_changed() {
        let mut model = InTurn::new([vec![0.5, 0.5], vec![f32::NAN, 0.5]]);
        let mut adam = Adam::new(AdamConfig::default(), model.params());
        let stats = model.step(&mut adam).unwrap();
        assert!(!stats.finite && stats.grad_norm.is_nan() && adam.steps() == 0);
        assert_eq!(model.values, [vec![1.0, 1.0], vec![2.0, 2.0]]);
        assert!(adam.state().all(|(_, s)| s.m == [0.0, 0.0] && s.v == [0.0, 0.0]));
        // And found later it is an error that names it, with a way out.
        for gradients in [[vec![0.5, f32::INFINITY], vec![0.5, 0.5]], [vec![0.5, f32::NAN], vec![0.5, 0.5]]] {
            let mut model = InTurn::new(gradients);
            let error = model.step(&mut adam).unwrap_err();
            assert!(error.to_string().contains("`first` is not finite, and the parameters before"), "{error}");
            assert!(error.hint().is_some_and(|hint| hint.contains("--resume")));
        }
    }

    #[test]
    fn state_goes_through_a_checkpoint() {
        let mut a = model(&[1.0, 2.0], &[0.5, -0.25]);
        let mut adam = Adam::new(AdamConfig::default(), a.params());
        adam.step(&mut a, 0.1, None).unwrap();
        let mut b = model(&a.read_param(0), &[0.5, -0.25]);
        let mut resumed = Adam::new(AdamConfig::default(), b.params());
        let saved: Vec<(String, Moments)> = adam.state().map(|(n, s)| (n.to_owned(), s.to_moments())).collect();
        resumed.load_state(adam.steps(), &mut |name| saved.iter().find(|s| s.0 == name).map(|s| s.1.clone())).unwrap();
        adam.step(&mut a, 0.1, None).unwrap();
        resumed.step(&mut b, 0.1, None).unwrap();
        assert_eq!(a.read_param(0), b.read_param(0));
        let missing = resumed.load_state(1, &mut |_| None).unwrap_err();
        assert!(missing.to_string().contains("`w`"));
        let short = resumed.load_state(1, &mut |_| Some(Moments { m: vec![0.0], v: vec![0.0] })).unwrap_err();
        assert!(short.to_string().contains("1 and 1 values, 2 expected"));
    }
}
