//! Users with bcrypt hashes. Passwords are checked on blocking threads, and a correct one only once.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use aws_lc_rs::hmac;
use aws_lc_rs::rand::SystemRandom;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bcrypt::HashParts;
use http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, StatusCode};
use tokio::sync::Semaphore;
use tokio::task;

use super::response::HttpError;

/// User names and bcrypt hashes. Without `Debug`, because a hash makes it possible to guess the password.
pub(super) struct Users {
    hashes: BTreeMap<String, String>,
    /// Checked for an unknown user, so that the response time does not reveal which users exist.
    decoy: String,
}

/// Checking a hash above this cost takes longer than the timeout of a request.
const MAX_COST: u32 = 16;

impl Users {
    /// # Errors
    /// A hash that is not a bcrypt hash, or whose cost is out of range. The text has the user's name and no part of the hash.
    pub(super) fn new(hashes: BTreeMap<String, String>) -> Result<Self, String> {
        let mut max_cost = 0;
        for (name, hash) in &hashes {
            let parts: HashParts = hash.parse().map_err(|_| not_a_hash(name))?;
            let cost = parts.get_cost();
            // The bcrypt crate would refuse a lower cost at every request.
            if !(4..=MAX_COST).contains(&cost) {
                return Err(format!(
                    "basic_auth_users: {name:?}: the hash has cost {cost}, which must be from 4 to {MAX_COST}; 10 is usual"
                ));
            }
            max_cost = max_cost.max(cost);
        }
        // A dot is six zero bits. No known password has the hash of zeros.
        let decoy = format!("$2b${max_cost:02}${:.<53}", "");
        Ok(Self { hashes, decoy })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    pub(super) fn count(&self) -> usize {
        self.hashes.len()
    }
}

/// The error for a wrong hash. It does not repeat the value, which is usually a password in plain text.
pub(super) fn not_a_hash(name: &str) -> String {
    format!("basic_auth_users: {name:?}: not a bcrypt hash; `htpasswd -nB USER` prints one")
}

/// Password checks that run at once. Each takes a core for tens of milliseconds, which the running probes need as well.
const MAX_CONCURRENT_CHECKS: usize = 2;
/// Correct passwords that are remembered. An installation has fewer scrapers than this, each with one password.
const MAX_REMEMBERED: usize = 64;

/// Checks passwords and remembers the correct ones, because a scraper sends the same password every few seconds.
pub(super) struct Passwords {
    /// Random for this process, so that the remembered tags are useless in any other.
    key: hmac::Key,
    /// The oldest first.
    verified: Mutex<VecDeque<hmac::Tag>>,
    permits: Arc<Semaphore>,
}

impl Passwords {
    pub(super) fn new() -> Self {
        let key = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new())
            .expect("TLS and tokens need the system's random bytes as well");
        Self {
            key,
            verified: Mutex::new(VecDeque::new()),
            permits: Arc::new(Semaphore::new(MAX_CONCURRENT_CHECKS)),
        }
    }

    /// Checks that the request names one of `users` with the user's password.
    ///
    /// # Errors
    /// 401 with a challenge, which makes a browser ask for a user name and a password.
    pub(super) async fn authenticate(
        &self,
        users: &Users,
        headers: &HeaderMap,
    ) -> Result<(), HttpError> {
        let authorization = headers.get(AUTHORIZATION);
        if self.accepts(users, authorization).await {
            return Ok(());
        }
        let text = match authorization {
            None => "this path requires a user name and a password",
            Some(_) => "wrong user name or password (bcrypt takes at most 71 bytes)",
        };
        let challenge =
            HeaderValue::from_static("Basic realm=\"livekit-canary\", charset=\"UTF-8\"");
        Err(HttpError::new(StatusCode::UNAUTHORIZED, text).with(WWW_AUTHENTICATE, challenge))
    }

    async fn accepts(&self, users: &Users, authorization: Option<&HeaderValue>) -> bool {
        let Some((name, password)) = authorization.and_then(basic_credentials) else {
            return false;
        };
        let known = users.hashes.get(&name);
        let hash = known.unwrap_or(&users.decoy).clone();
        let tag = self.tag(&name, &password, &hash);
        if known.is_some() && self.remembers(&tag) {
            return true;
        }
        // An unknown user's password is checked as well: see `Users::decoy`.
        let correct = self.check(password, hash).await && known.is_some();
        if correct {
            self.remember(tag);
        }
        correct
    }

    async fn check(&self, password: Vec<u8>, hash: String) -> bool {
        let permit = Arc::clone(&self.permits).acquire_owned().await;
        let permit = permit.expect("the semaphore is never closed");
        let checked = task::spawn_blocking(move || {
            // Held by the thread, because the check goes on if the client disconnects.
            let _permit = permit;
            // bcrypt compares the first 72 bytes only: a longer password is refused, not cut.
            bcrypt::non_truncating_verify(password, &hash).is_ok_and(|correct| correct)
        });
        checked.await.unwrap_or(false)
    }

    /// Identifies a user, a password and the hash that it was checked against. After a change of the hash the tag differs.
    fn tag(&self, name: &str, password: &[u8], hash: &str) -> hmac::Tag {
        let mut context = hmac::Context::with_key(&self.key);
        for part in [name.as_bytes(), password, hash.as_bytes()] {
            // The length distinguishes "ab" + "c" from "a" + "bc".
            context.update(&part.len().to_be_bytes());
            context.update(part);
        }
        context.sign()
    }

