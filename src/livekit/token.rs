//! Access tokens: short-lived, with no more grants than one call or one participant needs.

use secrecy::SecretString;

/// The key pair that signs tokens; `Debug` shows neither half of the secret.
#[derive(Debug, Clone)]
pub struct Keys {
    pub api_key: String,
    pub api_secret: SecretString,
}
