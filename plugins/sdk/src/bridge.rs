//! From the generated export traits to [`Plugin`], [`Dataset`] and [`Reward`].
//!
//! A component instance has one thread and holds at most one dataset and one reward at a time: the last ones initialised.

use std::cell::RefCell;
use std::marker::PhantomData;

use crate::bindings::cosmos::plugin::types::SampleError;
use crate::bindings::exports::cosmos::plugin::{dataset, metadata, reward};
use crate::{Dataset, Plugin, Reward, Settings};

thread_local! {
    static DATASET: RefCell<Option<Box<dyn Dataset>>> = const { RefCell::new(None) };
    static REWARD: RefCell<Option<Box<dyn Reward>>> = const { RefCell::new(None) };
}

/// Implements the component's exports for `P`; used by [`crate::export_plugin!`].
pub struct Bridge<P>(PhantomData<P>);

/// Without the hook a panic in WebAssembly loses its text: the host sees a bare trap.
fn install_panic_hook() {
    #[cfg(feature = "log")]
    std::panic::set_hook(Box::new(|info| {
        crate::host::log::write(crate::host::log::Level::Error, &info.to_string());
    }));
}

impl<P: Plugin> metadata::Guest for Bridge<P> {
    fn describe() -> metadata::Description {
        P::describe()
    }
}

impl<P: Plugin> dataset::Guest for Bridge<P> {
    fn init(name: String, settings: String) -> Result<(), String> {
        install_panic_hook();
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
            let get = |index: u64| match (&made, &len) {
                (Ok(_), Ok(len)) if index >= *len => {
                    Err(format!("index {index} is outside the dataset of {len} examples"))
                }
                (Ok(dataset), Ok(_)) => dataset.get(index),
                (Err(message), _) | (_, Err(message)) => Err(message.clone()),
            };
            indices.into_iter().map(|index| get(index).map_err(|message| SampleError { message })).collect()
        })
    }
}

impl<P: Plugin> reward::Guest for Bridge<P> {
    fn init(name: String, settings: String) -> Result<(), String> {
        install_panic_hook();
        let made = P::reward(&name, &Settings::parse(&settings)?)?;
        REWARD.with(|slot| *slot.borrow_mut() = Some(made));
        Ok(())
    }

    fn score_batch(samples: Vec<reward::Sample>) -> Vec<Result<reward::Score, SampleError>> {
        REWARD.with(|slot| {
            let slot = slot.borrow();
            let score = |sample: &reward::Sample| slot.as_ref().ok_or_else(not_initialised)?.score(sample);
            samples.iter().map(|sample| score(sample).map_err(|message| SampleError { message })).collect()
        })
    }
}

fn not_initialised() -> String {
    "`init` was not called, or it failed".to_owned()
}
