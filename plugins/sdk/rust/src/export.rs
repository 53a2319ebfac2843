//! The macros that make a type the component's exports.

/// Exports the named interfaces: `export!(MyPlugin: dataset, reward, environment);`, whatever
/// [`Plugin::describe`](crate::Plugin::describe) offers.
#[macro_export]
macro_rules! export {
    ($plugin:ty: $($interface:ident),+ $(,)?) => {
        #[cfg(target_arch = "wasm32")]
        mod exported_component {
            #![allow(unsafe_code, missing_docs, unused)]
            use super::*;
            // SAFETY (allowed above): the generated exports only forward to the bridge.
            type Exported = $crate::Bridge<$plugin>;
            $crate::__export_interface!(metadata Exported);
            $($crate::__export_interface!($interface Exported);)+
        }
    };
}

/// Exports a dataset and a reward.
#[macro_export]
macro_rules! export_plugin {
    ($plugin:ty) => {
        $crate::export!($plugin: dataset, reward);
    };
}

/// Exports a reward.
#[macro_export]
macro_rules! export_reward {
    ($plugin:ty) => {
        $crate::export!($plugin: reward);
    };
}

/// Exports a dataset.
#[macro_export]
macro_rules! export_dataset {
    ($plugin:ty) => {
        $crate::export!($plugin: dataset);
    };
}

/// Exports an environment.
#[macro_export]
macro_rules! export_environment {
    ($plugin:ty) => {
        $crate::export!($plugin: environment);
    };
}
