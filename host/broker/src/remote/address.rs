//! Where a Redis server is, from the config key `redis`.

use std::fmt;
use std::path::{Path, PathBuf};

use redis::{Client, ConnectionAddr, IntoConnectionInfo, TlsCertificates};

use crate::{BrokerError, Result};

/// Longest address that is read.
const ADDRESS_BYTES_MAX: usize = 4096;

/// Where a Redis server is and who asks. Neither `Display` nor `Debug` show the password.
#[derive(Clone, PartialEq, Eq)]
pub struct RedisAddress {
    /// With user, password and database; without our own `ca`.
    url: String,
    host: String,
    port: u16,
    tls: bool,
    has_password: bool,
    /// The certificate authority that signed the server's certificate; none for those that browsers trust.
    ca: Option<PathBuf>,
    /// Given as a mere port: the server may be started if it is not there.
    port_only: bool,
}

impl fmt::Display for RedisAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        write!(f, "{host}:{}", self.port)
    }
}

impl fmt::Debug for RedisAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RedisAddress({self}, tls: {}, password: {})", self.tls, self.has_password)
    }
}

impl RedisAddress {
    /// Reads the config key `redis`: a port of this machine as text (a server that is joined or started), or
    /// `redis://user:password@host:port/db`, with TLS `rediss://`, where `?ca=FILE` names the authority of a private
    /// certificate. `%40` and the like stand for characters that a URL keeps for itself.
    ///
    /// # Errors
    /// [`BrokerError::BadAddress`].
    pub fn parse(text: &str) -> Result<RedisAddress> {
        let text = text.trim();
        let bad = |reason: String| Err(BrokerError::BadAddress { address: without_password(text), reason });
        if text.len() > ADDRESS_BYTES_MAX {
            return bad(format!("longer than {ADDRESS_BYTES_MAX} bytes"));
        }
        if text.bytes().all(|b| b.is_ascii_digit()) {
            return match text.parse::<u16>() {
                Ok(port) if port > 0 => Ok(RedisAddress::local(port, None)),
                _ => bad("a port is a number from 1 to 65535".into()),
            };
        }
        if !text.starts_with("redis://") && !text.starts_with("rediss://") {
            return bad("neither a port nor a URL with `redis://` or `rediss://`".into());
        }
        let Some(mut url) = redis::parse_redis_url(text) else { return bad("not a well-formed URL".into()) };
        let mut ca = None;
        for (key, value) in url.query_pairs() {
            match key.as_ref() {
                "ca" if !value.is_empty() => ca = Some(PathBuf::from(value.as_ref())),
                other => return bad(format!("unknown option `{other}`; there is only `ca`")),
            }
        }
        if url.fragment().is_some() {
            return bad("a part after `#` means nothing here".into());
        }
        url.set_query(None);
        let tls = url.scheme() == "rediss";
        if ca.is_some() && !tls {
            return bad("`ca` needs `rediss://`".into());
        }
        let info = match url.as_str().into_connection_info() {
            Ok(info) => info,
            Err(error) => return bad(error.to_string()),
        };
        let (host, port) = match info.addr() {
            ConnectionAddr::Tcp(host, port) | ConnectionAddr::TcpTls { host, port, .. } => (host.clone(), *port),
            _ => return bad("neither a host nor a port".into()),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let has_password = info.redis_settings().password().is_some_and(|p| !p.is_empty());
        Ok(RedisAddress { url: url.as_str().to_owned(), host, port, tls, has_password, ca, port_only: false })
    }

    /// A server on this machine. `password` is made of letters and digits.
    pub(crate) fn local(port: u16, password: Option<&str>) -> RedisAddress {
        let user = password.map_or(String::new(), |password| format!(":{password}@"));
        RedisAddress {
            url: format!("redis://{user}127.0.0.1:{port}/0"),
            host: "127.0.0.1".into(),
            port,
            tls: false,
            has_password: password.is_some(),
            ca: None,
            port_only: password.is_none(),
        }
    }

    /// The whole address with its password, for a file of mode 0600 or the environment of a child. Never log it.
    pub fn secret_url(&self) -> String {
        let encoded = |path: &Path| -> String {
            let plain = |b: &u8| b.is_ascii_alphanumeric() || b"/-_.".contains(b);
            let bytes = path.as_os_str().as_encoded_bytes().iter();
            bytes.map(|b| if plain(b) { char::from(*b).to_string() } else { format!("%{b:02X}") }).collect()
        };
        match &self.ca {
            Some(ca) => format!("{}?ca={}", self.url, encoded(ca)),
            None => self.url.clone(),
        }
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Whether the config gave nothing but a port.
    pub fn is_port(&self) -> bool {
        self.port_only
    }

    pub(crate) fn has_password(&self) -> bool {
        self.has_password
    }

    /// Whether it is this machine by its name.
    pub(crate) fn is_loopback(&self) -> bool {
        self.host == "localhost" || self.host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }

    pub(crate) fn client(&self) -> Result<Client> {
        let bad = |reason: String| BrokerError::BadAddress { address: self.to_string(), reason };
        if !self.tls {
            return Client::open(self.url.as_str()).map_err(|e| bad(e.to_string()));
        }
        let root_cert = match &self.ca {
            Some(path) => {
                const CA_BYTES_MAX: u64 = 1 << 20;
                let read = |e: std::io::Error| bad(format!("`ca`: cannot read `{}`: {e}", path.display()));
                if std::fs::metadata(path).map_err(read)?.len() > CA_BYTES_MAX {
                    return Err(bad(format!("`ca`: `{}` is larger than {CA_BYTES_MAX} bytes", path.display())));
                }
                Some(std::fs::read(path).map_err(read)?)
            }
            None => None,
        };
        Client::build_with_tls(self.url.as_str(), TlsCertificates { client_tls: None, root_cert })
            .map_err(|e| bad(e.to_string()))
    }
}

/// A text that should have been an address, without what may be a password.
fn without_password(text: &str) -> String {
    let shown: String = match text.rsplit_once('@') {
        Some((head, host)) => {
            let scheme = head.split_once("://").map_or("", |(scheme, _)| scheme);
            format!("{scheme}://…@{host}")
        }
        None => text.to_owned(),
    };
    shown.chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ports_and_urls_are_addresses() {
        let port = RedisAddress::parse("12800").unwrap();
        assert_eq!((port.to_string(), port.is_port(), port.is_loopback()), ("127.0.0.1:12800".into(), true, true));
        let url = RedisAddress::parse("redis://me:s%40cret@db.example:7000/3").unwrap();
        assert_eq!((url.to_string(), url.has_password(), url.is_loopback()), ("db.example:7000".into(), true, false));
        assert!(!format!("{url} {url:?}").contains("cret"));
        assert_eq!(RedisAddress::parse(&url.secret_url()).unwrap(), url);
        let tls = RedisAddress::parse("rediss://:p@[::1]:7000/?ca=/etc/my%20ca.pem").unwrap();
        assert_eq!(tls.ca.as_deref(), Some(Path::new("/etc/my ca.pem")));
        assert!(tls.tls && tls.is_loopback() && tls.has_password());
        assert_eq!(RedisAddress::parse(&tls.secret_url()).unwrap(), tls);
        assert_eq!(RedisAddress::parse("redis://h").unwrap().port(), 6379);
    }

    #[test]
    fn what_is_no_address_is_refused_without_its_password() {
        let cases = [
            ("0", "from 1 to 65535"),
            ("70000", "from 1 to 65535"),
            ("", "from 1 to 65535"),
            ("localhost:6379", "neither a port nor a URL"),
            ("http://h", "neither a port nor a URL"),
            ("redis://:hunter2@h:99999", "not a well-formed URL"),
            ("redis://:hunter2@h/x", "database"),
            ("redis://h/?ca=x", "needs `rediss://`"),
            ("redis://h/?tls=1", "unknown option `tls`"),
            ("foo:hunter2@h", "neither a port"),
        ];
        for (text, wanted) in cases {
            let error = RedisAddress::parse(text).unwrap_err();
            let shown = error.to_string();
            assert!(shown.to_lowercase().contains(&wanted.to_lowercase()), "{text}: {shown}");
            assert!(!shown.contains("hunter2") && error.hint().is_some(), "{shown}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,60}", tail in "[a-z0-9:@/?=%#.\\[\\]]{0,40}") {
            let _ = RedisAddress::parse(&text);
            let _ = RedisAddress::parse(&format!("rediss://{tail}"));
        }
    }
}
