//! Access tokens: short-lived, with only the grants that one API call or one participant needs.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use livekit_api::access_token::{AccessToken, AccessTokenError, VideoGrants};
use livekit_protocol as proto;
use secrecy::{ExposeSecret, SecretString};

use crate::livekit::RoomName;

/// How long a token is valid. A token is used at once and the server checks it only once, so this merely allows for clocks
/// that differ. The server allows one more minute.
const TOKEN_TTL: Duration = Duration::from_mins(10);

/// The key pair that signs tokens; `Debug` shows neither of the two.
#[derive(Clone)]
pub struct Keys {
    api_key: SecretString,
    api_secret: SecretString,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("the API key is empty")]
    EmptyKey,
    #[error("the API secret is empty")]
    EmptySecret,
    #[error("a participant's token needs a room and an identity")]
    MissingIdentity,
}

/// A participant, as its token describes it to the server and to the others in the room.
#[derive(Debug, Clone, Default)]
pub(crate) struct TokenParticipant {
    pub(crate) identity: String,
    pub(crate) name: String,
    pub(crate) metadata: String,
    pub(crate) attributes: BTreeMap<String, String>,
}

/// What one call of the server API is allowed to do.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ApiPermission<'a> {
    /// Create and delete rooms.
    Create,
    List,
    /// Manage participants and dispatches of one room.
    Admin(&'a RoomName),
}

impl Keys {
    /// # Errors
    /// The key or the secret is empty.
    pub fn new(
        api_key: impl Into<SecretString>,
        api_secret: impl Into<SecretString>,
    ) -> Result<Self, TokenError> {
        let (api_key, api_secret) = (api_key.into(), api_secret.into());
        if api_key.expose_secret().is_empty() {
            return Err(TokenError::EmptyKey);
        }
        if api_secret.expose_secret().is_empty() {
            return Err(TokenError::EmptySecret);
        }
        Ok(Self {
            api_key,
            api_secret,
        })
    }

    /// A token to join `room` as a standard participant, which may publish a microphone and subscribe, and nothing else.
    ///
    /// With `room_config`, the token may create the room, too. A server with `auto_create: false` refuses to create a room
    /// on join unless the token has this grant.
    ///
    /// # Errors
    /// [`TokenError::MissingIdentity`] if room or identity is empty.
    pub(crate) fn participant(
        &self,
        room: &RoomName,
        participant: &TokenParticipant,
        room_config: Option<&proto::RoomConfiguration>,
    ) -> Result<SecretString, TokenError> {
        if room.0.is_empty() || participant.identity.is_empty() {
            return Err(TokenError::MissingIdentity);
        }
        let grants = VideoGrants {
            room_join: true,
            room: room.0.clone(),
            room_create: room_config.is_some(),
            can_publish: Some(true),
            can_publish_sources: vec!["microphone".to_owned()],
            // Unset would mean allowed.
            can_publish_data: Some(false),
            can_subscribe: Some(true),
            ..VideoGrants::default()
        };
        let mut token = self
            .token(grants)
            .with_identity(&participant.identity)
            .with_name(&participant.name)
            .with_metadata(&participant.metadata)
            .with_attributes(participant.attributes.clone());
        if let Some(config) = room_config {
            token = token.with_room_config(config.clone());
        }
        Ok(sign(token))
    }

    pub(crate) fn api(&self, permission: ApiPermission<'_>) -> SecretString {
        let grants = match permission {
            ApiPermission::Create => VideoGrants {
                room_create: true,
                ..VideoGrants::default()
            },
            ApiPermission::List => VideoGrants {
                room_list: true,
                ..VideoGrants::default()
            },
            ApiPermission::Admin(room) => VideoGrants {
                room_admin: true,
                room: room.0.clone(),
                ..VideoGrants::default()
            },
        };
        sign(self.token(grants))
    }

    fn token(&self, grants: VideoGrants) -> AccessToken {
        let (key, secret) = (&self.api_key, &self.api_secret);
        AccessToken::with_api_key(key.expose_secret(), secret.expose_secret())
            .with_ttl(TOKEN_TTL)
            .with_grants(grants)
    }
}

fn sign(token: AccessToken) -> SecretString {
    let jwt: Result<String, AccessTokenError> = token.to_jwt();
    jwt.expect("key, secret, room and identity are not empty, and claims are plain data")
        .into()
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use livekit_api::access_token::{Claims, TokenVerifier};

    use super::*;
    use crate::livekit::test_server::{SECRET, keys};

    fn verified(token: &SecretString) -> Claims {
        TokenVerifier::with_api_key("some-key", SECRET)
            .verify(token.expose_secret())
            .unwrap()
    }

    fn room() -> RoomName {
        RoomName("canary-1".to_owned())
    }

    fn participant(config: Option<&proto::RoomConfiguration>) -> Claims {
        let participant = TokenParticipant {
            identity: "echo".to_owned(),
            name: "Echo".to_owned(),
            metadata: "a caller".to_owned(),
            attributes: BTreeMap::from([("canary".to_owned(), "true".to_owned())]),
        };
        verified(&keys().participant(&room(), &participant, config).unwrap())
    }

    #[test]
    fn participant_may_only_join_its_room_publish_a_microphone_and_subscribe() {
        let claims = participant(None);
        assert_eq!(
            claims.video,
            VideoGrants {
                room_join: true,
                room: "canary-1".to_owned(),
                can_publish: Some(true),
                can_publish_sources: vec!["microphone".to_owned()],
                can_publish_data: Some(false),
                can_subscribe: Some(true),
                ..VideoGrants::default()
            }
        );
        assert_eq!(claims.sub, "echo");
        assert_eq!(claims.attributes["canary"], "true");
        assert_eq!((&*claims.name, &*claims.metadata), ("Echo", "a caller"));
        // An empty kind means a standard participant.
        assert_eq!(claims.kind, "");
        assert_eq!(claims.room_config, None);
    }

    #[test]
    fn token_with_room_settings_grants_the_creation_of_the_room() {
        let config = proto::RoomConfiguration {
            empty_timeout: 30,
            metadata: "canary".to_owned(),
            ..proto::RoomConfiguration::default()
        };
        let claims = participant(Some(&config));
        assert!(claims.video.room_create);
        assert_eq!(claims.room_config, Some(config));
    }

    #[test]
    fn token_expires_within_ten_minutes() {
        let claims = participant(None);
        assert!(claims.exp - claims.nbf <= 600);
    }

    #[test]
    fn empty_key_empty_secret_or_empty_identity_is_an_error() {
        assert_eq!(Keys::new("", SECRET).err(), Some(TokenError::EmptyKey));
        assert_eq!(
            Keys::new("some-key", "").err(),
            Some(TokenError::EmptySecret)
        );
        let unnamed = keys().participant(&room(), &TokenParticipant::default(), None);
        assert_eq!(unnamed.err(), Some(TokenError::MissingIdentity));
    }

    #[test]
    fn debug_shows_neither_the_key_nor_the_secret() {
        let shown = format!("{:?}", keys());
        assert!(!shown.contains("some-key"));
        assert!(!shown.contains(SECRET));
    }
}
