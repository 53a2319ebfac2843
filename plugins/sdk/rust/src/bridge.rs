//! From the generated export traits to [`Plugin`], [`Dataset`], [`Reward`] and [`Environment`].
//!
//! A component instance has one thread and holds at most one of each at a time: the last ones initialised.

use std::cell::RefCell;
use std::marker::PhantomData;

use crate::bindings::cosmos::plugin::types::SampleError;
use crate::bindings::exports::cosmos::plugin::{dataset, environment, metadata, reward};
use crate::panics::install_hook;
use crate::{Dataset, Environment, Plugin, Reward, Settings};

thread_local! {
    static DATASET: RefCell<Option<Box<dyn Dataset>>> = const { RefCell::new(None) };
    static REWARD: RefCell<Option<Box<dyn Reward>>> = const { RefCell::new(None) };
    static ENVIRONMENT: RefCell<Option<Box<dyn Environment>>> = const { RefCell::new(None) };
}

/// Implements the component's exports for `P`; used by [`crate::export!`].
pub struct Bridge<P>(PhantomData<P>);

impl<P: Plugin> metadata::Guest for Bridge<P> {
    fn describe() -> metadata::Description {
        install_hook();
        P::describe()
    }
}

impl<P: Plugin> dataset::Guest for Bridge<P> {
    fn init(name: String, settings: String) -> Result<(), String> {
        install_hook();
        let made = P::dataset(&name, &Settings::parse(&settings)?)?;
        DATASET.with(|slot| *slot.borrow_mut() = Some(made));
        Ok(())
    }

    fn len() -> Result<u64, String> {
        DATASET.with(|slot| slot.borrow().as_ref().ok_or_else(not_initialised)?.len())
    }

    fn get_batch(indices: Vec<u64>) -> Vec<Result<dataset::Example, SampleError>> {
        DATASET.with(|slot| {
            let slot = slot.borrow();
            let made = slot.as_ref().ok_or_else(not_initialised);
            let len = made.as_ref().map_err(Clone::clone).and_then(|d| d.len());
            let get = |index: &u64| match (&made, &len) {
                (Ok(_), Ok(len)) if index >= len => {
                    Err(format!("index {index} is outside the dataset of {len} examples"))
                }
                (Ok(dataset), Ok(_)) => dataset.get(*index),
                (Err(message), _) | (_, Err(message)) => Err(message.clone()),
            };
            each(&indices, get)
        })
    }
}

impl<P: Plugin> reward::Guest for Bridge<P> {
    fn init(name: String, settings: String) -> Result<(), String> {
        install_hook();
        let made = P::reward(&name, &Settings::parse(&settings)?)?;
        REWARD.with(|slot| *slot.borrow_mut() = Some(made));
        Ok(())
    }

    fn score_batch(samples: Vec<reward::Sample>) -> Vec<Result<reward::Score, SampleError>> {
        REWARD.with(|slot| {
            let slot = slot.borrow();
            each(&samples, |sample| slot.as_ref().ok_or_else(not_initialised)?.score(sample))
        })
    }
}

impl<P: Plugin> environment::Guest for Bridge<P> {
    fn init(name: String, settings: String) -> Result<(), String> {
        install_hook();
        let made = P::environment(&name, &Settings::parse(&settings)?)?;
        ENVIRONMENT.with(|slot| *slot.borrow_mut() = Some(made));
        Ok(())
    }

    fn reset_batch(starts: Vec<environment::Start>) -> Vec<Result<environment::Opened, SampleError>> {
        ENVIRONMENT.with(|slot| {
            let slot = slot.borrow();
            each(&starts, |start| slot.as_ref().ok_or_else(not_initialised)?.reset(start))
        })
    }

    fn step_batch(actions: Vec<environment::Action>) -> Vec<Result<environment::Outcome, SampleError>> {
        ENVIRONMENT.with(|slot| {
            let slot = slot.borrow();
            each(&actions, |action| slot.as_ref().ok_or_else(not_initialised)?.step(action))
        })
    }
}

fn each<I, T>(items: &[I], make: impl Fn(&I) -> Result<T, String>) -> Vec<Result<T, SampleError>> {
    items.iter().map(|item| make(item).map_err(|message| SampleError { message })).collect()
}

fn not_initialised() -> String {
    "`init` was not called, or it failed".to_owned()
}
