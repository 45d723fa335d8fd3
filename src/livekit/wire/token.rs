//! Access tokens: short-lived, with no more grants than one call or one participant needs.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use livekit_api::access_token::{AccessToken, AccessTokenError, VideoGrants};
use livekit_protocol as proto;
use secrecy::{ExposeSecret, SecretString};

use crate::livekit::RoomName;

/// A token is used at once and the server looks at it only once, so its life is nothing but an allowance for clocks
/// that differ: this much, plus the server's own minute.
const TOKEN_TTL: Duration = Duration::from_mins(10);

/// The key pair that signs tokens; `Debug` does not show the secret.
#[derive(Clone)]
pub struct Keys {
    api_key: String,
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

/// What one call of the server API needs.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ApiPermission<'a> {
    /// Creating and deleting rooms.
    Create,
    List,
    /// Participants and dispatches of one room.
    Admin(&'a RoomName),
}

impl Keys {
    /// # Errors
    /// Either half is empty.
    pub fn new(
        api_key: impl Into<String>,
        api_secret: impl Into<SecretString>,
    ) -> Result<Self, TokenError> {
        let (api_key, api_secret) = (api_key.into(), api_secret.into());
        if api_key.is_empty() {
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

    /// A token that joins `room` as a standard participant: it may publish a microphone and subscribe, no more.
    ///
    /// With `room_config` the token may create the room as well: a server with `auto_create: false` refuses the join
    /// of a room that doesn't exist yet unless the token has that grant.
    ///
    /// # Errors
    /// [`TokenError::MissingIdentity`] where room or identity is empty.
    pub fn participant(
        &self,
        room: &RoomName,
        identity: &str,
        attributes: &BTreeMap<String, String>,
        room_config: Option<&proto::RoomConfiguration>,
    ) -> Result<SecretString, TokenError> {
        if room.0.is_empty() || identity.is_empty() {
            return Err(TokenError::MissingIdentity);
        }
        let grants = VideoGrants {
            room_join: true,
            room: room.0.clone(),
            room_create: room_config.is_some(),
            can_publish: Some(true),
            can_publish_sources: vec!["microphone".to_owned()],
            can_publish_data: Some(false),
            can_subscribe: Some(true),
            ..VideoGrants::default()
        };
        let mut token = self
            .token(grants)
            .with_identity(identity)
            .with_attributes(attributes.clone());
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
        AccessToken::with_api_key(&self.api_key, self.api_secret.expose_secret())
            .with_ttl(TOKEN_TTL)
            .with_grants(grants)
    }
}

fn sign(token: AccessToken) -> SecretString {
    let jwt: Result<String, AccessTokenError> = token.to_jwt();
    jwt.expect(
        "neither key nor secret, neither room nor identity is empty, and claims are plain data",
    )
    .into()
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys")
            .field("api_key", &self.api_key)
            .finish_non_exhaustive()
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
        let attributes = BTreeMap::from([("canary".to_owned(), "true".to_owned())]);
        verified(
            &keys()
                .participant(&room(), "echo", &attributes, config)
                .unwrap(),
        )
    }

    #[test]
    fn a_participant_may_join_its_room_publish_a_microphone_and_subscribe_and_no_more() {
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
        // An empty kind is a standard participant.
        assert_eq!(claims.kind, "");
        assert_eq!(claims.room_config, None);
    }

    #[test]
    fn room_settings_travel_in_the_token_with_the_grant_to_create_the_room() {
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
    fn a_token_expires_within_minutes() {
        let claims = participant(None);
        assert!(claims.exp - claims.nbf <= 600);
    }

    #[test]
    fn a_pair_with_an_empty_half_or_a_participant_without_a_name_gets_no_token() {
        assert_eq!(Keys::new("", SECRET).err(), Some(TokenError::EmptyKey));
        assert_eq!(
            Keys::new("some-key", "").err(),
            Some(TokenError::EmptySecret)
        );
        let nobody = keys().participant(&room(), "", &BTreeMap::new(), None);
        assert_eq!(nobody.err(), Some(TokenError::MissingIdentity));
    }

    #[test]
    fn debug_shows_the_key_and_not_the_secret() {
        let shown = format!("{:?}", keys());
        assert!(shown.contains("some-key"));
        assert!(!shown.contains(SECRET));
    }
}
