//! Who may ask: users with bcrypt hashes, checked off the async threads and not twice for the same password.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use aws_lc_rs::hmac;
use aws_lc_rs::rand::SystemRandom;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bcrypt::HashParts;
use http::HeaderValue;
use tokio::sync::Semaphore;
use tokio::task;

/// Names and bcrypt hashes. No `Debug`: a hash is half a password.
pub(super) struct Users {
    hashes: BTreeMap<String, String>,
    /// Checked where there is no such user, so that the time of an answer doesn't tell.
    decoy: String,
}

/// A hash above this cost takes longer to check than a request may last.
const HIGHEST_COST: u32 = 16;

impl Users {
    /// # Errors
    /// A hash that isn't bcrypt's, or that costs more than a request has time for; the text names the user alone.
    pub(super) fn new(hashes: BTreeMap<String, String>) -> Result<Self, String> {
        let mut highest = 0;
        for (name, hash) in &hashes {
            let parts: HashParts = hash.parse().map_err(|_| not_a_hash(name))?;
            let cost = parts.get_cost();
            // The crate would refuse a lower one at every request.
            if !(4..=HIGHEST_COST).contains(&cost) {
                return Err(format!(
                    "basic_auth_users: {name:?}: the hash has cost {cost}, and must have 4 to {HIGHEST_COST}; 10 is usual"
                ));
            }
            highest = highest.max(cost);
        }
        // The hash of no password that anyone knows: all its bits are zero, which is what a dot stands for.
        let decoy = format!("$2b${highest:02}${:.<53}", "");
        Ok(Self { hashes, decoy })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }
}

/// A password in plain text, most often: it is not repeated.
pub(super) fn not_a_hash(name: &str) -> String {
    format!("basic_auth_users: {name:?}: not a bcrypt hash; `htpasswd -nB USER` prints one")
}

/// How many checks run at once: each takes a core for tens of milliseconds, beside probes that keep time.
const CHECKS_AT_ONCE: usize = 2;
/// More than there are scrapers, each with one password.
const MOST_REMEMBERED: usize = 64;

/// Checks passwords, and remembers which were right: a scraper sends the same one every few seconds.
pub(super) struct Passwords {
    /// Of this process alone: what is remembered can't be tried out anywhere else.
    key: hmac::Key,
    right: Mutex<VecDeque<hmac::Tag>>,
    turns: Arc<Semaphore>,
}

impl Passwords {
    pub(super) fn new() -> Self {
        let key = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new())
            .expect("the system has random bytes: TLS and tokens need them as well");
        Self {
            key,
            right: Mutex::new(VecDeque::new()),
            turns: Arc::new(Semaphore::new(CHECKS_AT_ONCE)),
        }
    }

    /// Whether `authorization` names one of `users` with their password.
    pub(super) async fn admit(&self, users: &Users, authorization: Option<&HeaderValue>) -> bool {
        let Some((name, password)) = authorization.and_then(basic) else {
            return false;
        };
        let known = users.hashes.get(&name);
        let hash = known.unwrap_or(&users.decoy).clone();
        let tag = self.tag(&name, &password, &hash);
        if known.is_some() && self.remembers(&tag) {
            return true;
        }
        let right = self.check(password, hash).await && known.is_some();
        if right {
            self.remember(tag);
        }
        right
    }

    async fn check(&self, password: Vec<u8>, hash: String) -> bool {
        let turn = Arc::clone(&self.turns).acquire_owned().await;
        let turn = turn.expect("nobody closes the semaphore");
        let checked = task::spawn_blocking(move || {
            // Here, since a check goes on when the client has left.
            let _turn = turn;
            bcrypt::verify(password, &hash).is_ok_and(|right| right)
        });
        checked.await.unwrap_or(false)
    }

    /// Stands for a user, a password and the hash that it was checked against. A rotated hash is another one.
    fn tag(&self, name: &str, password: &[u8], hash: &str) -> hmac::Tag {
        let mut context = hmac::Context::with_key(&self.key);
        for part in [name.as_bytes(), password, hash.as_bytes()] {
            // The length keeps "ab" + "c" from being "a" + "bc".
            context.update(&part.len().to_be_bytes());
            context.update(part);
        }
        context.sign()
    }

    fn remembers(&self, tag: &hmac::Tag) -> bool {
        let right = self.right.lock().unwrap_or_else(PoisonError::into_inner);
        right.iter().any(|one| one.as_ref() == tag.as_ref())
    }

    fn remember(&self, tag: hmac::Tag) {
        let mut right = self.right.lock().unwrap_or_else(PoisonError::into_inner);
        // Two requests may have checked the same password at once.
        right.retain(|one| one.as_ref() != tag.as_ref());
        if right.len() == MOST_REMEMBERED {
            right.pop_front();
        }
        right.push_back(tag);
    }
}

/// Name and password of `Authorization: Basic …` (RFC 7617).
fn basic(header: &HeaderValue) -> Option<(String, Vec<u8>)> {
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
    async fn right_password_is_checked_once_and_then_remembered() {
        let passwords = Passwords::new();
        let users = users(&[("prometheus", "a:b")]);
        for _ in 0..3 {
            assert!(
                passwords
                    .admit(&users, Some(&header("prometheus", "a:b")))
                    .await
            );
        }
        assert_eq!(passwords.right.lock().unwrap().len(), 1);
    }

    #[tokio::test]
    async fn remembered_password_is_wrong_once_the_hash_has_changed() {
        let passwords = Passwords::new();
        let header = header("prometheus", "old");
        assert!(
            passwords
                .admit(&users(&[("prometheus", "old")]), Some(&header))
                .await
        );
        assert!(
            !passwords
                .admit(&users(&[("prometheus", "new")]), Some(&header))
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
            header("nobody", "right"),
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
            assert!(!passwords.admit(&users, Some(header)).await, "{header:?}");
        }
        assert!(!passwords.admit(&users, None).await);
        assert!(passwords.right.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn what_is_remembered_has_a_bound() {
        let passwords = Passwords::new();
        for number in 0..=MOST_REMEMBERED {
            passwords.remember(passwords.tag("user", &[], &number.to_string()));
        }
        assert_eq!(passwords.right.lock().unwrap().len(), MOST_REMEMBERED);
        assert!(!passwords.remembers(&passwords.tag("user", &[], "0")));
        assert!(passwords.remembers(&passwords.tag("user", &[], "1")));
    }

    #[test]
    fn unknown_user_costs_the_work_of_the_dearest_known_one() {
        let hashes = [("a", 4), ("b", 6)]
            .map(|(name, cost)| (name.to_owned(), bcrypt::hash("secret", cost).unwrap()));
        let users = Users::new(hashes.into()).unwrap();
        let decoy: HashParts = users.decoy.parse().unwrap();
        assert_eq!(decoy.get_cost(), 6);
        assert!(!bcrypt::verify("", &users.decoy).unwrap());
    }

    #[test]
    fn hash_that_is_none_is_refused_by_the_users_name_alone() {
        let hash = bcrypt::hash("secret", 4).unwrap();
        for (hash, said) in [
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
            assert!(error.contains(said) && !error.contains(&hash), "{error}");
        }
    }
}
