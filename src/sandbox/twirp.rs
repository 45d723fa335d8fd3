//! Twirp over HTTP: protobuf and JSON bodies, and errors with livekit-server's messages.

use std::convert::Infallible;

use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode, header};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use prost::Message;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub(crate) type Body = BoxBody<Bytes, Infallible>;

/// The encoding of a call's bodies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wire {
    Json,
    Protobuf,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TwirpFailure {
    pub status: StatusCode,
    pub code: &'static str,
    pub msg: String,
    /// For `bad_route`: the requested `METHOD path`.
    pub route: Option<String>,
}

impl TwirpFailure {
    fn new(status: StatusCode, code: &'static str, msg: impl Into<String>) -> Self {
        Self {
            status,
            code,
            msg: msg.into(),
            route: None,
        }
    }

    pub(crate) fn permission_denied() -> Self {
        Self::new(
            StatusCode::UNAUTHORIZED,
            "unauthenticated",
            "permissions denied",
        )
    }

    /// The internal bus wraps these errors, and its message reaches the client.
    pub(crate) fn not_found(what: &str) -> Self {
        let msg = format!("twirp error unknown: {what}");
        Self::new(StatusCode::NOT_FOUND, "not_found", msg)
    }

    /// No room of that name exists, so no node answers on the bus.
    pub(crate) fn no_room() -> Self {
        let msg = "twirp error unknown: no response from servers";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", msg)
    }

    pub(crate) fn exhausted(msg: &str) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "resource_exhausted", msg)
    }

    pub(crate) fn bad_route(method: &str, path: &str, msg: String) -> Self {
        Self {
            route: Some(format!("{method} {path}")),
            ..Self::new(StatusCode::NOT_FOUND, "bad_route", msg)
        }
    }

    fn malformed(wire: Wire) -> Self {
        let body = match wire {
            Wire::Json => "json",
            Wire::Protobuf => "protobuf",
        };
        let msg = format!("the {body} request could not be decoded");
        Self::new(StatusCode::BAD_REQUEST, "malformed", msg)
    }

    pub(crate) fn into_response(self) -> Response<Body> {
        let mut body = serde_json::json!({ "code": self.code, "msg": self.msg });
        if let Some(route) = self.route {
            body["meta"] = serde_json::json!({ "twirp_invalid_route": route });
        }
        response(self.status, "application/json", body.to_string())
    }
}

impl Wire {
    /// The encoding that the request's content type names.
    pub(crate) fn of(headers: &HeaderMap) -> Result<Self, String> {
        let value = headers.get(header::CONTENT_TYPE);
        let kind = value.and_then(|v| v.to_str().ok()).unwrap_or_default();
        match kind.split(';').next().map(str::trim) {
            Some("application/json") => Ok(Self::Json),
            Some("application/protobuf") => Ok(Self::Protobuf),
            _ => Err(format!("unexpected Content-Type: {kind:?}")),
        }
    }

    pub(crate) fn decode<T>(self, body: &[u8]) -> Result<T, TwirpFailure>
    where
        T: Message + Default + DeserializeOwned,
    {
        let decoded = match self {
            Self::Json => serde_json::from_slice(body).ok(),
            Self::Protobuf => T::decode(body).ok(),
        };
        decoded.ok_or_else(|| TwirpFailure::malformed(self))
    }

    pub(crate) fn encode<T: Message + Serialize>(self, answer: &T) -> Response<Body> {
        match self {
            Self::Json => match serde_json::to_vec(answer) {
                Ok(body) => response(StatusCode::OK, "application/json", body),
                Err(error) => response(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "text/plain",
                    error.to_string(),
                ),
            },
            Self::Protobuf => response(
                StatusCode::OK,
                "application/protobuf",
                answer.encode_to_vec(),
            ),
        }
    }
}

pub(crate) fn response(
    status: StatusCode,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> Response<Body> {
    let mut response = Response::new(Full::new(body.into()).boxed());
    *response.status_mut() = status;
    if !content_type.is_empty() {
        let value = http::HeaderValue::from_static(content_type);
        response.headers_mut().insert(header::CONTENT_TYPE, value);
    }
    response
}

#[cfg(test)]
mod tests {
    use livekit_protocol as proto;

    use super::*;

    #[test]
    fn both_spellings_of_a_json_field_are_read() {
        for body in [
            r#"{"name":"r","empty_timeout":7}"#,
            r#"{"name":"r","emptyTimeout":7}"#,
        ] {
            let request: proto::CreateRoomRequest = Wire::Json.decode(body.as_bytes()).unwrap();
            assert_eq!((request.name.as_str(), request.empty_timeout), ("r", 7));
        }
    }

    #[test]
    fn an_unreadable_body_is_malformed() {
        let error = Wire::Json
            .decode::<proto::CreateRoomRequest>(b"{\"nam\":}")
            .unwrap_err();
        assert_eq!((error.code, error.status.as_u16()), ("malformed", 400));
    }
}
