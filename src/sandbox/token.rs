//! Authentication of requests: access tokens, and their rejections with livekit-server's messages.

use http::StatusCode;
use livekit_api::access_token::{AccessTokenError, Claims, TokenVerifier};

/// A rejection before any handler: plain text, as livekit-server's middleware sends it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Denied {
    pub status: StatusCode,
    pub text: String,
}

fn unauthorized(text: impl Into<String>) -> Denied {
    Denied {
        status: StatusCode::UNAUTHORIZED,
        text: text.into(),
    }
}

/// The claims of a request's token; `None` for a request without one.
///
/// `authorization` is the header, `query` the `access_token` parameter, which counts only without the header.
pub(crate) fn authenticate(
    key: &str,
    secret: &str,
    authorization: Option<&str>,
    query: Option<&str>,
) -> Result<Option<Claims>, Denied> {
    let token = match authorization {
        Some(header) => header
            .strip_prefix("Bearer ")
            .ok_or_else(|| unauthorized("invalid authorization header. Must start with Bearer "))?,
        None => query.unwrap_or_default(),
    };
    if token.is_empty() {
        return Ok(None);
    }
    let unverified =
        Claims::from_unverified(token).map_err(|_| unauthorized("invalid authorization token"))?;
    if unverified.iss != key {
        return Err(unauthorized(format!("invalid API key: {}", unverified.iss)));
    }
    match TokenVerifier::with_api_key(key, secret).verify(token) {
        Ok(claims) => Ok(Some(claims)),
        // The real server quotes the whole token here. A client must not pass it on, and tests check that.
        Err(error) => Err(unauthorized(format!(
            "invalid token: {token}, error: {}",
            in_server_words(&error)
        ))),
    }
}

fn in_server_words(error: &AccessTokenError) -> String {
    match error.to_string() {
        _ if is(error, "ExpiredSignature") => {
            "token has invalid claims: token is expired".to_owned()
        }
        _ if is(error, "InvalidSignature") => {
            "token signature is invalid: signature is invalid".to_owned()
        }
        other => other,
    }
}

/// The verifier's error type is not exported; its source identifies the kind.
fn is(error: &AccessTokenError, kind: &str) -> bool {
    std::error::Error::source(error).is_some_and(|source| source.to_string() == kind)
}

/// Checks the claims that a join needs.
pub(crate) fn check_join(claims: Option<&Claims>) -> Result<&Claims, Denied> {
    let Some(claims) = claims else {
        return Err(unauthorized("no permissions to access the room"));
    };
    if !claims.video.room_join {
        return Err(unauthorized("permissions denied"));
    }
    if claims.sub.is_empty() {
        return Err(Denied {
            status: StatusCode::BAD_REQUEST,
            text: "identity cannot be empty".to_owned(),
        });
    }
    Ok(claims)
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::hmac;
    use base64::prelude::{BASE64_URL_SAFE_NO_PAD, Engine as _};
    use livekit_api::access_token::{AccessToken, VideoGrants};

    use super::*;

    const KEY: &str = "devkey";
    const SECRET: &str = "a secret of more than thirty-two bytes";

    fn token(secret: &str) -> AccessToken {
        AccessToken::with_api_key(KEY, secret)
            .with_identity("me")
            .with_grants(VideoGrants {
                room_join: true,
                room: "r".to_owned(),
                ..VideoGrants::default()
            })
    }

    fn denied(jwt: &str) -> String {
        authenticate(KEY, SECRET, None, Some(jwt)).unwrap_err().text
    }

    #[test]
    fn a_valid_token_is_accepted_from_header_and_query() {
        let jwt = token(SECRET).to_jwt().unwrap();
        let header = format!("Bearer {jwt}");
        let by_header = authenticate(KEY, SECRET, Some(&header), None).unwrap();
        let by_query = authenticate(KEY, SECRET, None, Some(&jwt)).unwrap();
        assert_eq!(by_header.unwrap().sub, "me");
        assert_eq!(check_join(by_query.as_ref()).unwrap().video.room, "r");
    }

    #[test]
    fn bad_tokens_are_rejected_with_the_real_servers_messages() {
        let forged = token("another secret of more than thirty-two bytes");
        assert!(denied(&forged.to_jwt().unwrap()).ends_with("signature is invalid"));
        let foreign = AccessToken::with_api_key("other", SECRET).to_jwt().unwrap();
        assert_eq!(denied(&foreign), "invalid API key: other");
        assert_eq!(denied("nonsense"), "invalid authorization token");
        let basic = authenticate(KEY, SECRET, Some("Basic x"), None).unwrap_err();
        assert!(basic.text.contains("Must start with Bearer"));
    }

    /// A token with a valid signature that expires at this Unix time. The SDK makes none that has already expired.
    fn expiring_at(exp: i64) -> String {
        let valid = token(SECRET).to_jwt().unwrap();
        let mut parts = valid.split('.');
        let (header, claims) = (parts.next().unwrap(), parts.next().unwrap());
        let claims = BASE64_URL_SAFE_NO_PAD.decode(claims).unwrap();
        let mut claims: serde_json::Value = serde_json::from_slice(&claims).unwrap();
        claims["nbf"] = (exp - 600).into();
        claims["exp"] = exp.into();
        let claims = BASE64_URL_SAFE_NO_PAD.encode(claims.to_string());
        let signed = format!("{header}.{claims}");
        let key = hmac::Key::new(hmac::HMAC_SHA256, SECRET.as_bytes());
        let signature = BASE64_URL_SAFE_NO_PAD.encode(hmac::sign(&key, signed.as_bytes()));
        format!("{signed}.{signature}")
    }

    #[test]
    fn a_token_is_refused_once_it_has_expired_by_more_than_a_minute() {
        let now = chrono::Utc::now().timestamp();
        // The verifier allows a minute of clock skew, as the real server does.
        let recent = expiring_at(now - 20);
        assert!(authenticate(KEY, SECRET, None, Some(&recent)).is_ok());
        let text = denied(&expiring_at(now - 120));
        assert!(
            text.ends_with("token has invalid claims: token is expired"),
            "{text}"
        );
    }

    #[test]
    fn a_join_needs_a_token_with_the_grant_and_an_identity() {
        assert_eq!(
            check_join(None).unwrap_err().text,
            "no permissions to access the room"
        );
        let listing = AccessToken::with_api_key(KEY, SECRET).to_jwt().unwrap();
        let claims = authenticate(KEY, SECRET, None, Some(&listing)).unwrap();
        assert_eq!(
            check_join(claims.as_ref()).unwrap_err().text,
            "permissions denied"
        );
    }
}
