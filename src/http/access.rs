//! The lifecycle permission: which requests may change the daemon's state.
//!
//! It also stops requests that a hostile web page makes a browser send, by cross-site requests or by DNS rebinding.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use http::header::{HOST, ORIGIN};
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, StatusCode};

use super::response::HttpError;
use crate::config::SensitiveAccess;

/// Proof that a request may change the daemon's state. Only [`permit_change`] creates one.
#[derive(Debug)]
pub(super) struct ChangePermit {
    _private: (),
}

/// What protects the daemon.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a fact of its own, and any combination can be configured"
)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Protection {
    /// The caller has authenticated the request.
    pub(super) has_users: bool,
    /// The handshake has verified the certificate of every client.
    pub(super) has_client_certificates: bool,
    /// `http.enable_lifecycle` is set.
    pub(super) enable_lifecycle: bool,
    /// `http.listen` is a loopback address.
    pub(super) on_loopback: bool,
    /// `http.sensitive`.
    pub(super) sensitive: SensitiveAccess,
}

/// Why a document lacks what people said, and what shows it.
pub(super) const WITHHELD: &str = "transcripts and recordings are withheld: reading them requires users (basic_auth_users in \
     http.web_config_file), client certificates (client_auth_type: RequireAndVerifyClientCert), a loopback address in \
     http.listen, or http.sensitive = \"everyone\"";

impl Protection {
    /// Whether the client of an allowed request may also read what people said: transcripts and recordings. Every path that
    /// serves such data asks this.
    pub(super) fn is_sensitive_allowed(self) -> bool {
        match self.sensitive {
            SensitiveAccess::Everyone => true,
            SensitiveAccess::Users => {
                self.has_users || self.has_client_certificates || self.on_loopback
            }
        }
    }

    /// For a path that serves nothing else.
    ///
    /// # Errors
    /// 403 with the setting that would have to change.
    pub(super) fn check_sensitive(self) -> Result<(), HttpError> {
        if self.is_sensitive_allowed() {
            return Ok(());
        }
        Err(HttpError::new(StatusCode::FORBIDDEN, WITHHELD))
    }
}

/// Checks that a request reaches what it was sent to: if the loopback address is the only protection, a page whose name
/// resolves to 127.0.0.1 must not get past it, and must not read anything either.
///
/// # Errors
/// 403 with the header that would have to change.
pub(super) fn check_host(headers: &HeaderMap, protection: Protection) -> Result<(), HttpError> {
    if protection.has_users || !protection.on_loopback || is_for_loopback(headers) {
        return Ok(());
    }
    Err(HttpError::new(
        StatusCode::FORBIDDEN,
        "this requires localhost, 127.0.0.1 or [::1] as Host: http.listen is a loopback address, and there are no users",
    ))
}

/// Checks that a request may change the daemon's state.
///
/// # Errors
/// 403 with the setting or the header that would have to change.
pub(super) fn permit_change(
    headers: &HeaderMap,
    protection: Protection,
) -> Result<ChangePermit, HttpError> {
    let forbidden = |text| Err(HttpError::new(StatusCode::FORBIDDEN, text));
    let Protection {
        has_users,
        enable_lifecycle,
        on_loopback,
        ..
    } = protection;
    if !has_users && !enable_lifecycle && !on_loopback {
        return forbidden(
            "POST is disabled: it requires users (basic_auth_users in http.web_config_file), a loopback address in \
             http.listen, or http.enable_lifecycle = true",
        );
    }
    check_host(headers, protection)?;
    // The network is trusted, but not a page whose name was rebound to an address in it. Every browser sends Origin with
    // POST, and other clients don't.
    if !has_users && headers.contains_key(ORIGIN) && !is_for_private_host(headers) {
        return forbidden(
            "POST from a web page requires an IP address or a name of the private network as Host: there are no users",
        );
    }
    if is_cross_origin(headers) {
        return forbidden("a web page of another origin may not send this request");
    }
    Ok(ChangePermit { _private: () })
}

/// Whether a page of another origin sent this request. A client that is not a browser sends neither header.
///
/// `Sec-Fetch-Site` is the browser's own verdict, and holds even if a proxy changes `Host`. Browsers omit it on plain HTTP,
/// so `Origin` is compared there.
fn is_cross_origin(headers: &HeaderMap) -> bool {
    if let Some(site) = headers.get("sec-fetch-site") {
        return site != "same-origin" && site != "none";
    }
    let Some(origin) = headers.get(ORIGIN) else {
        return false;
    };
    // The scheme is not compared, because it differs behind a proxy that terminates TLS.
    let origin = origin
        .to_str()
        .ok()
        .and_then(|origin| origin.split_once("://"));
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    match (origin, host) {
        (Some((_, origin)), Some(host)) => !origin.eq_ignore_ascii_case(host),
        _ => true,
    }
}

/// Whether `Host` names this machine's loopback. A page whose name was rebound to 127.0.0.1 sends that name as `Host`. A
/// request without `Host` does not come from a browser.
fn is_for_loopback(headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(HOST).iter();
    match (hosts.next(), hosts.next()) {
        (None, _) => true,
        (Some(host), None) => names_loopback(host),
        (Some(_), Some(_)) => false,
    }
}

