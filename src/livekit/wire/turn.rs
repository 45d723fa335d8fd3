//! The TURN servers of a join response (RFC 7065), which is not trusted: which ones the canary can use, and how it
//! connects to each.
//!
//! A user name of LiveKit's own TURN server contains the API key, so neither part of a credential has a `Debug` form.

use std::fmt;

use livekit_protocol::IceServer;
use secrecy::SecretString;
use url::Host;

/// Maximum number of URLs that are parsed; a server offers one per address and protocol.
const MAX_URLS: usize = 16;

/// Maximum length of a user name in bytes (RFC 8489, section 14.3), and of a password.
const MAX_CREDENTIAL: usize = 508;

/// How the canary reaches a TURN server. The server relays UDP in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TurnTransport {
    Udp,
    Tcp,
    Tls,
}

/// A TURN server and the credential for it.
#[derive(Clone)]
pub(crate) struct TurnServer {
    pub(crate) transport: TurnTransport,
    pub(crate) host: Host,
    pub(crate) port: u16,
    pub(crate) username: SecretString,
    pub(crate) password: SecretString,
}

impl TurnServer {
    /// The usable servers of a join response, in its order. STUN servers, DTLS and malformed URLs are left out.
    pub(crate) fn offered(servers: &[IceServer]) -> Vec<Self> {
        let urls = servers
            .iter()
            .filter(|server| {
                server.username.len() <= MAX_CREDENTIAL && server.credential.len() <= MAX_CREDENTIAL
            })
            .flat_map(|server| server.urls.iter().map(move |url| (url, server)));
        urls.take(MAX_URLS)
            .filter_map(|(url, server)| {
                let (transport, host, port) = parse(url)?;
                Some(Self {
                    transport,
                    host,
                    port,
                    username: server.username.clone().into(),
                    password: server.credential.clone().into(),
                })
            })
            .collect()
    }

    /// `turn.example.com:443`.
    pub(crate) fn authority(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }
}

/// `TURN/TLS turn.example.com:443`, without the credential.
impl fmt::Display for TurnServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let transport = match self.transport {
            TurnTransport::Udp => "UDP",
            TurnTransport::Tcp => "TCP",
            TurnTransport::Tls => "TLS",
        };
        write!(f, "TURN/{transport} {}", self.authority())
    }
}

fn parse(url: &str) -> Option<(TurnTransport, Host, u16)> {
    let (scheme, rest) = url.split_once(':')?;
    let (authority, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (transport, default_port) = match (scheme, query.strip_prefix("transport=")) {
        ("turn", Some("udp") | None) => (TurnTransport::Udp, 3478),
        ("turn", Some("tcp")) => (TurnTransport::Tcp, 3478),
        ("turns", Some("tcp") | None) => (TurnTransport::Tls, 5349),
        _ => return None,
    };
    // A colon inside brackets is part of an IPv6 address.
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port.parse().ok()?),
        _ => (authority, default_port),
    };
    // `parse` refuses everything that would have another meaning in a URL.
    Some((transport, Host::parse(host).ok()?, port)).filter(|(.., port)| *port != 0)
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret;

    use super::*;

    fn offered(urls: &[&str]) -> Vec<String> {
        let server = IceServer {
            urls: urls.iter().map(|url| (*url).to_owned()).collect(),
            username: "name".to_owned(),
            credential: "word".to_owned(),
        };
        let offered = TurnServer::offered(&[server]);
        offered.iter().map(TurnServer::to_string).collect()
    }

    #[test]
    fn urls_are_read_with_the_defaults_of_their_scheme() {
        let urls = [
            "turn:10.0.0.1",
            "turn:10.0.0.1:99?transport=udp",
            "turn:turn.example.com?transport=tcp",
            "turns:turn.example.com",
            "turns:turn.example.com:443?transport=tcp",
            "turn:[fd00::1]:3479?transport=udp",
            "turns:[fd00::1]",
        ];
        let expected = [
            "TURN/UDP 10.0.0.1:3478",
            "TURN/UDP 10.0.0.1:99",
            "TURN/TCP turn.example.com:3478",
            "TURN/TLS turn.example.com:5349",
            "TURN/TLS turn.example.com:443",
            "TURN/UDP [fd00::1]:3479",
            "TURN/TLS [fd00::1]:5349",
        ];
        assert_eq!(offered(&urls), expected);
    }

    #[test]
    fn unusable_urls_are_left_out() {
        let urls = [
            "",
            "turn:",
            "turn:host:port",
            "turn:host:0",
            "turn:host:65536",
            "turn:user@host",
            "turn:host/path",
            "turn:host:1:2",
            "turn:fd00::1",
            "stun:stun.example.com",
            "turns:host?transport=udp",
            "turn:host?transport=sctp",
            "https://host",
        ];
        assert_eq!(offered(&urls), [""; 0]);
    }

    #[test]
    fn number_of_urls_and_length_of_credentials_are_bounded() {
        assert_eq!(offered(&["turn:host"; 100]).len(), MAX_URLS);
        let long = IceServer {
            urls: vec!["turn:host".to_owned()],
            username: "x".repeat(MAX_CREDENTIAL + 1),
            credential: String::new(),
        };
        assert!(TurnServer::offered(&[long]).is_empty());
    }

    #[test]
    fn each_server_has_its_own_credential() {
        let server = |url: &str, username: &str| IceServer {
            urls: vec![url.to_owned()],
            username: username.to_owned(),
            credential: username.to_owned(),
        };
        let offered = TurnServer::offered(&[server("turn:a", "one"), server("turns:b", "two")]);
        let names: Vec<_> = offered
            .iter()
            .map(|server| server.username.expose_secret())
            .collect();
        assert_eq!(names, ["one", "two"]);
    }
}
