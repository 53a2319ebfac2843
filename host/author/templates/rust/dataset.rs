//! A dataset: sums of two numbers below 100. Every index is another one.

use cosmos_plugin_sdk::*;

pub struct {{Type}};

export_dataset!({{Type}});

impl Plugin for {{Type}} {
    fn describe() -> Description {
        Description::new("{{name}}", env!("CARGO_PKG_VERSION"), "sums of two numbers")
            .dataset("{{name}}", DatasetRole::Train)
    }

    fn dataset(_name: &str, _settings: &Settings) -> Result<Box<dyn Dataset>, String> {
        Ok(Box::new({{Type}}))
    }
}

const NUMBERS: u64 = 100;

impl Dataset for {{Type}} {
    fn len(&self) -> Result<u64, String> {
        Ok(NUMBERS * NUMBERS)
    }

    fn get(&self, index: u64) -> Result<Example, String> {
        let (a, b) = (index / NUMBERS, index % NUMBERS);
        let question = Message::user(format!("What is {a} + {b}? End with the number."));
        Ok(Example::messages(vec![question]).reference(a + b))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_example_is_the_largest_sum() {
        let example = {{Type}}.get({{Type}}.len().unwrap() - 1).unwrap();
        assert_eq!(example.reference.as_deref(), Some("198"));
    }
}