    fn remembers(&self, tag: &hmac::Tag) -> bool {
        let verified = self.verified.lock();
        let verified = verified.unwrap_or_else(PoisonError::into_inner);
        verified.iter().any(|one| one.as_ref() == tag.as_ref())
    }

    fn remember(&self, tag: hmac::Tag) {
        let verified = self.verified.lock();
        let mut verified = verified.unwrap_or_else(PoisonError::into_inner);
        // Two requests may have checked the same password at the same time.
        verified.retain(|one| one.as_ref() != tag.as_ref());
        if verified.len() == MAX_REMEMBERED {
            verified.pop_front();
        }
        verified.push_back(tag);
    }
}

/// User name and password of `Authorization: Basic …` (RFC 7617).
fn basic_credentials(header: &HeaderValue) -> Option<(String, Vec<u8>)> {
    let (scheme, credentials) = header.to_str().ok()?.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let mut decoded = BASE64_STANDARD.decode(credentials.trim()).ok()?;
    let colon = decoded.iter().position(|byte| *byte == b':')?;
    let password = decoded.split_off(colon + 1);
    decoded.pop();
    Some((String::from_utf8(decoded).ok()?, password))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(name: &str, password: &str) -> HeaderValue {
        let credentials = BASE64_STANDARD.encode(format!("{name}:{password}"));
        HeaderValue::try_from(format!("Basic {credentials}")).unwrap()
    }

    fn users(of: &[(&str, &str)]) -> Users {
        let hashes = of.iter().map(|(name, password)| {
            let hash = bcrypt::hash(password, 4).unwrap();
            ((*name).to_owned(), hash)
        });
        Users::new(hashes.collect()).unwrap()
    }

    #[tokio::test]
    async fn correct_password_is_checked_once_and_then_remembered() {
        let passwords = Passwords::new();
        let users = users(&[("prometheus", "a:b")]);
        for _ in 0..3 {
            assert!(
                passwords
                    .accepts(&users, Some(&header("prometheus", "a:b")))
                    .await
            );
        }
        assert_eq!(passwords.verified.lock().unwrap().len(), 1);
    }

    /// bcrypt would cut it to 72 bytes, and accept every password with the same beginning.
    #[tokio::test]
    async fn password_that_is_too_long_for_bcrypt_is_refused() {
        let long = "x".repeat(80);
        let users = users(&[("prometheus", &long)]);
        let other = format!("{}{}", "x".repeat(72), "y");
        for password in [&long, &other] {
            let header = header("prometheus", password);
            assert!(!Passwords::new().accepts(&users, Some(&header)).await);
        }
    }

    #[tokio::test]
    async fn remembered_password_is_refused_after_its_hash_has_changed() {
        let passwords = Passwords::new();
        let header = header("prometheus", "old");
        assert!(
            passwords
                .accepts(&users(&[("prometheus", "old")]), Some(&header))
                .await
        );
        assert!(
            !passwords
                .accepts(&users(&[("prometheus", "new")]), Some(&header))
                .await
        );
    }

    #[tokio::test]
    async fn wrong_names_passwords_and_headers_are_refused_and_not_remembered() {
        let passwords = Passwords::new();
        let users = users(&[("prometheus", "right")]);
        let mut headers = vec![
            header("prometheus", "wrong"),
            header("prometheus", ""),
            header("Prometheus", "right"),
            header("unknown", "right"),
        ];
        headers.extend(
            [
                "Basic",
                "Basic %%%",
                "Basic cHJvbWV0aGV1cw==",
                "Bearer cHJvbWV0aGV1czpyaWdodA==",
            ]
            .map(HeaderValue::from_static),
        );
        for header in &headers {
            assert!(!passwords.accepts(&users, Some(header)).await, "{header:?}");
        }
        assert!(!passwords.accepts(&users, None).await);
        assert!(passwords.verified.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn number_of_remembered_passwords_is_bounded() {
        let passwords = Passwords::new();
        for number in 0..=MAX_REMEMBERED {
            passwords.remember(passwords.tag("user", &[], &number.to_string()));
        }
        assert_eq!(passwords.verified.lock().unwrap().len(), MAX_REMEMBERED);
        assert!(!passwords.remembers(&passwords.tag("user", &[], "0")));
        assert!(passwords.remembers(&passwords.tag("user", &[], "1")));
    }

    #[test]
    fn unknown_user_takes_as_long_to_check_as_the_most_expensive_known_one() {
        let hashes = [("a", 4), ("b", 6)]
            .map(|(name, cost)| (name.to_owned(), bcrypt::hash("secret", cost).unwrap()));
        let users = Users::new(hashes.into()).unwrap();
        let decoy: HashParts = users.decoy.parse().unwrap();
        assert_eq!(decoy.get_cost(), 6);
        assert!(!bcrypt::verify("", &users.decoy).unwrap());
    }

    #[test]
    fn wrong_hash_is_refused_with_the_name_of_the_user_and_without_the_hash() {
        let hash = bcrypt::hash("secret", 4).unwrap();
        for (hash, expected) in [
            ("hunter2".to_owned(), "not a bcrypt hash"),
            (hash.replacen("$04$", "$17$", 1), "cost 17"),
            (hash.replacen("$04$", "$03$", 1), "cost 3"),
        ] {
            let error = Users::new([("alice".to_owned(), hash.clone())].into())
                .err()
                .unwrap();
            assert!(
                error.starts_with("basic_auth_users: \"alice\": "),
                "{error}"
            );
            assert!(
                error.contains(expected) && !error.contains(&hash),
                "{error}"
            );
        }
    }
}
