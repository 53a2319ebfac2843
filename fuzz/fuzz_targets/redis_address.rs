//! The config key `redis`: an address or a refusal; an address survives being written.
#![no_main]

use cosmos_broker::RedisAddress;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(address) = RedisAddress::parse(text)
        && !address.is_port()
    {
        assert_eq!(RedisAddress::parse(&address.secret_url()), Ok(address));
    }
});
