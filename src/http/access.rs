//! Requests that a browser was tricked into: none of them may steer the canary, nor read it past a loopback address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use http::header::{HOST, ORIGIN};
use http::uri::Authority;
use http::{HeaderMap, HeaderValue};

/// Whether a page of another origin sent this, as far as headers tell. A client that is no browser sends neither header.
///
/// `Sec-Fetch-Site` is the browser's own verdict, which a proxy's change of `Host` can't spoil; browsers leave it out on
/// plain HTTP, where `Origin` must be compared.
pub(super) fn is_cross_origin(headers: &HeaderMap) -> bool {
    if let Some(site) = headers.get("sec-fetch-site") {
        return site != "same-origin" && site != "none";
    }
    let Some(origin) = headers.get(ORIGIN) else {
        return false;
    };
    // The scheme isn't compared: behind a proxy that ends TLS it differs.
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

/// Whether the request was meant for this machine's loopback: a page whose name was rebound to 127.0.0.1 sends its own
/// name. Without `Host` it is no browser's.
pub(super) fn is_for_loopback(headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(HOST).iter();
    match (hosts.next(), hosts.next()) {
        (None, _) => true,
        (Some(host), None) => names_loopback(host),
        (Some(_), Some(_)) => false,
    }
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
    fn pages_of_other_origins_are_told_from_our_own_and_from_other_clients() {
        let host = ("host", "canary:9787");
        for (cross, others) in [
            (false, &[][..]),
            (false, &[("origin", "http://canary:9787")]),
            (false, &[("origin", "https://CANARY:9787")]),
            (false, &[("sec-fetch-site", "same-origin")]),
            (false, &[("sec-fetch-site", "none")]),
            // A proxy has put its own Host.
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
    fn only_loopback_names_are_for_loopback() {
        for ours in [
            "localhost",
            "LOCALHOST:9787",
            "127.0.0.1:1",
            "127.8.8.8",
            "[::1]",
            "[::1]:9787",
        ] {
            assert!(is_for_loopback(&headers(&[("host", ours)])), "{ours}");
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