/// Whether `Host` is an IP address, or a name that no public DNS server can resolve.
fn is_for_private_host(headers: &HeaderMap) -> bool {
    const SUFFIXES: [&str; 6] = [
        ".localhost",
        ".local",
        ".internal",
        ".home.arpa",
        ".svc",
        ".lan",
    ];
    let host = headers.get(HOST).map(HeaderValue::as_bytes);
    let Some(Ok(authority)) = host.map(Authority::try_from) else {
        return false;
    };
    let host = authority.host().trim_end_matches('.').to_ascii_lowercase();
    let is_ip = host.starts_with('[') || host.parse::<Ipv4Addr>().is_ok();
    is_ip || !host.contains('.') || SUFFIXES.iter().any(|suffix| host.ends_with(suffix))
}

fn names_loopback(host: &HeaderValue) -> bool {
    let Ok(authority) = Authority::try_from(host.as_bytes()) else {
        return false;
    };
    let host = authority.host();
    if host.eq_ignore_ascii_case("localhost") {
        return true;
    }
    let v6 = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    let ip = match v6 {
        Some(host) => host.parse::<Ipv6Addr>().map(IpAddr::V6),
        None => host.parse::<Ipv4Addr>().map(IpAddr::V4),
    };
    ip.is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use http::HeaderName;

    use super::*;

    fn headers(of: &[(&'static str, &'static str)]) -> HeaderMap {
        of.iter()
            .map(|(name, value)| {
                (
                    HeaderName::from_static(name),
                    HeaderValue::from_static(value),
                )
            })
            .collect()
    }

    #[test]
    fn only_a_page_of_another_origin_is_cross_origin() {
        let host = ("host", "canary:9787");
        for (cross, others) in [
            (false, &[][..]),
            (false, &[("origin", "http://canary:9787")]),
            (false, &[("origin", "https://CANARY:9787")]),
            (false, &[("sec-fetch-site", "same-origin")]),
            (false, &[("sec-fetch-site", "none")]),
            // A proxy has replaced the Host.
            (
                false,
                &[
                    ("sec-fetch-site", "same-origin"),
                    ("origin", "https://canary.example"),
                ],
            ),
            (true, &[("origin", "null")]),
            (true, &[("origin", "")]),
            (true, &[("origin", "http://evil.example")]),
            (true, &[("origin", "http://canary:9788")]),
            (true, &[("origin", "http://canary:9787.evil.example")]),
            (true, &[("sec-fetch-site", "cross-site")]),
            (true, &[("sec-fetch-site", "same-site")]),
            (true, &[("sec-fetch-site", "what")]),
            (
                true,
                &[
                    ("sec-fetch-site", "cross-site"),
                    ("origin", "http://canary:9787"),
                ],
            ),
        ] {
            let mut all = headers(others);
            all.extend(headers(&[host]));
            assert_eq!(is_cross_origin(&all), cross, "{others:?}");
        }
        assert!(is_cross_origin(&headers(&[("origin", "http://canary")])));
    }

    #[test]
    fn only_addresses_and_names_of_a_private_network_count_as_private() {
        for (host, private) in [
            ("10.0.0.1:9787", true),
            ("[2001:db8::1]:9787", true),
            ("canary", true),
            ("Canary.Monitoring.SVC:9787", true),
            ("canary.local.", true),
            ("canary.example", false),
            ("canary.svc.evil.example:9787", false),
            ("10.0.0.1.evil.example", false),
            ("lo cal", false),
        ] {
            let headers = headers(&[("host", host)]);
            assert_eq!(is_for_private_host(&headers), private, "{host}");
        }
        assert!(!is_for_private_host(&HeaderMap::new()));
    }

    #[test]
    fn what_people_said_needs_users_certificates_loopback_or_the_setting() {
        let none = Protection::default();
        // The permission to change something is no permission to read this.
        let lifecycle = Protection {
            enable_lifecycle: true,
            ..none
        };
        for closed in [none, lifecycle] {
            assert!(!closed.is_sensitive_allowed(), "{closed:?}");
            for way_out in [
                "basic_auth_users",
                "client_auth_type",
                "http.listen",
                "http.sensitive",
            ] {
                assert!(WITHHELD.contains(way_out), "{way_out}");
            }
        }
        for open in [
            Protection {
                has_users: true,
                ..none
            },
            Protection {
                has_client_certificates: true,
                ..none
            },
            Protection {
                on_loopback: true,
                ..none
            },
            Protection {
                sensitive: SensitiveAccess::Everyone,
                ..none
            },
        ] {
            assert!(open.is_sensitive_allowed(), "{open:?}");
        }
    }

    #[test]
    fn only_loopback_names_count_as_loopback() {
        for loopback in [
            "localhost",
            "LOCALHOST:9787",
            "127.0.0.1:1",
            "127.8.8.8",
            "[::1]",
            "[::1]:9787",
        ] {
            assert!(
                is_for_loopback(&headers(&[("host", loopback)])),
                "{loopback}"
            );
        }
        for other in [
            "",
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "10.0.0.1:9787",
            "[::2]",
            "::1",
            "0.0.0.0",
            "lo calhost",
        ] {
            assert!(!is_for_loopback(&headers(&[("host", other)])), "{other}");
        }
        assert!(is_for_loopback(&HeaderMap::new()));
        let mut two = headers(&[("host", "localhost")]);
        two.append(HOST, HeaderValue::from_static("evil.example"));
        assert!(!is_for_loopback(&two));
    }
}
